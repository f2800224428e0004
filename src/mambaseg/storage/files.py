"""Files written whole or not at all; what to do about a full disk or an unusable home folder."""

import atexit
import contextlib
import csv
import errno
import io
import logging
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mambaseg.errors import UserError

_FREE, _RIGHT = "Free some space there", "Give yourself the right to write there"
_REMEDIES = {
    errno.ENOSPC: _FREE,
    errno.EDQUOT: f"{_FREE} (your quota is used up)",
    errno.EACCES: _RIGHT,
    errno.EPERM: _RIGHT,
    errno.EROFS: "Mount it for writing",
}
_OUTPUTS = "choose another folder with outputs=..."
_CACHES = ("XDG_CACHE_HOME", "MPLCONFIGDIR", "NUMBA_CACHE_DIR", "TRITON_HOME",
           "TORCHINDUCTOR_CACHE_DIR")  # fmt: skip
_PACKAGE = Path(__file__).resolve().parents[1]
log = logging.getLogger(__name__)


def conf_folder() -> Path:
    """The configs: `conf/` of a checkout, which a wheel holds inside of the package."""
    installed = _PACKAGE / "conf"
    return installed if installed.is_dir() else _PACKAGE.parents[1] / "conf"


def no_room(error: BaseException) -> bool:
    """Whether an error of `writing` says that the whole disk takes nothing more."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in full


@contextlib.contextmanager
def writing(path: Path, *, otherwise: str = _OUTPUTS) -> Iterator[None]:
    """Explains an `OSError` of the block, which writes `path`, in a UserError.

    `otherwise` is what else the user can do.
    """
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "Check the disk")
        raise UserError(
            f"cannot write {path}: {error.strerror or error}. {remedy}, or {otherwise}"
        ) from error


@contextlib.contextmanager
def whole_file(path: Path, *, otherwise: str = _OUTPUTS, durable: bool = False) -> Iterator[Path]:
    """Gives a temporary name beside `path`, which becomes `path` when the block succeeds.

    When it fails, with a UserError for an `OSError`, an earlier file is untouched and nothing else
    is left. Missing folders are created. With `durable` the file then survives a power cut.
    """
    temporary = temporary_name(path)
    with writing(path, otherwise=otherwise):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if durable:
                synchronise(temporary)
            temporary.replace(path)
            if durable and os.name == "posix":
                with contextlib.suppress(OSError):  # some network file systems refuse for folders
                    synchronise(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that no other process has, of any machine or container."""
    return path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex[:8]}.tmp")  # at most 255 bytes


def write_whole(
    path: Path, content: str | bytes, *, otherwise: str = _OUTPUTS, durable: bool = False
) -> None:
    """Writes a file whole or not at all, like `whole_file`; text as UTF-8."""
    with whole_file(path, otherwise=otherwise, durable=durable) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a CSV file with a heading, whole or not at all."""
    whole = whole_file(path)
    with whole as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)


def synchronise(path: Path) -> None:
    """Returns once a file's content, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows: only then
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Removes unfinished folders that match, in which nothing was written for more than a day."""
    for left in folder.glob(pattern):
        with contextlib.suppress(OSError):  # such as a file that is gone: somebody is at work
            written = max(one.stat().st_mtime for one in (left, *left.rglob("*")))
            if time.time() - written > 24 * 3600:
                shutil.rmtree(left, ignore_errors=True)


def home_file(name: str) -> Path | None:
    """A file in the home folder; None where this user has no home folder."""
    try:
        return Path("~", name).expanduser()
    except RuntimeError:  # neither HOME nor an entry in the list of users
        return None


def keep_caches() -> None:
    """Redirects the caches of matplotlib, numba, Triton and PyTorch if home takes no files.

    They then lie in a temporary folder until the end of the process. Variables that are set stay.
    """
    if all(name in os.environ for name in _CACHES) or _home_takes_files():
        return
    folder = tempfile.mkdtemp(prefix="mambaseg-caches-")  # a name that nobody can prepare
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not when a forked worker ends
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    for name in _CACHES:
        if name not in os.environ:
            os.environ[name] = str(Path(folder, name.lower()))
            Path(os.environ[name]).mkdir()
    if home_file("") is None:
        os.environ["HOME"] = folder  # W&B asks for one
    log.info("The home folder is not writable: caches go to %s for this run", folder)


def _home_takes_files() -> bool:
    home = home_file("")
    if home is None:
        return False
    cache = home / ".cache"
    try:
        with tempfile.TemporaryFile(dir=cache if cache.is_dir() else home) as file:
            file.write(bytes(1 << 16))  # a full disk still takes an empty file
    except OSError:
        return False
    return True


def print_any_name() -> None:
    """Lets file names that are not UTF-8 be printed and logged, with escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
