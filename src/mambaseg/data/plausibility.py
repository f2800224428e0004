"""What is possible and still suspicious about one case: said by data-check, never an error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from mambaseg.data.formats.volume import Volume

IN_PLANE_MM, BETWEEN_SLICES_MM = (0.2, 5.0), (0.5, 20.0)  # ACDC: 0.7 to 1.9, 5 to 10
MYOCARDIUM, LEFT_VENTRICLE = 2, 3
# Of the pixel sides where a left ventricle ends, so many border on myocardium: in ACDC's 200 cases
# at least 98 %, with two of its classes exchanged at most 46 %.
ENCLOSED = 0.75


def remarks(volume: Volume) -> Iterator[str]:
    """Sentences about a case that can be used, of whatever it is."""
    image, label = volume.image, volume.label
    if image.min() == image.max():
        yield f"the image is constant ({image.flat[0]:g} everywhere)"
    elif ((image == image.min()) | (image == image.max())).all():
        yield f"the image holds two values only ({image.min():g} and {image.max():g})"
    if label is not None and not label.any():
        yield "the label is background everywhere"


def cardiac_remarks(volume: Volume, num_classes: int) -> Iterator[str]:
    """Sentences about a case of ACDC, whose classes its label's values are."""
    label = volume.label
    if label is not None and num_classes == 4:
        share = enclosed_share(label)
        if share is not None and share < ENCLOSED:
            yield (
                f"only {share:.0%} of the left ventricle's border is on myocardium: are the labels "
                "1 right ventricle, 2 myocardium, 3 left ventricle?"
            )
    if volume.spacing is None:
        return
    limits = (BETWEEN_SLICES_MM, IN_PLANE_MM, IN_PLANE_MM)
    if any(not low <= s <= high for s, (low, high) in zip(volume.spacing, limits, strict=True)):
        yield f"unusual voxel size {_shown(volume.spacing)} mm (z, y, x)"


def enclosed_share(label: np.ndarray) -> float | None:
    """Share of the left ventricle's border, within slices, that is on myocardium.

    Args:
        label: (Z, H, W) with ACDC's classes.

    Returns:
        0..1, the end of the slice counting as border; None without a left ventricle.
    """
    padded = np.pad(label, ((0, 0), (1, 1), (1, 1)))
    ventricle = padded == LEFT_VENTRICLE
    sides = enclosed = 0
    for axis in (1, 2):
        for step in (1, -1):
            beyond = np.roll(padded, step, axis)[ventricle]
            sides += int(np.count_nonzero(beyond != LEFT_VENTRICLE))
            enclosed += int(np.count_nonzero(beyond == MYOCARDIUM))
    return enclosed / sides if sides else None


def _shown(sides: Iterable[float]) -> str:
    return " × ".join(f"{side:g}" for side in sides)
