"""The convolutional UNet of SSL4MIS, the baseline of the Mamba-UNet paper.

Source: Ronneberger et al. 2015 for the shape; the variant is the one SSL4MIS took from PyMIC, with
batch norm, leaky ReLU, element-wise dropout that grows with depth, and bilinear upsampling after a
1×1 convolution. (Its configuration offers transposed convolutions but never uses them.)
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mambaseg.models.any_size import require_multiple
from mambaseg.models.arguments import require_counts, require_levels
from mambaseg.models.pretrained import Original
from mambaseg.models.stochastic import Dropout


class ConvBlock(nn.Sequential):
    """Twice convolution, batch norm and leaky ReLU, with dropout in between.

    Maps `(B, in_channels, H, W)` to `(B, out_channels, H, W)`.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(),
            Dropout(dropout),  # single elements, not whole channels
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(),
        )


def conv_norm_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    """Convolve 3×3 without bias, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class UpJoin(nn.Sequential):
    """Up to the skip's resolution, join the skip, convolve: two layers under any names."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]  # two inputs
        """Join `(B, C, H, W)` and the skip `(B, C', 2H, 2W)`."""
        up, convolve = self
        return convolve(torch.cat([up(x), skip], dim=1))


class UpBlock(nn.Module):
    """Bring a coarse map to the skip's width and resolution, join the two, convolve."""

    def __init__(self, in_channels: int, skip_channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(in_channels, skip_channels, kernel_size=1)
        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.block = ConvBlock(2 * skip_channels, skip_channels, dropout=0.0)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Join `(B, in_channels, H, W)` and the skip `(B, skip_channels, 2H, 2W)`."""
        x = self.upsample(self.reduce(x))
        return self.block(torch.cat([skip, x], dim=1))


class UNet(Original):
    """UNet with five levels, 1,813,764 parameters for one channel and four classes.

    Args:
        in_channels: channels of the image.
        num_classes: K, background included.
        widths: channels per level; each level after the first halves the resolution.
        dropout: probability per encoder level; the decoder has none.

    Raises:
        ValueError: there is no level to halve to, a width is 0, or the lists differ in length.
    """

    up_block: ClassVar[type[UpBlock]] = UpBlock

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 4,
        *,
        widths: Sequence[int] = (16, 32, 64, 128, 256),
        dropout: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.5),
    ) -> None:
        super().__init__()
        require_levels(2, widths=widths, dropout=dropout)
        require_counts(widths=widths)
        inputs = [in_channels, *widths[:-1]]
        self.encoder = nn.ModuleList(
            ConvBlock(*level) for level in zip(inputs, widths, dropout, strict=True)
        )
        self.pool = nn.MaxPool2d(2)
        coarse_to_fine = list(widths)[::-1]
        self.decoder = nn.ModuleList(map(self.up_block, coarse_to_fine[:-1], coarse_to_fine[1:]))
        self.head = nn.Conv2d(widths[0], num_classes, kernel_size=3, padding=1)
        self.size_multiple = 2 ** (len(widths) - 1)

    def forward(self, image: Tensor) -> Tensor:
        """Map `(B, C, H, W)`, H and W multiples of `size_multiple`, to logits `(B, K, H, W)`."""
        return self.head(self.decoded(self.encoded(image))[-1])

    def encoded(self, image: Tensor) -> list[Tensor]:
        """Map `(B, C, H, W)` to the encoder's levels, finest first."""
        require_multiple(image, self.size_multiple, type(self).__name__)
        levels = [self.encoder[0](image)]
        for block in self.encoder[1:]:
            levels.append(block(self.pool(levels[-1])))
        return levels

    def decoded(
        self, levels: Sequence[Tensor], decoder: nn.ModuleList | None = None
    ) -> list[Tensor]:
        """Map the encoder's levels to those of this decoder, or of another like it, coarse first.

        `head` makes logits of the last.
        """
        *skips, x = levels
        maps = []
        for block, skip in zip(decoder or self.decoder, reversed(skips), strict=True):
            x = block(x, skip)
            maps.append(x)
        return maps

    def original_names(self) -> dict[str, str]:
        """Map the original network's key prefixes to ours."""
        names = {"encoder.in_conv.conv_conv.": "encoder.0.", "decoder.out_conv.": "head."}
        for level in range(1, len(self.encoder)):
            names[f"encoder.down{level}.maxpool_conv.1.conv_conv."] = f"encoder.{level}."
            names[f"decoder.up{level}.conv1x1."] = f"decoder.{level - 1}.reduce."
            names[f"decoder.up{level}.conv.conv_conv."] = f"decoder.{level - 1}.block."
        return names
