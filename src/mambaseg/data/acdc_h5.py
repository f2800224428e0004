"""ACDC as redistributed in h5 by SSL4MIS and WSL4MIS: one file per annotated frame.

Each file holds `image` and `label`, both `(Z, H, W)`. Spacing, orientation and Info.cfg were left
out. Intensities differ between the two (SSL4MIS: min–max per volume; WSL4MIS: clipped at 99 %
first), so networks trained on one are not at home on the other.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from mambaseg.data.case import Case, DataError, Volume, as_label

# SSL4MIS (and Mamba-UNet) and WSL4MIS; "" is one of these folders given as root itself.
FOLDERS = ("data", "ACDC_training_volumes", "")
FILE_NAME = re.compile(r"(patient\d+)_frame(\d+)\.h5")
PHASES = ("ED", "ES")
GROUPS = ("DCM", "HCM", "MINF", "NOR", "RV")


def volume_files(root: Path) -> list[Path]:
    """The volume files below `root` in the first known folder that has any."""
    for folder in FOLDERS:
        place = root / folder
        if place.is_dir():
            files = [path for path in place.iterdir() if FILE_NAME.fullmatch(path.name)]
            if files:
                return sorted(files)
    return []


def survey_h5(files: list[Path]) -> tuple[list[Case], list[DataError]]:
    """The cases in `files`, and what is wrong with the rest.

    The frame number says which phase comes first, not which frame it was: SSL4MIS calls every ES
    frame 02, WSL4MIS keeps the number of the cine. In both, ED is the lower one (it is so for all
    100 patients), hence phases go by rank within the patient.
    """
    frames: dict[str, list[tuple[int, Path]]] = defaultdict(list)
    for path in files:
        match = FILE_NAME.fullmatch(path.name)
        if match:
            frames[match[1]].append((int(match[2]), path))
    cases: list[Case] = []
    problems: list[DataError] = []
    for patient, found in sorted(frames.items()):
        if len(found) != len(PHASES):
            names = ", ".join(path.name for _, path in sorted(found))
            problem = f"{patient} should have two frames (ED and ES), found {len(found)}: {names}"
            remedy = "Add the missing file, or take the extra one away."
            problems.append(DataError(problem, found[0][1].parent, remedy))
            continue
        group = training_group(patient)
        for phase, (_, path) in zip(PHASES, sorted(found), strict=True):
            cases.append(Case(f"{patient}_{phase}", patient, phase, group, path, path, read_h5))
    return cases, problems


def training_group(patient: str) -> str | None:
    """Pathology group of the official training patients 1..100, twenty each; None for others."""
    number = int(patient.removeprefix("patient"))
    return GROUPS[(number - 1) // 20] if 1 <= number <= 100 else None


def read_h5(case: Case) -> Volume:
    """Read one volume file; spacing, affine and orientation are unknown.

    Raises:
        UserError: missing, truncated, not h5, or without `image` or `label`.
    """
    import h5py

    path = case.image_path
    if not path.exists():
        raise DataError("the file is missing", path, "Get it again.")
    try:
        with h5py.File(path, "r") as file:
            content = {key: np.asarray(file[key]) for key in ("image", "label") if key in file}
            keys = ", ".join(sorted(file)) or "none"
    except Exception as error:  # h5py raises OSError, RuntimeError, ... on damaged files
        problem = f"not a readable h5 file ({type(error).__name__}: {error})"
        remedy = "The download or copy was probably cut off: get the file again."
        raise DataError(problem, path, remedy) from error
    for key in ("image", "label"):
        if key not in content:
            remedy = "Use the volume files of SSL4MIS or WSL4MIS."
            raise DataError(f"there is no '{key}' in the file (keys: {keys})", path, remedy)
    image = content["image"].astype(np.float32, copy=False)
    return Volume(image, as_label(content["label"], path))
