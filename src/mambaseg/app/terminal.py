"""What a command says in the terminal, through the console that also draws bars and tables."""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)


def announce_synthetic(data: Iterable[Any]) -> None:
    """Says, once for each of these configs of data, that they are computed and what to do."""
    said = {one.title: one.get("instead") or "" for one in data if one.get("synthetic")}
    for title, instead in said.items():
        log.warning("*** %s *** %s", title, instead)


def outlive_closed_pipe() -> None:
    """Lets a command go on in silence where nobody reads any more: rich would end it."""
    from rich.console import Console as RichConsole

    def go_on(console: RichConsole) -> None:
        console.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        log.warning("nobody reads the output any more; the command goes on without")

    RichConsole.on_broken_pipe = go_on  # type: ignore[assignment, method-assign]


@contextmanager
def download(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar in a terminal, and nothing elsewhere, that follows a download: bytes here, of all."""
    from rich import get_console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = get_console()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(name, start=False, total=None)

        def report(here: int, total: int | None) -> None:
            bar.start_task(task)
            bar.update(task, completed=here, total=total)

        yield report


class Console(logging.Handler):
    """Writes each line above a bar that is being drawn; to a pipe or a file as it is.

    The console is rich's own (`rich.get_console`), which writes to the present `sys.stdout`. Long
    lines are left to the terminal to wrap, so that a path can be copied from it.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a line."""
        from rich import get_console  # when something is said: a refused command imports little

        try:
            get_console().print(
                self.format(record), soft_wrap=True, markup=False, highlight=False, emoji=False
            )
        except Exception:  # as logging's own handlers
            self.handleError(record)
