"""M&Ms (Campello et al., IEEE TMI 40(12), 2021): which cases a folder holds.

    211230_M&Ms_..._opendataset.csv         which frames of whom are ED and ES, from 0
    Training/Labeled/A0S9V9/A0S9V9_sa.nii.gz        the cine, 4-D
    Training/Labeled/A0S9V9/A0S9V9_sa_gt.nii.gz     labels, 4-D; empty but at ED and ES
    Validation/  Testing/                   the same

Labels: 0 background, 1 left ventricle, 2 myocardium, 3 right ventricle: ACDC's in reverse order,
which `data.label_map` of conf/data/mnms.yaml turns round.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from mambaseg.data.case import Case
from mambaseg.data.formats.files import read_volume
from mambaseg.data.formats.volume import Volume
from mambaseg.data.problems import cases_or_first_problem
from mambaseg.data.validation import DataError, as_float32, as_label, check_same_geometry, unlisted
from mambaseg.storage.untrusted import ForeignFileError, read_table, readable

FOLDERS = {"Training/Labeled": "train", "Validation": "val", "Testing": "test"}
CLASSES = ("background", "LV", "MYO", "RV")  # of the files' numbers
COLUMNS = ("external code", "ed", "es")
PHASES = ("ED", "ES")
IMAGE, LABEL = "_sa.nii.gz", "_sa_gt.nii.gz"
LAYOUT = "Known: Training/Labeled/A0S9V9/A0S9V9_sa.nii.gz with _sa_gt, and the list of subjects."


def recognises(root: Path) -> bool:
    """Whether `root` is meant to be M&Ms, by the names of its folders."""
    return any((root / folder).is_dir() for folder in FOLDERS) and bool(_folders(root))


def find_cases(root: Path | str) -> list[Case]:
    """All labelled cases, sorted by id ("A0S9V9_ED"); their part is the challenge's.

    Raises:
        UserError: no subjects there, no list of them, or one is incomplete.
    """
    cases, problems = survey(root)
    return cases_or_first_problem(cases, problems, Path(root).expanduser())


def survey(root: Path | str) -> tuple[list[Case], list[DataError]]:
    """Like `find_cases`, but goes on after a subject with a problem and returns them all."""
    root = Path(root).expanduser()
    try:
        folders = _folders(root)
        if not folders:
            raise DataError("no subjects of M&Ms here", root, LAYOUT)
        frames = _frames(root)
    except OSError as error:
        raise unlisted(Path(error.filename or root), error) from error
    cases: list[Case] = []
    problems: list[DataError] = []
    for folder, part in folders:
        try:
            cases += _cases(folder, part, frames)
        except DataError as error:
            problems.append(error)
    return sorted(cases, key=lambda case: case.id), problems


def _folders(root: Path) -> list[tuple[Path, str]]:
    """Folders of subjects, and the part that they are in."""
    return [
        (folder, part)
        for place, part in FOLDERS.items()
        if (root / place).is_dir()
        for folder in sorted((root / place).iterdir())
        if folder.is_dir() and (folder / f"{folder.name}{IMAGE}").exists()
    ]


def _frames(root: Path) -> dict[str, dict[str, str]]:
    """Rows of the list of subjects by their code, columns in small letters."""
    for path in sorted(root.glob("*.csv")):
        try:
            columns, rows = read_table(path)
        except (ForeignFileError, OSError) as error:
            raise DataError(f"is no list of subjects: {error}", path, LAYOUT) from error
        if set(COLUMNS) <= {column.strip().lower() for column in columns}:
            named = [{key.strip().lower(): value.strip() for key, value in r.items()} for r in rows]
            return {row["external code"]: row for row in named}
    remedy = "It comes with the images and has the columns External code, ED and ES."
    raise DataError("the list of subjects (.csv) is missing", root, remedy)


def _cases(folder: Path, part: str, frames: dict[str, dict[str, str]]) -> list[Case]:
    name, row = folder.name, frames.get(folder.name)
    if row is None:
        raise DataError(f"{name} is not in the list of subjects", folder, "Add it, or move it out.")
    image, label = folder / f"{name}{IMAGE}", folder / f"{name}{LABEL}"
    if not label.exists():
        raise DataError("the label is missing", label, f"Get {name} again, or take it out.")
    group = row.get("pathology") or row.get("disease") or None
    cases = []
    for phase in PHASES:
        if not row[phase.lower()].isdecimal():
            problem = f"the list of subjects has no frame of {name} for {phase}"
            raise DataError(problem, folder, "Correct the list, or take the subject out.")
        reader = partial(read_frame, frame=int(row[phase.lower()]))
        case = Case(
            f"{readable(name)}_{phase}",
            readable(name),
            phase,
            group,
            image,
            label,
            reader,
            part=part,
        )
        cases.append(case)
    return cases


def read_frame(case: Case, *, frame: int) -> Volume:
    """Read one frame of a cine and of its labels.

    Args:
        case: of `find_cases`.
        frame: its number from 0.

    Raises:
        UserError: a file is missing or damaged, has no such frame, or the two do not fit.
    """
    image = read_volume(case.image_path)
    assert case.label_path is not None  # or there would be no case
    label = read_volume(case.label_path)
    check_same_geometry(image, label, case.image_path, case.label_path)
    for path, found in ((case.image_path, image), (case.label_path, label)):
        if frame >= found.image.shape[1]:
            problem = f"has {found.image.shape[1]} frames; {case.phase} is said to be {frame}"
            raise DataError(problem, path, "Frames count from 0: correct the list of subjects.")
    array = as_float32(case.image_path, image.image[:, frame : frame + 1])
    numbers = as_label(label.image[:, frame], case.label_path)
    return replace(image, image=array, label=numbers)
