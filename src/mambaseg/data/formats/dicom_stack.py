"""Where the slices of DICOM files lie in space and time, from their headers through pydicom."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mambaseg.data.validation import AGAIN, DataError, check_array, check_file, voxel_size
from mambaseg.errors import UserError

TOLERANCE_MM = 0.1  # of a corner of a slice from its place on the grid
_SAME_MM = 0.005  # slices nearer to each other lie at one position
_EXPORT = "Export one volume per series, complete, or convert it to NIfTI (such as by dcm2niix)."
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])  # DICOM's axes of the patient, and NIfTI's
_PLACE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
# functional groups of multi-frame files, whose attributes other files have at the top
_GROUPS = (
    "PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence",
    "PixelValueTransformationSequence", "FrameContentSequence", "CardiacSynchronizationSequence",
    "TemporalPositionSequence",
)  # fmt: skip
_INDICES = ("TemporalPositionIdentifier", "TemporalPositionIndex")  # one for a time of all slices
_TIMES = (*_INDICES, "TemporalPositionTimeOffset", "NominalCardiacTriggerDelayTime", "TriggerTime")
_FRAME_TIMES = (0x00181063, 0x00181065)  # what steps from frame to frame: FrameTime and its vector
_NO_PICTURES = ("Segmentation", "RT Dose", "Parametric Map")  # objects with pixels that are none


class Frame(NamedTuple):
    """One slice at one time.

    Attributes:
        path: of its file.
        number: in its file, from 0.
        header: of its file, without pixels.
        about: what the header says of this frame alone.
        origin: (3,) mm, the centre of the first pixel; None where the header does not say.
        axes: (3, 2) mm, from one column and from one row to the next; None likewise.
    """

    path: Path
    number: int
    header: Any
    about: Any
    origin: Any
    axes: Any

    @property
    def name(self) -> str:
        """What a message calls it."""
        several = int(self.header.get("NumberOfFrames") or 1) > 1
        return f"frame {self.number + 1} of {self.path.name}" if several else self.path.name


@dataclass(frozen=True)
class Stack:
    """Frames in the order of their volume.

    Attributes:
        frames: one list of slices for each time.
        affine: 4x4, voxel (x, y, z) to mm, in NIfTI's axes.
        spacing: mm as (z, y, x); None where the headers leave some of it out.
    """

    frames: list[list[Frame]]
    affine: npt.NDArray[np.float64]
    spacing: tuple[float, float, float] | None


def stack(paths: Sequence[Path]) -> Stack:
    """Where the frames of one series lie, from the headers alone.

    Raises:
        UserError: as `read_dicom`.
    """
    frames = [frame for path in paths for frame in _frames(path)]
    first = frames[0]
    rows, columns = first.header.Rows, first.header.Columns
    for frame in frames:
        if (frame.header.Rows, frame.header.Columns) != (rows, columns):
            problem = f"has {frame.header.Rows} x {frame.header.Columns} pixels, {first.path.name}"
            raise DataError(f"{problem} of the same series {rows} x {columns}", frame.path, _EXPORT)
    check_array(first.path, (len(frames), rows, columns), np.dtype(np.float32), "series")
    lost = next((frame for frame in frames if frame.origin is None), None)
    if lost is None:
        return _located(frames)
    if len(frames) > 1 and (
        len(paths) > 1 or first.header.get("FrameIncrementPointer") not in _FRAME_TIMES
    ):
        missing = next(name for name in _PLACE if not lost.about.get(name))
        problem = f"has no {missing}: where its slices lie cannot be known"
        raise DataError(problem, lost.path, _EXPORT)
    height, width = map(float, first.about.get("PixelSpacing") or (1, 1))
    return Stack([[frame] for frame in frames], np.diag([-width, -height, 1.0, 1.0]), None)


def _located(frames: list[Frame]) -> Stack:
    """Frames that all say where they lie, on the grid that the first one's axes give."""
    first = frames[0]
    normal = np.cross(*first.axes.T)
    normal /= np.linalg.norm(normal)
    heights = np.array([frame.origin @ normal for frame in frames])
    order = np.argsort(heights, kind="stable")
    places = np.split(order, np.flatnonzero(np.diff(heights[order]) > _SAME_MM) + 1)
    slices = [_in_time([frames[index] for index in place]) for place in places]
    _check_times(slices)
    bottom, top = (float(np.mean(heights[place])) for place in (places[0], places[-1]))
    if len(slices) > 1:
        step = (top - bottom) / (len(slices) - 1)
    else:
        thick = value_of(first, "SpacingBetweenSlices") or value_of(first, "SliceThickness")
        step = abs(thick or 0.0)
    affine = np.eye(4)
    affine[:3] = np.column_stack([first.axes, normal * (step or 1.0), slices[0][0].origin])
    _check_grid(slices, affine)
    affine[:3] = _LPS_TO_RAS @ affine[:3]
    spacing = voxel_size(first.path, (step, *first.about.PixelSpacing)) if step else None
    return Stack([list(volume) for volume in zip(*slices, strict=True)], affine, spacing)


def _in_time(frames: list[Frame]) -> list[Frame]:
    """The frames of one position, sorted by the first attribute that tells their times apart."""
    if len(frames) == 1:
        return frames
    for name in _TIMES:
        times = [frame.about.get(name) for frame in frames]
        if None not in times and len(set(times)) == len(times):
            return sorted(frames, key=lambda frame: frame.about.get(name))
    one, other = frames[:2]
    raise DataError(
        f"{one.name} lies at the position of {other.name}, and neither says when it was taken "
        "(TriggerTime, TemporalPositionIdentifier)", one.path.parent,
        "Leave one of the two out if it is a copy. Else export one volume per series.",
    )  # fmt: skip


def _check_times(slices: list[list[Frame]]) -> None:
    """Every position has as many times, and their numbers are the same where they have any."""
    first = slices[0]
    for times in slices:
        if len(times) != len(first):
            raise DataError(
                f"the series has {len(first)} frames at the position of {first[0].name} and "
                f"{len(times)} at that of {times[0].name}", first[0].path.parent, _EXPORT,
            )  # fmt: skip
        for name in _INDICES if len(first) > 1 else ():
            if any(
                one.about.get(name) != other.about.get(name)
                for one, other in zip(times, first, strict=True)
            ):
                problem = f"{name} is not that of {first[0].name}"
                raise DataError(problem, times[0].path, _EXPORT)


def _check_grid(slices: list[list[Frame]], affine: npt.NDArray[np.float64]) -> None:
    """Every frame's corners lie where the grid has them."""
    step = float(np.linalg.norm(affine[:3, 2]))
    tolerance = min(TOLERANCE_MM, 0.1 * step) if len(slices) > 1 else TOLERANCE_MM
    for z, frame in ((z, frame) for z, times in enumerate(slices) for frame in times):
        corner = (frame.header.Columns, frame.header.Rows)
        if not (np.abs(frame.axes - affine[:3, :2]) * corner).max() <= TOLERANCE_MM:
            problem = "its orientation or pixel size is not that of the series' other slices"
            raise DataError(problem, frame.path, _EXPORT)
        off = frame.origin - affine[:3] @ [0, 0, z, 1]
        along, distance = abs(float(off @ affine[:3, 2])) / step, float(np.linalg.norm(off))
        if along > tolerance:
            raise DataError(
                f"the {len(slices)} slices of the series are not equally spaced: {frame.name} "
                f"lies {along:.4g} mm off. One is missing, or several volumes are mixed",
                frame.path.parent, _EXPORT,
            )  # fmt: skip
        if not distance <= tolerance:
            raise DataError(
                f"the slices are shifted against each other ({distance:.4g} mm at "
                f"{frame.name}), as with a tilted gantry: they are no rectangular grid",
                frame.path.parent,
                "Resample it to a rectangular grid, such as by dcm2niix, and use the result.",
            )


def _frames(path: Path) -> list[Frame]:
    """The frames of one file, as its header lists them."""
    header = header_of(path)
    if not is_image(header):
        raise DataError("is a DICOM file without an image", path, "Choose the image's series.")
    colours = header.get("PhotometricInterpretation")
    if header.get("SamplesPerPixel", 1) != 1 or colours not in ("MONOCHROME1", "MONOCHROME2"):
        raise DataError(f"the image has colours ({colours})", path, "Use a grey-scale image.")
    if "MOSAIC" in (header.get("ImageType") or ()):
        raise DataError("the image is a mosaic of slices", path, "Convert it, such as by dcm2niix.")
    try:
        count = int(header.get("NumberOfFrames") or 1)
        shared = header.get("SharedFunctionalGroupsSequence") or ()
        each = header.get("PerFrameFunctionalGroupsSequence")
        if each and len(each) != count:
            raise ValueError(f"it lists {len(each)} frames and promises {count}")
        about = (
            [_of_frame(header, (*shared[:1], one)) for one in each] if each else [header] * count
        )
        return [Frame(path, number, header, one, *_place(one)) for number, one in enumerate(about)]
    except (AttributeError, TypeError, ValueError) as error:
        raise unreadable(path, error) from error


def _place(about: Any) -> tuple[Any, Any]:
    """`Frame.origin` and `Frame.axes`.

    Raises:
        ValueError: there are no such axes.
    """
    if not all(about.get(name) for name in _PLACE):
        return None, None
    position, orientation, size = (np.array(about[name].value, float) for name in _PLACE)
    row, column = orientation.reshape(2, 3)
    origin, (height, width) = position.reshape(3), size
    products = [row @ row, column @ column, row @ column]
    if not np.allclose(products, [1, 1, 0], atol=1e-3):
        raise ValueError(f"ImageOrientationPatient is {orientation.tolist()}")
    if not (np.isfinite(origin).all() and 0 < height < np.inf and 0 < width < np.inf):
        raise ValueError(f"PixelSpacing is {size.tolist()} at {origin.tolist()}")
    return origin, np.column_stack([row * width, column * height])


def value_of(frame: Frame, name: str) -> float | None:
    """An attribute of a frame as a finite number; None where it is absent or empty.

    Raises:
        UserError: it is none.
    """
    value = frame.about.get(name)
    if value in (None, ""):
        return None
    try:
        if np.isfinite(found := float(value)):
            return found
    except (TypeError, ValueError):
        pass
    raise DataError(f"{name} is {value!r}", frame.path, AGAIN)


def _of_frame(header: Any, groups: Sequence[Any]) -> Any:
    """The attributes of a frame's functional groups side by side, as in a file of one frame."""
    about = pydicom_package().Dataset()
    for name in ("RescaleSlope", "RescaleIntercept"):
        if name in header:
            about[name] = header[name]
    for group in groups:
        for name in _GROUPS:
            if group.get(name):
                about.update(group[name].value[0])
    return about


def header_of(path: Path, *, only: Sequence[str] | None = None) -> Any:
    """A file's header, which is that of a DICOM file and not cut off.

    Args:
        path: of the file.
        only: names of attributes to read, among them those that `is_image` asks for; None is all.

    Raises:
        UserError: it is not, or pydicom is not installed.
    """
    check_file(path)
    pydicom = pydicom_package()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=only)
            is_image(header)
    except Exception as error:  # as above
        raise unreadable(path, error) from error
    return header


def is_image(header: Any) -> bool:
    """Whether a header is of an image, by its class and its size.

    Raises:
        ValueError: it should be, but there is no size; or it is of nothing at all.
    """
    about = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
    name = pydicom_package().uid.UID(about or "").name
    if header.get("Rows") and header.get("Columns"):
        return not any(kind in name for kind in _NO_PICTURES)
    if not name or "Image Storage" in name:
        raise ValueError("no DICOM file, or cut off")
    return False


def pydicom_package() -> Any:
    """The package, which is optional.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pydicom
    except ImportError as error:
        raise UserError("DICOM is read with pydicom: pip install -e '.[images]'") from error
    return pydicom


def unreadable(path: Path, error: Exception) -> DataError:
    """What is said of a file that pydicom or its decoders stumble over."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    remedy = f"{AGAIN} If it is no slice of a series, move it to another folder."
    return DataError(f"cannot be read as DICOM ({reason})", path, remedy)
