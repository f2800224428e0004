"""Layers that drop something at random in training, and who decides what they drop.

On its own such a layer draws from torch's generator, as any other. Inside `drawing` it is told a
number per sample, and what it drops from a sample is a function of that number alone: not of the
other samples of the batch, of the process that computes it, or of what was drawn before.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stochastic(nn.Module):
    """A layer that drops something in training only, at a `rate` in [0, 1)."""

    numbers: Tensor | None = None
    """One per sample of the coming batch, (B,) int64 on the CPU, uniform in [0, 2^63)."""
    kept: Tensor | None = None
    """Whether a sample that may be dropped as a whole is kept, (B,), by these numbers."""
    mask: Tensor | None = None
    """What single elements are multiplied by, where that was drawn before (CUDA graphs)."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"rate of a {type(self).__name__} must lie in [0, 1), got {rate}")
        self.rate = rate

    def extra_repr(self) -> str:
        """Show the rate in `print(network)`."""
        return f"rate={self.rate:.3f}"


class DropPath(Stochastic):
    """Zero a residual branch for whole samples.

    Source: Huang et al. 2016, Deep Networks with Stochastic Depth.
    Kept samples are divided by `1 - rate`, so the expectation is unchanged. Identity in eval mode.
    """

    def forward(self, branch: Tensor) -> Tensor:
        """Map `(B, ...)` to `(B, ...)`."""
        if not self.training or self.rate == 0.0:
            return branch
        kept = self.kept
        if kept is None:
            kept = torch.rand(branch.shape[0], device=branch.device) >= self.rate
        scale = kept.to(branch, non_blocking=True) / (1.0 - self.rate)
        return branch * scale.view(-1, *[1] * (branch.ndim - 1))


class Dropout(Stochastic):
    """Zero single elements; the others are divided by `1 - rate`. Identity in eval mode.

    Source: Srivastava et al. 2014, Dropout. Equals `torch.nn.Dropout` where no numbers are told.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, ...)` to `(B, ...)`."""
        if self.mask is not None and self.training:
            return x * self.mask
        if self.numbers is None or not self.training or self.rate == 0.0:
            return F.dropout(x, self.rate, self.training)
        # on a CPU in the order of the dimensions, whatever x's layout: the same mask in each
        layout = torch.contiguous_format if x.device.type == "cpu" else torch.preserve_format
        mask = self.draw(torch.empty_like(x, memory_format=layout), self.numbers)
        # and laid out like x once, because both passes multiply
        return x * (mask if mask.stride() == x.stride() else torch.empty_like(x).copy_(mask))

    def draw(self, mask: Tensor, numbers: Tensor) -> Tensor:
        """Fill `(B, ...)` with 0 or `1 / (1 - rate)`, each sample by its number of `(B,)`."""
        generator = torch.Generator(mask.device)
        for sample, number in zip(mask, numbers.tolist(), strict=True):
            sample.bernoulli_(1.0 - self.rate, generator=generator.manual_seed(number))
        return mask.div_(1.0 - self.rate)


def stochastic_layers(network: nn.Module) -> list[Stochastic]:
    """List the layers that drop something, in the network's order."""
    return [m for m in network.modules() if isinstance(m, Stochastic) and m.rate > 0]


@contextmanager
def drawing(
    layers: Sequence[Stochastic], numbers: Tensor, device: torch.device | None = None
) -> Iterator[None]:
    """Let layers drop by numbers, (B, layers) int64 on the CPU, uniform in [0, 2^63).

    `device` is the network's; one copy takes there what all layers need.
    """
    kept = kept_samples(layers, numbers)
    if device is not None and device.type == "cuda":
        kept = kept.pin_memory().to(device, non_blocking=True)
    for layer, column, answers in zip(layers, numbers.unbind(1), kept.unbind(1), strict=True):
        layer.numbers, layer.kept = column, answers
    try:
        yield
    finally:
        for layer in layers:
            layer.numbers = layer.kept = None


def kept_samples(layers: Sequence[Stochastic], numbers: Tensor) -> Tensor:
    """Tell which samples each layer keeps as a whole: (B, layers) bool, from `numbers` like it."""
    uniform = (numbers >> 10).double() * 2.0**-53  # all that a float64 in [0, 1) holds
    return uniform >= torch.tensor([layer.rate for layer in layers], dtype=torch.float64)


def linear_schedule(rate: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Spread drop path rates evenly from 0 (first block) to `rate` (last block), by stage.

    Raises:
        ValueError: `rate`, which networks call drop_path_rate, is no probability below 1.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"model.drop_path_rate={rate}: must be 0 or more and below 1")
    last = max(sum(depths) - 1, 1)
    rates = iter([rate * block / last for block in range(sum(depths))])
    return [list(islice(rates, depth)) for depth in depths]


def falling_schedule(rate: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Spread drop path rates evenly from `rate` (first block) to 0 (last block)."""
    return [stage[::-1] for stage in linear_schedule(rate, depths[::-1])[::-1]]
