"""Calibration: how far the probabilities of a network agree with how often it is right.

Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017): the confidence of a voxel is the
probability of its most probable class. Voxels are sorted into bins of equal width by confidence;
the expected calibration error (ECE, eq. 3) is the mean of |accuracy - confidence| over the bins,
weighted by their voxels. Temperature scaling (section 4.2) divides all logits by one number T > 0:
the most probable class stays, its probability changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mambaseg.storage.untrusted import ForeignFileError, read_json

if TYPE_CHECKING:  # reports read calibrations without torch
    from torch import Tensor

BINS = 15  # as in the paper
COLDEST, HOTTEST = 0.05, 20.0  # temperatures that are tried
REGIONS = ("all", "foreground")
HOW = ("plain", "calibrated")  # without and with the temperature
FILE = "calibration.json"
_CHUNK = 2**20  # voxels at a time


class Reliability:
    """Counts of the bins, of any number of voxels; torchmetrics would keep every confidence."""

    def __init__(self) -> None:
        self.bins = np.zeros((BINS, 3))  # voxels, sum of their confidences, how many are right
        self.loss = 0.0  # sum of the negative log-likelihoods

    def update(self, logits: Tensor, truth: Tensor) -> None:
        """Adds voxels: `logits` (N, K) and their classes `truth` (N,)."""
        import torch

        log_probabilities = logits.double().log_softmax(dim=1)
        best, predicted = log_probabilities.max(dim=1)
        confidence = best.exp()
        place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # bins (0, 1/15], (1/15, ...
        columns = (torch.ones_like(confidence), confidence, (predicted == truth).double())
        for index, weights in enumerate(columns):
            self.bins[:, index] += torch.bincount(place, weights, BINS).cpu().numpy()
        self.loss -= float(log_probabilities.gather(1, truth[:, None]).sum())

    def plain(self) -> dict[str, Any]:
        """`ece` and `nll` (the mean), None without voxels, and the `bins` (15, 3) as lists."""
        count, confidence, right = self.bins.T
        total = count.sum()
        error = float(np.abs(right - confidence).sum() / total) if total else None
        loss = float(self.loss / total) if total else None
        return {"ece": error, "nll": loss, "bins": self.bins.tolist()}


def fit_temperature(logits: Tensor, truth: Tensor) -> float:
    """The temperature at which voxels with `logits` (N, K) have the smallest mean NLL.

    `truth` (N,) are their classes. In float64, between `COLDEST` and `HOTTEST`; the loss has one
    minimum in 1 / T, as it is convex in it.
    """
    import torch
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        total = 0.0
        for part, classes in zip(logits.split(_CHUNK), truth.split(_CHUNK), strict=True):
            scaled = part.double() / float(np.exp(log_temperature))
            total += float(torch.nn.functional.cross_entropy(scaled, classes, reduction="sum"))
        return total / len(truth)

    bounds = (float(np.log(COLDEST)), float(np.log(HOTTEST)))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-7})
    return float(np.exp(found.x))


def calibration_file(checkpoint: Path) -> Path:
    """Where the calibration of a checkpoint is stored: beside it."""
    return checkpoint.with_name(f"{checkpoint.stem}.{FILE}")


def read_calibration(path: Path) -> dict[str, Any]:
    """A stored calibration, whoever wrote it.

    Raises:
        OSError: there is none.
        ForeignFileError: it does not hold what it must.
    """
    found = read_json(path)
    try:
        flag, test = found["flag"], found["test"]
        numbers = [found["temperature"], *flag["thresholds"].values()]
        right = isinstance(found["checkpoint"], str) and COLDEST <= numbers[0] <= HOTTEST
        right = right and all(value is None or 0 <= value <= 1 for value in numbers[1:])
        right = right and flag["thresholds"].keys() == set(HOW)
        for region in REGIONS:
            for how in HOW:
                one = test[region][how]
                counts: npt.NDArray[Any] = np.array(one["bins"], dtype=float)
                right = right and counts.shape == (BINS, 3) and bool((counts >= 0).all())
                right = right and all(one[key] is None or one[key] >= 0 for key in ("ece", "nll"))
    except (KeyError, TypeError, ValueError, AttributeError):
        right = False
    if not right:
        raise ForeignFileError("it does not hold a calibration")
    return dict(found)
