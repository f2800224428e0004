"""What several methods share: pseudo-labels, differences, entropies, ramps, averages, dropout.

Probabilities are softmaxes (B, K, H, W) over the classes, labels (B, H, W) class indices. Means are
over the samples of all devices, so that several processes compute what one does.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseg.models.stochastic import Dropout
from mambaseg.training.losses import DiceCE, sum_over_devices

cross_entropy = DiceCE(ce_weight=1.0, dice_weight=0.0, partial=True)
"""(logits, label) -> mean cross entropy over the pixels whose label is not ignored; 0 of none."""
dice = DiceCE(ce_weight=0.0, dice_weight=1.0, partial=True)
"""(logits, label) -> Dice loss as `DiceCE` defines it."""
ce_dice = DiceCE(ce_weight=1.0, dice_weight=1.0, partial=True)
"""(logits, label) -> sum of both."""


def pseudo_label(scores: Tensor) -> Tensor:
    """The class with the highest score (B, K, H, W) of each pixel; no gradient flows through it."""
    return scores.detach().argmax(1)


def squared_difference(one: Tensor, other: Tensor) -> Tensor:
    """Mean squared difference of two arrays of probabilities."""
    return (one - other).square().mean()


def entropy(probability: Tensor) -> Tensor:
    """Entropy of each pixel in nats, (B, H, W), with 1e-6 inside the logarithm."""
    return -(probability * (probability + 1e-6).log()).sum(1)


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Quotient of two sums, each over the samples of all devices."""
    one, other = sum_over_devices(torch.stack([part, whole.to(part)]))
    return one / other


def ramp(step: float, length: float, *, stairs: int = 0) -> float:
    """Rise as exp(-5 (1 - t)^2) from 0.0067 to 1, where t = step / length goes from 0 to 1.

    With `stairs` t rises in so many equal stairs, as the weights of SSL4MIS do.
    Source: Laine and Aila 2017, Temporal Ensembling, section 3.1.
    """
    t = min(max(step / length, 0.0), 1.0) if length else 1.0
    if stairs:
        t = math.floor(t * stairs + 1e-9) / stairs
    return math.exp(-5.0 * (1.0 - t) ** 2)


class DropMaps(Dropout):
    """`Dropout` of whole feature maps; equals `torch.nn.Dropout2d` where no numbers are told."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        if self.numbers is None or not self.training:
            return F.dropout2d(x, self.rate, self.training)
        return x * self.draw(x.new_empty(*x.shape[:2], 1, 1), self.numbers)


class Teacher(nn.Module):
    """An average of a network's parameters over the steps: t <- d t + (1 - d) s.

    d is min(1 - 1 / (step + 1), decay), so that the first steps copy the student. Running
    statistics of norms are not averaged: the teacher stays in training mode and has its own, of
    its own passes. It takes no gradient.

    Source: Tarvainen and Valpola 2017, Mean teachers are better role models, section 3.
    """

    def __init__(self, network: nn.Module, decay: float = 0.99) -> None:
        super().__init__()
        self.network, self.decay = copy.deepcopy(network).requires_grad_(False), decay

    def follow(self, student: nn.Module, step: int) -> None:
        """Take in the student's parameters after optimizer step `step`, counted from 0."""
        decay = min(1.0 - 1.0 / (step + 1), self.decay)
        with torch.no_grad():
            for mine, its in zip(self.network.parameters(), student.parameters(), strict=True):
                mine.mul_(decay).add_(its.to(mine), alpha=1.0 - decay)
