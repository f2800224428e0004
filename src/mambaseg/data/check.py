"""Is this folder fit for training? Reads every file once and lists all problems, not the first.

`python -m mambaseg.data.check ROOT` prints a table and exits with 1 when there are errors.
Errors are what training or scoring would stumble over; warnings are what the reader of the scores
has to know; information is the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mambaseg.data.acdc import patient_folders, survey
from mambaseg.data.acdc_h5 import FILE_NAME, volume_files
from mambaseg.data.case import Case, DataError, as_label
from mambaseg.data.nifti import read_nifti
from mambaseg.data.splits import known_duplicates, listed

Level = Literal["error", "warning", "info"]
STYLES: dict[Level, str] = {"error": "bold red", "warning": "yellow", "info": "cyan"}
# Lists that come with the h5 layouts: which files make up a part of the split.
LISTS = {
    "train": ("train.list", "train_slices.list"),
    "val": ("val.list",),
    "test": ("test.list",),
}


@dataclass(frozen=True)
class Problem:
    """One line of the report: how bad, where, what, and what to do about it."""

    level: Level
    where: str
    problem: str
    remedy: str


@dataclass(frozen=True)
class Report:
    """What `check_dataset` found."""

    root: Path
    patients: int
    cases: int
    problems: tuple[Problem, ...]

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
            _counted(len(self.of("error")), "error"),
            _counted(len(self.of("warning")), "warning"),
        ]
        looked_at = f"{_counted(self.cases, 'case')} of {_counted(self.patients, 'patient')}"
        return f"{looked_at} in {self.root}: {', '.join(found)}"


def check_dataset(root: Path | str, num_classes: int = 4) -> Report:
    """Read every case below `root` and report what is wrong with it.

    Errors: no patients, missing, truncated, damaged or unreadable files, image and label of
    different shape, more or less than three dimensions, NaN, labels outside 0..num_classes-1, list
    files that name absent patients or one patient in two parts. Warnings: identical images, gaps
    in the numbering, an image or label without content. Information: unknown voxel size.
    """
    root = Path(root).expanduser()
    try:
        cases, unusable = survey(root)
    except DataError as error:
        return Report(root, 0, 0, (_from_error(str(root), error, root),))
    with ThreadPoolExecutor() as pool:  # unpacking releases the interpreter lock
        examined = list(pool.map(lambda case: _examine(case, num_classes), cases))
    patients = _patients(root)
    problems = [_from_error(_patient_of(error), error, root) for error in unusable]
    problems += [_from_error(e.case.id, error, root) for e in examined for error in e.errors]
    problems += _list_problems(root, patients)
    problems += _duplicates(examined)
    problems += _gaps(patients)
    problems += [
        Problem("warning", e.case.id, what, "Look at the file; get it again if it is damaged.")
        for e in examined
        for what in e.remarks
    ]
    problems += _unknown_spacing(examined)
    return Report(root, len(patients), len(cases), tuple(problems))


# ---- one case


@dataclass(frozen=True)
class _Examined:
    """What is kept of a case after reading it; arrays are let go."""

    case: Case
    digest: str | None = None
    spacing_known: bool = False
    remarks: tuple[str, ...] = ()
    errors: tuple[DataError, ...] = ()


def _examine(case: Case, num_classes: int) -> _Examined:
    """Read a case, whatever comes of it."""
    try:
        volume = case.read(num_classes)
    except DataError as error:
        return _Examined(case, errors=(error, *_label_errors(case, error)))
    image, label = volume.image, volume.label
    remarks = []
    if image.min() == image.max():
        remarks.append(f"the image is constant ({image.flat[0]:g} everywhere)")
    if label is not None and not label.any():
        remarks.append("the label is background everywhere")
    content = hashlib.sha256(str(image.shape).encode())
    content.update(np.ascontiguousarray(image).data)
    return _Examined(case, content.hexdigest(), volume.spacing is not None, tuple(remarks))


def _label_errors(case: Case, error: DataError) -> list[DataError]:
    """An unreadable image hides its label: look at that file too."""
    path = case.label_path
    if error.path != case.image_path or path is None or path == case.image_path:
        return []
    try:
        as_label(read_nifti(path).array, path)
    except DataError as second:
        return [second]
    return []


# ---- the folder as a whole


def _patients(root: Path) -> set[str]:
    """Everybody who has a folder or a file, usable or not."""
    matches = (FILE_NAME.fullmatch(path.name) for path in volume_files(root))
    folders = {folder.name for folder in patient_folders(root)}
    return folders or {match[1] for match in matches if match}


def _list_problems(root: Path, patients: set[str]) -> Iterator[Problem]:
    """Lists beside h5 files: absent patients, and patients in two parts."""
    parts: dict[str, set[str]] = {}
    for part, names in LISTS.items():
        path = next((root / name for name in names if (root / name).is_file()), None)
        if path is None:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        parts[part] = set(re.findall(r"^(patient\d+)_", text, flags=re.MULTILINE))
        absent = parts[part] - patients
        if absent:
            problem = f"names {listed(absent)}, not in the folder"
            yield Problem("error", path.name, problem, "Add the files, or use the matching list.")
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        both = parts.get(one, set()) & parts.get(other, set())
        if both:
            problem = f"{listed(both)} in both lists"
            remedy = "A patient belongs in one part; the lists are not used by data.split."
            yield Problem("error", f"{one}.list, {other}.list", problem, remedy)


def _duplicates(examined: Iterable[_Examined]) -> Iterator[Problem]:
    """Identical images, one line for the same group of patients."""
    by_content: dict[str, list[Case]] = defaultdict(list)
    for one in examined:
        if one.digest is not None:
            by_content[one.digest].append(one.case)
    phases: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for cases in by_content.values():
        if len(cases) > 1:
            phases[tuple(sorted({case.patient for case in cases}))] |= {c.phase for c in cases}
    for patients, which in sorted(phases.items()):
        where = ", ".join(patients)
        problem = f"identical images ({', '.join(sorted(which))})"
        remedy = "In different parts of a split they leak: leave all but one out."
        if patients in known_duplicates(patients):
            remedy = (
                "So it is in ACDC itself. data.split=random keeps them in one part; a published "
                "split that does not says so with its scores."
            )
        elif len(patients) == 1:
            problem, remedy = "ED and ES are the same image", "Get the patient again."
        yield Problem("warning", where, problem, remedy)


def _gaps(patients: set[str]) -> Iterator[Problem]:
    """Patients are numbered without gaps; one that is missing was probably lost."""
    numbers = {int(patient.removeprefix("patient")) for patient in patients}
    missing = sorted(set(range(min(numbers), max(numbers))) - numbers)
    if missing:
        names = listed(f"patient{number:03d}" for number in missing)
        remedy = "Complete the data set; published splits need every patient."
        yield Problem("warning", names, f"{_counted(len(missing), 'patient')} missing", remedy)


def _unknown_spacing(examined: Sequence[_Examined]) -> Iterator[Problem]:
    """Without a voxel size there are no mm."""
    readable = [one for one in examined if one.digest is not None]
    unknown = [one.case.id for one in readable if not one.spacing_known]
    if unknown:
        where = "all" if len(unknown) == len(readable) else listed(unknown)
        problem = f"voxel size unknown in {len(unknown)} of {len(readable)} cases"
        remedy = "Distances are scored in voxels only; the challenge's own files have it."
        yield Problem("info", where, problem, remedy)


# ---- words


def _from_error(where: str, error: DataError, root: Path) -> Problem:
    """An exception as a line of the report."""
    problem = error.problem
    if error.path is not None and error.path != root:
        inside = error.path.is_relative_to(root)
        problem = f"{error.path.relative_to(root) if inside else error.path}: {problem}"
    return Problem("error", where, problem, error.remedy)


def _patient_of(error: DataError) -> str:
    """The patient that a problem of the survey is about."""
    name = re.compile(r"patient\d+")
    told, in_path = name.findall(error.problem), name.findall(str(error.path))
    return next(iter([*told, *reversed(in_path)]), "?")


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; 1 when there are errors, else 0."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    parser = argparse.ArgumentParser(prog="python -m mambaseg.data.check", description=__doc__)
    parser.add_argument("root", type=Path, help="folder of the data set (as data.root)")
    parser.add_argument("--num-classes", type=int, default=4, help="with background (default: 4)")
    options = parser.parse_args(arguments)
    report = check_dataset(options.root, options.num_classes)
    console = Console()
    if report.problems:
        table = Table(show_lines=True)
        for heading in ("level", "case", "problem", "remedy"):
            table.add_column(heading, overflow="fold")
        for one in report.problems:  # Text: square brackets in a path are no markup
            style = STYLES[one.level]
            table.add_row(Text(one.level, style), *map(Text, (one.where, one.problem, one.remedy)))
        console.print(table)
    console.print(Text(report.summary, "green" if report.ok else "red"), soft_wrap=True)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
