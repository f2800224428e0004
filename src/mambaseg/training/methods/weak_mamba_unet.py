"""Weak-Mamba-UNet: three networks learn scribbles, and the pseudo-labels of their random mix."""

import itertools
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from mambaseg.training.methods.method import Method, Step, require_numbers
from mambaseg.training.methods.terms import dice, pseudo_label


class WeakMambaUNet(Method):
    """Partial supervised loss plus Dice to the pseudo-labels of a random mix, for each network.

    The shares of the mix are drawn anew at each step, uniformly among those that sum to 1; the
    pseudo-labels hold at all pixels, scribbles included.

    Source: Wang and Ma 2024, Weak-Mamba-UNet (arXiv 2402.10887), equations 1-5.

    Args:
        networks: see `Method`.
        weight: of the pseudo-labels, from the first step on.
    """

    count: ClassVar[int | None] = None

    def __init__(self, networks: Sequence[nn.Module], *, weight: float = 1.0) -> None:
        super().__init__(networks)
        require_numbers(weight=weight)
        self.weight = weight

    def terms(self, step: Step) -> dict[str, Tensor]:
        """`supervised` and `pseudo` of each network, numbered."""
        outputs = [step.logits(network, turn=turn) for turn, network in enumerate(self.networks)]
        label = mixed_label(outputs, shares(step.uniform(len(outputs) - 1)))
        terms = {}
        for number, logits in enumerate(outputs, start=1):
            terms[f"supervised_{number}"] = step.supervised(logits)
            terms[f"pseudo_{number}"] = self.weight * dice(logits, label)
        return terms


def shares(points: Sequence[float]) -> list[float]:
    """The lengths into which points in [0, 1) cut the unit interval."""
    cuts = [0.0, *sorted(points), 1.0]
    return [high - low for low, high in itertools.pairwise(cuts)]


def mixed_label(outputs: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The pseudo-label (B, H, W) of a mix of the probabilities of several networks' logits."""
    mixed: Tensor = sum(  # type: ignore[assignment]
        share * logits.softmax(1) for share, logits in zip(shares, outputs, strict=True)
    )
    return pseudo_label(mixed)
