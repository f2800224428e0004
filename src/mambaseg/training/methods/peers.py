"""Networks that teach each other by pseudo-labels: CPS, cross teaching."""

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from mambaseg.training.methods.method import Method, Step, published_weight, require_numbers
from mambaseg.training.methods.terms import ce_dice, cross_entropy, dice, pseudo_label

PSEUDO_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce": cross_entropy, "dice": dice, "ce_dice": ce_dice,
}  # fmt: skip


class Peers(Method):
    """Each network learns the pseudo-labels of the next on unlabelled images.

    Two networks whose pseudo-labels are learnt by cross entropy are cross pseudo supervision (Chen
    et al. 2021, equation 2; with Dice, a CNN and a transformer: cross teaching, Luo et al. 2022).
    More than two form a ring.

    Args:
        networks: see `Method`.
        pseudo: loss of the pseudo-labels: `ce`, `dice` or `ce_dice`.
        weight: of the pseudo-labels at the end of the ramp.
    """

    count: ClassVar[int | None] = None
    unlabelled = True

    def __init__(
        self,
        networks: Sequence[nn.Module],
        *,
        pseudo: Literal["ce", "dice", "ce_dice"] = "ce",
        weight: float = 0.1,
    ) -> None:
        super().__init__(networks)
        require_numbers(weight=weight)
        self.pseudo_loss, self.weight = PSEUDO_LOSSES[pseudo], weight

    def terms(self, step: Step) -> dict[str, Tensor]:
        """`supervised` and `pseudo` of each network, numbered."""
        return self.terms_of(step, self.outputs(step))

    def outputs(self, step: Step) -> list[Tensor]:
        """The logits of all networks."""
        return [step.logits(network, turn=turn) for turn, network in enumerate(self.networks)]

    def terms_of(self, step: Step, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """The terms, by the networks' logits."""
        weight, first = published_weight(step, self.weight), step.labelled
        terms = {}
        for number, logits in enumerate(outputs, start=1):
            teacher = outputs[number % len(outputs)]
            pseudo = self.pseudo_loss(logits[first:], pseudo_label(teacher[first:]))
            terms[f"supervised_{number}"] = step.supervised(logits)
            terms[f"pseudo_{number}"] = weight * pseudo
        return terms
