"""UltraLight VM-UNet: a U of 49 thousand parameters, with Mamba on quarters of the channels.

Source: Wu et al., Patterns 2025, arXiv 2403.20035, in the version of its released code
(wurenkai/UltraLight-VM-UNet, commit d7648e4).

* The three coarse levels read the pixels of a map row by row, each quarter of the channels as a
  sequence of its own through one Mamba block, and normalise before and after with one norm.
* A skip passes a bridge that weighs positions, then channels. The last encoder level goes on from
  the map before the bridge.
* The decoder adds its skips; classes are told apart at half of the image's resolution.

Differs from the original in returning logits (there: sigmoid outputs, one class against the rest).
As there, the start of linear layers and convolutions holds within Mamba too: its step bias is zero.
"""

from collections.abc import Sequence
from itertools import pairwise
from types import MappingProxyType

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mambaseg.models.any_size import require_multiple
from mambaseg.models.arguments import require_counts, require_levels
from mambaseg.models.cbam import SpatialAttention
from mambaseg.models.linear import Linear
from mambaseg.models.mamba1d import Mamba1d
from mambaseg.models.pretrained import Original
from mambaseg.models.ushape import init_linear

QUARTERS = 4
FINE = 3  # levels of convolutions; the coarser ones have Mamba


class PVMLayer(nn.Module):
    """Parallel vision Mamba: one Mamba block for each quarter of the channels in turn."""

    def __init__(self, dim: int, out_dim: int, *, d_state: int, scan_backend: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)  # in front of Mamba, and behind it
        self.mamba = Mamba1d(dim // QUARTERS, d_state=d_state, scan_backend=scan_backend)
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.proj = Linear(dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, dim, H, W)` to `(B, out_dim, H, W)`."""
        tokens = self.norm(rearrange(x, "b c h w -> b (h w) c"))
        quarters = rearrange(tokens, "b l (q c) -> (b q) l c", q=QUARTERS)
        quarters = self.mamba(quarters) + self.skip_scale * quarters
        tokens = rearrange(quarters, "(b q) l c -> b l (q c)", q=QUARTERS)
        return rearrange(self.proj(self.norm(tokens)), "b (h w) c -> b c h w", h=x.shape[2])


class Bridge(nn.Module):
    """Weigh the positions of each skip, then the channels of all skips by all their means."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.positions = SpatialAttention(dilation=3, bias=True)  # for all levels
        self.mix = nn.Conv1d(1, 1, kernel_size=3, padding=1, bias=False)
        self.channels = nn.ModuleList(Linear(sum(widths), width) for width in widths)

    def forward(self, skips: Sequence[Tensor]) -> list[Tensor]:
        """Map skips `(B, C_i, H_i, W_i)` to the same shapes."""
        weighed = [self.positions(skip) for skip in skips]
        sums = [skip + part for skip, part in zip(skips, weighed, strict=True)]
        means = torch.cat([x.mean(dim=(2, 3)) for x in sums], dim=1)
        means = self.mix(means.unsqueeze(1)).squeeze(1)
        weights = [channels(means).sigmoid()[..., None, None] for channels in self.channels]
        return [w * x + part for w, x, part in zip(weights, sums, weighed, strict=True)]


class UltraLightVMUNet(Original):
    """UltraLight VM-UNet, 49,340 parameters for one channel and four classes.

    Args:
        in_channels: channels of the image, taken as they are.
        num_classes: K, background included.
        widths: channels per level, multiples of 4; each level but the last halves the resolution.
        d_state: states per channel of the scan.
        scan_backend: which implementation of `mambaseg.scan` to use; `auto` takes the fastest.

    Raises:
        ValueError: there is no level to halve to, or a width is no multiple of 4.
    """

    encoder_twins = MappingProxyType({"encoder_norms.": "encoder."})  # a norm per level

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 4,
        *,
        widths: Sequence[int] = (8, 16, 24, 32, 48, 64),
        d_state: int = 16,
        scan_backend: str = "auto",
    ) -> None:
        super().__init__()
        require_levels(2, widths=widths)
        require_counts(widths=widths)
        if any(width % QUARTERS for width in widths):
            raise ValueError(f"model.widths={list(widths)}: must be multiples of {QUARTERS}")
        self.size_multiple = 2 ** (len(widths) - 1)

        def layer(level: int, dim: int, out_dim: int) -> nn.Module:
            if level < FINE:
                return nn.Conv2d(dim, out_dim, kernel_size=3, padding=1)
            return PVMLayer(dim, out_dim, d_state=d_state, scan_backend=scan_backend)

        ways = [*enumerate(pairwise([in_channels, *widths]))]
        self.encoder = nn.ModuleList(layer(level, dim, out) for level, (dim, out) in ways)
        self.encoder_norms = nn.ModuleList(nn.GroupNorm(4, width) for width in widths[:-1])
        self.bridge = Bridge(widths[:-1])
        ways = ways[:0:-1]  # back, but not to the image
        self.decoder = nn.ModuleList(layer(level, dim, out) for level, (out, dim) in ways)
        self.decoder_norms = nn.ModuleList(nn.GroupNorm(4, width) for width in widths[-2::-1])
        self.head = nn.Conv2d(widths[0], num_classes, kernel_size=1)
        self.apply(init_linear)
        self.apply(_init_convolution)

    def forward(self, image: Tensor) -> Tensor:
        """Map `(B, C, H, W)`, H and W multiples of `size_multiple`, to logits `(B, K, H, W)`."""
        require_multiple(image, self.size_multiple, type(self).__name__)
        x, skips = image, []
        for layer, norm in zip(self.encoder[:-1], self.encoder_norms, strict=True):
            x = F.gelu(F.max_pool2d(norm(layer(x)), 2))
            skips.append(x)
        x = F.gelu(self.encoder[-1](x))
        bridged = reversed(self.bridge(skips))
        for layer, norm, skip in zip(self.decoder, self.decoder_norms, bridged, strict=True):
            x = norm(layer(x))
            x = F.gelu(x if x.shape == skip.shape else _twice(x)) + skip
        return _twice(self.head(x))

    def original_names(self) -> dict[str, str]:
        """Map the original network's key prefixes to ours."""
        names = {"scab.catt.get_all_att.": "bridge.mix.", "final.": "head."}
        names["scab.satt.shared_conv2d.0."] = "bridge.positions.conv."
        for level in range(len(self.encoder)):
            names[f"encoder{level + 1}.0."] = f"encoder.{level}."
        for i in range(len(self.decoder)):
            names[f"decoder{i + 1}.0."] = f"decoder.{i}."
            names[f"ebn{i + 1}."] = f"encoder_norms.{i}."
            names[f"dbn{i + 1}."] = f"decoder_norms.{i}."
            names[f"scab.catt.att{i + 1}."] = f"bridge.channels.{i}."
        return names


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


def _init_convolution(module: nn.Module) -> None:
    """Set a convolution to He's normal by outputs times kernel, that of an image to zero bias."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        fan_out = module.out_channels * module.weight[0, 0].numel()
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
    if isinstance(module, nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
