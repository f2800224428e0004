"""ACDC (Bernard et al., IEEE TMI 37(11), 2018): which cases a folder holds.

The layout is recognised by looking at the folder; no image is opened for it. Official layout:

    [database/][training/ | testing/]patient001/
        Info.cfg                        ED: 1, ES: 12, Group: DCM, ...
        patient001_frame01.nii.gz       patient001_frame01_gt.nii.gz
        patient001_frame12.nii.gz       patient001_frame12_gt.nii.gz

Labels: 0 background, 1 right ventricle, 2 myocardium, 3 left ventricle.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mambaseg.data.acdc_h5 import PHASES, survey_h5, volume_files
from mambaseg.data.case import Case, DataError, Volume, as_label
from mambaseg.data.nifti import read_nifti

PATIENT = re.compile(r"patient\d+")
# Anything else is not ours: `_4d` (the whole cine), `_scribble`, macOS's `._` twins.
FRAME = re.compile(r"(patient\d+)_frame(\d+)(_gt)?\.nii(?:\.gz)?")
FOLDERS = ("", "training", "testing", "database/training", "database/testing")

HOW_TO_GET = (
    "ACDC is free after accepting its terms: "
    "https://humanheart-project.creatis.insa-lyon.fr/database/#collection/637218c173e9f0047faa00fb "
    "(cite Bernard et al., IEEE TMI 2018). Unpack it and point data.root (or ACDC_ROOT) at the "
    "folder that holds training/ and testing/. To try without it: data=phantom."
)
KNOWN_LAYOUTS = (
    "Known layouts: official (patient001/patient001_frame01.nii.gz with _gt and Info.cfg, also "
    "under training/ and testing/), SSL4MIS (data/patient001_frame01.h5), WSL4MIS "
    "(ACDC_training_volumes/patient001_frame01.h5)."
)


def find_cases(root: Path | str) -> list[Case]:
    """All cases below `root`, sorted by id ("patient001_ED", "patient001_ES", ...).

    Raises:
        UserError: no patients there, or a patient without its ED or ES frame or its Info.cfg.
    """
    cases, problems = survey(root)
    if problems:
        first, others = problems[0], len(problems) - 1
        more = f"({others} more like this: make data-check DATA={root} lists all.)"
        remedy = f"{first.remedy} {more}" if others else first.remedy
        raise DataError(first.problem, first.path, remedy)
    return cases


def survey(root: Path | str) -> tuple[list[Case], list[DataError]]:
    """Like `find_cases`, but goes on after a patient with a problem and returns them all.

    Raises:
        UserError: `root` is no folder, holds no patients, or holds two layouts.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "this folder does not exist"
        raise DataError(problem, root, HOW_TO_GET)
    folders, files = patient_folders(root), volume_files(root)
    if folders and files:
        remedy = f"Point data.root at one of them: {folders[0].parent} or {files[0].parent}."
        raise DataError("holds both NIfTI patient folders and h5 volumes", root, remedy)
    if folders:
        cases, problems = _survey_official(folders)
    elif files:
        cases, problems = survey_h5(files)
    else:
        hint = _nested_hint(root)
        raise DataError("no ACDC patients here", root, f"{hint}{KNOWN_LAYOUTS} {HOW_TO_GET}")
    return sorted(cases, key=lambda case: case.id), problems


def patient_folders(root: Path) -> list[Path]:
    """Folders of the official layout below `root`, sorted by patient."""
    found: list[Path] = []
    for folder in FOLDERS:
        place = root / folder
        if place.is_dir():
            found += [p for p in place.iterdir() if PATIENT.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda path: (path.name, path))


def _nested_hint(root: Path) -> str:
    """Archives are often unpacked one level deeper: say so when that is the case."""
    for child in sorted(root.iterdir()):
        if child.is_dir() and (patient_folders(child) or volume_files(child)):
            return f"Did you mean {child}? "
    return ""


def _survey_official(folders: list[Path]) -> tuple[list[Case], list[DataError]]:
    """Cases of all patient folders; a patient with a problem does not hide the others."""
    cases: list[Case] = []
    problems: list[DataError] = []
    seen: dict[str, Path] = {}
    for folder in folders:
        if folder.name in seen:
            problem = f"{folder.name} is there twice, also as {seen[folder.name]}"
            problems.append(DataError(problem, folder, "Keep one of the two folders."))
            continue
        seen[folder.name] = folder
        try:
            info = read_info(folder / "Info.cfg")
        except DataError as error:
            problems.append(error)
            continue
        images, labels = _frames(folder)
        for phase, frame in zip(PHASES, (info.ed, info.es), strict=True):
            if frame in images:
                id_, label = f"{folder.name}_{phase}", labels.get(frame)
                cases.append(
                    Case(id_, folder.name, phase, info.group, images[frame], label, read_official)
                )
            else:
                problems.append(_missing_frame(folder, phase, frame, sorted(images)))
    return cases, problems


def _frames(folder: Path) -> tuple[dict[int, Path], dict[int, Path]]:
    """Frame number to image file, and to label file."""
    images: dict[int, Path] = {}
    labels: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = FRAME.fullmatch(path.name)
        if match and match[1] == folder.name:
            (labels if match[3] else images)[int(match[2])] = path
    return images, labels


def _missing_frame(folder: Path, phase: str, frame: int, present: list[int]) -> DataError:
    """The frame that Info.cfg names is not in the folder."""
    have = ", ".join(f"{number:02d}" for number in present) or "none"
    return DataError(
        f"the file is missing; Info.cfg says that {phase} is frame {frame} (frames here: {have})",
        folder / f"{folder.name}_frame{frame:02d}.nii.gz",
        f"Get {folder.name} again, or correct {phase} in its Info.cfg.",
    )


@dataclass(frozen=True)
class Info:
    """What Info.cfg says about a patient: frame numbers of ED and ES, pathology group."""

    ed: int
    es: int
    group: str | None


def read_info(path: Path) -> Info:
    """Read a patient's Info.cfg (lines "key: value").

    Raises:
        UserError: missing or unreadable; ED or ES absent, not a number, or the same frame.
    """
    remedy = 'It comes with the patient\'s images and has lines such as "ED: 1" and "ES: 12".'
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except FileNotFoundError as error:
        problem = f"{path.parent.name} has no Info.cfg, which says what frames are ED and ES"
        raise DataError(problem, path, remedy) from error
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", path, remedy) from error
    fields = {key.strip(): value.strip() for key, _, value in _pairs(text)}
    for phase in PHASES:
        if not fields.get(phase, "").isdecimal():
            problem = f"there is no frame number for {phase} (found {fields.get(phase)!r})"
            raise DataError(problem, path, remedy)
    ed, es = int(fields["ED"]), int(fields["ES"])
    if ed == es:
        raise DataError(f"ED and ES are the same frame ({ed})", path, remedy)
    return Info(ed, es, fields.get("Group") or None)


def _pairs(text: str) -> list[tuple[str, str, str]]:
    """Lines with a colon, cut at the first one."""
    return [line.partition(":") for line in text.splitlines() if ":" in line]


def read_official(case: Case) -> Volume:
    """Read a case of the official layout; the geometry is the image's.

    Raises:
        UserError: a file that is missing, truncated, damaged, or a label that holds no classes.
    """
    image = read_nifti(case.image_path)
    label = None
    if case.label_path is not None:
        label = as_label(read_nifti(case.label_path).array, case.label_path)
    try:
        array = image.array.astype(np.float32)
    except (TypeError, ValueError) as error:  # RGB and other structured data types
        problem = f"the image has data type {image.array.dtype}"
        raise DataError(problem, case.image_path, "Use a grey-scale image.") from error
    return Volume(array, label, image.spacing, image.affine, image.orientation)
