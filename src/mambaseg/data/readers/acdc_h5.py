"""ACDC as redistributed in h5 by SSL4MIS and WSL4MIS: one file per annotated frame.

Each file holds `image` and `label`, that of WSL4MIS `scribble` too, all `(Z, H, W)`. Spacing,
orientation and Info.cfg were left out. Intensities differ between the two (SSL4MIS: min–max per
volume; WSL4MIS: clipped at 99 % first), so networks trained on one are not at home on the other.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mambaseg.data.case import Case, Scribble
from mambaseg.data.readers.reader import named
from mambaseg.data.validation import (
    DataError,
    as_float32,
    as_label,
    check_array,
    check_file,
    decoding,
)
from mambaseg.data.volume import Volume

# SSL4MIS (and Mamba-UNet) and WSL4MIS; "" is one of these folders given as root itself.
FOLDERS = ("data", "ACDC_training_volumes", "")
FILE_NAME = re.compile(r"(patient\d+)_frame(\d+)\.h5")
PHASES: tuple[str, ...] = ("ED", "ES")
GROUPS = ("DCM", "HCM", "MINF", "NOR", "RV")
UNLABELLED = 4  # in a scribble (Valvano et al., IEEE TMI 40(8), 2021)


def volume_files(root: Path) -> list[Path]:
    """List the volume files below `root`; `UserError` for more than one known folder."""
    files = [path for folder in FOLDERS for _, path in named(root / folder, FILE_NAME)]
    if len({path.parent for path in files}) > 1:
        remedy = f"Point data.root at one of them, such as {files[0].parent}."
        raise DataError("holds h5 volumes in more than one folder", root, remedy)
    return files


def find_volumes(files: Iterable[Path]) -> Iterator[Case | DataError]:
    """The cases in volume files, and what is wrong with the rest.

    The frame number says which phase comes first, not which frame it was: SSL4MIS calls every ES
    frame 02, WSL4MIS keeps the number of the cine. In both, ED is the lower one (it is so for all
    100 patients), hence phases go by rank within the patient.
    """
    frames: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(files, key=lambda path: int(re.findall(r"\d+", path.name)[1])):
        frames[path.name.partition("_")[0]].append(path)
    for patient, found in sorted(frames.items()):
        phases = PHASES
        if len(found) != len(PHASES):
            names = ", ".join(path.name for path in found)
            problem = f"{patient} should have two frames (ED and ES), found {len(found)}: {names}"
            remedy = "Add the missing file, or take the extra one away."
            yield DataError(problem, found[-1], remedy)
            phases = tuple(path.stem.partition("_")[2] for path in found)
        group = training_group(patient)
        for phase, path in zip(phases, found, strict=True):
            scribble = Scribble(path, UNLABELLED, partial(read_h5, label="scribble"))
            yield Case(
                f"{patient}_{phase}", patient, phase, group, path, path, read_h5, scribble=scribble
            )


def training_group(patient: str) -> str | None:
    """Pathology group of the official training patients 1..100, twenty each; None for others."""
    number = int(patient.removeprefix("patient"))
    return GROUPS[(number - 1) // 20] if 1 <= number <= 100 else None


def read_h5(case: Case, *, label: str = "label") -> Volume:
    """Read `image` and a label, 3-D, of one volume file without spacing, affine and orientation.

    `label` names the label in the file; none is read where the case has no `label_path`.
    Only what lies in the file itself is read: a link or a virtual or external data set may lead to
    any file of the machine.
    """
    import h5py

    path = case.image_path
    check_file(path)
    keys = ["image"] if case.label_path is None else ["image", label]
    with decoding(path, "h5"), h5py.File(path, "r") as file:
        image, *labels = (np.asarray(_data_set(file, key, path)) for key in keys)
    known = as_label(labels[0], path) if labels else None
    return Volume(as_float32(path, image)[:, None], known)


def _data_set(file: Any, key: str, path: Path) -> Any:
    """A data set that is stored in the file itself, as far as it may be read into memory."""
    import h5py

    keys = sorted(file.keys())  # `in file` follows links
    linked = key not in keys or not isinstance(file.get(key, getlink=True), h5py.HardLink)
    found = None if linked else file[key]
    if (
        not isinstance(found, h5py.Dataset)
        or found.shape is None
        or found.is_virtual
        or found.external
    ):
        problem = f"'{key}' is no array that is stored in this file (keys: {', '.join(keys)})"
        raise DataError(problem, path, "Use the volume files of SSL4MIS or WSL4MIS.")
    check_array(path, found.shape, found.dtype, key)
    if found.chunks:  # a chunk is unpacked as a whole
        check_array(path, found.chunks, found.dtype, f"chunk of '{key}'")
    return found
