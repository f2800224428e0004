"""Interpolation consistency: the prediction for a mix should be the mix of the predictions."""

from collections.abc import Sequence

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
        decay: see `MeanTeacher`, as the next ones; there is no noise.
        weight: of the consistency.
        start: of the consistency.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        *,
        alpha: float = 0.2,
        decay: float = 0.99,
        weight: float = 0.1,
        start: float = 0.0,
    ) -> None:
        super().__init__(networks, decay=decay, weight=weight, start=start)
        require_numbers(Number(above=0), alpha=alpha)
        self.alpha = alpha

    def terms(self, step: Step) -> dict[str, Tensor]:
        """`supervised` and `consistency`."""
        first, places = step.labelled, range(step.labelled, len(step.image))
        unlabelled = step.image[first:]
        if len(unlabelled) % 2:
            raise UserError(
                f"method=ict mixes pairs of unlabelled images, and a micro-batch has "
                f"{len(unlabelled)}: let data.batch_size be a multiple of 4 × trainer.devices × "
                "trainer.accumulate_grad_batches"
            )
        shares = self.shares(step, places[::2]).to(unlabelled).view(-1, 1, 1, 1)
        mixed = mix(unlabelled[::2], unlabelled[1::2], shares)
        with torch.no_grad():
            taught = [
                step.logits(self.teacher.network, step.image[half], places=half, turn=1)
                for half in (places[::2], places[1::2])
            ]
        images = torch.cat([step.image[:first], mixed])
        logits = step.logits(self.network, images, places=[*range(first), *places[::2]])
        target = mix(taught[0].softmax(1), taught[1].softmax(1), shares)
        consistency = squared_difference(logits[first:].softmax(1), target)
        weight = published_weight(step, self.weight) * self.begun(step)
        return {"supervised": step.supervised(logits), "consistency": weight * consistency}

    def shares(self, step: Step, places: Sequence[int]) -> Tensor:
        """The share of the second image in each mix, by the places of the first ones."""
        drawn = [step.uniform_of(place, 1)[0] for place in places]
        return torch.from_numpy(betaincinv(self.alpha, self.alpha, drawn))


def mix(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """The share of the second, and the rest of the first."""
    return (1 - share) * one + share * other
