"""Uncertainty-aware Mean Teacher: agree with the teacher where it is certain."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mambaseg.data.limits import Number
from mambaseg.training.methods.mean_teacher import MeanTeacher
from mambaseg.training.methods.method import Step, require_numbers
from mambaseg.training.methods.terms import entropy, ramp, ratio


class UAMT(MeanTeacher):
    """Mean Teacher's squared difference, where the mean of noisy passes has a low entropy.

    The threshold rises from 3/4 of the largest possible entropy to all of it.

    Source: Yu et al. 2019, Uncertainty-aware Self-ensembling Model, equations 2-4.

    Args:
        networks: see `Method`.
        passes: of the teacher, by which its certainty is estimated.
        released: take the largest entropy (ln 2) and the number of classes (2) of two classes
            whatever their number, as the published code for ACDC does.
        **teaching: see `MeanTeacher`.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        *,
        passes: int = 8,
        released: bool = False,
        **teaching: Any,
    ) -> None:
        super().__init__(networks, **{"start": 0.0, **teaching})
        require_numbers(Number(1, whole=True), passes=passes)
        self.passes, self.released = passes, released

    def threshold(self, share: float, classes: int) -> float:
        """Entropy in nats below which a pixel is certain, at a share of the training."""
        return (0.75 + 0.25 * ramp(share, 1)) * math.log(2 if self.released else classes)

    def consistency(
        self, step: Step, student: Tensor, teacher: Tensor, view: Tensor | None = None
    ) -> Tensor:
        """The difference where the teacher is certain, of a view as in `taught`."""
        classes = student.shape[1]
        with torch.no_grad():
            threshold = self.threshold(step.number / step.steps, classes)
            passes = [self.taught(step, 2 + k, view).softmax(1) for k in range(self.passes)]
            mask = entropy(torch.stack(passes).mean(0)) < threshold
        return masked_difference(student, teacher, mask, 2 if self.released else classes)


def masked_difference(one: Tensor, other: Tensor, mask: Tensor, classes: int) -> Tensor:
    """Mean squared difference (B, K, H, W) over the pixels of a mask (B, H, W) and `classes`."""
    difference = (one - other).square() * mask.unsqueeze(1)
    return ratio(difference.sum(), classes * mask.sum() + 1e-16)
