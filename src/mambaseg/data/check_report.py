"""What data-check has found in a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mambaseg.data.examined import Examined
from mambaseg.data.layouts import Layout
from mambaseg.data.problems import Level, Problem, counted


@dataclass(frozen=True)
class Report:
    """What `check_dataset` found.

    `patients`, `layout` and `class_names` are None where nothing tells them; `patient_pattern`
    finds the patients in names that look like several cases of one.
    """

    root: Path
    patients: int | None
    cases: int
    problems: tuple[Problem, ...]
    layout: Layout | None = None
    examined: tuple[Examined, ...] = ()
    class_names: tuple[str, ...] | None = None
    patient_pattern: str | None = None

    def of(self, level: Level) -> list[Problem]:
        """The problems of one level."""
        return [problem for problem in self.problems if problem.level == level]

    @property
    def ok(self) -> bool:
        """True without errors; warnings do not count."""
        return not self.of("error")

    @property
    def summary(self) -> str:
        """One line: how much was looked at, and how many problems there are."""
        found = [
            counted(len(self.of("error")), "error"),
            counted(len(self.of("warning")), "warning"),
        ]
        looked_at = counted(self.cases, "case")
        if self.patients is not None:
            looked_at += f" of {counted(self.patients, 'patient')}"
        return f"{looked_at} in {self.root}: {', '.join(found)}"
