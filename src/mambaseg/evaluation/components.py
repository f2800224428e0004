"""Scores of objects instead of voxels: which components of a class were found.

A component is a set of voxels that touch by faces, edges or corners (26 neighbours in a volume, 8
in a picture). A predicted and a true component match if their IoU exceeds 0.5, so that each has at
most one partner (Kirillov et al., CVPR 2019, section 4.1). With TP pairs, FP predicted components
without a partner and FN true ones: precision = TP / (TP + FP), recall = TP / (TP + FN), F1 =
2 TP / (2 TP + FP + FN), and panoptic quality = sum of the pairs' IoU / (TP + FP / 2 + FN / 2),
which is F1 times the mean IoU of the pairs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mambaseg.evaluation.metrics import Metric
from mambaseg.evaluation.surface import Spacing

Mask = npt.NDArray[np.bool_]
IOU = 0.5


def match_components(prediction: Mask, reference: Mask) -> tuple[int, int, npt.NDArray[np.float64]]:
    """How many components each of two masks (Z, H, W) has, and the IoUs of the pairs that match."""
    from scipy.ndimage import generate_binary_structure, label

    touching = generate_binary_structure(prediction.ndim, prediction.ndim)
    ours, predicted = label(prediction, touching)
    theirs, there = label(reference, touching)
    both = prediction & reference
    # one number per pair: NumPy sorts numbers far faster than pairs
    pairs, common = np.unique(
        ours[both].astype(np.int64) * (there + 1) + theirs[both], return_counts=True
    )
    our, their = np.divmod(pairs, there + 1)
    sizes = np.bincount(ours.ravel())[our] + np.bincount(theirs.ravel())[their]
    ious = common / (sizes - common)
    return int(predicted), int(there), ious[ious > IOU]


class ComponentScore(Metric):
    """One of the scores of components: `precision`, `recall`, `f1` or `panoptic_quality`."""

    def __init__(self, score: str) -> None:
        names = {
            "precision": ("component_precision", "component precision"),
            "recall": ("component_recall", "component recall"),
            "f1": ("component_f1", "component F1"),
            "panoptic_quality": ("panoptic_quality", "panoptic quality"),
        }
        super().__init__(*names[score])
        self.score = score

    def measure(self, prediction: Mask, reference: Mask, spacing: Spacing | None) -> float | None:
        """The score in [0, 1]; None where both masks are empty."""
        predicted, there, ious = match_components(prediction, reference)
        total = {"precision": predicted, "recall": there}.get(self.score, (predicted + there) / 2)
        won = ious.sum() if self.score == "panoptic_quality" else len(ious)
        return float(won / total) if total else None
