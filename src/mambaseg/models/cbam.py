"""Weights of channels and positions, from averages and maxima.

Source: Woo et al. 2018, CBAM, arXiv 1807.06521, sections 3.1 and 3.2.
"""

import torch
from torch import Tensor, nn


class ChannelAttention(nn.Sequential):
    """Weigh the channels by two layers that see their averages, and their maxima."""

    def __init__(self, dim: int, reduction: int = 16) -> None:
        hidden = max(dim // reduction, 1)
        super().__init__(
            nn.Conv2d(dim, hidden, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden, dim, kernel_size=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C, H, W)`."""
        summaries = x.mean(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
        average, maximum = map(super().forward, summaries)
        return torch.sigmoid(average + maximum) * x


class SpatialAttention(nn.Module):
    """Weigh the positions by a 7×7 convolution of the average and the maximum over channels."""

    def __init__(self, dilation: int = 1, *, bias: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3 * dilation, dilation=dilation, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C, H, W)`."""
        summary = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return self.conv(summary).sigmoid() * x
