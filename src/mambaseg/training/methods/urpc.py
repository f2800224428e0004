"""URPC: the scales of a decoder agree with their mean where they agree with each other."""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseg.errors import UserError
from mambaseg.models.unet import UNet, UpBlock
from mambaseg.training.methods.method import (
    Method,
    Step,
    at_any_size,
    published_weight,
    require_network,
    require_numbers,
)
from mambaseg.training.methods.terms import ratio


class URPC(Method):
    """Uncertainty-rectified pyramid consistency of a UNet with a head at each decoder level.

    Source: Luo et al. 2021, Efficient Semi-supervised Gland Segmentation via Uncertainty Rectified
    Pyramid Consistency, equations 1-6. The heads of the coarser levels belong to the method: they
    teach, and only the finest predicts. The released network also disturbs what they see by
    dropout and noise, which the paper does not have.

    Args:
        networks: see `Method`; a UNet.
        weight: of the consistency at the end of its ramp.
        scales: heads, the finest included; a decoder of fewer levels has one at each.
    """

    unlabelled = True
    needs = "the decoder of a UNet"

    def __init__(
        self, networks: Sequence[nn.Module], *, weight: float = 0.1, scales: int = 4
    ) -> None:
        super().__init__(networks)
        require_numbers(weight=weight)
        network = require_network(self, UNet)
        if min(scales, len(network.decoder)) < 2:
            raise UserError(
                f"method.scales={scales}, and the network's decoder has {len(network.decoder)} "
                "level(s): 2 or more are needed"
            )
        self.heads = nn.ModuleList()
        for block in network.decoder[-scales:-1]:
            assert isinstance(block, UpBlock)
            width = block.reduce.out_channels
            self.heads.append(nn.Conv2d(width, network.head.out_channels, 3, padding=1))
        self.weight = weight

    def terms(self, step: Step) -> dict[str, Tensor]:
        """`supervised`, the mean over the heads, and `consistency`."""
        fine, *coarse = step.through(partial(at_any_size, self, outputs=self.scales))
        outputs = [fine, *coarse]
        supervised = torch.stack([step.supervised(logits) for logits in outputs]).mean()
        weight = published_weight(step, self.weight)
        consistency = pyramid_consistency([logits[step.labelled :] for logits in outputs])
        return {"supervised": supervised, "consistency": weight * consistency}

    def scales(self, image: Tensor) -> list[Tensor]:
        """Logits (B, K, H, W) of the finest head, then of the others, brought to its size."""
        network = require_network(self, UNet)
        maps = network.decoded(network.encoded(image))
        coarse = [
            F.interpolate(head(x), image.shape[-2:])  # to the nearest pixel, as in SSL4MIS
            for head, x in zip(self.heads, maps[-len(self.heads) - 1 : -1], strict=True)
        ]
        return [network.head(maps[-1]), *coarse]


def pyramid_consistency(outputs: Sequence[Tensor]) -> Tensor:
    """Squared difference of each scale to the mean, weighted by exp(-KL), plus the KL divergence.

    `outputs` are logits (B, K, H, W) of one size. Nothing is detached.
    """
    logs = [logits.log_softmax(1) for logits in outputs]
    mean = torch.stack([log.exp() for log in logs]).mean(0)
    log_mean = torch.stack(logs).logsumexp(0) - math.log(len(logs))  # finite where mean is 0
    terms = []
    for log in logs:
        divergence = (mean * (log_mean - log)).sum(1, keepdim=True)
        weight = (-divergence).exp()
        difference = ((mean - log.exp()).square() * weight).sum() / mean.shape[1]
        count = torch.as_tensor(weight.numel(), device=weight.device)
        terms.append(ratio(difference, weight.sum() + 1e-8 * count) + divergence.mean())
    return torch.stack(terms).mean()
