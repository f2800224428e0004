"""2-D pictures (PNG, JPEG, TIFF, BMP) as images and as masks, and label maps as PNG.

Pictures are as they are shown: turned as their EXIF orientation says. 8- and 16-bit pictures are on
one scale, 0..255; the numbers of 32-bit TIFF files are left as they are.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from mambaseg.data.formats.nifti import place_on
from mambaseg.data.validation import DataError, check_array, check_file, decoding
from mambaseg.data.volume import Volume

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
_GREY = {"1": np.uint8, "L": np.uint8, "I;16": np.uint16, "I;16B": np.uint16, "I": np.int32,
         "F": np.float32}  # fmt: skip
_COLOUR = ("P", "LA", "RGB", "RGBA")
_BITS, _PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT = 258, 262, 284, 339  # TIFF's
_LOSSY = ("JPEG", "MPO")  # MPO is a JPEG of several; the first is the picture
_CHROMA = 16  # what JPEG makes of grey: channels that differ by less are equal
_AS = "Save it as PNG or TIFF of 8 or 16 bits"


def read_picture(path: Path, channels: int = 1) -> Volume:
    """Read one picture as (1, 1, C, H, W) for a network of `channels` (see `read_pixels`).

    The spacing is unknown. As NIfTI (for probabilities) its pixels have the size 1, in no unit.
    """
    pixels = read_pixels(path, channels)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])  # rows go down, columns right
    header = place_on((1, 1, *pixels.shape[1:]), affine, None)
    return Volume(pixels[None, None], header=header, flat=True)


def read_pixels(path: Path, channels: int = 1) -> npt.NDArray[Any]:
    """Read one PNG, JPEG, TIFF or BMP file: (C, H, W).

    A colour picture is red, green and blue; three equal channels are grey. Grey is repeated where
    three channels are asked for. A picture with neither that many nor one keeps its own.
    `UserError` where it is damaged, too large, transparent, or coloured for one channel.
    """
    pixels: npt.NDArray[Any]
    with _opened(path) as (picture, stored):
        if picture.mode in _COLOUR:
            pixels = _opaque(path, picture).transpose(2, 0, 1)
            if (pixels[1:] == pixels[0]).all():
                pixels = pixels[:1]
            elif channels == 1:
                problem = "the picture has colours, the networks take one grey channel"
                raise DataError(problem, path, f"{_AS}, grey, or train with data.in_channels=3.")
        else:
            pixels = from_16_bits(_numbers(picture, stored)[None])
            if picture.mode == "1":
                pixels *= np.uint8(255)
    if len(pixels) == 1 and channels == 3:
        pixels = np.repeat(pixels, 3, axis=0)
    return np.ascontiguousarray(pixels)


def from_16_bits(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Grey values of 16 bits on the scale of 8 bits; any others as they are."""
    if pixels.dtype.newbyteorder("=") != np.uint16:
        return pixels
    return pixels.astype(np.float32) / np.float32(257)


def read_mask(path: Path) -> tuple[npt.NDArray[Any], bool]:
    """Read the numbers of a mask, (H, W), and whether JPEG has blurred them.

    Numbers are grey values or the indices of a palette; `UserError` for any other colours.
    """
    problem = ""
    with _opened(path) as (picture, stored):
        lossy = picture.format in _LOSSY
        if picture.mode in _GREY or picture.mode == "P":
            pixels = _numbers(picture, stored)
            if _tag(picture, _PHOTOMETRIC, 1) == 0 and picture.mode != "1":
                problem = "the mask is stored with white as 0: its numbers are not what it shows"
            elif picture.mode == "P" and _shows_negative(picture, pixels):
                problem = "its palette shows 0 brighter than other numbers, all as greys"
        else:
            colours = _opaque(path, picture)
            pixels = colours[..., 0]
            if "16" in stored:
                problem = "the mask has colours of 16 bits, of which numbers below 256 are lost"
            elif np.ptp(colours.astype(np.int16), axis=-1).max(initial=0) > lossy * _CHROMA:
                problem = "the mask has colours: which class is which cannot be known"
    if problem:
        raise DataError(problem, path, f"{_AS}, class numbers as grey values or a palette.")
    return pixels, lossy


def _shows_negative(picture: Image.Image, indices: npt.NDArray[Any]) -> bool:
    """Whether a palette shows as greys what a mask holds, and its lowest number not as darkest."""
    colours = np.array(picture.getpalette("RGB")).reshape(-1, 3)[np.unique(indices)]
    return bool((colours == colours[:, :1]).all() and colours[0, 0] > colours[:, 0].min())


def _opaque(path: Path, picture: Image.Image) -> npt.NDArray[np.uint8]:
    """Colours (H, W, 3); behind transparency the colour would be anybody's guess."""
    pixels = np.asarray(picture.convert("RGBA"))
    if (pixels[..., 3] != 255).any():
        raise DataError("the picture is transparent", path, f"{_AS} without an alpha channel.")
    return pixels[..., :3]


def _numbers(picture: Any, stored: str) -> npt.NDArray[Any]:
    """Grey pixels, or indices of a palette, in the data type that their file has."""
    pixels = np.asarray(picture)
    if stored.startswith("I;16") and not stored.endswith("S"):  # older Pillows widen them
        return pixels.astype(np.uint16)
    pixels = pixels.astype(_GREY.get(picture.mode, np.uint8))
    unsigned = picture.format == "TIFF" and _tag(picture, _SAMPLE_FORMAT, 1) == 1
    if pixels.dtype == np.int32 and unsigned and (pixels < 0).any():  # Pillow lets them overflow
        return pixels.view(np.uint32).astype(np.float32)
    return pixels


def _tag(picture: Any, number: int, default: int) -> int:
    """The first value of a TIFF tag; the default for other formats."""
    value = getattr(picture, "tag_v2", {}).get(number, default)
    return int(value[0] if isinstance(value, tuple) else value)


def _problem(picture: Any) -> str:
    """Why a picture cannot be used, such as that Pillow shows it other than it is stored."""
    bits = _tag(picture, _BITS, 8)
    if picture.mode not in (*_GREY, *_COLOUR):
        return f"the picture has the mode {picture.mode}"
    if getattr(picture, "n_frames", 1) > 1 and picture.format not in _LOSSY:
        return f"the file holds {picture.n_frames} pages"
    if _tag(picture, _PHOTOMETRIC, 1) == 0 and picture.mode not in ("1", "L"):
        return f"the picture has {bits} bits with white as 0"
    if bits == 8 and _tag(picture, _SAMPLE_FORMAT, 1) == 2:
        return "the picture has signed bytes"
    if bits == 16 and _tag(picture, _PLANAR, 1) == 2:
        return "the picture has colours of 16 bits in planes"
    if "transparency" in picture.info and picture.mode in _GREY:
        return "the picture is transparent"
    return ""


def reduced(pixels: npt.NDArray[Any], longest_side: int | None) -> npt.NDArray[Any]:
    """Reduce images (..., H, W) whose longer side exceeds `longest_side`, in their data type.

    The aspect is kept; pixels are averaged under a triangle (bilinear with antialiasing).
    """
    height, width = pixels.shape[-2:]
    target = _reduced_size((height, width), longest_side)
    if target == (height, width):
        return pixels
    images = [
        np.asarray(Image.fromarray(image).resize(target[::-1], Image.Resampling.BILINEAR))
        for image in pixels.reshape(-1, height, width)
    ]
    return np.stack(images).reshape(*pixels.shape[:-2], *target)


def reduced_labels(
    labels: npt.NDArray[np.uint8], longest_side: int | None
) -> npt.NDArray[np.uint8]:
    """Labels (H, W) on the grid of `reduced`: each pixel takes the nearest one."""
    rows, columns = (
        np.minimum(((np.arange(new) + 0.5) * (old / new)).astype(int), old - 1)
        for old, new in zip(labels.shape, _reduced_size(labels.shape, longest_side), strict=True)
    )
    return labels[np.ix_(rows, columns)]


def _reduced_size(size: tuple[int, ...], longest_side: int | None) -> tuple[int, int]:
    height, width = size
    scale = min(1.0, (longest_side or max(size)) / max(size))
    return max(1, round(scale * height)), max(1, round(scale * width))


def label_picture(labels: npt.NDArray[np.uint8]) -> bytes:
    """A PNG whose grey values are the labels (H, W)."""
    stream = io.BytesIO()
    Image.fromarray(labels).save(stream, format="PNG")
    return stream.getvalue()


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, str]]:
    """A picture turned as it is shown, and Pillow's name of how it is stored; else `UserError`."""
    check_file(path)
    with (
        decoding(path, ", ".join(FORMATS), f"Get the file again. {_AS}, grey or RGB."),
        Image.open(path, formats=FORMATS) as picture,
    ):
        width, height = picture.size
        dtype = np.dtype(_GREY.get(picture.mode, np.uint8))
        check_array(path, (1, height, width), dtype, "picture")
        if problem := _problem(picture):
            raise DataError(problem, path, f"{_AS}, grey (black is 0) or RGB, one per file.")
        # which Pillow forgets when it loads the pixels
        stored = picture.tile[0][3] if picture.tile else ""
        stored = stored if isinstance(stored, str) or not stored else stored[0]
        ImageOps.exif_transpose(picture, in_place=True)
        yield picture, str(stored)
