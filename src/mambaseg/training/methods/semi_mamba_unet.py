"""Semi-Mamba-UNet: cross teaching of Mamba-UNet and UNet, and a contrast of their mean logits."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mambaseg.training.methods.method import Step, require_numbers
from mambaseg.training.methods.peers import Peers
from mambaseg.training.methods.terms import squared_difference


class SemiMambaUNet(Peers):
    """Two networks with a supervised, a pseudo-label and a contrast term each.

    Source: Ma and Wang 2024, Semi-Mamba-UNet (arXiv 2402.07245), equations 3-8. The pseudo-labels
    are learnt by Dice alone as in the released code (`pseudo=ce_dice`: as in equation 6). The
    contrast is the released code's: no projector is learnt, and no pixel is contrasted with
    another; it draws together the two networks' normalised mean logits of an image.

    Args:
        networks: see `Method`.
        contrast: weight of the contrast in each network's loss; 0 leaves it out.
        **learning: see `Peers`.
    """

    count = 2

    def __init__(
        self, networks: Sequence[nn.Module], *, contrast: float = 0.5, **learning: Any
    ) -> None:
        super().__init__(networks, **{"pseudo": "dice", **learning})
        require_numbers(contrast=contrast)
        self.contrast = contrast

    def terms(self, step: Step) -> dict[str, Tensor]:
        """`supervised` and `pseudo` of each network, and `contrast` of both together."""
        outputs = self.outputs(step)
        terms = self.terms_of(step, outputs)
        if self.contrast:
            terms["contrast"] = 2 * self.contrast * contrast(*outputs)
        return terms


def contrast(one: Tensor, other: Tensor) -> Tensor:
    """Mean squared difference of two networks' normalised mean logits, of logits (B, K, H, W)."""
    return squared_difference(
        F.normalize(one.mean((2, 3)), eps=1e-12), F.normalize(other.mean((2, 3)), eps=1e-12)
    )
