"""Networks of this project: image (B, C, H, W) -> logits (B, K, H, W)."""

import torch
from torch import Tensor, nn


def block(channels: int, width: int) -> nn.Sequential:
    """Two convolutions."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
    )  # fmt: skip


class TinyNet(nn.Module):
    """A UNet of two levels."""

    size_multiple = 2
    """Height and width must be multiples of it; images are padded up to it. Default: 1."""

    def __init__(self, in_channels: int, num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.fine = block(in_channels, width)
        self.coarse = block(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge = block(2 * width, width)
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of every pixel."""
        fine = self.fine(image)
        coarse = self.up(self.coarse(nn.functional.max_pool2d(fine, 2)))
        return self.head(self.merge(torch.cat([fine, coarse], dim=1)))
