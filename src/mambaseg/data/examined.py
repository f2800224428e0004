"""One case as data-check sees it: read completely, whatever comes of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from mambaseg.data.case import Case
from mambaseg.data.formats.nifti import read_nifti
from mambaseg.data.formats.volume import Volume
from mambaseg.data.plausibility import remarks
from mambaseg.data.validation import (
    DataError,
    as_label,
    collected_warnings,
    label_problems,
)

Remarks = Callable[[Volume, int], Iterable[str]]


@dataclass(frozen=True)
class Examined:
    """What is kept of a case after reading it; arrays are let go.

    Attributes:
        case: which.
        digest: of shape and voxels of the image; None when the case cannot be used.
        shape: (Z, C, H, W) of the image.
        spacing: mm as (z, y, x); None when unknown.
        orientation: axis codes of (x, y, z); None when unknown.
        label_counts: voxels with each value of the label 0..255.
        remarks: what is possible and still suspicious.
        errors: why it cannot be used.
    """

    case: Case
    digest: str | None = None
    shape: tuple[int, ...] = ()
    spacing: tuple[float, float, float] | None = None
    orientation: str | None = None
    label_counts: tuple[int, ...] = ()
    remarks: tuple[str, ...] = ()
    errors: tuple[DataError, ...] = ()


def examine(case: Case, num_classes: int, further: Remarks) -> Examined:
    """Read a case; `further` are the remarks of its layout."""
    try:
        with collected_warnings() as said:
            volume = case.load()
        errors = list(case.problems(volume, num_classes))
        if errors:
            return Examined(case, errors=tuple(errors))
        content = hashlib.sha256(str(volume.image.shape).encode())
        content.update(np.ascontiguousarray(volume.image).data)
        assert volume.label is not None  # or there would be an error
        counts = np.bincount(volume.label.ravel(), minlength=256)
        return Examined(
            case,
            content.hexdigest(),
            volume.image.shape,
            volume.spacing,
            volume.orientation,
            tuple(map(int, counts)),
            (*said, *remarks(volume), *further(volume, num_classes)),
        )
    except DataError as error:
        return Examined(case, errors=(error, *_label_errors(case, error, num_classes)))
    except Exception as error:  # the other cases are still to be looked at
        problem = f"it could not be examined ({type(error).__name__}: {error})"
        remedy = "Leave the case out, and report this as a bug if the file is sound."
        return Examined(case, errors=(DataError(problem, case.image_path, remedy),))


def _label_errors(case: Case, error: DataError, num_classes: int) -> list[DataError]:
    """An unreadable image hides its label: look at that file too."""
    path = case.label_path
    if error.path != case.image_path or path is None or path == case.image_path:
        return []
    if not path.name.endswith((".nii", ".nii.gz")):
        return []
    try:
        label = as_label(read_nifti(path).image[0, :, 0], path)
    except DataError as second:
        return [second]
    return list(label_problems(label, path, num_classes))
