"""Scribble2Label: scribbles, and pseudo-labels where a mean of predictions is confident."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mambaseg.data.classes import IGNORED
from mambaseg.data.limits import PART, SHARE, Number
from mambaseg.errors import UserError
from mambaseg.inference.segment import Member, segment
from mambaseg.training.losses import sum_over_devices
from mambaseg.training.methods.method import Method, Step, require_numbers
from mambaseg.training.methods.terms import cross_entropy
from mambaseg.training.ranks import own_place

log = logging.getLogger(__name__)
_SURE = 128  # added to the class of a pixel that predictions name, not the annotator


class Scribble2Label(Method):
    """Partial supervised loss plus cross entropy to the sure pixels of averaged predictions.

    Every so many steps the network predicts all training cases as they are; of each pixel a running
    mean of these predictions is kept. Where it is above the threshold for a class and there is no
    scribble, that class is learnt, in the same augmented view as the image.

    The means take two bytes per voxel and class of all training cases, in memory and in each
    checkpoint. In 8 bits they would stop rising where a new prediction changes them by less than
    half of 1/255.

    Source: Lee and Jeong 2020, Scribble2Label: Scribble-Supervised Cell Segmentation via
    Self-Generating Pseudo-Labels with Consistency, equations 2-4.

    Args:
        networks: see `Method`.
        weight: of the pseudo-labels.
        start: share of the training before they count.
        every: steps between two predictions of all cases.
        momentum: share of a new prediction in the running mean, which begins at 0.
        threshold: mean probability above which a pixel is sure.
    """

    needs = "pixels without a label"

    def __init__(
        self,
        networks: Sequence[nn.Module],
        *,
        weight: float = 0.5,
        start: float = 0.1,
        every: int = 100,
        momentum: float = 0.2,
        threshold: float = 0.8,
    ) -> None:
        super().__init__(networks)
        require_numbers(weight=weight)
        require_numbers(SHARE, start=start)
        require_numbers(Number(1, whole=True), every=every)
        require_numbers(PART, momentum=momentum)
        require_numbers(Number(0, below=1), threshold=threshold)
        self.weight, self.start, self.every = weight, start, every
        self.momentum, self.threshold = momentum, threshold
        self.means: dict[str, Tensor] = {}  # case -> (Z, K, H, W) uint16, see `shares_of`
        self._data: Any = None

    def begin(self, data: Any) -> None:
        """Lets the data module show, from now on, what is sure among the labels of a slice.

        Raises:
            UserError: all pixels have labels, or the training ends before a pixel can be sure.
        """
        if not data.partial:
            raise UserError(
                "method=scribble2label labels the pixels without a label, and here every pixel has "
                "one: add data.labels=scribble or data.ignore_label, or choose another method"
            )
        count = predictions_until_sure(self.momentum, self.threshold)
        first = self.every * count
        if first >= data.steps > count:  # with so few steps it is a trial of the program
            raise UserError(
                f"method=scribble2label: no pixel can be sure before step {first} (method.every="
                f"{self.every}), and the training has {data.steps} steps: choose method.every="
                f"{(data.steps - 1) // count} or less"
            )
        if first > (start := round(self.start * data.steps)):
            log.warning("method=scribble2label: pseudo-labels begin at step %d of %d, not at "
                        "step %d (method.start): no pixel is sure before, with method.every=%d",
                        first, data.steps, start, self.every)  # fmt: skip
        self._data = data
        data.relabel = self.relabelled

    def terms(self, step: Step) -> dict[str, Tensor]:
        """`supervised` and `pseudo`."""
        sure = (step.label >= _SURE) & (step.label != IGNORED)
        target = (step.label - _SURE).where(sure, IGNORED)
        logits = step.logits(self.network)
        scribbled = replace(step, label=step.label.where(~sure, IGNORED))
        begun = step.number >= round(self.start * step.steps)
        pseudo = self.weight * begun * cross_entropy(logits, target)
        return {"supervised": scribbled.supervised(logits), "pseudo": pseudo}

    def after(self, step: int) -> None:
        """The running means take in what the network predicts now."""
        if (step + 1) % self.every or self._data is None:
            return
        device = next(self.network.parameters()).device
        member = Member(self.network, self._data.preprocessing)
        rank, world = own_place()
        labelled = [case for case in self._data.cases["train"] if case.labelled]
        for place, case in enumerate(labelled):
            number = self._data.cache.position(case.id)
            image = torch.from_numpy(self._data.cache.image(number).copy())
            classes = self._data.num_classes
            now = torch.zeros(len(image), classes, *image.shape[-2:], dtype=torch.uint8)
            if place % world == rank:  # each process predicts its share
                shown = segment(
                    [member],
                    [image.to(device)],
                    spacing=self._data.cache.entries[number].spacing,
                    batch_size=self.batch_size,
                    probabilities=True,
                )
                assert shown.probabilities is not None
                now = shown.probabilities
            if world > 1:
                now = sum_over_devices(now.to(device)).cpu()
            mean = self.means.get(case.id, torch.zeros_like(now))
            taken_in = running_mean(shares_of(mean), shares_of(now), self.momentum)
            most = torch.iinfo(torch.uint16).max
            self.means[case.id] = (most * taken_in).round().to(torch.uint16)

    def relabelled(self, label: Tensor, cases: Sequence[str], slices: Sequence[int]) -> Tensor:
        """Native labels (B, H, W) uint8, with 128 + class where one is sure and no scribble is.

        They are padded at the bottom and right, where nothing is looked up.
        """
        label = label.clone()
        for own, case, z in zip(label, cases, slices, strict=True):
            if (mean := self.means.get(case)) is not None:
                height, width = mean.shape[-2:]
                part = own[:height, :width]
                share = shares_of(mean[z]).to(label.device)
                found = sure_label(share, part, self.threshold)
                part[found != IGNORED] = (found[found != IGNORED] + _SURE).to(label.dtype)
        return label

    def get_extra_state(self) -> dict[str, Tensor]:
        """The running means, for a checkpoint."""
        return dict(self.means)

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take them from a checkpoint."""
        self.means = dict(state)


def shares_of(whole: Tensor) -> Tensor:
    """Probabilities that are kept as shares of the largest integer of their type.

    Means of 8 bits, which checkpoints of earlier versions hold, are read like those of 16.
    """
    return whole.float() / torch.iinfo(whole.dtype).max


def running_mean(mean: Tensor, now: Tensor, momentum: float) -> Tensor:
    """The mean with a share of what is predicted now."""
    return momentum * now + (1 - momentum) * mean


def predictions_until_sure(momentum: float, threshold: float) -> int:
    """After how many predictions of probability 1 a running mean from 0 on is above a threshold."""
    if momentum == 1:
        return 1
    return 1 + math.floor(math.log1p(-threshold) / math.log1p(-momentum))  # 1 - (1 - m)^n > t


def sure_label(mean: Tensor, label: Tensor, threshold: float) -> Tensor:
    """The class whose mean (K, H, W) is above the threshold where a label (H, W) is IGNORED."""
    highest, found = mean.max(0)
    return found.where((highest > threshold) & (label == IGNORED), IGNORED)
