"""UVM-Net: a U-Net whose every level looks at its whole map through Mamba blocks.

Source: Zheng & Wu 2024, U-shaped Vision Mamba for Single Image Dehazing (arXiv 2402.04139), and its
code. Its authors train it to predict a change of the image, as `AnySize(..., residual=True)` does.

As in the code:

* In front of every level's convolutions the map is brought to 64 × 64 by interpolation, goes
  through the Bi-SSM block and is brought back, whatever the level's own resolution is.
* The Bi-SSM block makes tokens of a map by a reshape, not a permute: a "token" is C values that
  follow each other in memory, mostly neighbours in one row of one channel. So the layer norm over
  a token takes away what the bias of the convolution in front of it adds to a channel.
* The cost follows the grid: a small image takes nearly as long as a large one.

Differences:

* The scan across tokens (`wide_scan`), a Mamba block on 64 · 64 = 4096 channels in each of the nine
  levels, is left out by default. It holds 948 M of the published network's 1,004 M parameters, and
  the authors name it as the part to remove.
* The attention's softmax runs over the positions of a sample, times their number, so that its mean
  is 1. The code's runs over the samples of the batch: with one sample, as the network is trained
  there, every weight is exactly 1. `attention=False` leaves it out, which is just that.
* One channel is repeated to three: the first layer norm, over the channels, would make zeros of it.
* Heights and widths must be multiples of 16; the code pads inside the decoder.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseg.models.any_size import require_multiple
from mambaseg.models.arguments import require_counts, require_levels
from mambaseg.models.mamba1d import Mamba1d
from mambaseg.models.pretrained import Original
from mambaseg.models.unet import conv_norm_relu


class BiSSM(nn.Module):
    """Convolutions, then selective scans over the map's values as they lie in memory.

    Args:
        dim: C, channels of the map.
        grid: height and width of the map.
        attention: weight the result by a softmax over positions, from a second scan.
        wide_scan: scan the transposed tokens too: C tokens of grid² channels.
        **scans: Of each `Mamba1d`.
    """

    def __init__(
        self, dim: int, grid: int, *, attention: bool, wide_scan: bool, **scans: Any
    ) -> None:
        super().__init__()
        self.local = nn.Sequential(
            nn.Conv2d(dim, 16, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, dim, kernel_size=3, padding=1),
        )
        self.norm = nn.LayerNorm(dim)
        self.scan = Mamba1d(dim, **scans)
        self.wide_scan = Mamba1d(grid * grid, **scans) if wide_scan else None
        self.attention = Mamba1d(dim, **scans) if attention else None
        self.smooth = nn.Conv2d(dim, dim, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, grid, grid)` to `(B, C, grid, grid)`."""
        x = x + self.local(x)
        tokens = self.norm(x.reshape(len(x), -1, x.shape[1]))  # (B, grid², C), scrambled as said
        y = self.scan(tokens)
        if self.wide_scan is not None:
            y = self.wide_scan(y.transpose(1, 2)).transpose(1, 2)
        if self.attention is not None:
            y = y * self.attention(tokens).softmax(dim=1) * tokens.shape[1]
        return self.smooth(y.reshape(x.shape))


class Level(nn.Module):
    """A Bi-SSM block on a grid of fixed size, as a residual branch, then two convolutions."""

    def __init__(
        self, in_channels: int, middle: int, out_channels: int, grid: int, **options: Any
    ) -> None:
        super().__init__()
        self.grid = grid
        self.bi_ssm = BiSSM(in_channels, grid, **options)
        self.convs = nn.Sequential(
            *conv_norm_relu(in_channels, middle), *conv_norm_relu(middle, out_channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, in_channels, H, W)` to `(B, out_channels, H, W)`."""
        branch = self.bi_ssm(_resize(x, [self.grid, self.grid]))
        return self.convs(x + _resize(branch, x.shape[2:]))


class UVMNet(Original):
    """UVM-Net with five levels.

    56,166,760 parameters for three channels in and out, 1,003,940,200 with the wide scan; for
    segmentation, one or three channels and four classes, 56,166,825.

    Args:
        in_channels: channels of the image; one is repeated to three.
        num_classes: K, background included.
        widths: channels per encoder level; each level after the first halves the resolution.
        grid: side of the square map that the Bi-SSM blocks see, at every level.
        attention: keep the blocks' attention.
        wide_scan: keep the blocks' scan across tokens.
        d_state: states per channel of the scans.
        scan_backend: which implementation of `mambaseg.scan` to use; `auto` takes the fastest.

    Raises:
        ValueError: there is no level to halve to, or a width or the grid is 0.
    """

    original_parts: ClassVar[dict[str, str]] = {
        ".double_conv.": ".convs.",
        ".ub.convb.": ".bi_ssm.local.",
        ".ub.ln.": ".bi_ssm.norm.",
        ".ub.model1.": ".bi_ssm.scan.",
        ".ub.model2.": ".bi_ssm.attention.",
        ".ub.model3.": ".bi_ssm.wide_scan.",
        ".ub.smooth.": ".bi_ssm.smooth.",
    }

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 4,
        *,
        widths: Sequence[int] = (64, 128, 256, 512, 512),
        grid: int = 64,
        attention: bool = True,
        wide_scan: bool = False,
        d_state: int = 16,
        scan_backend: str = "auto",
    ) -> None:
        super().__init__()
        require_levels(2, widths=widths)
        require_counts(widths=widths, grid=grid)
        if not attention:  # of no effect in the original on a batch of one
            self.original_unused = (".ub.model2.",)
        self.repeats_channel = in_channels == 1
        self.size_multiple = 2 ** (len(widths) - 1)

        options: dict[str, Any] = {"attention": attention, "wide_scan": wide_scan}
        options |= {"grid": grid, "d_state": d_state, "scan_backend": scan_backend}
        channels = [3 if self.repeats_channel else in_channels, *widths]
        self.encoder = nn.ModuleList(
            Level(inputs, width, width, **options) for inputs, width in pairwise(channels)
        )
        self.pool = nn.MaxPool2d(2)
        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.decoder = nn.ModuleList()
        below = widths[-1]
        for skip, finer in zip(widths[-2::-1], [*widths[-3::-1], widths[0]], strict=True):
            joined = below + skip
            self.decoder.append(Level(joined, joined // 2, finer, **options))
            below = finer
        self.head = nn.Conv2d(below, num_classes, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        """Map `(B, C, H, W)`, H and W multiples of `size_multiple`, to logits `(B, K, H, W)`."""
        require_multiple(image, self.size_multiple, type(self).__name__)
        x = image.repeat(1, 3, 1, 1) if self.repeats_channel else image
        levels = [self.encoder[0](x)]
        for level in self.encoder[1:]:
            levels.append(level(self.pool(levels[-1])))
        x = levels.pop()
        for level, skip in zip(self.decoder, reversed(levels), strict=True):
            x = level(torch.cat([skip, self.upsample(x)], dim=1))
        return self.head(x)

    def original_names(self) -> dict[str, str]:
        """Map the original network's key prefixes to ours; it has the wide scan."""
        names = {"inc.": "encoder.0.", "outc.conv.": "head."}
        for level in range(1, len(self.encoder)):
            names[f"down{level}.maxpool_conv.1."] = f"encoder.{level}."
            names[f"up{level}.conv."] = f"decoder.{level - 1}."
        return names


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate `(B, C, H, W)` to another size, corner pixels on corner pixels."""
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=True)
