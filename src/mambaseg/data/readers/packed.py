"""ACDC in a pack: a folder that is small enough to travel with a checkout. How it is made: `pack`.

    pack.json                   what each case is: patient, phase, group, spacing, shape, digest
    patient001_ED.npz           `image` (Z, H, W) uint8, 0 to 255, and `label` (Z, H, W) uint8

An image is what preprocessing makes of its volume (min–max to [0, 1]) in steps of 1/255, so no
intensity is further than 1/510 from what it was. Affine and orientation were left out.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mambaseg.data.case import Case, DataError, Volume
from mambaseg.data.files import AGAIN, check_file
from mambaseg.data.fingerprint import digest_of
from mambaseg.storage.run_folder import file_digest
from mambaseg.storage.untrusted import ForeignFileError, read_arrays, read_json

INDEX = "pack.json"
FORMAT = "mambaseg-pack-1"
LEVELS = 255
REMEDY = "Pack the data again (python -m mambaseg.data.pack ROOT OUT), or copy the folder."
_ID = re.compile(r"(patient\d+)_(ED|ES)")


def survey_packed(root: Path) -> list[Case]:
    """The cases of a pack, sorted by id; no image is opened.

    Raises:
        UserError: the index is not what `pack` writes.
    """
    path = root / INDEX
    try:
        index = read_json(path)
    except ForeignFileError as error:
        raise DataError(f"is no index of a pack ({error})", path, REMEDY) from error
    found = index.get("format") if isinstance(index, dict) else None
    if found != FORMAT:
        raise DataError(f"the format is {found!r}, not {FORMAT!r}", path, REMEDY)
    entries = index.get("cases")
    if not isinstance(entries, list) or not entries or index.get("digest") != digest_of(entries):
        raise DataError("was changed after it was written", path, REMEDY)
    try:
        cases = [_case(root, entry) for entry in entries]
    except (KeyError, TypeError, ValueError) as error:
        problem = f"an entry is damaged ({type(error).__name__}: {error})"
        raise DataError(problem, path, REMEDY) from error
    if len({case.id for case in cases}) != len(cases):
        raise DataError("a case stands in it twice", path, REMEDY)
    return sorted(cases, key=lambda case: case.id)


def _case(root: Path, entry: dict[str, Any]) -> Case:
    match = _ID.fullmatch(entry["id"])
    if not match:
        raise ValueError("the id of a case is not like patient001_ED")
    group, digest, spacing = entry["group"], entry["digest"], entry["spacing"]
    if not (group is None or isinstance(group, str)) or not isinstance(digest, str):
        raise TypeError("group or digest is not text")
    if spacing is not None:
        z, y, x = map(float, spacing)
        if not all(0 < side < float("inf") for side in (z, y, x)):
            raise ValueError("a voxel size is not positive")
        spacing = (z, y, x)
    path = root / f"{match[0]}.npz"
    reader = partial(read_packed, digest=digest, spacing=spacing)
    return Case(match[0], match[1], match[2], group, path, path, reader)


def read_packed(case: Case, *, digest: str, spacing: tuple[float, float, float] | None) -> Volume:
    """Read a case of a pack: intensities 0 to 255; affine and orientation are unknown.

    Args:
        case: of `survey_packed`.
        digest: of its file, as the index has it.
        spacing: likewise.

    Raises:
        UserError: the file is missing, damaged, or of another pack.
    """
    path = case.image_path
    check_file(path)
    if file_digest(path) != digest:
        raise DataError("holds other bytes than the pack's index says", path, f"{AGAIN} {REMEDY}")
    try:
        arrays = read_arrays(path, ("image", "label"), _is_volume)
    except ForeignFileError as error:
        raise DataError(f"is no case of a pack ({error})", path, REMEDY) from error
    if missing := {"image", "label"} - arrays.keys():
        raise DataError(f"holds no {' and no '.join(sorted(missing))}", path, REMEDY)
    return Volume(arrays["image"].astype(np.float32)[:, None], arrays["label"], spacing)


def _is_volume(name: str, array: np.ndarray) -> bool:
    return array.dtype == np.uint8 and array.ndim == 3 and array.size > 0
