"""One job at a time per run folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from mambaseg.errors import UserError
from mambaseg.storage.files import writing

# a file system without locks, or a network one whose server gives none
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
log = logging.getLogger(__name__)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Lets one job at a time through the block, by the lock file `path`; the others wait.

    Raises:
        UserError: the file cannot be written.
    """
    lock = FileLock(str(path), fallback_to_soft=False)
    with writing(path):
        _take(lock, "jobs side by side do not wait for one another.")
    try:
        yield
    finally:
        lock.release()


def _take(lock: BaseFileLock, otherwise: str) -> None:
    """Takes a lock; warns what to expect `otherwise` where the file system has none."""
    folder = Path(lock.lock_file).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("%s is on a file system without locks: %s", folder, otherwise)


class RunLock:
    """The right to write a run folder, which need not exist.

    The operating system holds it (flock, over NFS a lock of the server): a killed process leaves
    nothing to clean up, and the processes it has started do not keep it. The lock is a file in
    `.locks/` beside the run folders, because a locked run folder may be moved aside. The file names
    process and machine while the lock is held.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder.parent / ".locks" / folder.name
        self._lock = FileLock(str(self.path), timeout=0, fallback_to_soft=False)

    def acquire(self) -> None:
        """Takes the lock, or refuses at once by a UserError; warns where there are no locks."""
        with writing(self.path):
            try:
                _take(self._lock, f"nothing stops a second job from writing {self.folder}. Do not "
                      "run one command twice at the same time.")  # fmt: skip
            except Timeout:
                raise UserError(self._refusal()) from None
        if self.held:
            self._note(f"{os.getpid()} {platform.node()}\n")

    @property
    def held(self) -> bool:
        """Whether this job has the lock; False after `acquire` where there are no locks."""
        return self._lock.is_locked

    def release(self) -> None:
        """Gives the lock back; does nothing where it is not held."""
        if self.held:
            self._note("")
            self._lock.release()

    def _note(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name in it
            self.path.write_text(text, encoding="utf-8")

    def _refusal(self) -> str:
        try:
            process, host = self.path.read_text(encoding="utf-8").split()
            owner, end = f"process {process} on {host}", f"end it (kill {process} on {host})"
        except (OSError, ValueError):
            owner, end = "another process", "end it"
        return (
            f"{self.folder} is being written by {owner}: two jobs must not share a run folder. "
            f"Wait until that one has ended, or {end}; the same command then returns its result "
            "or resumes from its last checkpoint."
        )
