"""DICOM files as images, through pydicom."""

from __future__ import annotations

import itertools
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mambaseg.data.formats.dicom_stack import (
    Frame,
    header_of,
    is_image,
    pydicom_package,
    stack,
    unreadable,
    value_of,
)
from mambaseg.data.formats.itk import read_pixels
from mambaseg.data.formats.nifti import place_on
from mambaseg.data.formats.volume import Volume
from mambaseg.data.validation import AGAIN, DataError

_IDENTITY = ("SOPClassUID", "SeriesInstanceUID", "Rows", "Columns")
# JPEG of 12 bits and lossless JPEG, for which pydicom needs further packages
_BY_ITK = ("1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")


def series_in(paths: Sequence[Path]) -> list[tuple[Path, ...]]:
    """The files of each series of images, sorted by identity; other objects are left out.

    A file that cannot be read may be a slice of any of them. It is listed with each, so that none
    is read without it.

    Raises:
        UserError: pydicom is not installed.
    """
    pydicom_package()
    series: dict[str, list[Path]] = defaultdict(list)
    damaged = []
    for path in paths:
        try:
            header = header_of(path, only=_IDENTITY)
        except DataError:
            damaged.append(path)
        else:
            if is_image(header):
                series[str(header.get("SeriesInstanceUID", ""))].append(path)
    if damaged and not series:
        series[""] = []
    return [tuple(sorted([*files, *damaged])) for _, files in sorted(series.items())]


def read_dicom(paths: Sequence[Path]) -> Volume:
    """Read the files of one series, or a single file, as a volume or a cine.

    Slices are sorted by their position along the normal of their plane, and at each position by
    their time. Pixels are in the units of their own frame's rescale slope and intercept.

    Raises:
        UserError: a file cannot be read or is not grey, or the slices are no regular grid.
    """
    found = stack(paths)
    files: dict[Path, list[Frame]] = defaultdict(list)
    for frame in itertools.chain(*found.frames):
        files[frame.path].append(frame)
    pixels: dict[tuple[Path, int], npt.NDArray[Any]] = {}
    for path, held in files.items():
        held.sort(key=lambda frame: frame.number)
        pixels |= {(path, number): plane for number, plane in enumerate(_measured(path, held))}
    frames = np.array(
        [[pixels[frame.path, frame.number] for frame in slices] for slices in found.frames]
    )
    header = place_on(frames.shape, found.affine, found.spacing)
    return Volume(frames[:, :, None], None, found.spacing, found.affine, header=header)


def _measured(path: Path, frames: Sequence[Frame]) -> list[npt.NDArray[Any]]:
    """The pixels (H, W) of all frames of a file, each in its own units; brighter is more.

    Whole numbers that are not rescaled keep their data type.
    """
    header = frames[0].header
    scales = [_scale(frame) for frame in frames]
    if header.file_meta.get("TransferSyntaxUID") in _BY_ITK:
        if len(set(scales)) > 1:
            problem = "its frames have rescale slopes of their own under JPEG compression"
            raise DataError(problem, path, "Decompress it, such as by dcmdjpeg.")
        planes = list(read_pixels(path))
        if len(planes) != len(frames):
            raise DataError(f"{len(planes)} of {len(frames)} frames can be read", path, AGAIN)
        return planes
    pixels = _pixels(path)
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


def _scale(frame: Frame) -> tuple[float, float]:
    """The rescale slope and intercept of a frame."""
    slope, intercept = value_of(frame, "RescaleSlope"), value_of(frame, "RescaleIntercept")
    if slope == 0:
        raise DataError("RescaleSlope is 0", frame.path, AGAIN)
    return 1.0 if slope is None else slope, intercept or 0.0


def _pixels(path: Path) -> npt.NDArray[Any]:
    """The stored pixels of a file, (frames, H, W)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = pydicom_package().dcmread(path, force=True)
            pixels = np.asarray(file.pixel_array)
        frames = int(file.get("NumberOfFrames") or 1)
        if pixels.size != frames * file.Rows * file.Columns:
            raise ValueError(f"it holds more frames than the {frames} that it promises")
        return pixels.reshape(frames, file.Rows, file.Columns)
    except Exception as error:  # foreign bytes make pydicom and its decoders raise nearly anything
        syntax = getattr(header_of(path).file_meta, "TransferSyntaxUID", None)
        if syntax and not _is_decoded(syntax):
            problem = f"its pixels are compressed as {syntax.name}"
            raise DataError(problem, path, "Decompress it, such as by gdcmconv --raw.") from error
        raise unreadable(path, error) from error


def _is_decoded(syntax: Any) -> bool:
    """Whether pydicom has what it needs for a transfer syntax."""
    from pydicom.pixels import get_decoder

    try:
        return bool(get_decoder(syntax).is_available)
    except NotImplementedError:
        return False
