"""Interpolation consistency: what is said of a mix of two images is the mix of what is said."""

from collections.abc import Sequence
from typing import Any

import torch
from scipy.special import betaincinv
from torch import Tensor, nn

from mambaseg.data.limits import Number
from mambaseg.errors import UserError
from mambaseg.training.methods.mean_teacher import MeanTeacher
from mambaseg.training.methods.method import Step, published_weight, require_numbers
from mambaseg.training.methods.terms import squared_difference


class ICT(MeanTeacher):
    """The student's probabilities of mixed unlabelled images, against the teacher's mixed ones.

    Neighbours in the batch are mixed, so that several processes mix the pairs that one does. The
    teacher sees the first image of each pair in one pass and the second ones in another: its batch
    norms take the statistics of half of the unlabelled images, as in SSL4MIS.

    Source: Verma et al. 2019, Interpolation Consistency Training, equation 2; as in SSL4MIS.

    Args:
        networks: see `Method`.
        alpha: of the Beta distribution from which each pair's share is drawn.
        **teaching: see `MeanTeacher`; there is no noise.
    """

    def __init__(
        self, networks: Sequence[nn.Module], *, alpha: float = 0.2, **teaching: Any
    ) -> None:
        super().__init__(networks, **{"start": 0.0, "noise": 0.0, **teaching})
        require_numbers(Number(above=0), alpha=alpha)
        self.alpha = alpha

    def terms(self, step: Step) -> dict[str, Tensor]:
        """`supervised` and `consistency`."""
        first, pairs = step.labelled, (len(step.image) - step.labelled) // 2
        unlabelled = step.image[first:]
        if len(unlabelled) % 2:
            raise UserError(
                f"method=ict mixes pairs of unlabelled images, and a micro-batch has "
                f"{len(unlabelled)}: let data.batch_size be a multiple of 4 × trainer.devices × "
                "trainer.accumulate_grad_batches"
            )
        shares = self.shares(step, pairs).to(unlabelled).view(-1, 1, 1, 1)
        mixed = mix(unlabelled[::2], unlabelled[1::2], shares)
        with torch.no_grad():
            taught = [
                step.logits(self.teacher.network, half, first=first + place, apart=2, turn=1)
                for place, half in enumerate((unlabelled[::2], unlabelled[1::2]))
            ]
        logits = step.logits(self.network, torch.cat([step.image[:first], mixed]))
        target = mix(taught[0].softmax(1), taught[1].softmax(1), shares)
        consistency = squared_difference(logits[first:].softmax(1), target)
        weight = published_weight(step, self.weight) * self.begun(step)
        return {"supervised": step.supervised(logits), "consistency": weight * consistency}

    def shares(self, step: Step, pairs: int) -> Tensor:
        """The share (pairs,) of the second image in each mix."""
        places = range(step.labelled, step.labelled + 2 * pairs, 2)
        drawn = [step.uniform_of(place, 1)[0] for place in places]
        return torch.from_numpy(betaincinv(self.alpha, self.alpha, drawn))


def mix(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """The share of the second, and the rest of the first."""
    return (1 - share) * one + share * other
