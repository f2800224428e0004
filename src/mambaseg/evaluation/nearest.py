"""The search for the nearest voxel of a mask, compiled by numba at its first call.

It loads numba, so `mambaseg.evaluation.surface` imports it when it is needed.
"""

import numpy as np
from numba import njit

_EMPTY, _MEASURED = 1, 2  # rows that a search has come to: without a voxel of the goal, with one


@njit(cache=True, nogil=True)
def nearest_distances(start, goal, corner, spacings):
    """Distances (S, N) from the N voxels of `start`, in raster order, to the nearest of `goal`.

    Both are boolean volumes. `goal` has a voxel and lies at `corner` (z, y, x) of `start`, beyond
    which nothing belongs to it; spacings (S, 3) are those of z, y, x.

    Exact: from each voxel the search goes outwards over rows (z, y), as long as they are nearer
    than what it has found. Which voxel of a row is the nearest does not depend on the spacing, so
    it is looked up, and measured for the rows that a search comes to: 4 bytes per voxel.
    """
    gaps = np.empty(goal.shape, np.int32)  # along the row, to the nearest voxel of the goal
    rows = np.zeros(goal.shape[:2], np.uint8)
    distances = np.empty((len(spacings), np.count_nonzero(start)))
    number = 0
    for z, plane in enumerate(start):
        for y, row in enumerate(plane):
            for x in np.flatnonzero(row):
                place = z - corner[0], y - corner[1], x - corner[2]
                for unit, spacing in enumerate(spacings):
                    squared = _nearest_squared(goal, gaps, rows, spacing, place)
                    distances[unit, number] = np.sqrt(squared)
                number += 1
    return distances


@njit
def _nearest_squared(goal, gaps, rows, spacing, place):
    depth, height, width = goal.shape
    z, y, x = place
    inside = min(max(x, 0), width - 1)
    best = np.inf
    for dz in range(max(0, -z, z - depth + 1), max(z + 1, depth - z)):
        above = (dz * spacing[0]) ** 2
        if above >= best:
            break
        for dy in range(max(0, -y, y - height + 1), max(y + 1, height - y)):
            aside = above + (dy * spacing[1]) ** 2
            if aside >= best:
                break
            for zz in range(z - dz, z + dz + 1, max(1, 2 * dz)):  # both ways
                for yy in range(y - dy, y + dy + 1, max(1, 2 * dy)):
                    if not (0 <= zz < depth and 0 <= yy < height):
                        continue
                    if rows[zz, yy] == 0:
                        rows[zz, yy] = _measure_row(goal[zz, yy], gaps[zz, yy])
                    if rows[zz, yy] == _MEASURED:
                        gap = gaps[zz, yy, inside] + abs(x - inside)
                        best = min(best, aside + (gap * spacing[2]) ** 2)
    return best


@njit
def _measure_row(goal, gaps):
    """Fills in the voxels from each place of a row to the nearest of the goal, if it has one."""
    gap = len(goal)
    for x in range(len(goal)):
        gap = 0 if goal[x] else gap + 1
        gaps[x] = gap
    if gap >= 2 * len(goal):
        return _EMPTY
    for x in range(len(goal) - 1, -1, -1):
        gap = min(gap + 1, gaps[x])
        gaps[x] = gap
    return _MEASURED
