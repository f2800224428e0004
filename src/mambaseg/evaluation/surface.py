"""Distances between the surfaces of two binary volumes, as medpy 0.5.2 defines them.

A *border* voxel belongs to the mask and has at least one of its six neighbours outside it; what
lies beyond the volume counts as outside, so a mask that reaches the first or last slice has its
whole cross-section there as border. A single slice, such as a picture, has no neighbours above and
below: its border is a contour in the plane. Where the reference says nothing of a voxel, that voxel
is outside no mask: a structure that continues there has no border towards it. From the two lists of
distances (each border voxel of one mask to the nearest border voxel of the other) follow

- ``hd``: the largest distance of both lists (Hausdorff);
- ``hd95``: the 95th percentile of the two lists *pooled*. MONAI and the Mamba-UNet paper (eq. 8)
  take the larger of the two directed percentiles, which is never smaller;
- ``asd``: the mean from prediction to reference, *one way* (the paper's eq. 9 is ``assd``);
- ``assd``: the mean of the two lists concatenated (medpy 0.4.0 averaged the two means instead);
- ``nsd``: normalised surface Dice, the share of border voxels of both masks no farther than a
  tolerance from the other border. Border *voxels* are counted; they are not weighted by the area
  they stand for, as Nikolov et al. (2018, arXiv 1809.04430) do.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Distances = npt.NDArray[np.float64]
Spacing = tuple[float, float, float]
ROUNDING = 1e-6  # of a voxel size, relative


class SurfaceDistances(NamedTuple):
    """One distance per border voxel, in the unit of the spacing they were measured with."""

    to_reference: Distances  # from each border voxel of the prediction
    to_prediction: Distances  # from each border voxel of the reference


def border(mask: Mask, axes: Sequence[int] = (0, 1, 2), unknown: Mask | None = None) -> Mask:
    """The voxels of a `mask` (Z, H, W) that have a neighbour along one of the axes outside it.

    Beyond the end of the array counts as outside, what is `unknown` does not.
    """
    padded = np.pad(mask if unknown is None else mask | unknown, 1)
    inside = mask.copy()
    for axis in axes:
        for start in (0, 2):
            neighbour = [slice(1, -1)] * mask.ndim
            neighbour[axis] = slice(start, start + mask.shape[axis])
            inside &= padded[tuple(neighbour)]
    return mask & ~inside


def _box_around(mask: Mask, margin: int = 0) -> tuple[slice, ...]:
    """The smallest box around a mask, and so many voxels more."""
    box = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        occupied = np.flatnonzero(mask.any(axis=others))
        box.append(slice(max(0, int(occupied[0]) - margin), int(occupied[-1]) + 1 + margin))
    return tuple(box)


def _distances(start: Mask, goal: Mask, spacings: Distances) -> Distances:
    """Distances (S, N) from the voxels of `start`, in raster order, to the nearest of `goal`."""
    from mambaseg.evaluation.nearest import nearest_distances

    apart, box = start & ~goal, _box_around(goal)
    distances = np.zeros((len(spacings), np.count_nonzero(start)))
    corner = tuple(side.start for side in box)
    distances[:, apart[start]] = nearest_distances(apart, goal[box], corner, spacings)
    return distances


def surface_distances(
    prediction: Mask,
    reference: Mask,
    spacings: Sequence[Spacing],
    unknown: Mask | None = None,
) -> list[SurfaceDistances] | None:
    """Distances between the borders of two masks (Z, H, W), in the unit of each spacing (z, y, x).

    Each mask has at least one voxel and none that is `unknown`; the spacing ``(1, 1, 1)`` measures
    in voxels. None: all around one of the masks is unknown, so that it has no border.
    """
    sides = prediction.shape
    across = sides.index(1) if 1 in sides else None  # a single slice, along whatever axis
    axes = tuple(axis for axis in range(3) if axis != across)
    # Beyond this box is outside of both masks, so cutting it out changes no border; of what is
    # unknown the next voxels count, too.
    box = _box_around(prediction | reference, margin=unknown is not None)
    predicted, expected = (
        border(mask[box], axes, None if unknown is None else unknown[box])
        for mask in (prediction, reference)
    )
    if not (predicted.any() and expected.any()):
        return None
    scales = np.asarray(spacings, np.float64)
    there, back = (_distances(predicted, expected, scales), _distances(expected, predicted, scales))
    return [SurfaceDistances(*both) for both in zip(there, back, strict=True)]


def surface_scores(distances: SurfaceDistances, tolerance: float) -> dict[str, float]:
    """``hd95``, ``hd``, ``asd``, ``assd`` in the unit of `distances`, and ``nsd`` in [0, 1].

    Surfaces agree up to the tolerance, in the same unit. Distances are compared to six digits: in
    the float32 of a header, a voxel of 0.4 mm is slightly larger.
    """
    pooled = np.concatenate(distances)
    return {
        "hd95": float(np.percentile(pooled, 95)),
        "hd": float(pooled.max()),
        "asd": float(distances.to_reference.mean()),
        "assd": float(pooled.mean()),
        "nsd": float((pooled <= tolerance * (1 + ROUNDING)).mean()),
    }
