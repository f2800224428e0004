"""What data-check looks for in ACDC alone: numbering, lists, frames without a phase, anatomy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice, pairwise
from pathlib import Path

from mambaseg.data.case import Case
from mambaseg.data.problems import Problem, counted
from mambaseg.data.readers.acdc import FOLDERS, NAMES, frames_of, patient_folders, read_official
from mambaseg.data.readers.acdc_h5 import FILE_NAME, read_h5, volume_files
from mambaseg.data.readers.acdc_h5 import FOLDERS as H5_FOLDERS
from mambaseg.data.splits import LISTED, listed
from mambaseg.data.validation import DataError, check_file

# Lists that come with the h5 layouts: which files make up a part of the split.
LISTS = {
    "train": ("train.list", "train_slices.list"),
    "val": ("val.list",),
    "test": ("test.list",),
}


def recognises(root: Path) -> bool:
    """Whether anything below `root` is named as ACDC names it, also in other letters."""
    places = {root / folder for folder in (*FOLDERS, *H5_FOLDERS)}
    names = (path.name.lower() for place in places if place.is_dir() for path in place.iterdir())
    return any(pattern.fullmatch(name) for name in names for pattern in NAMES)


def patients(root: Path, cases: Sequence[Case]) -> set[str]:
    """Everybody who has a folder or a file, usable or not."""
    matches = (FILE_NAME.fullmatch(path.name) for path in volume_files(root))
    folders = {folder.name for folder in patient_folders(root)}
    named = folders or {match[1] for match in matches if match}
    return named or {case.patient for case in cases}


def without_phase(root: Path, cases: Sequence[Case]) -> list[Case]:
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


def folder_problems(root: Path, cases: Sequence[Case]) -> Iterator[Problem]:
    """What is wrong with the lists and the numbering."""
    everybody = patients(root, cases)
    yield from _list_problems(root, everybody)
    yield from _gaps(everybody)


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
            yield Problem.from_error(path.name, error, root)
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


def _gaps(patients: set[str]) -> Iterator[Problem]:
    """Patients are numbered without gaps; one that is missing was probably lost."""
    numbers = sorted({int(patient.removeprefix("patient")) for patient in patients})
    gaps = [range(one + 1, other) for one, other in pairwise(numbers) if other > one + 1]
    if gaps:  # a number with a typing error makes a gap of millions: name a few only
        count = sum(map(len, gaps))
        names = listed((f"patient{n:03d}" for n in islice(chain(*gaps), LISTED)), total=count)
        remedy = "Complete the data set; published splits need every patient."
        yield Problem("warning", names, f"{counted(count, 'patient')} missing", remedy)
