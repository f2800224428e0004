"""One case: where its files are, how they are read, and what makes it fit for use.

Images are `(Z, C, H, W)` = (z, channel, y, x), a batch of slices; labels are `(Z, H, W)`. Nothing
is reoriented or resampled here, as in the published ACDC pipelines: rows and columns are the
file's own.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mambaseg.data.slicing import order_of, reordered, slice_axis
from mambaseg.errors import UserError
from mambaseg.storage.untrusted import readable

ROUNDED = 1e-3  # how far a label's value may be from the whole number that it stands for
_SAYINGS: ContextVar[list[str] | None] = ContextVar("_SAYINGS", default=None)
log = logging.getLogger(__name__)


class DataError(UserError):
    """A file or folder of the data set cannot be used; the parts of the message stay apart.

    Args:
        problem: what is wrong, without a full stop.
        path: the file or folder it is about.
        remedy: what to do, one or more sentences.
    """

    def __init__(self, problem: str, path: Path | None = None, remedy: str = "") -> None:
        where = f"{readable(str(path))}: " if path is not None else ""
        super().__init__(f"{where}{problem}. {remedy}" if remedy else f"{where}{problem}")
        self.problem = problem
        self.path = path
        self.remedy = remedy


@dataclass(frozen=True)
class Volume:
    """The arrays of one case, as stored; "z" is the axis along which slices are stacked.

    Attributes:
        image: `(Z, C, H, W)` float32, in the file's own intensity units.
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
        phase: "ED" (end-diastole) or "ES" (end-systole); None where that means nothing.
        group: pathology group (NOR, MINF, DCM, HCM, RV) or None.
        image_path: file with the image, or the first of several.
        label_path: file with the label, the same as `image_path` for h5; None without label.
        reader: module-level function that reads the case, or a `functools.partial` of one with
            plain keywords (so that a case can be pickled and described).
        more_images: further files of an image that is spread over several: its channels, its
            slices, the voxels beside a header.
        more_labels: likewise of a label.
        part: `train`, `val` or `test`, where the data set itself says so (`data.split=given`).
        label_map: pairs (value in the file, class); None takes the values as they are.
        value_names: pairs (value in the file, name), where the data set itself names them.
        slicing: which axis of the file becomes the first one, a rule of `slicing`.
        fold: of the data set's own cross-validation, that `part` is of; None where it has none.
        patient_assumed: nobody said whose the case is, so it counts as a patient of its own.
    """

    id: str
    patient: str
    phase: str | None
    group: str | None
    image_path: Path
    label_path: Path | None
    reader: Callable[[Case], Volume]
    more_images: tuple[Path, ...] = ()
    more_labels: tuple[Path, ...] = ()
    part: str | None = None
    label_map: tuple[tuple[int, int], ...] | None = None
    value_names: tuple[tuple[int, str], ...] = ()
    slicing: str = "stored"
    fold: int | None = None
    patient_assumed: bool = False

    def load(self) -> Volume:
        """Read the case, slice it and map its labels; what it holds is not validated.

        Raises:
            UserError: a file cannot be read, or a label is not named in the map.
        """
        volume = self.reader(self)
        axis = slice_axis(volume.spacing, self.slicing)
        if axis != 0 and volume.image.ndim == 4:
            volume = _sliced(volume, order_of(axis))
        if self.label_map is None or volume.label is None:
            return volume
        return replace(volume, label=_mapped(self, volume.label, dict(self.label_map)))

    def read(self, num_classes: int | None = None, channels: int | None = None) -> Volume:
        """Load and validate the case (see `validate_volume`).

        Raises:
            UserError: the files cannot be read or do not hold what they should.
        """
        try:
            volume = self.load()
            validate_volume(self, volume, num_classes, channels)
        except MemoryError as error:
            problem, remedy = f"{self.id} does not fit into memory", "Free some, or leave it out."
            raise DataError(problem, self.image_path, remedy) from error
        return volume

    def sources(self) -> tuple[Path, ...]:
        """The files the arrays come from, each once."""
        paths = (self.image_path, *self.more_images, self.label_path, *self.more_labels)
        return tuple(dict.fromkeys(path for path in paths if path is not None))

    @property
    def recipe(self) -> str:
        """How its arrays come from its files: reader and keywords, label map, slicing."""
        reader: Any = self.reader
        keywords = []
        if isinstance(reader, functools.partial):
            keywords, reader = sorted(reader.keywords.items()), reader.func
        made = f"{reader.__module__}.{reader.__qualname__} {keywords} {self.label_map}"
        return made if self.slicing == "stored" else f"{made} {self.slicing}"


def validate_volume(
    case: Case, volume: Volume, num_classes: int | None = None, channels: int | None = None
) -> None:
    """Make sure that `volume` is what the rest of the package relies on.

    The image is 3-D with channels (as many as asked for), not empty and finite; the label has its
    shape. With `num_classes` a label is required and may hold only 0..num_classes-1; without, only
    what is there is checked.

    Raises:
        UserError: with the file and what to do about it.
    """
    for problem in find_problems(case, volume, num_classes, channels):
        raise problem


def find_problems(
    case: Case, volume: Volume, num_classes: int | None = None, channels: int | None = None
) -> Iterator[DataError]:
    """All that `validate_volume` objects to, the image first."""
    yield from _image_problems(case, volume.image, channels)
    if volume.label is None:
        if num_classes is not None:
            yield DataError(
                f"{case.id} has no label",
                case.image_path,
                "Training and scoring need one: put the _gt file beside the image (current ACDC "
                "downloads have it for every patient), or leave the patient out.",
            )
        return
    grid = (*volume.image.shape[:1], *volume.image.shape[2:])
    if volume.label.shape != grid:
        yield DataError(
            f"the label of {case.id} has shape {volume.label.shape} but the image "
            f"({case.image_path.name}) has {grid} (z, y, x)",
            case.label_path or case.image_path,
            "The two files do not belong together: take both from the same download.",
        )
    yield from label_problems(case, volume.label, num_classes)


def label_problems(case: Case, label: np.ndarray, num_classes: int | None) -> Iterator[DataError]:
    """Values that are no class of the data set."""
    if num_classes is not None and label.size and int(label.max()) >= num_classes:
        values = np.unique(label).tolist()
        wrong = [value for value in values if value >= num_classes]
        share = np.count_nonzero(label >= num_classes) / label.size
        mapped = [f"{value}: {value if value < num_classes else '?'}" for value in values[:6]]
        more = ", ..." if len(values) > 6 else ""
        yield DataError(
            f"the label of {case.id} holds {_listed(wrong)} (in {share:.2%} of it); allowed are "
            f"0..{num_classes - 1}",
            case.label_path or case.image_path,
            "Replace the file by the original, or map its labels to the data set's classes, every "
            f"value of all files: 'data.label_map={{{', '.join(mapped)}{more}}}'.",
        )


def _image_problems(case: Case, image: np.ndarray, channels: int | None) -> Iterator[DataError]:
    """3-D with channels, not empty, finite."""
    if image.ndim != 4:
        yield DataError(
            f"the image of {case.id} is {image.ndim - 1}-D (shape {image.shape} with channels), "
            "expected is one 3-D volume",
            case.image_path,
            "Use the file of one frame (patientXXX_frameFF), not the whole cine (_4d).",
        )
    elif channels is not None and image.shape[1] != channels:
        yield DataError(
            f"the image of {case.id} has {image.shape[1]} channels, the data set has {channels}",
            case.image_path,
            "Give every case the same channels, or set data.in_channels to what they have.",
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


def checked_label_map(
    mapping: Mapping[int, int] | None, num_classes: int
) -> tuple[tuple[int, int], ...] | None:
    """`data.label_map` as a case carries it.

    Raises:
        UserError: a value is no byte, or a class is not one of 0..num_classes-1.
    """
    if mapping is None:
        return None
    for value, index in mapping.items():
        if not (type(value) is int and 0 <= value <= 255 and type(index) is int):
            raise UserError(f"data.label_map: {value}: {index} does not map 0..255 to a class")
        if not 0 <= index < num_classes:
            raise UserError(
                f"data.label_map: {value} is mapped to {index}, classes are 0..{num_classes - 1}"
            )
    return tuple(sorted(mapping.items()))


def _sliced(volume: Volume, order: tuple[int, int, int]) -> Volume:
    """The volume with its axes (z, y, x) in another order, and what says where they point."""
    label, spacing = volume.label, volume.spacing
    affine, orientation = volume.affine, volume.orientation
    columns = [2 - axis for axis in reversed(order)]  # of (x, y, z)
    return Volume(
        reordered(volume.image, order, (0, 2, 3)),
        None if label is None or label.ndim != 3 else reordered(label, order, (0, 1, 2)),
        None if spacing is None else (spacing[order[0]], spacing[order[1]], spacing[order[2]]),
        None if affine is None else affine[:, [*columns, 3]],
        orientation and "".join(orientation[column] for column in columns),
    )


def _mapped(case: Case, label: np.ndarray, mapping: Mapping[int, int]) -> np.ndarray:
    """The classes of a label by `data.label_map`."""
    unknown = [value for value in map(int, np.unique(label)) if value not in mapping]
    if unknown:
        raise DataError(
            f"the label of {case.id} holds {_listed(unknown)}, not named in data.label_map "
            f"({dict(mapping)})",
            case.label_path or case.image_path,
            "Name every value of the files; what is to be background is mapped to 0.",
        )
    classes = np.zeros(256, np.uint8)
    for value, index in mapping.items():
        classes[value] = index
    return classes[label]


@contextlib.contextmanager
def sayings() -> Iterator[list[str]]:
    """What reading in this thread says about sound files; outside the block it is logged."""
    said: list[str] = []
    token = _SAYINGS.set(said)
    try:
        yield said
    finally:
        _SAYINGS.reset(token)


def _say(sentence: str) -> None:
    said = _SAYINGS.get()
    if said is None:
        log.warning(sentence)
    else:
        said.append(sentence)


def as_label(array: np.ndarray, path: Path) -> np.ndarray:
    """Class numbers as uint8; a label stored as float is accepted when its values are whole.

    Values within `ROUNDED` of a whole number are rounded and said: a header's scale (2.00007) or
    arithmetic (0.9999999) made them so.

    Raises:
        UserError: NaN, fractions, or values outside 0..255.
    """
    if array.dtype == np.uint8:
        return array
    remedy = "Labels are whole class numbers: replace the file by the original label map."
    if array.dtype.kind not in "biuf":
        raise DataError(f"the label has data type {array.dtype}", path, remedy)
    if array.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            whole = np.rint(array)
            off = np.abs(array - whole)  # NaN for NaN and infinity, which are not below the limit
        if not (off <= ROUNDED).all():
            raise DataError(f"the label holds {_listed(array[~(off <= ROUNDED)])}", path, remedy)
        if off.any():
            examples = _listed(array[off > 0], digits=7)
            _say(f"{path.name}: the label holds {examples}, rounded to whole numbers")
        array = whole
    outside = (array < 0) | (array > 255)
    if outside.any():
        raise DataError(f"the label holds {_listed(array[outside])}", path, remedy)
    return array.astype(np.uint8)


def _listed(values: np.ndarray | list[int], limit: int = 4, *, digits: int = 6) -> str:
    """Distinct values in words: "value 7", "values 4, 5, ..."."""
    distinct = np.unique(np.asarray(values))
    shown = ", ".join(f"{value:.{digits}g}" for value in distinct[:limit])
    more = ", ..." if len(distinct) > limit else ""
    return f"value{'s' if len(distinct) > 1 else ''} {shown}{more}"
