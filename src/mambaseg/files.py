"""Files that are written whole or not at all, and a disk that is full, said in words."""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from mambaseg.errors import UserError

_REMEDIES = {
    errno.ENOSPC: "Free some space there",
    errno.EDQUOT: "Free some space there (your quota is used up)",
    errno.EACCES: "Give yourself the right to write there",
    errno.EPERM: "Give yourself the right to write there",
    errno.EROFS: "Mount it for writing",
}


@contextlib.contextmanager
def writing(path: Path, *, otherwise: str) -> Iterator[None]:
    """Explains what keeps the block from writing.

    Args:
        path: what is written, named in the message.
        otherwise: what else the user can do: `choose another folder with outputs=...`.

    Raises:
        UserError: for an `OSError` of the block.
    """
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "Look after the disk")
        raise UserError(
            f"cannot write {path}: {error.strerror or error}. {remedy}, or {otherwise}"
        ) from error


@contextlib.contextmanager
def whole_file(path: Path, *, otherwise: str) -> Iterator[Path]:
    """Gives a temporary name beside `path`, which becomes `path` when the block ends well.

    When it does not, what stood at `path` stands there still and nothing else is left. Folders are
    made.

    Raises:
        UserError: the disk is full, or the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path, otherwise=otherwise):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Removes unfinished folders that match, left by processes killed more than a day ago."""
    for left in folder.glob(pattern):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 24 * 3600:
                shutil.rmtree(left, ignore_errors=True)
