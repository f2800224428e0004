"""The one exception that speaks to the user, and what may fail without ending a run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, in which file, and what to do.

    Entry scripts print the message alone and exit with a non-zero status; every other exception is
    a bug of ours and keeps its stack trace.
    """


class NotInstalledError(UserError):
    """An optional package is missing. A sweep skips such a job and goes on."""


def counted(count: int, noun: str) -> str:
    """`1 case`, `2,000 cases`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no more memory, of a GPU or of the machine."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


@contextmanager
def within_memory(remedy: str) -> Iterator[None]:
    """Says the remedy where the block is `out_of_memory`.

    Raises:
        UserError: it is.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"out of memory: {error}\n{remedy}") from error


@contextmanager
def optional(what: str) -> Iterator[None]:
    """Lets the block fail with a warning: for what only shows a result that is there already.

    Args:
        what: the subject of the warning, such as `the figures`.
    """
    try:
        yield
    except Exception as error:  # whatever a library raises
        log.warning("%s failed (%s: %s); the run goes on", what, type(error).__name__, error)
        log.debug("%s", what, exc_info=True)
