"""Deep co-training as the papers of the line compare with: agree with oneself on a turned view."""

from collections.abc import Sequence

from torch import Tensor, nn

from mambaseg.training.methods.method import Method, Step, published_weight, require_numbers
from mambaseg.training.methods.terms import squared_difference


class DeepCoTraining(Method):
    """Half the squared difference of two views, each pulled towards the other.

    One network and a turn by 90, 180 or 270 degrees (or none), as in SSL4MIS; the method of the
    name has two networks (Qiao et al. 2018, Deep Co-Training for Semi-Supervised Image
    Recognition). The value is the mean squared difference; either side gets half its gradient.

    Args:
        networks: see `Method`.
        weight: of the consistency at the end of its ramp.
    """

    unlabelled = True

    def __init__(self, networks: Sequence[nn.Module], *, weight: float = 0.1) -> None:
        super().__init__(networks)
        require_numbers(weight=weight)
        self.weight = weight

    def terms(self, step: Step) -> dict[str, Tensor]:
        """`supervised` and `consistency`."""
        quarters, first = int(4 * step.uniform(1)[0]), step.labelled
        logits = step.logits(self.network)
        view = step.image[first:].rot90(quarters, (-2, -1))
        places = range(first, len(step.image))
        other = step.logits(self.network, view, places=places, turn=1).softmax(1)
        consistency = mutual_difference(other, logits[first:].softmax(1).rot90(quarters, (-2, -1)))
        weight = published_weight(step, self.weight)
        return {"supervised": step.supervised(logits), "consistency": weight * consistency}


def mutual_difference(one: Tensor, other: Tensor) -> Tensor:
    """Mean squared difference of which each side takes half the gradient."""
    there = squared_difference(one, other.detach())
    return 0.5 * (there + squared_difference(one.detach(), other))
