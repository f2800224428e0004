"""DMPLS: two decoders learn scribbles, and the pseudo-labels of their random mix."""

import copy
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from mambaseg.data.limits import Number
from mambaseg.models.unet import UNet
from mambaseg.training.methods.method import (
    Kind,
    Method,
    Step,
    at_any_size,
    require_network,
    require_numbers,
)
from mambaseg.training.methods.terms import DropMaps, dice
from mambaseg.training.methods.weak_mamba_unet import mixed_label


class DMPLS(Method):
    """Dynamically mixed pseudo-labels of a UNet with a second decoder behind dropout.

    Source: Luo et al. 2022, Scribble-Supervised Medical Image Segmentation via Dual-Branch Network
    and Dynamically Mixed Pseudo Labels Supervision, equations 1-4. The second decoder belongs to
    the method: only the first predicts. Of each level of the encoder it sees whole feature maps
    dropped, as WSL4MIS does it.

    Args:
        networks: see `Method`; a UNet.
        weight: of the pseudo-labels.
        dropout: share of the feature maps that are dropped before the second decoder.
    """

    needs = "the decoder of a UNet"

    def __init__(
        self, networks: Sequence[nn.Module], *, weight: float = 0.5, dropout: float = 0.5
    ) -> None:
        super().__init__(networks)
        require_numbers(weight=weight)
        require_numbers(Number(0, below=1), dropout=dropout)
        network = require_network(self, UNet)
        self.decoder = _begun_anew(network.decoder)
        self.head: nn.Module = _begun_anew(network.head)
        self.dropout = nn.ModuleList(DropMaps(dropout) for _ in network.encoder)
        self.weight = weight

    def terms(self, step: Step) -> dict[str, Tensor]:
        """`supervised` and `pseudo`, each the mean over both decoders."""
        outputs = step.through(partial(at_any_size, self, outputs=self.both))
        share = step.uniform(1)[0]
        label = mixed_label(outputs, (share, 1 - share))
        supervised, pseudo = (
            0.5 * (loss(outputs[0]) + loss(outputs[1]))
            for loss in (step.supervised, lambda logits: dice(logits, label))
        )
        return {"supervised": supervised, "pseudo": self.weight * pseudo}

    def both(self, image: Tensor) -> list[Tensor]:
        """Logits (B, K, H, W) of the network's own decoder and of the second one."""
        network = require_network(self, UNet)
        levels = network.encoded(image)
        dropped = [drop(level) for drop, level in zip(self.dropout, levels, strict=True)]
        own, other = network.decoded(levels), network.decoded(dropped, self.decoder)
        return [network.head(own[-1]), self.head(other[-1])]


def _begun_anew(module: Kind) -> Kind:
    """A copy with freshly drawn weights."""
    module = copy.deepcopy(module)
    for part in module.modules():
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
    return module
