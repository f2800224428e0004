"""Samples that must show foreground: which slice, and about which pixel the network's square lies.

Of every batch the last samples are such, as in nnU-Net: a third of them, rounded up to one at least
for `data.oversample=0.33`; of batches of one sample a third, drawn by chance. A case that has
foreground is drawn, one of its classes, and one of the class's voxels, each with equal chances.
(Source: nnU-Net v2, `nnUNetDataLoader`.)
"""

from __future__ import annotations

import numpy as np

from mambaseg.data.batches import Draw
from mambaseg.data.counter import FOREGROUND, uniforms
from mambaseg.data.slices import SliceDataset
from mambaseg.errors import UserError


class Foreground:
    """Draws samples that show foreground: a pure function of (seed, step, position).

    Args:
        slices: of the training; labels of those that have one are looked at once.
        num_classes: K, background included.
        share: of a batch, above 0 and up to 1.
        seed: of the run.
    """

    def __init__(self, slices: SliceDataset, num_classes: int, share: float, seed: int) -> None:
        if not 0 < share <= 1:
            raise UserError(f"data.oversample={share}: it is a share of the batch, from 0 to 1")
        self.slices, self.share, self.seed = slices, share, seed
        cases = slices.case_numbers[: slices.labelled]
        self._counts = np.stack([self._voxels(item, num_classes) for item in range(len(cases))])
        self._counts[:, 0] = 0
        rows: dict[int, list[int]] = {}
        for item in np.flatnonzero(self._counts.any(axis=1)):
            rows.setdefault(int(cases[item]), []).append(int(item))
        self._cases = [np.array(items) for items in rows.values()]  # slices with foreground of each

    def count(self, batch_size: int, step: int) -> int:
        """How many samples of a step's batch, the last ones, must show foreground."""
        if batch_size == 1:  # position 1, which such a batch has not
            (coin,) = uniforms(self.seed, FOREGROUND, step=step, position=1, count=1)
            return int(coin < self.share)
        return max(1, batch_size - round(batch_size * (1 - self.share)))

    def draw(self, step: int, position: int) -> Draw:
        """The sample at a position of the global batch of a step."""
        u = uniforms(self.seed, FOREGROUND, step=step, position=position, count=3)
        items = self._cases[int(u[0] * len(self._cases))]
        counts = self._counts[items]  # (slices, K)
        present = np.flatnonzero(counts.any(axis=0))
        chosen = int(present[int(u[1] * len(present))])
        ends = counts[:, chosen].cumsum()
        voxel = int(u[2] * ends[-1])
        place = int(np.searchsorted(ends, voxel, side="right"))
        item = int(items[place])
        label = self._label(item)
        pixels = np.flatnonzero(label == chosen)
        pixel = int(pixels[voxel - (ends[place] - counts[place, chosen])])
        return Draw(item, step, position, divmod(pixel, label.shape[1]))

    def _voxels(self, item: int, num_classes: int) -> np.ndarray:
        return np.bincount(self._label(item).ravel(), minlength=num_classes)[:num_classes]

    def _label(self, item: int) -> np.ndarray:
        case, z = int(self.slices.case_numbers[item]), int(self.slices.slice_numbers[item])
        return self.slices.cache.label(case)[z]
