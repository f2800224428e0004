"""What is wrong with a data set, as lines of a report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mambaseg.data.case import Case
from mambaseg.data.validation import DataError
from mambaseg.storage.untrusted import readable

Level = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Problem:
    """One line of the report: how bad, where, what, and what to do about it."""

    level: Level
    where: str
    problem: str
    remedy: str

    @classmethod
    def from_error(cls, where: str, error: DataError, root: Path) -> Problem:
        """An exception as a line; files are named relative to the data set."""
        problem = error.problem
        if error.path is not None and error.path != root:
            inside = error.path.is_relative_to(root)
            path = error.path.relative_to(root) if inside else error.path
            problem = f"{readable(str(path))}: {problem}"
        return cls("error", where, problem, error.remedy)


def whose(error: DataError, patient: re.Pattern[str] = re.compile(r"patient\d+")) -> str:
    """The patient that a problem of a survey is about, or the file."""
    told, in_path = patient.findall(error.problem), patient.findall(str(error.path))
    name = error.path.name if error.path is not None else "?"
    return next(iter([*told, *reversed(in_path)]), name)


def cases_or_first_problem(
    cases: Sequence[Case], problems: Sequence[DataError], root: Path
) -> list[Case]:
    """What a survey found, for training and scoring, which stop at the first problem.

    Raises:
        UserError: there is one.
    """
    if not problems:
        return list(cases)
    first, others = problems[0], len(problems) - 1
    more = f"({others} more like this: make data-check DATA={root} lists all.)"
    remedy = f"{first.remedy} {more}" if others else first.remedy
    raise DataError(first.problem, first.path, remedy)


def counted(count: int, noun: str) -> str:
    """A number and its noun, in the plural where it is one."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
