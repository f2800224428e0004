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
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from mambaseg.data.acdc import frames_of, patient_folders, read_official, survey
from mambaseg.data.acdc_h5 import FILE_NAME, read_h5, volume_files
from mambaseg.data.case import Case, DataError, as_label, find_problems, label_problems
from mambaseg.data.files import check_file
from mambaseg.data.fingerprint import THREADS
from mambaseg.data.nifti import read_nifti
from mambaseg.data.plausibility import remarks
from mambaseg.data.splits import LISTED, known_duplicates, listed

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
    different shape or axes, more or less than three dimensions, NaN, labels outside
    0..num_classes-1, names spelt otherwise, list files that name absent patients or one patient in
    two parts. Warnings: identical images, gaps in the numbering, axes unlike the other cases', and
    what `plausibility` remarks. Information: unknown voxel size.
    """
    root = Path(root).expanduser()
    try:
        cases, unusable = survey(root)
    except DataError as error:
        return Report(root, 0, 0, (_from_error(str(root), error, root),))
    with ThreadPoolExecutor(THREADS) as pool:  # unpacking releases the interpreter lock
        files = [*cases, *_without_phase(root, cases)]
        examined = list(pool.map(lambda case: _examine(case, num_classes), files))
    patients = _patients(root) | {case.patient for case in cases}
    problems = [_from_error(_patient_of(error), error, root) for error in unusable]
    problems += [_from_error(e.case.id, error, root) for e in examined for error in e.errors]
    problems += _list_problems(root, patients)
    problems += _duplicates(examined)
    problems += _gaps(patients)
    problems += [
        Problem(
            "warning",
            e.case.id,
            what,
            "Look at the file; correct it or get it again if it is wrong.",
        )
        for e in examined
        for what in e.remarks
    ]
    problems += _other_axes(examined)
    problems += _unknown_spacing(examined)
    return Report(root, len(patients), len(cases), tuple(problems))


# ---- one case


@dataclass(frozen=True)
class _Examined:
    """What is kept of a case after reading it; arrays are let go."""

    case: Case
    digest: str | None = None
    spacing_known: bool = False
    orientation: str | None = None
    remarks: tuple[str, ...] = ()
    errors: tuple[DataError, ...] = ()


def _without_phase(root: Path, cases: Sequence[Case]) -> list[Case]:
    """Frames of patients without any case: a bad Info.cfg must not hide what else is bad."""
    complete = {case.patient for case in cases}
    found: list[Case] = []
    for folder in patient_folders(root):
        if folder.name in complete:
            continue
        try:
            images, labels, _ = frames_of(folder)
        except OSError:  # the survey has said so
            continue
        for frame, path in images.items():
            id_, label = f"{folder.name}_frame{frame:02d}", labels.get(frame)
            found.append(Case(id_, folder.name, "?", None, path, label, read_official))
    for path in volume_files(root):
        patient = path.name.partition("_")[0]
        if patient not in complete:
            found.append(Case(path.stem, patient, "?", None, path, path, read_h5))
    return found


def _examine(case: Case, num_classes: int) -> _Examined:
    """Read a case, whatever comes of it."""
    try:
        volume = case.load()
        errors = list(find_problems(case, volume, num_classes))
        if errors:
            return _Examined(case, errors=tuple(errors))
        content = hashlib.sha256(str(volume.image.shape).encode())
        content.update(np.ascontiguousarray(volume.image).data)
        return _Examined(
            case,
            content.hexdigest(),
            volume.spacing is not None,
            volume.orientation,
            tuple(remarks(volume, num_classes)),
        )
    except DataError as error:
        return _Examined(case, errors=(error, *_label_errors(case, error, num_classes)))
    except Exception as error:  # the other cases are still to be looked at
        problem = f"it could not be examined ({type(error).__name__}: {error})"
        remedy = "Leave the case out, and report this as a bug if the file is sound."
        return _Examined(case, errors=(DataError(problem, case.image_path, remedy),))


def _label_errors(case: Case, error: DataError, num_classes: int) -> list[DataError]:
    """An unreadable image hides its label: look at that file too."""
    path = case.label_path
    if error.path != case.image_path or path is None or path == case.image_path:
        return []
    try:
        label = as_label(read_nifti(path).array, path)
    except DataError as second:
        return [second]
    return list(label_problems(case, label, num_classes))


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
        try:
            check_file(path)
        except DataError as error:
            yield _from_error(path.name, error, root)
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
            patients = tuple(sorted({case.patient for case in cases}))
            phases[patients] |= {case.phase or case.id for case in cases}
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
    numbers = sorted({int(patient.removeprefix("patient")) for patient in patients})
    gaps = [range(one + 1, other) for one, other in pairwise(numbers) if other > one + 1]
    if gaps:  # a number with a typing error makes a gap of millions: name a few only
        count = sum(map(len, gaps))
        names = listed((f"patient{n:03d}" for n in islice(chain(*gaps), LISTED)), total=count)
        remedy = "Complete the data set; published splits need every patient."
        yield Problem("warning", names, f"{_counted(count, 'patient')} missing", remedy)


def _other_axes(examined: Sequence[_Examined]) -> Iterator[Problem]:
    """Nothing is reoriented: a case with other axes is shown to the network turned or flipped."""
    known = [one for one in examined if one.orientation is not None]
    if not known:
        return
    usual, _ = Counter(one.orientation for one in known).most_common(1)[0]
    others = [one for one in known if one.orientation != usual]
    for axes in sorted({str(one.orientation) for one in others}):
        where = listed(one.case.id for one in others if one.orientation == axes)
        remedy = "Arrays are used as stored: bring all files to the same axes."
        yield Problem("warning", where, f"axes {axes} where most cases have {usual}", remedy)


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
