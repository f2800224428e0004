"""RWKV-UNet: a convolutional U whose coarse stages see the whole map by RWKV's linear attention.

Source: Jiang et al. 2025, arXiv 2501.08458, in the version of its released code
(juntaoJianggavin/RWKV-UNet, commit df96e2f).

* A block widens the map, mixes (stages 3 and 4 only: `SpatialMix`, from their second block on),
  convolves each channel by 5×5 and narrows. The first block of a stage halves the resolution and
  has no residuals.
* The skips of stages 1 to 3 are mixed by channel at the finest one's resolution (`SkipMix`).
* A decoder stage widens nothing: 1×1, 9×9 for each channel, 1×1, bilinear, then the skip is joined.

Differs from the original in what it leaves out, for it is in no output there: attention and norms
that are made for every block, and the classifier. WKV is computed from its definition: the released
kernel for GPUs deviates from it, by 1e-5 of the logits at 224². Images may have any size and need
not be squares (there: squares up to 256).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mambaseg.models.any_size import require_multiple
from mambaseg.models.arguments import require_counts, require_levels
from mambaseg.models.linear import Linear
from mambaseg.models.pretrained import Original
from mambaseg.models.stochastic import DropPath, linear_schedule
from mambaseg.models.ushape import init_linear
from mambaseg.scan import bidirectional_wkv

EPS = 1e-6  # of all norms but those beside RWKV's layers
ATTENDING = (2, 3)  # stages whose blocks attend, but for their first


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of `(B, C, H, W)`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the same."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv_norm(dim: int, out_dim: int, act: nn.Module) -> nn.Sequential:
    """Convolve 1×1 without bias, batch norm, activate."""
    conv = nn.Conv2d(dim, out_dim, kernel_size=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_dim, eps=EPS), act)


def depthwise(dim: int, side: int, stride: int = 1) -> nn.Sequential:
    """Convolve each channel without bias, batch norm, SiLU."""
    conv = nn.Conv2d(dim, dim, side, stride, side // 2, groups=dim, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(dim, eps=EPS), nn.SiLU())


def shift(x: Tensor) -> Tensor:
    """Give a quarter of the channels each the left, right, upper, lower neighbour; 0 outside."""
    dim = x.shape[-1]
    left, right, up, down = x.split([dim * (q + 1) // 4 - dim * q // 4 for q in range(4)], dim=-1)
    return torch.cat(
        [
            F.pad(left[:, :, :-1], (0, 0, 1, 0)),
            F.pad(right[:, :, 1:], (0, 0, 0, 1)),
            F.pad(up[:, :-1], (0, 0, 0, 0, 1, 0)),
            F.pad(down[:, 1:], (0, 0, 0, 0, 0, 1)),
        ],
        dim=-1,
    )


class ShiftMix(nn.Module):
    """What both mixes of RWKV share: linear layers that see a position and its shifted neighbours.

    `inputs` are one letter each: k and r, and v.
    """

    def __init__(self, dim: int, inputs: str) -> None:
        super().__init__()
        for letter in inputs:
            self.register_parameter(
                f"spatial_mix_{letter}", nn.Parameter(torch.full((1, 1, dim), 0.5))
            )

    def mixed(self, letter: str, x: Tensor, shifted: Tensor) -> Tensor:
        """Mix `(B, H, W, C)` and its shifted neighbours by the learned shares of an input."""
        return shifted.lerp(x, self.get_parameter(f"spatial_mix_{letter}").to(x.dtype))


class SpatialMix(ShiftMix):
    """RWKV's linear attention over all positions of a map, read row by row."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, "kvr")
        self.spatial_decay = nn.Parameter(torch.zeros(dim))  # over the whole map
        self.spatial_first = nn.Parameter(torch.zeros(dim))
        self.key, self.value, self.receptance, self.output = (
            Linear(dim, dim, bias=False) for _ in range(4)
        )
        self.key_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, H, W, C)` to the same."""
        height, width = x.shape[1:3]
        shifted = shift(x)
        key = self.key(self.mixed("k", x, shifted)).flatten(1, 2)
        value = self.value(self.mixed("v", x, shifted)).flatten(1, 2)
        gate = self.receptance(self.mixed("r", x, shifted)).sigmoid()
        length = height * width
        decay, first = self.spatial_decay / length, self.spatial_first / length
        y = bidirectional_wkv(decay, first, key, value).unflatten(1, (height, width))
        return self.output(gate * self.key_norm(y))


class ChannelMix(ShiftMix):
    """RWKV's gated MLP of each position and its shifted neighbours, with a squared ReLU."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, "kr")
        self.key = Linear(dim, 2 * dim, bias=False)
        self.key_norm = nn.LayerNorm(2 * dim)
        self.receptance = Linear(dim, dim, bias=False)
        self.value = Linear(2 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, H, W, C)` to the same."""
        shifted = shift(x)
        hidden = self.key_norm(F.relu(self.key(self.mixed("k", x, shifted))).square())
        return self.receptance(self.mixed("r", x, shifted)).sigmoid() * self.value(hidden)


class SqueezeExcite(nn.Module):
    """Weigh the channels by two layers that see their averages."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv_reduce, self.conv_expand = (nn.Conv2d(dim, dim, kernel_size=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the same."""
        hidden = F.silu(self.conv_reduce(x.mean((2, 3), keepdim=True)))
        return x * self.conv_expand(hidden).sigmoid()


class Stem(nn.Module):
    """The block at the image's resolution: without a norm in front, attention and residuals."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.widen = conv_norm(dim, dim, nn.ReLU())
        self.local = depthwise(dim, 5)
        self.se = SqueezeExcite(dim)
        self.narrow = nn.Sequential(nn.Conv2d(dim, out_dim, kernel_size=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, dim, H, W)` to `(B, out_dim, H, W)`."""
        return self.narrow(self.se(self.local(self.widen(x))))


class GLSPBlock(nn.Module):
    """Widen, attend if it is to, convolve each channel, narrow ("global-local spatial perception").

    Args:
        dim: channels that come in.
        out_dim: channels that go out.
        hidden: channels in between.
        norm: makes the norm in front.
        halves: halve the resolution, without any residual; the first block of a stage.
        attends: has RWKV's attention.
        drop_path: probability that a sample skips the block, or its attention, in training.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        hidden: int,
        norm: nn.Module,
        *,
        halves: bool,
        attends: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.halves = halves
        self.norm = norm
        self.widen = conv_norm(dim, hidden, nn.ReLU())
        self.att = SpatialMix(hidden) if attends else None
        self.ln1 = nn.LayerNorm(hidden) if attends else None
        self.drop_attention = DropPath(drop_path if attends else 0.0)
        self.local = depthwise(hidden, 5, stride=2 if halves else 1)
        self.narrow = nn.Sequential(nn.Conv2d(hidden, out_dim, kernel_size=1, bias=False))
        self.drop_path = DropPath(0.0 if halves else drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, dim, H, W)` to `(B, out_dim, H, W)`, or half of the resolution."""
        y = self.widen(self.norm(x))
        if self.att is not None and self.ln1 is not None:
            attended = self.ln1(self.att(rearrange(y, "b c h w -> b h w c")))
            y = y + self.drop_attention(rearrange(attended, "b h w c -> b c h w"))
        if self.halves:
            return self.narrow(self.local(y))
        return x + self.drop_path(self.narrow(y + self.local(y)))


class SkipMix(nn.Module):
    """Mix the skips by channel at the resolution of the finest ("cross-channel mix", CCM)."""

    def __init__(self, dims: Sequence[int], width: int, drop_path: float) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Conv2d(dim, width, kernel_size=1) for dim in dims)
        self.channel = ChannelMix(width * len(dims))
        self.ln1 = nn.LayerNorm(width * len(dims))
        self.drop_path = DropPath(drop_path)
        self.final_projections = nn.ModuleList(nn.Conv2d(width, dim, kernel_size=1) for dim in dims)

    def forward(self, skips: Sequence[Tensor]) -> list[Tensor]:
        """Map skips `(B, C_i, H_i, W_i)`, coarse to fine, to the same."""
        finest = skips[-1].shape[2:]
        projected = zip(self.projections, skips, strict=True)
        maps = [project(_resized(skip, finest)) for project, skip in projected]
        x = rearrange(torch.cat(maps, dim=1), "b c h w -> b h w c")
        x = x + self.drop_path(self.ln1(self.channel(x)))
        parts = rearrange(x, "b h w c -> b c h w").chunk(len(skips), dim=1)
        ways = zip(self.final_projections, parts, skips, strict=True)
        return [_resized(project(part), skip.shape[2:]) for project, part, skip in ways]


class RWKVUNet(Original):
    """RWKV-UNet; its tiny form has 3,145,836 parameters for one channel and four classes.

    Small: `widths=(32, 64, 128, 192)`, `depths=(3, 3, 6, 3)`, `expansions=(2, 2.5, 3, 4)` give
    9,702,020. Base: `widths=(48, 72, 144, 240)`, the same depths, `expansions=(2, 2.5, 4, 4)` and
    `mix_width=48` give 17,125,588. The original has as many more as take no part in its output.

    Args:
        in_channels: channels of the image; a single one is repeated to three.
        num_classes: K, background included.
        widths: channels per stage; each halves the resolution.
        depths: blocks per stage.
        expansions: how much wider a block is inside, per stage; the first of a stage twice that.
        stem_width: channels at the image's resolution.
        mix_width: channels per skip where skips are mixed.
        drop_path_rate: of the last block; rises linearly from 0. Also that of the skips' mix.

    Raises:
        ValueError: the lists differ in length, or a stage has no channels or blocks.
    """

    original_parts: ClassVar[dict[str, str]] = {
        ".conv.conv.": ".widen.0.",
        ".conv.norm.": ".widen.1.",
        ".conv_local.conv.": ".local.0.",
        ".conv_local.norm.": ".local.1.",
        ".proj.conv.": ".narrow.0.",
        ".proj.norm.": ".narrow.1.",
        ".norm.norm.": ".norm.",
    }

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 4,
        *,
        widths: Sequence[int] = (32, 48, 96, 160),
        depths: Sequence[int] = (2, 2, 4, 2),
        expansions: Sequence[float] = (2, 2.5, 3, 3.5),
        stem_width: int = 24,
        mix_width: int = 32,
        drop_path_rate: float = 0.05,
    ) -> None:
        super().__init__()
        require_levels(2, widths=widths, depths=depths, expansions=expansions)
        require_counts(widths=widths, depths=depths)
        self.size_multiple = 2 ** len(widths)
        self.repeats_channel = in_channels == 1
        self.stem = Stem(3 if self.repeats_channel else in_channels, stem_width)
        self.encoder = nn.ModuleList()
        rates = linear_schedule(drop_path_rate, (*depths,))
        for stage, dims in enumerate(pairwise([stem_width, *widths])):
            self.encoder.append(_encoder_stage(stage, *dims, expansions[stage], rates[stage]))
        self.stem.apply(init_linear)
        self.encoder.apply(init_linear)
        skips = list(widths[-2::-1])  # coarse to fine
        self.skip_mix = SkipMix(skips, mix_width, drop_path_rate)
        self.decoder = nn.ModuleList()
        for i, out_dim in enumerate([*skips, stem_width]):
            dim = 2 * skips[i - 1] if i else widths[-1]
            self.decoder.append(DecoderStage(dim, out_dim))
        self.head = nn.Conv2d(stem_width, num_classes, kernel_size=1)
        self.original_unused = self._unused()

    def forward(self, image: Tensor) -> Tensor:
        """Map `(B, C, H, W)`, H and W multiples of `size_multiple`, to logits `(B, K, H, W)`."""
        require_multiple(image, self.size_multiple, type(self).__name__)
        x = self.stem(image.repeat(1, 3, 1, 1) if self.repeats_channel else image)
        maps = []
        for stage in self.encoder:
            x = stage(x)
            maps.append(x)
        skips = [*self.skip_mix(maps[-2::-1]), None]
        for stage, skip in zip(self.decoder, skips, strict=True):
            x = stage(x)
            x = x if skip is None else torch.cat([x, skip], dim=1)
        return self.head(x)

    def _unused(self) -> tuple[str, ...]:
        """List the original's keys that are in no output there."""
        silent = ["stage0.0"]  # blocks without attention
        for stage, blocks in enumerate(self.encoder):
            assert isinstance(blocks, nn.Sequential)
            for index, block in enumerate(blocks):
                silent += [] if block.att else [f"stage{stage + 1}.{index}"]
        attention = [f"encoder.{name}.{part}." for name in silent for part in ("att", "ln1")]
        decoder = [f"decoder{i + 1}.ln1." for i in range(len(self.decoder))]
        return (".ln2.", "encoder.norm.", "encoder.head.", *attention, *decoder)

    def original_names(self) -> dict[str, str]:
        """Map the original network's key prefixes to ours."""
        names = {"encoder.stage0.0.": "stem.", "ccm.": "skip_mix.", "final_conv.": "head."}
        for stage in range(len(self.encoder)):
            names[f"encoder.stage{stage + 1}."] = f"encoder.{stage}."
            names[f"decoder{stage + 1}."] = f"decoder.{stage}."
        return names


class DecoderStage(nn.Module):
    """1×1, 9×9 for each channel, 1×1, each with batch norm; then twice the resolution."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.widen = conv_norm(dim, dim, nn.ReLU())
        self.local = depthwise(dim, 9)
        self.narrow = conv_norm(dim, out_dim, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, dim, H, W)` to `(B, out_dim, 2H, 2W)`."""
        x = self.narrow(self.local(self.widen(x)))
        return F.interpolate(x, scale_factor=2, mode="bilinear")


def _encoder_stage(
    stage: int, dim: int, width: int, expansion: float, rates: Sequence[float]
) -> nn.Sequential:
    """Make the blocks of a stage, one per drop path rate."""
    blocks = nn.Sequential()
    for index, rate in enumerate(rates):
        norm = (ChannelNorm if stage in ATTENDING else nn.BatchNorm2d)(dim, eps=EPS)
        hidden = int(dim * expansion * (1 if index else 2))
        attends = stage in ATTENDING and index > 0
        block = GLSPBlock(
            dim, width, hidden, norm, halves=index == 0, attends=attends, drop_path=rate
        )
        blocks.append(block)
        dim = width
    return blocks


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, tuple(size), mode="bilinear")
