"""Stochastic depth: leave out a residual branch for some samples of a training batch."""

import torch
from torch import Tensor, nn


def draw_kept(batch: int, rate: float, device: torch.device) -> Tensor:
    """Draw which samples keep their branch; the one place where drop path touches randomness.

    Returns:
        Boolean `(batch,)`; each entry is False with probability `rate`.
    """
    return torch.rand(batch, device=device) >= rate


class DropPath(nn.Module):
    """Zero a residual branch for whole samples.

    Source: Huang et al. 2016, Deep Networks with Stochastic Depth.
    Kept samples are divided by `1 - rate`, so the expectation is unchanged. Identity in eval mode.

    Args:
        rate: probability in [0, 1) that a sample loses the branch.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop path rate must lie in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """Map `(B, ...)` to `(B, ...)`."""
        if not self.training or self.rate == 0.0:
            return branch
        kept = draw_kept(branch.shape[0], self.rate, branch.device)
        scale = kept.to(branch.dtype) / (1.0 - self.rate)
        return branch * scale.view(-1, *[1] * (branch.ndim - 1))

    def extra_repr(self) -> str:
        """Show the rate in `print(network)`."""
        return f"rate={self.rate:.3f}"


def linear_schedule(rate: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Spread drop path rates evenly from 0 (first block) to `rate` (last block).

    Returns:
        One list of rates per stage, one rate per block.
    """
    last = max(sum(depths) - 1, 1)
    rates = [rate * block / last for block in range(sum(depths))]
    starts = [sum(depths[:stage]) for stage in range(len(depths))]
    return [rates[start : start + depth] for start, depth in zip(starts, depths, strict=True)]
