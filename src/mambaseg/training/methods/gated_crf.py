"""Gated CRF: neighbours of like intensity have like labels."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mambaseg.data.limits import Number
from mambaseg.errors import UserError
from mambaseg.training.methods.method import Method, Step, require_numbers

log = logging.getLogger(__name__)


class GatedCRF(Method):
    """Partial supervised loss plus a pairwise term over each pixel's neighbourhood.

    Source: Obukhov et al. 2019, Gated CRF Loss for Weakly Supervised Semantic Image Segmentation,
    equations 3-6, with one kernel of position and intensity and without a source mask.

    Args:
        networks: see `Method`.
        weight: of the pairwise term.
        position: standard deviation in pixels.
        intensity: standard deviation in the image's unit; squared differences of all channels add
            up, those of neighbouring slices too.
        radius: of the square neighbourhood, pixels.
        released: let neighbours beyond the border count as pixels of position 0, intensity 0 and
            no class, as the published code does; it adds a constant without a gradient.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        *,
        weight: float = 0.1,
        position: float = 6.0,
        intensity: float = 0.1,
        radius: int = 5,
        released: bool = False,
    ) -> None:
        super().__init__(networks)
        require_numbers(weight=weight)
        require_numbers(Number(above=0), position=position, intensity=intensity)
        require_numbers(Number(1, whole=True), radius=radius)
        self.weight, self.released = weight, released
        self.position, self.intensity, self.radius = position, intensity, radius

    def begin(self, data: Any) -> None:
        """Warns of images in another unit than the default of `intensity` is for."""
        if data.preprocessing.intensity in ("zscore", "ct"):
            log.warning("method=gated_crf: method.intensity=%g counts in standard deviations of "
                        "the images here (data.intensity=%s), and its default is for images in "
                        "[0, 1]", self.intensity, data.preprocessing.intensity)  # fmt: skip

    def terms(self, step: Step) -> dict[str, Tensor]:
        """`supervised` and `pairwise`."""
        logits = step.logits(self.network)
        pairwise = self.pairwise(logits.softmax(1), step.image)
        return {"supervised": step.supervised(logits), "pairwise": self.weight * pairwise}

    def pairwise(self, probability: Tensor, image: Tensor) -> Tensor:
        """Sum over a pixel's neighbours of kernel × disagreement, mean over the pixels."""
        samples, _, height, width = probability.shape
        if self.radius >= min(height, width):
            raise UserError(
                f"method.radius={self.radius}: images of {height} × {width} pixels allow "
                f"{min(height, width) - 1} at most"
            )
        total = probability.new_zeros(())
        reach = range(-self.radius, self.radius + 1)
        offsets = [(down, right) for down in reach for right in reach if (down, right) > (0, 0)]
        for down, right in offsets:  # each pair once; it counts for both of its pixels
            here = (slice(0, height - down), slice(max(-right, 0), width - max(right, 0)))
            there = (slice(down, height), slice(max(right, 0), width - max(-right, 0)))
            kernel = self._kernel(down, right, image[:, :, *here], image[:, :, *there])
            agreement = (probability[:, :, *here] * probability[:, :, *there]).sum(1)
            total = total + 2 * (kernel * (1 - agreement)).sum()
        if self.released:
            total = total + self._beyond(image)
        return total / (samples * height * width)

    def _kernel(self, down: int, right: int, one: Tensor, other: Tensor) -> Tensor:
        apart = (down**2 + right**2) / self.position**2
        return (-0.5 * (apart + ((one - other) / self.intensity).square().sum(1))).exp()

    def _beyond(self, image: Tensor) -> Tensor:
        """What neighbours beyond the border add where they count as pixels at the origin."""
        height, width = image.shape[-2:]
        rows = torch.arange(height, device=image.device).to(image).view(-1, 1)
        columns = torch.arange(width, device=image.device).to(image)
        apart = (rows.square() + columns.square()) / self.position**2
        kernel = (-0.5 * (apart + (image / self.intensity).square().sum(1))).exp()
        side = 2 * self.radius + 1
        inside = (self._reached(rows, height)) * (self._reached(columns, width))
        return (kernel * (side**2 - inside)).sum()

    def _reached(self, places: Tensor, length: int) -> Tensor:
        """How many places of a line lie within the radius of each of its places."""
        first, last = (places - self.radius).clamp(min=0), places + self.radius
        return last.clamp(max=length - 1) - first + 1
