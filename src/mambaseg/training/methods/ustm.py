"""USTM: a teacher's certain labels of a turned view, for images with scribbles."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mambaseg.training.methods.method import Step
from mambaseg.training.methods.terms import certain, ramp, turned
from mambaseg.training.methods.uamt import UAMT, masked_difference


class USTM(UAMT):
    """UAMT's masked difference on all images, with the teacher's view turned by quarter turns.

    Source: Liu et al. 2022, Weakly Supervised Segmentation of COVID19 Infection with Scribble
    Annotation Based on Uncertainty-aware Self-ensembling and Transformation-consistent Model.

    Args:
        networks: see `Method`.
        weight: of the consistency at the end of its ramp over the whole training.
        **teaching: see `UAMT`.
    """

    unlabelled = False

    def __init__(
        self, networks: Sequence[nn.Module], *, weight: float = 1.0, **teaching: Any
    ) -> None:
        super().__init__(networks, weight=weight, **teaching)

    def terms(self, step: Step) -> dict[str, Tensor]:
        """`supervised` and `consistency`."""
        quarters = int(4 * step.uniform(1)[0])
        logits = step.logits(self.network)
        view = turned(step.image, quarters)
        taught = self._taught(step, view, 1).softmax(1)
        classes = logits.shape[1]
        with torch.no_grad():
            threshold = self.threshold(step.number / step.steps, classes)
            mask, _ = certain(partial(self._noisy, step, view), self.passes, threshold)
        student = turned(logits.softmax(1), quarters)
        consistency = masked_difference(student, taught, mask, 2 if self.released else classes)
        weight = self.weight * ramp(step.number, step.steps, stairs=60)
        return {"supervised": step.supervised(logits), "consistency": weight * consistency}

    def _noisy(self, step: Step, view: Tensor, number: int) -> Tensor:
        return self._taught(step, view, 2 + number)

    def _taught(self, step: Step, view: Tensor, turn: int) -> Tensor:
        noise = self.noise * step.normal(view, turn=turn)
        with torch.no_grad():
            noisy = view + noise.clamp(-self.clip, self.clip)
            return step.logits(self.teacher.network, noisy, turn=turn)
