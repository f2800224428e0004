"""Scribbles of the phantom: open curves inside each structure, and one around all of them.

As Valvano et al. (IEEE TMI 40(8), 2021) drew them on ACDC: few per cent of a structure, less than
one of the background, all other pixels unlabelled. Whoever draws by hand follows the shape of what
he sees; these curves follow a structure's border at a constant depth.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mambaseg.data.readers.acdc_h5 import UNLABELLED

DEPTH = 0.7  # of the greatest distance from a structure's border
AWAY = (5.0, 12.0)  # pixels from the structures to the curve around them
GAP = (1.0, 3.0)  # radians of a curve that are left open

Label = NDArray[np.uint8]


def draw_scribble(label: Label, rng: np.random.Generator) -> Label:
    """Draw the scribble of a label (Z, H, W): its classes on curves of a pixel, else UNLABELLED."""
    return np.stack([_draw_slice(one, rng) for one in label])


def _draw_slice(label: Label, rng: np.random.Generator) -> Label:
    from scipy.ndimage import distance_transform_edt

    scribble = np.full_like(label, UNLABELLED)
    for index in np.unique(label[label > 0]):
        depth = distance_transform_edt(np.pad(label == index, 1))[1:-1, 1:-1]
        inside = depth > min(DEPTH * depth.max(), depth.max() - 0.5)
        ring = inside & (depth <= depth[inside].min() + 1)
        scribble[_opened(ring, rng)] = index
    structures = label > 0
    if not structures.any():  # a circle in the middle
        structures = np.zeros_like(structures)
        structures[label.shape[0] // 2, label.shape[1] // 2] = True
    distance, away = distance_transform_edt(~structures), rng.uniform(*AWAY)
    scribble[_opened((distance > away) & (distance <= away + 1), rng)] = 0
    return scribble


def _opened(ring: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.bool_]:
    """A ring without the pixels that lie in a random sector, seen from its middle; never empty."""
    rows, columns = np.nonzero(ring)
    angles = np.arctan2(rows - rows.mean(), columns - columns.mean())
    start, gap = rng.uniform(-np.pi, np.pi), rng.uniform(*GAP)
    kept = (angles - start) % (2 * np.pi) >= gap
    opened = np.zeros_like(ring)
    opened[rows[kept], columns[kept]] = True
    return opened if kept.any() else ring
