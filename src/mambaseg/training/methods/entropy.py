"""Entropy minimisation: be certain everywhere."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from mambaseg.training.methods.method import Method, Step, published_weight, require_numbers
from mambaseg.training.methods.terms import entropy


class Entropy(Method):
    """Mean entropy of all outputs, those of labelled images too, as a share of the largest.

    Source: Vu et al. 2019, ADVENT, equation 3, without its adversarial part; the papers of the
    Mamba-UNet line call this ADVENT, as in SSL4MIS.

    Args:
        networks: see `Method`.
        weight: at the end of the ramp.
    """

    unlabelled = True

    def __init__(self, networks: Sequence[nn.Module], *, weight: float = 0.1) -> None:
        super().__init__(networks)
        require_numbers(weight=weight)
        self.weight = weight

    def terms(self, step: Step) -> dict[str, Tensor]:
        """`supervised` and `entropy`."""
        logits = step.logits(self.network)
        certainty = normalised_entropy(logits.softmax(1))
        weight = published_weight(step, self.weight)
        return {"supervised": step.supervised(logits), "entropy": weight * certainty}


def normalised_entropy(probability: Tensor) -> Tensor:
    """Mean entropy over the pixels, between 0 and 1."""
    return entropy(probability).mean() / math.log(probability.shape[1])
