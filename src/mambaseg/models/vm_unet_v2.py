"""VM-UNetV2: VM-UNet's encoder, skips that see all levels, and a decoder of convolutions.

Source: Zhang et al. 2024, arXiv 2403.09157, in the version of its released code
(nobodyplayer1/VM-UNetV2, commit 65f9269).

* The four maps are what *enters* the encoder's stages: the finest is the bare patch embedding.
* Each is weighed by channel and by position and narrowed. On each level the maps of all levels,
  brought to its grid, are convolved and multiplied with each other (semantics and detail infusion).

Differs from the original in what it leaves out, for nothing comes of it there: the encoder's fourth
stage, whose result is thrown away (8,911,872 parameters), a transposed convolution (`deconv5`), and
heads that are not in the output. Besides: logits (there: sigmoid outputs); images need not be
squares; `add_coarser_head` (there: `deep_supervision`, for one class only) takes any number.
"""

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mambaseg.models.any_size import require_multiple
from mambaseg.models.cbam import ChannelAttention, SpatialAttention
from mambaseg.models.ushape import PatchEncoder, init_linear
from mambaseg.models.vss import vss_blocks


class Infusion(nn.ModuleList):
    """Bring maps of all levels to one grid, convolve each, multiply all."""

    def __init__(self, width: int, levels: int) -> None:
        super().__init__(nn.Conv2d(width, width, kernel_size=3, padding=1) for _ in range(levels))

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Map any `(B, width, H_i, W_i)` to one `(B, width, H, W)`."""
        parts = (conv(_resized(x, size)) for conv, x in zip(self, maps, strict=True))
        return reduce(torch.mul, parts)


class VMUNetV2(PatchEncoder):
    """VM-UNetV2, 13,822,188 parameters for one channel and four classes.

    The original has 22,771,522, of which 8,949,334 take no part in its output.

    Args:
        in_channels: see `UShape`, like all that is not named here.
        embed_dim: channels of the finest stage.
        depths: blocks per encoder stage, fine to coarse. The last number only counts for the drop
            path: that stage is left out.
        width: channels of skips and decoder.
        d_state: states per channel of the scan.
        drop_path_rate: of the last block of `depths`; rises linearly from 0.
        add_coarser_head: add a head at half of the finest map's resolution to the logits.
        scan_backend: which implementation of `mambaseg.scan` to use; `auto` takes the fastest.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 4,
        *,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 9, 2),
        width: int = 48,
        d_state: int = 16,
        patch_size: int = 4,
        drop_path_rate: float = 0.2,
        add_coarser_head: bool = False,
        scan_backend: str = "auto",
    ) -> None:
        super().__init__()
        self.repeats_channel = in_channels == 1
        make_block = vss_blocks(d_state, scan_backend)
        self._embed(in_channels, make_block, embed_dim, depths, patch_size, drop_path_rate)
        self.encoder.pop(-1)
        levels = len(self.dims)
        self.laterals = nn.ModuleList(
            nn.Sequential(
                ChannelAttention(dim),
                SpatialAttention(),
                nn.Conv2d(dim, width, kernel_size=1, bias=False),
                nn.BatchNorm2d(width),
            )
            for dim in self.dims
        )
        self.infusions = nn.ModuleList(Infusion(width, levels) for _ in self.dims)
        self.decoder = nn.ModuleList(
            nn.ConvTranspose2d(width, width, kernel_size=4, stride=2, padding=1, bias=False)
            for _ in self.dims[1:]
        )
        self.head = nn.Conv2d(width, num_classes, kernel_size=1)
        self.coarser_head = self.raise_coarser = None
        unused = [f"seg_outs.{i}." for i in range(levels - 1)]
        if add_coarser_head:
            self.coarser_head = nn.Conv2d(width, num_classes, kernel_size=1)
            self.raise_coarser = nn.ConvTranspose2d(
                num_classes, num_classes, kernel_size=3, stride=2, padding=1, output_padding=1
            )
            unused.pop()
        else:
            unused.append("deconv6.")
        self.original_unused = (f"vmunet.layers.{levels - 1}.", "deconv5.", *unused)
        self.apply(init_linear)

    def forward(self, image: Tensor) -> Tensor:
        """Map `(B, C, H, W)`, H and W multiples of `size_multiple`, to logits `(B, K, H, W)`."""
        require_multiple(image, self.size_multiple, type(self).__name__)
        maps, x = self._stage_inputs(image)
        maps = [rearrange(y, "b h w c -> b c h w") for y in (*maps, x)]
        maps = [lateral(y) for lateral, y in zip(self.laterals, maps, strict=True)]
        sizes = [(y.shape[2], y.shape[3]) for y in maps]
        skips = [infuse(maps, size) for infuse, size in zip(self.infusions, sizes, strict=True)]
        x = coarser = skips.pop()
        for up, skip in zip(self.decoder, reversed(skips), strict=True):
            x, coarser = up(x) + skip, x
        logits = self._raised(self.head(x))
        if self.coarser_head is not None and self.raise_coarser is not None:
            logits = logits + self.raise_coarser(self._raised(self.coarser_head(coarser)))
        return logits

    def _raised(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=self.patch_size, mode="bilinear")

    def original_names(self) -> dict[str, str]:
        """Map the original network's key prefixes to ours."""
        names = {f"vmunet.{old}": new for old, new in self.backbone_names().items()}
        levels = len(self.dims)
        for i in range(levels):
            names[f"ca_{i + 1}.fc1."] = f"laterals.{i}.0.0."
            names[f"ca_{i + 1}.fc2."] = f"laterals.{i}.0.2."
            names[f"sa_{i + 1}.conv1."] = f"laterals.{i}.1.conv."
            names[f"Translayer_{i + 1}.conv."] = f"laterals.{i}.2."
            names[f"Translayer_{i + 1}.bn."] = f"laterals.{i}.3."
            names[f"sdi_{i + 1}.convs."] = f"infusions.{i}."
            names[f"deconv{i + 2}."] = f"decoder.{i}."
        names["deconv6."] = "raise_coarser."
        return names | {
            f"seg_outs.{levels - 1}.": "head.",
            f"seg_outs.{levels - 2}.": "coarser_head.",
        }


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Pool `(B, C, H, W)` to a coarser grid, or interpolate to a finer one."""
    if x.shape[2] > size[0]:
        return F.adaptive_avg_pool2d(x, size)
    if x.shape[2] < size[0]:
        return F.interpolate(x, size, mode="bilinear", align_corners=True)
    return x
