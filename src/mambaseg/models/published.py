"""Pretrained weights that others have published: which file a network takes, and how it gets here.

`published.json` lists them: address, licence and, where their publisher states them or somebody
has seen them, size and SHA-256. A file that is there already is taken as it is.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from mambaseg.errors import UserError
from mambaseg.models.pretrained import read_weights

LIST = Path(__file__).with_name("published.json")
BLOCK = 1 << 20
TIMEOUT = 30.0  # s without a byte
Report = Callable[[int, int | None], None]  # bytes that are here, and of how many
log = logging.getLogger(__name__)


def published_weights(backbone: str) -> dict[str, Any]:
    """The entry of the list for a network's backbone (`Pretrained.backbone`, which names a file).

    Raises:
        UserError: nobody has published such a file, or the list does not know it.
    """
    for entry in json.loads(LIST.read_text("utf-8")):
        if entry["file"] in backbone:
            return dict(entry)
    raise UserError(
        f"model.pretrained=auto: no file is known for this network, which takes {backbone}. Name "
        "one: model.pretrained=<path>"
    )


def fetched(entry: dict[str, Any], folder: Path, report: Report | None = None) -> Path:
    """The file of an entry in a folder, fetched into it if it is not there.

    An interrupted download resumes. The file appears under its name when it has the size that the
    server states and, where the list knows them, its size and hash; if nobody states a size, when
    it opens as weights. Several processes wait for one of them.

    Raises:
        UserError: it cannot be fetched, breaks off, or is not the file that the list describes.
    """
    path = folder / entry["file"]
    if path.is_file():
        return path
    part = folder / f".part-{entry['file']}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{entry['file']}.lock"):
            if path.is_file():
                return path
            total = _fetch(entry["url"], part, report)
            digest = _checked(entry, part, total)
            part.replace(path)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"model.pretrained=auto: {path} is not there and cannot be fetched ({reason}). Get it "
            f"from {entry['url']} ({entry['what']}, {entry['license']}) and put it there; the same "
            "command resumes what has been fetched"
        ) from error
    log.info("fetched %s (%s, %s), sha256 %s", path, entry["what"], entry["license"], digest)
    return path


def _fetch(url: str, part: Path, report: Report | None) -> int | None:
    """Appends what is missing to `part`; the size that the server states."""
    here = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={here}-"} if here else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        if error.headers.get("Content-Range") == f"bytes */{here}":
            return here  # it is whole already
        part.unlink()  # something else
        return _fetch(url, part, report)
    with answer:
        if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
            here = 0  # the server begins anew
        length = answer.headers.get("Content-Length")
        total = here + int(length) if length else None
        with part.open("ab" if here else "wb") as file:
            while block := answer.read(BLOCK):
                file.write(block)
                here += len(block)
                if report:
                    report(here, total)
    return total


def _checked(entry: dict[str, Any], part: Path, total: int | None) -> str:
    """SHA-256 of what was fetched."""
    size = part.stat().st_size
    if total is not None and size < total:
        raise OSError(f"it broke off after {size:,} of {total:,} bytes")
    with part.open("rb") as file:
        page = file.read(64).lstrip().startswith(b"<")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if page:
        part.unlink()
        raise OSError("a web page came in place of the file")
    if total is None and entry["bytes"] is None and entry["sha256"] is None:
        try:
            read_weights(part)
        except UserError as error:
            part.unlink()
            raise OSError("what came does not open as weights; it may have broken off") from error
    for name, wanted, found in (
        ("bytes", entry["bytes"], size),
        ("sha256", entry["sha256"], digest),
    ):
        if wanted is not None and wanted != found:
            part.unlink()
            raise UserError(
                f"model.pretrained=auto: what {entry['url']} gives is not the file that is known "
                f"({name} {found} instead of {wanted}); nothing was kept"
            )
    return digest
