"""USTM: a teacher's certain labels of a turned view, for images with scribbles."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mambaseg.training.methods.method import Step
from mambaseg.training.methods.terms import ramp
from mambaseg.training.methods.uamt import UAMT


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
        view = step.image.rot90(quarters, (-2, -1))
        taught = self.taught(step, 1, view).softmax(1)
        student = logits.softmax(1).rot90(quarters, (-2, -1))
        consistency = self.consistency(step, student, taught, view)
        weight = self.weight * ramp(step.number, step.steps, stairs=60) * self.begun(step)
        return {"supervised": step.supervised(logits), "consistency": weight * consistency}
