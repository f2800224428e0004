"""PVT-EMCAD: a pretrained transformer encoder, and a decoder of multi-scale depthwise convolutions.

Source: Rahman, Munir, Marculescu 2024 (CVPR), arXiv 2405.06880, in the version of its released code
(SLDGroup/EMCAD, commit e48f54e, as `train_synapse.py` builds it).

* On each level attention by channel (CAB) and by position (SAB, one for all levels), then MSCB: a
  residual of depthwise convolutions of three sizes between two 1×1.
* Up (EUCB), and the gated skip (LGAG) is added.
* A head on every level; the finest is the prediction.

Differs from the original in the heads: the coarser ones are in the output only in training, and
only where the loss asks for them (`loss=deep_supervision`); else they are frozen. Its loss, a sum
over all subsets of the heads, is not here. Left out is EUCB's shuffle, which does nothing.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseg.models.any_size import require_multiple
from mambaseg.models.arguments import require_levels
from mambaseg.models.cbam import ChannelAttention, SpatialAttention
from mambaseg.models.heads import ManyHeads
from mambaseg.models.pretrained import Original, Pretrained
from mambaseg.models.pvt_v2 import PVTv2

SIDES = (1, 3, 5)  # of the kernels of a block
PATCH, LEVELS = 4, 4  # side of the finest map's positions; stages of PVTv2


def conv_norm(dim: int, out_dim: int, side: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolve without bias, batch norm."""
    conv = nn.Conv2d(dim, out_dim, side, padding=side // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_dim)]


class MultiScaleBlock(nn.Module):
    """Widen, convolve each channel by three kernels, mix, narrow (MSCB); a residual."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        wide = 2 * dim
        self.widen = nn.Sequential(*conv_norm(dim, wide), nn.ReLU6())
        self.scales = nn.ModuleList(
            nn.Sequential(*conv_norm(wide, wide, side, groups=wide), nn.ReLU6()) for side in SIDES
        )
        self.narrow = nn.Sequential(*conv_norm(wide, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the same."""
        y = self.widen(x)
        y = torch.stack([scale(y) for scale in self.scales]).sum(0)
        y = y.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)  # even channels first, then odd
        return x + self.narrow(y)


class UpConv(nn.Module):
    """Twice the resolution, by nearest neighbours and a depthwise convolution (EUCB)."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.local = nn.Sequential(*conv_norm(dim, dim, 3, groups=dim), nn.ReLU())
        self.narrow = nn.Conv2d(dim, out_dim, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, dim, H, W)` to `(B, out_dim, 2H, 2W)`."""
        return self.narrow(self.local(F.interpolate(x, scale_factor=2)))


class SkipGate(nn.Module):
    """Weigh the positions of a skip by what is there and in the decoder (LGAG)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = dim // 2
        self.of_decoder, self.of_skip = (
            nn.Sequential(
                nn.Conv2d(dim, hidden, kernel_size=3, padding=1, groups=hidden),
                nn.BatchNorm2d(hidden),
            )
            for _ in range(2)
        )
        self.weigh = nn.Sequential(nn.Conv2d(hidden, 1, kernel_size=1), nn.BatchNorm2d(1))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Weigh `skip` `(B, C, H, W)` by it and by `x` like it."""
        return self.weigh(F.relu(self.of_decoder(x) + self.of_skip(skip))).sigmoid() * skip


class EMCAD(ManyHeads, Pretrained, Original):
    """PVT-EMCAD-B2, 26,767,495 parameters for one channel and four classes.

    Args:
        in_channels: channels of the image; unless three, a 1×1 convolution makes them three.
        num_classes: K, background included.
        widths: channels per level, fine to coarse, of encoder and decoder.
        depths: blocks per encoder stage.
        heads: attention heads per encoder stage.
        drop_path_rate: of the last encoder block; rises linearly from 0.

    Raises:
        ValueError: a list has not one value for each of the four levels.
    """

    backbone = "PVTv2-B2 (pvt_v2_b2.pth)"
    original_parts: ClassVar[dict[str, str]] = {
        ".mlp.dwconv.dwconv.": ".mlp.dwconv.",
        ".pconv1.": ".widen.",
        ".msdc.dwconvs.": ".scales.",
        ".pconv2.": ".narrow.",
        ".up_dwc.1.": ".local.0.",
        ".up_dwc.2.": ".local.1.",
        ".pwc.0.": ".narrow.",
        ".W_g.": ".of_decoder.",
        ".W_x.": ".of_skip.",
        ".psi.": ".weigh.",
    }

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 4,
        *,
        widths: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 4, 6, 3),
        heads: Sequence[int] = (1, 2, 5, 8),
        drop_path_rate: float = 0.1,
    ) -> None:
        super().__init__()
        require_levels(LEVELS, LEVELS, widths=widths, depths=depths, heads=heads)
        self.size_multiple = PATCH * 2 ** (len(widths) - 1)
        self.to_colour: nn.Module = nn.Identity()
        if in_channels != 3:
            self.to_colour = nn.Sequential(
                nn.Conv2d(in_channels, 3, 1), nn.BatchNorm2d(3), nn.ReLU()
            )
        self.encoder = PVTv2(widths, depths, heads, drop_path_rate)
        dims = widths[::-1]  # coarse to fine, as all that follows
        self.channels = nn.ModuleList(ChannelAttention(dim) for dim in dims)
        self.positions = SpatialAttention()
        self.blocks = nn.ModuleList(MultiScaleBlock(dim) for dim in dims)
        self.ups = nn.ModuleList(UpConv(*ends) for ends in pairwise(dims))
        self.gates = nn.ModuleList(SkipGate(dim) for dim in dims[1:])
        self.heads = nn.ModuleList(nn.Conv2d(dim, num_classes, kernel_size=1) for dim in dims)
        for part in (self.channels, self.positions, self.blocks, self.ups, self.gates):
            part.apply(_init_convolution)
        self.supervise_deeply(False)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Map `(B, C, H, W)`, H and W multiples of `size_multiple`, to logits `(B, K, H, W)`.

        See `ManyHeads`.
        """
        require_multiple(image, self.size_multiple, type(self).__name__)
        *skips, x = self.encoder(self.to_colour(image))
        maps = [self._refined(0, x)]
        for i, skip in enumerate(reversed(skips)):
            x = self.ups[i](maps[-1])
            maps.append(self._refined(i + 1, x + self.gates[i](x, skip)))
        logits = self.logits(maps)
        if isinstance(logits, list):
            return [_enlarged(one, image) for one in logits]
        return _enlarged(logits, image)

    def _refined(self, level: int, x: Tensor) -> Tensor:
        return self.blocks[level](self.positions(self.channels[level](x)))

    def backbone_names(self) -> dict[str, str]:
        """Map PVTv2's key prefixes to ours."""
        names = self.encoder.published_names()
        return {old: f"encoder.{new}" for old, new in names.items()}

    def original_names(self) -> dict[str, str]:
        """Map the original network's key prefixes to ours."""
        names = {f"backbone.{old}": new for old, new in self.backbone_names().items()}
        names |= {"conv.": "to_colour.", "decoder.sab.": "positions."}
        for i, level in enumerate(range(len(self.blocks), 0, -1)):
            names[f"decoder.cab{level}.fc1."] = f"channels.{i}.0."
            names[f"decoder.cab{level}.fc2."] = f"channels.{i}.2."
            names[f"decoder.mscb{level}.0."] = f"blocks.{i}."
            names[f"decoder.eucb{level - 1}."] = f"ups.{i}."
            names[f"decoder.lgag{level - 1}."] = f"gates.{i}."
            names[f"out_head{level}."] = f"heads.{i}."
        return names


def _enlarged(logits: Tensor, image: Tensor) -> Tensor:
    return F.interpolate(logits, image.shape[2:], mode="bilinear")


def _init_convolution(module: nn.Module) -> None:
    """Set a convolution to a normal distribution of 0.02, its bias to zero."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
