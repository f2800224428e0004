"""2-D images with masks in folders; which belong together is found by `matching`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mambaseg.data.case import Case
from mambaseg.data.formats.files import PICTURES
from mambaseg.data.formats.pictures import read_mask, read_pixels, reduced, reduced_labels
from mambaseg.data.readers.matching import Matcher
from mambaseg.data.readers.reader import Found, Problem, reader
from mambaseg.data.validation import DataError, as_float32, as_label
from mambaseg.data.volume import Volume
from mambaseg.errors import UserError

MATCHER = Matcher(PICTURES)
LOOKED_AT = 20  # masks that say what all hold
KINDS = ("auto", "binary", "instances", "classes")
SOLID = 0.05  # share of a mask, or of what is not black in it: more of one grey are no border
FEW = 16  # greys: blurring leaves more, or none beside black and white


class NotBinaryError(DataError):
    """A mask is not black and white: its numbers are of classes or of single objects."""


@reader(
    example="images/ and masks/ with pictures of the same names, or a.png beside a_mask.png",
    remedy="Also in train/, val/ and test/; docs/own-data.md names the other layouts. Files end in "
    f"{', '.join(PICTURES)}.",
    recognises=MATCHER.recognises,
    any_names=True,
    class_names=lambda root: None,
)
def find_cases(
    root: Path,
    *,
    masks: str = "auto",
    num_classes: int | None = None,
    label_map: Mapping[int, int] | None = None,
    channels: int = 3,
    longest_side: int | None = None,
    ignore_label: int | None = None,
    patient_pattern: str | None = None,
) -> Iterator[Found]:
    """All images with their masks; `num_classes` is None where nobody knows.

    `masks` says what the numbers in a mask are, see `read_pair`; `auto` is `binary` for two classes
    without a label map and without pixels to ignore, else `classes`, and where nobody knows the
    classes what some masks look like. `channels` is 1 or 3, of every image; larger ones are reduced
    to `longest_side` pixels.
    """
    if masks not in KINDS:
        raise UserError(f"data.masks={masks}: choose one of {', '.join(KINDS)}")
    if ignore_label is not None and masks not in ("auto", "classes"):
        raise UserError(
            f"data.ignore_label={ignore_label}: masks that are read as {masks} have no such value; "
            "use data.masks=classes, with data.label_map for all other values"
        )
    unknown = masks == "auto" and num_classes is None and ignore_label is None
    if masks == "auto":
        binary = (num_classes or 2) == 2 and label_map is None and ignore_label is None
        masks = "binary" if binary else "classes"
    read = functools.partial(read_pair, channels=channels, longest_side=longest_side)

    found = list(MATCHER.find_cases(root, functools.partial(read, masks=masks), patient_pattern))
    cases = [one for one in found if isinstance(one, Case)]
    error = _not_binary(cases[:: max(1, len(cases) // LOOKED_AT)]) if unknown else None
    if error:
        masks = "instances" if any(case.more_labels for case in cases) else "classes"
        read = functools.partial(read, masks=masks)
        found = [replace(one, reader=read) if isinstance(one, Case) else one for one in found]
        yield Problem("info", "masks", error.problem, error.remedy)
    yield from found


def _not_binary(cases: Sequence[Case]) -> NotBinaryError | None:
    """Why the masks of some cases, read as black and white, are not; the first reason."""
    for case in cases:
        try:
            case.load()
        except NotBinaryError as error:
            return error
        except DataError:  # which the case is reported with
            continue
    return None


def read_pair(case: Case, *, masks: str, channels: int, longest_side: int | None) -> Volume:
    """Read an image and its masks as a volume of one slice.

    All are as they are shown, each by its own EXIF orientation. An image whose longer side exceeds
    `longest_side` pixels is reduced with antialiasing, its mask by nearest neighbour. Several masks
    are joined. `channels` is for `read_pixels`.

    `masks` are `binary`: 0 and 1, or black and white divided at half (128 of 0..255); `instances`:
    every number but 0 is foreground; `classes`: the numbers of the classes.
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
    if numbers.dtype.kind == "i" and numbers.min(initial=0) < 0:
        remedy = "Save it with 0 for the background and 1 or 255 for the foreground."
        raise DataError(f"the mask holds the number {numbers.min()}", path, remedy)
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
    """Whether a grey is that of a region rather than of a soft border."""
    from scipy.ndimage import maximum_filter, minimum_filter

    greys, counts = np.unique(numbers[(numbers > 0) & (numbers < white)], return_counts=True)
    if not greys.size:
        return False
    limit = SOLID * np.count_nonzero(numbers)
    # Close to black, where JPEG leaves its noise, a region's is one of few greys.
    dark = greys <= 0.1 * white
    if len(greys) <= FEW and (counts[dark] > limit).any():
        return True
    between = ~dark & (greys < 0.9 * white)
    if (counts[between] > SOLID * numbers.size).any():
        return True
    # A region is one where 3 x 3 neighbourhoods have one grey.
    inner = numbers[minimum_filter(numbers, 3) == maximum_filter(numbers, 3)]
    found, inside = np.unique(inner, return_counts=True)
    return bool((inside[np.isin(found, greys[between])] > limit).any())
