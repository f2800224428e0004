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
from dataclasses import replace
from pathlib import Path

from mambaseg.data.case import Case
from mambaseg.data.formats.nifti import read_nifti
from mambaseg.data.formats.volume import Volume
from mambaseg.data.problems import cases_or_first_problem
from mambaseg.data.readers.acdc_h5 import FILE_NAME, PHASES, survey_h5, volume_files
from mambaseg.data.readers.acdc_h5 import FOLDERS as H5_FOLDERS
from mambaseg.data.readers.acdc_info import read_info
from mambaseg.data.validation import DataError, as_float32, as_label, check_same_geometry, unlisted

PATIENT = re.compile(r"patient\d+")
# Anything else is not ours: `_4d` (the whole cine), `_scribble`, macOS's `._` twins.
FRAME = re.compile(r"(patient\d+)_frame(\d+)(_gt)?\.nii(?:\.gz)?")
NAMES = (PATIENT, FRAME, FILE_NAME, re.compile(r"info\.cfg"))
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
    return cases_or_first_problem(cases, problems, Path(root))


def survey(root: Path | str) -> tuple[list[Case], list[DataError]]:
    """Like `find_cases`, but goes on after a patient with a problem and returns them all.

    Raises:
        UserError: `root` is no folder, cannot be listed, holds no patients, or holds two layouts.
    """
    root = Path(root).expanduser()
    try:
        return _survey(root)
    except OSError as error:
        raise unlisted(Path(error.filename or root), error) from error


def _survey(root: Path) -> tuple[list[Case], list[DataError]]:
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "this folder does not exist"
        raise DataError(problem, root, HOW_TO_GET)
    folders, files = patient_folders(root), volume_files(root)
    if folders and files:
        remedy = f"Point data.root at one of them: {folders[0].parent} or {files[0].parent}."
        raise DataError("holds both NIfTI patient folders and h5 volumes", root, remedy)
    places = {root / folder for folder in (*FOLDERS, *H5_FOLDERS)}
    misnamed = [problem for place in sorted(places) for problem in _misnamed(place)]
    if folders:
        cases, problems = _survey_official(folders)
    elif files:
        cases, problems = survey_h5(files)
    elif misnamed:
        cases, problems = [], []
    else:
        hint = _nested_hint(root)
        raise DataError("no ACDC patients here", root, f"{hint}{KNOWN_LAYOUTS} {HOW_TO_GET}")
    return sorted(cases, key=lambda case: case.id), [*misnamed, *problems]


def patient_folders(root: Path) -> list[Path]:
    """What is named as a patient's folder below `root`, sorted by patient, usable or not."""
    found: list[Path] = []
    for folder in FOLDERS:
        place = root / folder
        if place.is_dir():
            found += [path for path in place.iterdir() if PATIENT.fullmatch(path.name)]
    return sorted(found, key=lambda path: (path.name, path))


def _misnamed(place: Path) -> list[DataError]:
    """What is named like ours but for upper and lower case; left alone, it would be lost."""
    if not place.is_dir():
        return []
    names = {path.name for path in place.iterdir()}
    problems = []
    for name in sorted(names):
        ours = name.lower().capitalize() if name.lower() == "info.cfg" else name.lower()
        is_data = any(pattern.fullmatch(name.lower()) for pattern in NAMES)
        # A disk that ignores case opens the file by our name too: then nothing is lost.
        if is_data and name != ours and (ours in names or not (place / ours).exists()):
            remedy = f"Rename it to {ours}, or move it out of the data set."
            problems.append(DataError("is not spelt as ACDC spells it", place / name, remedy))
    return problems


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
            found, wrong = _patient(folder)
        except DataError as error:
            found, wrong = [], [error]
        except OSError as error:
            found, wrong = [], [unlisted(folder, error)]
        cases += found
        problems += wrong
    return cases, problems


def _patient(folder: Path) -> tuple[list[Case], list[DataError]]:
    """ED and ES of one patient."""
    if not folder.is_dir():
        target = "leads to nothing" if folder.is_symlink() else "is a file"
        remedy = "Put the patient's folder there, or move this out of the data set."
        raise DataError(f"is named as a patient's folder and {target}", folder, remedy)
    images, labels, problems = frames_of(folder)
    try:
        info = read_info(folder / "Info.cfg")
    except DataError as error:
        return [], [*problems, error]
    cases: list[Case] = []
    for phase, frame in zip(PHASES, (info.ed, info.es), strict=True):
        if frame in images:
            id_, label = f"{folder.name}_{phase}", labels.get(frame)
            cases.append(
                Case(id_, folder.name, phase, info.group, images[frame], label, read_official)
            )
        else:
            problems.append(_missing_frame(folder, phase, frame, sorted(images)))
    return cases, problems


def frames_of(folder: Path) -> tuple[dict[int, Path], dict[int, Path], list[DataError]]:
    """Frame number to image file, and to label file; and files that are two for one frame."""
    images: dict[int, Path] = {}
    labels: dict[int, Path] = {}
    problems = _misnamed(folder)
    for path in sorted(folder.iterdir()):
        match = FRAME.fullmatch(path.name)
        if match and match[1] == folder.name:
            files, frame = labels if match[3] else images, int(match[2])
            if frame in files:
                problem = f"there are two files for frame {frame}, also {files[frame].name}"
                problems.append(DataError(problem, path, "Keep one of the two files."))
            files.setdefault(frame, path)
    return images, labels, problems


def _missing_frame(folder: Path, phase: str, frame: int, present: list[int]) -> DataError:
    """The frame that Info.cfg names is not in the folder."""
    have = ", ".join(f"{number:02d}" for number in present) or "none"
    return DataError(
        f"the file is missing; Info.cfg says that {phase} is frame {frame} (frames here: {have})",
        folder / f"{folder.name}_frame{frame:02d}.nii.gz",
        f"Get {folder.name} again, or correct {phase} in its Info.cfg.",
    )


def read_official(case: Case) -> Volume:
    """Read a case of the official layout; the geometry is the image's.

    Raises:
        UserError: a file that is missing, truncated, damaged, a label that holds no classes, or
            one whose header has other axes or another voxel size than the image's.
    """
    image = read_nifti(case.image_path)
    label = None
    if case.label_path is not None:
        label_file = read_nifti(case.label_path)
        check_same_geometry(image, label_file, case.image_path, case.label_path)
        label = as_label(label_file.image[0, :, 0], case.label_path)
    return replace(image, image=as_float32(case.image_path, image.image[0]), label=label)
