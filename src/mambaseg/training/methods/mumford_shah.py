"""Mumford-Shah: regions of even intensity with short borders."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mambaseg.training.losses import sum_over_devices
from mambaseg.training.methods.method import Method, Step, require_numbers


class MumfordShah(Method):
    """Partial supervised loss plus the Mumford-Shah functional of the probabilities.

    Source: Kim and Ye 2020, Mumford-Shah Loss Functional for Image Segmentation with Deep
    Learning, equation 8: sums over pixels, so the weight is small.

    Args:
        networks: see `Method`.
        weight: of the functional.
        released: let image and probabilities change places in the region term, as the published
            code does.
    """

    def __init__(
        self, networks: Sequence[nn.Module], *, weight: float = 1e-6, released: bool = False
    ) -> None:
        super().__init__(networks)
        require_numbers(weight=weight)
        self.weight, self.released = weight, released

    def terms(self, step: Step) -> dict[str, Tensor]:
        """`supervised` and `functional`."""
        logits = step.logits(self.network)
        probability = logits.softmax(1)
        functional = self.region(probability, step.image) + length(probability)
        functional = sum_over_devices(functional)
        return {"supervised": step.supervised(logits), "functional": self.weight * functional}

    def region(self, probability: Tensor, image: Tensor) -> Tensor:
        """Deviation of each class from its mean, over all channels of the image."""
        pairs = (image[:, k : k + 1] for k in range(image.shape[1]))
        if self.released:
            return torch.stack([_region(channel, probability) for channel in pairs]).sum()
        return torch.stack([_region(probability, channel) for channel in pairs]).sum()


def _region(weights: Tensor, values: Tensor) -> Tensor:
    """Sum of weights × (values - their weighted mean per sample)²."""
    whole = weights.sum((2, 3), keepdim=True)
    whole = whole.where(whole.abs() >= torch.finfo(whole.dtype).tiny, 1.0)  # a class of no pixel
    mean = (weights * values).sum((2, 3), keepdim=True) / whole
    return (weights * (values - mean).square()).sum()


def length(probability: Tensor) -> Tensor:
    """Sum of the absolute differences of neighbours in rows and columns."""
    return probability.diff(dim=2).abs().sum() + probability.diff(dim=3).abs().sum()
