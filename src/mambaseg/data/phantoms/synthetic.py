"""A folder of computed data: written once, whole or not at all, and recognised later."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from mambaseg.errors import UserError
from mambaseg.storage.files import remove_abandoned, writing
from mambaseg.storage.untrusted import read_json

Parameters = Mapping[str, object]

NOTE = "SYNTHETIC.md"
"""The file that says so in a folder of computed data."""

_log = logging.getLogger(__name__)


def write_once(
    root: Path,
    parameters: Parameters,
    write: Callable[[Path], None],
    *,
    note: str,
    manifest: str,
    what: str,
) -> Path:
    """Write a synthetic data set, or return at once when it is there already.

    The folder appears complete or not at all, also when several processes write it at a time.
    `write` fills an empty folder; the content depends on nothing but `parameters`, which the file
    `manifest` keeps with the size of every file. `note` is the text of `NOTE` in it, `what`
    is for the log, such as "30 patients". `UserError` where `root` holds something else.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        return _checked(root, parameters, manifest)
    _log.info("Writing the synthetic phantom (%s) to %s", what, root)
    with writing(root, otherwise="choose another folder with data.root=..."):
        root.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(root.parent, f".{root.name}.partial-*")
        work = Path(tempfile.mkdtemp(prefix=f".{root.name}.partial-", dir=root.parent))
        try:
            write(work)
            _seal(work, parameters, note, manifest)
            work.chmod(0o755)  # mkdtemp makes private folders
            try:
                work.rename(root)  # also over an empty folder, but over no other
            except OSError:
                if not root.is_dir():
                    raise
                _checked(root, parameters, manifest)  # another process has just written it
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return root


def _checked(root: Path, parameters: Parameters, manifest: str) -> Path:
    """The existing folder, when it is the phantom of these parameters and complete."""
    remedy = "Choose another folder with data.root=..., or move this one away."
    try:
        found = read_json(root / manifest)
        files = dict(found.pop("files"))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise UserError(
            f"data.root={root} holds other files (no readable {manifest}), so no synthetic data "
            "was written there. To train on them name the data set: data=acdc (or nnunet, folder). "
            "The synthetic phantom goes elsewhere with another data.root=..."
        ) from None
    pairs = [f"{k} {found.get(k)} ≠ {v}" for k, v in parameters.items() if found.get(k) != v]
    if pairs:
        raise UserError(
            f"The phantom in {root} was made with other settings ({', '.join(pairs)}). {remedy}"
        )
    damaged = [
        name
        for name, size in files.items()
        if not (root / name).is_file() or (root / name).stat().st_size != size
    ]
    if damaged:
        raise UserError(
            f"The phantom in {root} is damaged: {len(damaged)} of {len(files)} files are missing "
            f"or changed, {damaged[0]} first. {remedy}"
        )
    return root


def _seal(root: Path, parameters: Parameters, note: str, manifest: str) -> None:
    """Add the note and the manifest; the manifest last."""
    (root / NOTE).write_text(note, encoding="utf-8")
    written = sorted(path for path in root.rglob("*") if path.is_file())
    files = {path.relative_to(root).as_posix(): path.stat().st_size for path in written}
    text = json.dumps({**parameters, "files": files}, indent=1)
    (root / manifest).write_text(text + "\n", encoding="utf-8")
