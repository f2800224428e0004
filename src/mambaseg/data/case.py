"""One case: where its files are, how they are read, and what makes it fit for use.

Arrays are `(Z, H, W)` = (z, y, x). Nothing is reoriented or resampled here, as in the published
ACDC pipelines: rows and columns are the file's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mambaseg.errors import UserError


class DataError(UserError):
    """A file or folder of the data set cannot be used; the parts of the message stay apart.

    Args:
        problem: what is wrong, without a full stop.
        path: the file or folder it is about.
        remedy: what to do, one or more sentences.
    """

    def __init__(self, problem: str, path: Path | None = None, remedy: str = "") -> None:
        where = f"{path}: " if path is not None else ""
        super().__init__(f"{where}{problem}. {remedy}" if remedy else f"{where}{problem}")
        self.problem = problem
        self.path = path
        self.remedy = remedy


@dataclass(frozen=True)
class Volume:
    """The arrays of one case, as stored.

    Attributes:
        image: `(Z, H, W)` float32, in the file's own intensity units.
        label: `(Z, H, W)` uint8, or None for a case without one.
        spacing: voxel size in mm as (z, y, x); None when the file does not tell.
        affine: 4x4, from voxel (x, y, z) to mm, as stored; None when the file has none.
        orientation: axis codes of (x, y, z) such as "LPS"; None when unknown.
    """

    image: np.ndarray
    label: np.ndarray | None
    spacing: tuple[float, float, float] | None = None
    affine: np.ndarray | None = None
    orientation: str | None = None


@dataclass(frozen=True)
class Case:
    """One annotated phase of one patient; holds paths, no arrays.

    Attributes:
        id: "patient001_ED".
        patient: "patient001"; splits go by it.
        phase: "ED" (end-diastole) or "ES" (end-systole).
        group: pathology group (NOR, MINF, DCM, HCM, RV) or None.
        image_path: file with the image.
        label_path: file with the label, the same as `image_path` for h5; None without label.
        reader: module-level function that reads the case (so that a case can be pickled).
    """

    id: str
    patient: str
    phase: str
    group: str | None
    image_path: Path
    label_path: Path | None
    reader: Callable[[Case], Volume]

    def read(self, num_classes: int | None = None) -> Volume:
        """Read and validate the case (see `validate_volume`).

        Raises:
            UserError: the files cannot be read or do not hold what they should.
        """
        try:
            volume = self.reader(self)
            validate_volume(self, volume, num_classes)
        except MemoryError as error:
            problem, remedy = f"{self.id} does not fit into memory", "Free some, or leave it out."
            raise DataError(problem, self.image_path, remedy) from error
        return volume

    def sources(self) -> tuple[Path, ...]:
        """The files the arrays come from, each once."""
        paths = (self.image_path, self.label_path)
        return tuple(dict.fromkeys(path for path in paths if path is not None))


def validate_volume(case: Case, volume: Volume, num_classes: int | None = None) -> None:
    """Make sure that `volume` is what the rest of the package relies on.

    The image is 3-D, not empty and finite; the label has its shape. With `num_classes` a label is
    required and may hold only 0..num_classes-1; without, only what is there is checked.

    Raises:
        UserError: with the file and what to do about it.
    """
    for problem in find_problems(case, volume, num_classes):
        raise problem


def find_problems(
    case: Case, volume: Volume, num_classes: int | None = None
) -> Iterator[DataError]:
    """All that `validate_volume` objects to, the image first."""
    yield from _image_problems(case, volume.image)
    if volume.label is None:
        if num_classes is not None:
            yield DataError(
                f"{case.id} has no label",
                case.image_path,
                "Training and scoring need one: put the _gt file beside the image (current ACDC "
                "downloads have it for every patient), or leave the patient out.",
            )
        return
    if volume.label.shape != volume.image.shape:
        yield DataError(
            f"the label of {case.id} has shape {volume.label.shape} but the image "
            f"({case.image_path.name}) has {volume.image.shape} (z, y, x)",
            case.label_path or case.image_path,
            "The two files do not belong together: take both from the same download.",
        )
    yield from label_problems(case, volume.label, num_classes)


def label_problems(case: Case, label: np.ndarray, num_classes: int | None) -> Iterator[DataError]:
    """Values that are no class of the data set."""
    if num_classes is not None and label.size and int(label.max()) >= num_classes:
        wrong = [int(value) for value in np.unique(label) if value >= num_classes]
        yield DataError(
            f"the label of {case.id} holds {_listed(wrong)}; allowed are 0..{num_classes - 1}",
            case.label_path or case.image_path,
            "Replace the file by the original, or map its labels to the data set's classes.",
        )


def _image_problems(case: Case, image: np.ndarray) -> Iterator[DataError]:
    """3-D, not empty, finite."""
    if image.ndim != 3:
        yield DataError(
            f"the image of {case.id} is {image.ndim}-D (shape {image.shape}), expected is one 3-D "
            "volume",
            case.image_path,
            "Use the file of one frame (patientXXX_frameFF), not the whole cine (_4d).",
        )
    if image.size == 0:
        yield DataError(
            f"the image of {case.id} is empty (shape {image.shape})",
            case.image_path,
            "Download the file again.",
        )
    finite = np.isfinite(image)
    if not finite.all():
        count = image.size - int(np.count_nonzero(finite))
        yield DataError(
            f"the image of {case.id} has {count} of {image.size} voxels that are NaN or infinite",
            case.image_path,
            "Download the file again, or export it again without NaN.",
        )


def as_label(array: np.ndarray, path: Path) -> np.ndarray:
    """Class numbers as uint8; a label stored as float is accepted when its values are whole.

    Raises:
        UserError: NaN, fractions, or values outside 0..255.
    """
    if array.dtype == np.uint8:
        return array
    remedy = "Labels are whole class numbers: replace the file by the original label map."
    if array.dtype.kind not in "biuf":
        raise DataError(f"the label has data type {array.dtype}", path, remedy)
    if array.dtype.kind == "f":
        whole = array == np.floor(array)  # False for NaN; infinity is caught by the range below
        if not whole.all():
            raise DataError(f"the label holds {_listed(array[~whole])}", path, remedy)
    outside = (array < 0) | (array > 255)
    if outside.any():
        raise DataError(f"the label holds {_listed(array[outside])}", path, remedy)
    return array.astype(np.uint8)


def _listed(values: np.ndarray | list[int], limit: int = 4) -> str:
    """Distinct values in words: "value 7", "values 4, 5, ..."."""
    distinct = np.unique(np.asarray(values))
    shown = ", ".join(f"{value:g}" for value in distinct[:limit])
    more = ", ..." if len(distinct) > limit else ""
    return f"value{'s' if len(distinct) > 1 else ''} {shown}{more}"
