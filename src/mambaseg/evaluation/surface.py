"""Distances between the surfaces of two binary volumes, as medpy 0.5.2 defines them.

A *border* voxel belongs to the mask and has at least one of its six neighbours outside it; what
lies beyond the volume counts as outside, so a mask that reaches the first or last slice has its
whole cross-section there as border. From the two lists of distances (each border voxel of one mask
to the nearest border voxel of the other) follow

- ``hd``: the largest distance of both lists (Hausdorff);
- ``hd95``: the 95th percentile of the two lists *pooled*. MONAI and the Mamba-UNet paper (eq. 8)
  take the larger of the two directed percentiles, which is never smaller;
- ``asd``: the mean from prediction to reference, *one way* (the paper's eq. 9 is ``assd``);
- ``assd``: the mean of the two lists concatenated (medpy 0.4.0 averaged the two means instead);
- ``nsd``: normalised surface Dice, the share of border voxels of both masks no farther than a
  tolerance from the other border. Border *voxels* are counted; they are not weighted by the area
  they stand for, as Nikolov et al. (2018, arXiv 1809.04430) do.

Distance transforms run on the smallest box that provably holds every nearest voxel.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Distances = npt.NDArray[np.float64]
Spacing = tuple[float, float, float]

FIRST_REACH = 8  # voxels of the finest axis; most borders of a usable prediction are nearer


class SurfaceDistances(NamedTuple):
    """One distance per border voxel, in the unit of the spacing they were measured with."""

    to_reference: Distances  # from each border voxel of the prediction
    to_prediction: Distances  # from each border voxel of the reference


def border(mask: Mask) -> Mask:
    """The voxels of a `mask` (Z, H, W) that have one of their six neighbours outside it.

    Beyond the end of the array counts as outside.
    """
    padded = np.pad(mask, 1)
    inside = mask.copy()
    for axis in range(mask.ndim):
        for start in (0, 2):
            neighbour = [slice(1, -1)] * mask.ndim
            neighbour[axis] = slice(start, start + mask.shape[axis])
            inside &= padded[tuple(neighbour)]
    return mask & ~inside


def _box_around(mask: Mask, margin: Sequence[int]) -> tuple[slice, ...]:
    """The smallest box around a mask, wider by `margin` voxels per axis as far as there are any."""
    box = []
    for axis, extra in enumerate(margin):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        occupied = np.flatnonzero(mask.any(axis=others))
        first, last = int(occupied[0]), int(occupied[-1])
        box.append(slice(max(first - extra, 0), min(last + 1 + extra, mask.shape[axis])))
    return tuple(box)


def _nearest_distances(start: Mask, goal: Mask, spacing: Spacing) -> Distances:
    """Distance from each voxel of `start`, in raster order, to the nearest voxel of `goal`.

    Exact, yet only where the two differ is anything computed: the transform runs on the box around
    the voxels of `start` that are not in `goal`, widened by a reach. If every distance found is
    within the reach, nothing beyond the box can be nearer; otherwise the box grows to the largest.
    It takes about 13 bytes per voxel of the box.
    This makes the background class, whose border spans the volume, as cheap as the others.
    """
    from scipy.ndimage import distance_transform_edt

    if not goal.any():
        raise ValueError("there is no voxel to measure the distance to")
    distances = np.zeros(np.count_nonzero(start))
    apart = start & ~goal
    if not apart.any():
        return distances
    reach = FIRST_REACH * min(spacing)
    while True:
        margin = np.minimum(np.ceil(reach / np.asarray(spacing)), start.shape).astype(int)
        box = _box_around(apart, margin.tolist())
        if not goal[box].any():  # the transform needs one
            reach = np.inf  # the box becomes the whole volume
            continue
        nearest = distance_transform_edt(
            ~goal[box], sampling=spacing, return_distances=False, return_indices=True
        )
        found = _distances_at(apart[box], nearest, spacing)
        whole = all(part.stop - part.start == n for part, n in zip(box, start.shape, strict=True))
        if whole or found.max() <= reach:
            break
        reach = found.max()
    distances[apart[start]] = found
    return distances


def _distances_at(chosen: Mask, nearest: npt.NDArray[np.int32], spacing: Spacing) -> Distances:
    """Distances of the `chosen` voxels (Z, H, W) to their `nearest` (3, Z, H, W), in raster order.

    SciPy's own distances, at a quarter of the memory: it makes them for every voxel of the box.
    """
    slices = []
    for z, here in enumerate(chosen):
        y, x = np.nonzero(here)
        away = nearest[:, z, y, x] - np.stack((np.full_like(y, z), y, x))
        scaled = away * np.asarray(spacing)[:, None]
        slices.append(np.sqrt(np.add.reduce(scaled * scaled, axis=0)))
    return np.concatenate(slices)


def surface_distances(
    prediction: Mask, reference: Mask, spacings: Sequence[Spacing]
) -> list[SurfaceDistances]:
    """Distances between the borders of two masks (Z, H, W), in the unit of each spacing (z, y, x).

    Each mask has at least one voxel; the spacing ``(1, 1, 1)`` measures in voxels.
    """
    # Beyond this box is outside of both masks, so cutting it out changes no border.
    box = _box_around(prediction | reference, margin=(0, 0, 0))
    predicted, expected = border(prediction[box]), border(reference[box])
    return [
        SurfaceDistances(
            to_reference=_nearest_distances(predicted, expected, spacing),
            to_prediction=_nearest_distances(expected, predicted, spacing),
        )
        for spacing in spacings
    ]


def surface_scores(distances: SurfaceDistances, tolerance: float) -> dict[str, float]:
    """``hd95``, ``hd``, ``asd``, ``assd`` in the unit of `distances`, and ``nsd`` in [0, 1].

    Surfaces agree up to the tolerance, in the same unit.
    """
    pooled = np.concatenate(distances)
    return {
        "hd95": float(np.percentile(pooled, 95)),
        "hd": float(pooled.max()),
        "asd": float(distances.to_reference.mean()),
        "assd": float(pooled.mean()),
        "nsd": float((pooled <= tolerance).mean()),
    }
