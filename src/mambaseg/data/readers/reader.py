"""What a reader of a data set is.

A reader is a function that yields the cases below a folder and, as errors, what is wrong with the
rest. Training stops at the first error, data-check lists them all. A config in conf/data names it
as `find_cases._target_`, which is all that is needed to train and check::

    @reader(example="hearts (h1.nii.gz and h1_seg.nii.gz)", recognises=lambda root: ...)
    def find_cases(root: Path) -> Iterator[Found]:
        for path in sorted(root.glob("*_seg.nii.gz")):
            yield Case(...)
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mambaseg.data.case import Case
from mambaseg.data.patients import parts_of
from mambaseg.data.validation import DataError, unlisted
from mambaseg.data.volume import Volume

Level = Literal["error", "warning", "info"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """One line of data-check's report: how bad, where, what, and what to do about it."""

    level: Level
    where: str
    problem: str
    remedy: str


Found = Case | DataError | Problem
"""What a reader yields: a case, an error that training stops at, or a remark that it logs."""


@dataclass(eq=False)
class Reader:
    """A reader, and what data-check asks it. Called with a folder it returns the cases."""

    scan: Callable[..., Iterable[Found]]  #: (folder, options) -> what is found; opens no image
    example: str = ""  #: what such a folder holds, for messages
    remedy: str = ""  #: what to do where nothing is found
    #: By names alone, and generous, so that damaged data are recognised too.
    recognises: Callable[[Path], bool] = lambda root: False
    any_names: bool = False  #: whether files may have any names; such readers are asked last
    class_names: Callable[[Path], Sequence[str] | None] | None = None  #: in place of the config's
    ignore_label: Callable[[Path], int | None] | None = None  #: likewise, of `data.ignore_label`
    #: likewise, of `data.regions`
    regions: Callable[[Path], dict[str, list[int]] | None] | None = None
    channels: Callable[[Path], int] | None = None  #: that an image must have
    split: Callable[[Path], str] | None = None  #: `data.split` to propose, likewise
    remarks: Callable[[Volume], Iterable[str]] = lambda volume: ()  #: on what is suspicious

    def __post_init__(self) -> None:
        functools.update_wrapper(self, self.scan)

    def __reduce__(self) -> str:
        return self.scan.__qualname__

    def __call__(self, root: Path | str, **options: object) -> list[Case]:
        """Return all cases below `root`, sorted by id, or raise the first error; log remarks."""
        cases, errors, remarks = self.survey(root, **options)
        for one in remarks:
            level = logging.INFO if one.level == "info" else logging.WARNING
            log.log(level, "%s: %s. %s", one.where, one.problem, one.remedy)
        if errors:
            first, more = errors[0], ""
            if len(errors) > 1:
                more = f" ({len(errors) - 1} more like this: mambaseg check {root} lists all.)"
            raise DataError(first.problem, first.path, first.remedy + more)
        parts_of(cases)
        return cases

    def require(self, root: Path | str) -> tuple[Path, str]:
        """The folder, and what is expected in it; `UserError`: it is none."""
        root = Path(root).expanduser()
        expected = f"Expected: {self.example}. {self.remedy}".rstrip()
        require_folder(root, expected)
        return root, expected

    def survey(
        self, root: Path | str, **options: object
    ) -> tuple[list[Case], list[DataError], list[Problem]]:
        """Return cases sorted by id, errors, remarks; `UserError` for an unusable `root`."""
        root, expected = self.require(root)
        try:
            found = list(self.scan(root, **options))
            if all(isinstance(one, Problem) for one in found):
                folders = (path for path in sorted(root.iterdir()) if path.is_dir())
                inside = next((path for path in folders if self.recognises(path)), None)
                hint = f"Did you mean {inside}? " if inside else ""
                raise DataError("no cases of this data set here", root, hint + expected)
        except OSError as error:
            raise unlisted(Path(error.filename or root), error) from error
        cases = sorted((one for one in found if isinstance(one, Case)), key=lambda case: case.id)
        errors = [one for one in found if isinstance(one, DataError)]
        return cases, errors, [one for one in found if isinstance(one, Problem)]


def reader(**attributes: Any) -> Callable[[Callable[..., Iterable[Found]]], Reader]:
    """Make a `Reader` of the function below; `attributes` are those of the class."""
    return functools.partial(Reader, **attributes)


def named(folder: Path, name: re.Pattern[str]) -> Iterator[tuple[re.Match[str], Path]]:
    """Entries of a folder, if there is one, that a pattern fits, sorted; without hidden ones."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not path.name.startswith(".") and (match := name.fullmatch(path.name)):
            yield match, path


def require_folder(root: Path, expected: str = "") -> None:
    """Raise `UserError` unless the folder of a data set is one."""
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "this folder does not exist"
        raise DataError(problem, root, f"data.root names the folder of the data. {expected}")
