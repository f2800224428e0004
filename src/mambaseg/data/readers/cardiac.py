"""What is possible in a short-axis heart with ACDC's labels, and still suspicious."""

from collections.abc import Iterator

import numpy as np

from mambaseg.data.formats.volume import Volume

IN_PLANE_MM, BETWEEN_SLICES_MM = (0.2, 5.0), (0.5, 20.0)  # ACDC: 0.7 to 1.9, 5 to 10
MYOCARDIUM, LEFT_VENTRICLE = 2, 3
# Of the pixel sides where a left ventricle ends, so many border on myocardium: in ACDC's 200 cases
# at least 98 %, with two of its classes exchanged at most 46 %.
ENCLOSED = 0.75


def cardiac_remarks(volume: Volume) -> Iterator[str]:
    """Sentences about a left ventricle that is not enclosed, and about an unusual voxel size."""
    share = None if volume.label is None else _enclosed_share(volume.label)
    if share is not None and share < ENCLOSED:
        yield (
            f"only {share:.0%} of the left ventricle's border is on myocardium: are the labels "
            "1 right ventricle, 2 myocardium, 3 left ventricle?"
        )
    limits = (BETWEEN_SLICES_MM, IN_PLANE_MM, IN_PLANE_MM)
    spacing = volume.spacing or ()
    if any(not low <= side <= high for side, (low, high) in zip(spacing, limits, strict=False)):
        shown = " × ".join(f"{side:g}" for side in spacing)
        yield f"unusual voxel size {shown} mm (z, y, x)"


def _enclosed_share(label: np.ndarray) -> float | None:
    """Share of the left ventricle's border, within slices, that is on myocardium."""
    padded = np.pad(label, ((0, 0), (1, 1), (1, 1)))
    ventricle = padded == LEFT_VENTRICLE
    sides = enclosed = 0
    for axis in (1, 2):
        for step in (1, -1):
            beyond = np.roll(padded, step, axis)[ventricle]
            sides += int(np.count_nonzero(beyond != LEFT_VENTRICLE))
            enclosed += int(np.count_nonzero(beyond == MYOCARDIUM))
    return enclosed / sides if sides else None
