"""Attention U-Net: UNet whose skips are weighted by additive attention gates.

Source: Oktay et al. 2018, arXiv 1804.03999 (section 2, equations 1 to 3, figure 2).

The Mamba-UNet paper's 2-D AttentionUNet was never released; all but the gates is therefore the UNet
of this project. As in Oktay's paper, the gating signal is the next coarser map of the decoder, the
gate works at that resolution, and its weights are interpolated back. Differs from Oktay's code in
gating all four skips (there: not the finest), in a single gate per skip, and in having no deep
supervision.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseg.models.unet import UNet, UpBlock


class AdditiveGate(nn.Module):
    """Weight a skip by how well it fits a coarser gating signal.

    With x the skip and g the signal: α = σ(ψ(ReLU(W_x x + W_g g))), a single weight per pixel.

    Args:
        skip_channels: of x, and of the space in which the two are added.
        gate_channels: of g.
    """

    def __init__(self, skip_channels: int, gate_channels: int) -> None:
        super().__init__()
        self.skip = nn.Conv2d(skip_channels, skip_channels, kernel_size=2, stride=2, bias=False)
        self.gate = nn.Conv2d(gate_channels, skip_channels, kernel_size=1)
        self.psi = nn.Conv2d(skip_channels, 1, kernel_size=1)
        self.out = nn.Sequential(
            nn.Conv2d(skip_channels, skip_channels, kernel_size=1), nn.BatchNorm2d(skip_channels)
        )

    def forward(self, skip: Tensor, gate: Tensor) -> Tensor:
        """Weight `(B, skip_channels, 2H, 2W)` by `(B, gate_channels, H, W)`; the skip's shape."""
        weight = torch.sigmoid(self.psi(F.relu(self.skip(skip) + self.gate(gate))))
        weight = F.interpolate(weight, scale_factor=2, mode="bilinear", align_corners=False)
        return self.out(skip * weight)


class GatedUpBlock(UpBlock):
    """UNet's way up, with the skip gated by the coarser map that comes in."""

    def __init__(self, in_channels: int, skip_channels: int) -> None:
        super().__init__(in_channels, skip_channels)
        self.attention = AdditiveGate(skip_channels, in_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Join `(B, in_channels, H, W)` and the skip `(B, skip_channels, 2H, 2W)`."""
        return super().forward(x, self.attention(skip, x))


class AttentionUNet(UNet):
    """`UNet` with attention gates, 1,967,288 parameters for one channel and four classes."""

    up_block: ClassVar[type[UpBlock]] = GatedUpBlock
