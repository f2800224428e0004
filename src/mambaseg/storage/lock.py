"""One job at a time per run folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import errno
import logging
import os
import platform
from pathlib import Path

from filelock import FileLock, Timeout

from mambaseg.errors import UserError

FOLDER = ".locks"
# a file system without locks, or a network one whose server gives none
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)

log = logging.getLogger(__name__)


class RunLock:
    """The right to write a run folder.

    The operating system holds it (flock, over NFS a lock of the server): a process that is killed
    leaves nothing to clean up, and processes it has forked or started do not keep it. It is a file
    in `.locks/` beside the run folders, since a run folder may be moved aside while it is held. The
    file names process and machine while the lock is held, for the message; afterwards it is empty.

    Args:
        folder: the run folder; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder.parent / FOLDER / folder.name
        self._lock: FileLock | None = None

    def acquire(self) -> None:
        """Takes the lock, or refuses at once.

        On a file system that has no locks it only says so.

        Raises:
            UserError: another job has it, or the place cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(str(self.path), timeout=0)
            lock.acquire()
        except Timeout:
            raise UserError(self._refusal()) from None
        except NotImplementedError:
            self._go_without()
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise UserError(
                    f"cannot write {self.path}: {error.strerror}. Free some space there, give "
                    "yourself the right to write, or choose another folder with outputs=..."
                ) from error
            self._go_without()
        else:
            self._lock = lock
            self._note(f"{os.getpid()} {platform.node()}\n")

    @property
    def held(self) -> bool:
        """Whether this job has the lock; False after `acquire` where there are no locks."""
        return self._lock is not None

    def release(self) -> None:
        """Gives the lock back; does nothing where it is not held."""
        if self._lock is not None:
            self._note("")
            self._lock.release()
            self._lock = None

    def _note(self, text: str) -> None:
        try:
            self.path.write_text(text, encoding="utf-8")
        except OSError:  # a full disk: the lock holds without a name in it
            log.debug("cannot note the owner in %s", self.path)

    def _refusal(self) -> str:
        try:
            process, host = self.path.read_text(encoding="utf-8").split()
            owner, end = f"process {process} on {host}", f"end it (kill {process} on {host})"
        except (OSError, ValueError):
            owner, end = "another process", "end it"
        return (
            f"{self.folder} is being written by {owner}: two jobs must not share a run folder. "
            f"Wait until that one has ended, or {end}; the same command then returns its result "
            "or goes on from its last checkpoint."
        )

    def _go_without(self) -> None:
        log.warning(
            "%s is on a file system without locks: nothing stops a second job from writing %s. "
            "Do not run one command twice at the same time.", self.path.parent, self.folder,
        )  # fmt: skip
