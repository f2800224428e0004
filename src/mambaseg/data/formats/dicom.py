"""DICOM files as volumes, through pydicom: where their slices lie in space and time, and pixels."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mambaseg.data.formats.itk import LPS_TO_RAS, read_pixels
from mambaseg.data.formats.nifti import place_on
from mambaseg.data.validation import AGAIN, DataError, check_array, check_file, decoding, voxel_size
from mambaseg.data.volume import Spacing, Volume
from mambaseg.errors import UserError

TOLERANCE_MM = 0.1  # of a corner of a slice from its place on the grid
_SAME_MM = 0.005  # slices nearer to each other lie at one position
_EXPORT = (
    "Export one complete volume on a rectangular grid per series, or convert it to NIfTI (such as "
    "by dcm2niix)."
)
_DAMAGED = f"{AGAIN} If it is no slice of a series, move it to another folder."
_IDENTITY = ("SOPClassUID", "SeriesInstanceUID", "Rows", "Columns")
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
# JPEG of 12 bits and lossless JPEG, for which pydicom needs further packages
_BY_ITK = ("1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")


class _Frame(NamedTuple):
    """One slice at one time."""

    path: Path  # of its file
    number: int  # in its file, from 0
    header: Any  # of its file, without pixels
    about: Any  # what the header says of this frame alone
    origin: Any  # (3,) mm, the centre of the first pixel; None where the header does not say
    axes: Any  # (3, 2) mm, from one column and from one row to the next; None likewise

    @property
    def name(self) -> str:
        """What a message calls it."""
        several = int(self.header.get("NumberOfFrames") or 1) > 1
        return f"frame {self.number + 1} of {self.path.name}" if several else self.path.name

    def value(self, name: str) -> float | None:
        """An attribute as a finite number; None where it is absent or empty."""
        value = self.about.get(name)
        if value in (None, ""):
            return None
        with contextlib.suppress(TypeError, ValueError):
            if np.isfinite(found := float(value)):
                return found
        raise DataError(f"{name} is {value!r}", self.path, AGAIN)


class Stack(NamedTuple):
    """Frames in the order of their volume, a list of slices per time, and their place."""

    frames: list[list[_Frame]]
    affine: npt.NDArray[np.float64]  # 4x4, voxel (x, y, z) to mm in NIfTI's axes
    spacing: Spacing | None  # mm (z, y, x); None where the headers leave some of it out


def series_in(paths: Sequence[Path]) -> list[tuple[Path, ...]]:
    """The files of each series of images, sorted by identity; other objects are left out.

    A file that cannot be read may be a slice of any of them. It is listed with each, so that none
    is read without it.
    """
    series: dict[str, list[Path]] = defaultdict(list)
    damaged = []
    for path in paths:
        try:
            header, is_image = _header(path, only=_IDENTITY)
        except DataError:
            damaged.append(path)
        else:
            if is_image:
                series[str(header.get("SeriesInstanceUID", ""))].append(path)
    if damaged and not series:
        series[""] = []
    return [tuple(sorted([*files, *damaged])) for _, files in sorted(series.items())]


def read_dicom(paths: Sequence[Path]) -> Volume:
    """Read the files of one series, or a single file: `image` (T, Z, 1, H, W).

    Slices are sorted by their position along the normal of their plane, and at each position by
    their time. Pixels are in the units of their own frame's rescale slope and intercept.

    Raises:
        UserError: a file cannot be read or is not grey, or the slices are no regular grid.
    """
    found, affine, spacing = stack(paths)
    files: dict[Path, list[_Frame]] = defaultdict(list)
    for frame in itertools.chain(*found):
        files[frame.path].append(frame)
    pixels: dict[tuple[Path, int], npt.NDArray[Any]] = {}
    for path, held in files.items():
        held.sort(key=lambda frame: frame.number)
        pixels |= {(path, number): plane for number, plane in enumerate(_measured(path, held))}
    array = np.array([[pixels[frame.path, frame.number] for frame in slices] for slices in found])
    header = place_on(array.shape, affine, spacing)
    return Volume(array[:, :, None], None, spacing, affine, header=header)


def stack(paths: Sequence[Path]) -> Stack:
    """Where the frames of one series lie, from the headers alone; errors as of `read_dicom`."""
    frames = [frame for path in paths for frame in _frames(path)]
    first = frames[0]
    rows, columns = size = first.header.Rows, first.header.Columns
    for frame in frames:
        if (frame.header.Rows, frame.header.Columns) != size:
            problem = f"has {frame.header.Rows} x {frame.header.Columns} pixels, {first.path.name}"
            raise DataError(f"{problem} of the same series {rows} x {columns}", frame.path, _EXPORT)
    check_array(first.path, (len(frames), *size), np.dtype(np.float32), "series")
    lost = next((frame for frame in frames if frame.origin is None), None)
    if lost is None:
        return _located(frames)
    film = len(paths) == 1 and first.header.get("FrameIncrementPointer") in _FRAME_TIMES
    if len(frames) > 1 and not film:
        missing = next(name for name in _PLACE if not lost.about.get(name))
        problem = f"has no {missing}: where its slices lie cannot be known"
        raise DataError(problem, lost.path, _EXPORT)
    height, width = map(float, first.about.get("PixelSpacing") or (1, 1))
    return Stack([[frame] for frame in frames], np.diag([-width, -height, 1.0, 1.0]), None)


def _located(frames: list[_Frame]) -> Stack:
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
        step = abs(first.value("SpacingBetweenSlices") or first.value("SliceThickness") or 0.0)
    affine = np.eye(4)
    affine[:3] = np.column_stack([first.axes, normal * (step or 1.0), slices[0][0].origin])
    _check_grid(slices, affine)
    spacing = voxel_size(first.path, (step, *first.about.PixelSpacing)) if step else None
    return Stack([list(times) for times in zip(*slices, strict=True)], LPS_TO_RAS @ affine, spacing)


def _in_time(frames: list[_Frame]) -> list[_Frame]:
    """The frames of one position, sorted by the first attribute that tells their times apart."""
    if len(frames) == 1:
        return frames
    for name in _TIMES:
        times = [frame.about.get(name) for frame in frames]
        if None not in times and len(set(times)) == len(times):
            return sorted(frames, key=lambda frame: frame.about.get(name))
    one, other = frames[:2]
    problem = f"{one.name} lies at the position of {other.name}, and neither says when it was taken"
    remedy = f"Leave one of the two out if it is a copy. Else: {_EXPORT}"
    raise DataError(f"{problem} ({', '.join(_TIMES)})", one.path.parent, remedy)


def _check_times(slices: list[list[_Frame]]) -> None:
    """Every position has as many times, and their numbers are the same where they have any."""
    first, *others = (
        [[frame.about.get(name) for name in _INDICES] for frame in times] for times in slices
    )
    for times, numbers in zip(slices[1:], others, strict=True):
        if len(numbers) != len(first) or (len(first) > 1 and numbers != first):
            problem = (
                f"the {len(first)} times at the position of {slices[0][0].name} are not the "
                f"{len(numbers)} at that of {times[0].name} ({', '.join(_INDICES)})"
            )
            raise DataError(problem, times[0].path.parent, _EXPORT)


def _check_grid(slices: list[list[_Frame]], affine: npt.NDArray[np.float64]) -> None:
    """Every frame's corners lie where the grid has them."""
    step = float(np.linalg.norm(affine[:3, 2]))
    tolerance = min(TOLERANCE_MM, 0.1 * step) if len(slices) > 1 else TOLERANCE_MM
    for z, frame in ((z, frame) for z, times in enumerate(slices) for frame in times):
        corner = (frame.header.Columns, frame.header.Rows)
        turned = (np.abs(frame.axes - affine[:3, :2]) * corner).max()
        off = frame.origin - affine[:3] @ [0, 0, z, 1]
        along, distance = abs(float(off @ affine[:3, 2])) / step, float(np.linalg.norm(off))
        if not turned <= TOLERANCE_MM:
            problem = "has another orientation or pixel size"
        elif along > tolerance:
            problem = f"lies {along:.4g} mm off: one is missing, or several volumes are mixed"
        elif not distance <= tolerance:
            problem = f"is shifted by {distance:.4g} mm, as with a tilted gantry"
        else:
            continue
        problem = (
            f"the {len(slices)} slices of the series are no regular grid: {frame.name} {problem}"
        )
        raise DataError(problem, frame.path.parent, _EXPORT)


def _frames(path: Path) -> list[_Frame]:
    """The frames of one file, as its header lists them."""
    header, is_image = _header(path)
    colours, problem = header.get("PhotometricInterpretation"), ""
    if not is_image:
        problem = "is a DICOM file without an image"
    elif header.get("SamplesPerPixel", 1) != 1 or colours not in ("MONOCHROME1", "MONOCHROME2"):
        problem = f"the image has colours ({colours})"
    elif "MOSAIC" in (header.get("ImageType") or ()):
        problem = "the image is a mosaic of slices"
    if problem:
        raise DataError(problem, path, f"Choose a grey-scale series of slices. {_EXPORT}")
    with decoding(path, "DICOM", _DAMAGED):
        count = int(header.get("NumberOfFrames") or 1)
        shared = header.get("SharedFunctionalGroupsSequence") or ()
        each = header.get("PerFrameFunctionalGroupsSequence")
        if each and len(each) != count:
            raise ValueError(f"it lists {len(each)} frames and promises {count}")
        about = (
            [_of_frame(header, (*shared[:1], one)) for one in each] if each else [header] * count
        )
        return [_Frame(path, number, header, one, *_place(one)) for number, one in enumerate(about)]


def _place(about: Any) -> tuple[Any, Any]:
    """`_Frame.origin` and `_Frame.axes`; ValueError where there are no such axes."""
    if not all(about.get(name) for name in _PLACE):
        return None, None
    position, orientation, size = (np.array(about[name].value, float) for name in _PLACE)
    row, column = orientation.reshape(2, 3)
    origin, (height, width) = position.reshape(3), size
    if not np.allclose([row @ row, column @ column, row @ column], [1, 1, 0], atol=1e-3):
        raise ValueError(f"ImageOrientationPatient is {orientation.tolist()}")
    if not (np.isfinite(origin).all() and 0 < height < np.inf and 0 < width < np.inf):
        raise ValueError(f"PixelSpacing is {size.tolist()} at {origin.tolist()}")
    return origin, np.column_stack([row * width, column * height])


def _of_frame(header: Any, groups: Sequence[Any]) -> Any:
    """The attributes of a frame's functional groups side by side, as in a file of one frame."""
    about = _pydicom().Dataset()
    for name in ("RescaleSlope", "RescaleIntercept"):
        if name in header:
            about[name] = header[name]
    for group, name in itertools.product(groups, _GROUPS):
        if group.get(name):
            about.update(group[name].value[0])
    return about


def _header(path: Path, *, only: Sequence[str] | None = None) -> tuple[Any, bool]:
    """A file's header, or some attributes of it, and whether it is of an image."""
    check_file(path)
    pydicom = _pydicom()
    with decoding(path, "DICOM", _DAMAGED), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=only)
        about = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
        name = pydicom.uid.UID(about or "").name
        sized = bool(header.get("Rows") and header.get("Columns"))
        if not sized and (not name or "Image Storage" in name):
            raise ValueError("no DICOM file, or cut off")
    return header, sized and not any(kind in name for kind in _NO_PICTURES)


def _pydicom() -> Any:
    """The package, which is optional."""
    try:
        import pydicom
    except ImportError as error:
        raise UserError("DICOM is read with pydicom: pip install 'mambaseg[images]'") from error
    return pydicom


def _measured(path: Path, frames: Sequence[_Frame]) -> list[npt.NDArray[Any]]:
    """The pixels (H, W) of a file's frames in their own units; integers unless rescaled."""
    header = frames[0].header
    scales = [(frame.value("RescaleSlope"), frame.value("RescaleIntercept")) for frame in frames]
    if any(slope == 0 for slope, _ in scales):
        raise DataError("RescaleSlope is 0", path, AGAIN)
    scales = [(1.0 if slope is None else slope, shift or 0.0) for slope, shift in scales]
    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax in _BY_ITK:
        planes = list(read_pixels(path))
        if len(planes) != len(frames) or len(set(scales)) > 1:
            problem = f"{len(planes)} of {len(frames)} frames can be read, with one scale for all"
            raise DataError(problem, path, "Decompress it, such as by dcmdjpeg.")
        return planes
    pixels = _pixels(path, getattr(syntax, "name", "unknown"))
    if header.PhotometricInterpretation == "MONOCHROME1":
        levels = 2 ** int(header.BitsStored)
        pixels = (-1 if header.PixelRepresentation else levels - 1) - pixels
    if header.get("ModalityLUTSequence"):
        from pydicom.pixels import apply_modality_lut

        return list(apply_modality_lut(pixels, header))
    if set(scales) == {(1.0, 0.0)}:
        return list(pixels)
    return [
        (plane * slope + intercept).astype(np.float32)
        for plane, (slope, intercept) in zip(pixels, scales, strict=True)
    ]


def _pixels(path: Path, syntax: str) -> npt.NDArray[Any]:
    """The stored pixels of a file, (frames, H, W)."""
    remedy = f"{_DAMAGED} Decompress it if it is compressed ({syntax}), such as by gdcmconv --raw."
    with decoding(path, "DICOM", remedy), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = _pydicom().dcmread(path, force=True)
        pixels = np.asarray(file.pixel_array)
        frames = int(file.get("NumberOfFrames") or 1)
        if pixels.size != frames * file.Rows * file.Columns:
            raise ValueError(f"it holds more frames than the {frames} that it promises")
        return pixels.reshape(frames, file.Rows, file.Columns)
