"""A picture and its mask as a case of one slice, whatever numbers the mask holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mambaseg.data.case import Case
from mambaseg.data.formats.pictures import (
    read_mask,
    read_pixels,
    reduced,
    reduced_labels,
)
from mambaseg.data.formats.volume import Volume
from mambaseg.data.validation import DataError, as_float32, as_label

SOLID = 0.05  # share of a mask, or of what is not black in it: more of one grey are no border
FEW = 16  # greys: blurring leaves more, or none beside black and white


class NotBinaryError(DataError):
    """A mask is not black and white: its numbers are of classes or of single objects."""


def read_pair(case: Case, *, masks: str, channels: int, longest_side: int | None) -> Volume:
    """Read an image and its masks as a volume of one slice.

    All are as they are shown, each by its own EXIF orientation. An image whose longer side exceeds
    `longest_side` is reduced with antialiasing, its mask by nearest neighbour.

    Args:
        case: The files; the foreground of several masks is joined.
        masks: `binary`: 0 and 1, or black and white divided at half (128 of 0..255); `instances`:
            every number but 0 is foreground; `classes`: the numbers of the classes.
        channels: Of the image, see `read_pixels`.
        longest_side: Pixels, None for native size.

    Raises:
        UserError: A file that cannot be read or used, a mask of another size or kind.
    """
    image = read_pixels(case.image_path, channels)
    paths = [path for path in (case.label_path, *case.more_labels) if path is not None]
    if masks == "classes" and len(paths) > 1:
        remedy = "Join them into one file of class numbers; several can only be joined as binary."
        raise DataError(f"is one of {len(paths)} masks of {case.id}", paths[1], remedy)
    label = np.zeros(image.shape[1:], np.uint8)
    for path in paths:
        numbers, lossy = read_mask(path)
        if numbers.shape != label.shape:
            sizes = [f"{width} × {height}" for height, width in (numbers.shape, label.shape)]
            raise DataError(
                f"the mask is {sizes[0]} pixels, the image {case.image_path.name} {sizes[1]}",
                path,
                "They must show the same: take both from the same download, at the same size. If "
                "one of them is turned by its EXIF orientation, save it without.",
            )
        if numbers.dtype.kind == "f":
            numbers = as_label(numbers, path)
        np.maximum(label, _classes(numbers, path, masks, lossy=lossy), out=label)
    image = as_float32(case.image_path, reduced(image, longest_side))
    return Volume(image[None], reduced_labels(label, longest_side)[None])


def _classes(
    numbers: npt.NDArray[Any], path: Path, kind: str, *, lossy: bool
) -> npt.NDArray[np.uint8]:
    """What the numbers of one file mean."""
    if kind == "instances":
        return (numbers >= 128 if lossy else numbers != 0).astype(np.uint8)
    if kind == "classes":
        if lossy:
            remedy = "Save it as PNG before JPEG has blurred its numbers."
            raise DataError("a JPEG file cannot hold class numbers", path, remedy)
        return as_label(numbers, path)
    largest = int(numbers.max(initial=0))
    if largest <= 1 and not lossy:
        return (numbers == 1).astype(np.uint8)
    white = 255 if largest < 256 else 65535
    if not lossy and (largest < white / 2 or _solid_greys(numbers, white)):
        found = np.unique(numbers)
        listed = ", ".join(map(str, found[:6])) + (", ..." if len(found) > 6 else "")
        raise NotBinaryError(
            f"the mask holds {len(found)} numbers ({listed}) up to {largest}: it is not black and "
            "white",
            path,
            "data.masks=instances makes every number but 0 foreground. Numbers of classes are "
            "named with data.class_names and data.num_classes, or mapped with data.label_map, such "
            f"as 'data.label_map={{0: 0, {largest}: 1}}' with every number of the files.",
        )
    return (numbers > white / 2).astype(np.uint8)


def _solid_greys(numbers: npt.NDArray[Any], white: int) -> bool:
    """Whether a grey is that of a region rather than of a soft border.

    Between black and white that is a grey over a twentieth of the mask, or in whose 3 × 3
    neighbourhoods lies a twentieth of all that is not black. Close to black, where JPEG leaves its
    noise, it is one of few greys: 0, 1, 255 are a class and a margin that belongs to none.
    """
    from scipy.ndimage import maximum_filter, minimum_filter

    greys, counts = np.unique(numbers[(numbers > 0) & (numbers < white)], return_counts=True)
    if not greys.size:
        return False
    limit = SOLID * np.count_nonzero(numbers)
    dark = greys <= 0.1 * white
    if len(greys) <= FEW and (counts[dark] > limit).any():
        return True
    between = ~dark & (greys < 0.9 * white)
    if (counts[between] > SOLID * numbers.size).any():
        return True
    inner = numbers[minimum_filter(numbers, 3) == maximum_filter(numbers, 3)]
    found, inside = np.unique(inner, return_counts=True)
    return bool((inside[np.isin(found, greys[between])] > limit).any())
