"""M&Ms (Campello et al., IEEE TMI 40(12), 2021): which cases a folder holds.

    211230_M&Ms_..._opendataset.csv         which frames of whom are ED and ES, from 0
    Training/Labeled/A0S9V9/A0S9V9_sa.nii.gz        the cine, 4-D
    Training/Labeled/A0S9V9/A0S9V9_sa_gt.nii.gz     labels, 4-D; empty but at ED and ES
    Validation/  Testing/                   the same

Labels: 0 background, 1 left ventricle, 2 myocardium, 3 right ventricle: ACDC's in reverse order,
which `data.label_map` of conf/data/mnms.yaml turns round.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from mambaseg.data.case import Case
from mambaseg.data.formats.files import read_volume
from mambaseg.data.patients import require_one_row
from mambaseg.data.readers.reader import Found, Level, Problem, named, reader
from mambaseg.data.splits import listed
from mambaseg.data.validation import DataError, as_float32, as_label, check_same_geometry
from mambaseg.data.volume import Volume
from mambaseg.errors import counted
from mambaseg.storage.untrusted import ForeignFileError, read_table, readable

FOLDERS = {"Training/Labeled": "train", "Validation": "val", "Testing": "test"}
UNLABELLED = "Training/Unlabeled"
PHASES = ("ED", "ES")
IMAGE, LABEL = "_sa.nii.gz", "_sa_gt.nii.gz"


def _folders(root: Path) -> Iterator[tuple[Path, str]]:
    """Folders of subjects, and the part that they are in."""
    for place, part in FOLDERS.items():
        for _, folder in named(root / place, re.compile(".+", re.DOTALL)):
            if folder.is_dir():
                yield folder, part


def _has_image(folder: Path) -> bool:
    return (folder / f"{folder.name}{IMAGE}").exists()


@reader(
    example="M&Ms (Training/Labeled/A0S9V9/A0S9V9_sa.nii.gz with _sa_gt, and the list of subjects)",
    recognises=lambda root: any(_has_image(folder) for folder, _ in _folders(root)),
)
def find_cases(root: Path) -> Iterator[Found]:
    """ED and ES of every labelled subject ("A0S9V9_ED"); their part is the challenge's."""
    folders = list(_folders(root))
    frames = _read_frames(root) if any(_has_image(folder) for folder, _ in folders) else {}
    yield from _of_no_folder(root, frames)
    for folder, part in folders:
        image, label = (folder / f"{folder.name}{ending}" for ending in (IMAGE, LABEL))
        row = frames.get(folder.name, {})
        absent = [phase for phase in PHASES if not row.get(phase.lower(), "").isdecimal()]
        if not image.exists():
            if folder.name in frames or any(folder.glob("*.nii*")):  # else it is no subject's
                remedy = "Get the subject again or correct the name, or take the folder out."
                yield DataError("the image is missing", image, remedy)
        elif not label.exists():
            yield DataError("the label is missing", label, "Get the subject again, or take it out.")
        elif absent:
            problem = (
                f"the list of subjects has no frame of {folder.name} for {' and '.join(absent)}"
            )
            yield DataError(problem, folder, "Correct the list, or take the subject out.")
        else:
            name, group = readable(folder.name), row.get("pathology") or row.get("disease") or None
            facts = tuple((key, row[key]) for key in ("vendor", "centre") if row.get(key))
            for phase in PHASES:
                read = partial(read_frame, frame=int(row[phase.lower()]))
                yield Case(
                    f"{name}_{phase}",
                    name,
                    phase,
                    group,
                    image,
                    label,
                    read,
                    part=part,
                    facts=facts,
                )


def _of_no_folder(root: Path, frames: Iterable[str]) -> Iterator[Problem]:
    """Whom the list alone names; where a folder of the challenge is absent they may be in it."""
    places = [root / place for place in (*FOLDERS, UNLABELLED)]
    here = {one.name for place in places if place.is_dir() for one in place.iterdir()}
    if absent := sorted(set(frames) - here):
        problem = f"{counted(len(absent), 'subject')} of the list without a folder, not used"
        level: Level = "warning" if all(place.is_dir() for place in places) else "info"
        yield Problem(level, listed(absent), problem, "Complete the data set if they should be.")


def _read_frames(root: Path) -> dict[str, dict[str, str]]:
    """Rows of the list of subjects by their code, columns in small letters."""
    remedy = "It comes with the images and has the columns External code, ED and ES."
    for path in sorted(root.glob("*.csv")):
        try:
            columns, rows = read_table(path)
        except (ForeignFileError, OSError) as error:
            raise DataError(f"is no list of subjects: {error}", path, remedy) from error
        if {"external code", "ed", "es"} <= {column.strip().lower() for column in columns}:
            named = [{key.strip().lower(): value.strip() for key, value in r.items()} for r in rows]
            known: dict[str, dict[str, str]] = {}
            for row in named:
                code = row["external code"]
                require_one_row(path, code, row, known.setdefault(code, row))
            return known
    raise DataError("the list of subjects (.csv) is missing", root, remedy)


def read_frame(case: Case, *, frame: int) -> Volume:
    """Read one frame (from 0) of a cine and of its labels; `UserError` if it has none."""
    image = read_volume(case.image_path)
    _require_frame(case, frame, image, case.image_path)
    array = as_float32(case.image_path, image.image[:, frame : frame + 1])
    if case.label_path is None:
        return replace(image, image=array)
    label = read_volume(case.label_path)
    check_same_geometry(image, label, case.image_path, case.label_path)
    _require_frame(case, frame, label, case.label_path)
    numbers = as_label(label.image[:, frame], case.label_path)
    return replace(image, image=array, label=numbers)


def _require_frame(case: Case, frame: int, found: Volume, path: Path) -> None:
    if frame >= found.image.shape[1]:
        problem = f"has {found.image.shape[1]} frames; {case.phase} is said to be {frame}"
        raise DataError(problem, path, "Frames count from 0: correct the list of subjects.")
