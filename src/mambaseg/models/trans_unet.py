"""TransUNet: a ResNet-50 and a vision transformer as encoder, a convolutional decoder with skips.

Source: Chen et al. 2021, arXiv 2102.04306, in its released configuration R50-ViT-B/16. The encoder
is that of Dosovitskiy et al. 2021, arXiv 2010.11929 (hybrid R50+ViT-B/16, whose ImageNet-21k
weights load); the ResNet has the standardised convolutions and group norms of Kolesnikov et al.
2020, BiT, arXiv 1912.11370.

Differs from the original in taking any multiple of 16: the position embedding is interpolated.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mambaseg.models.any_size import require_multiple
from mambaseg.models.arguments import require_counts, require_levels, require_whole_heads
from mambaseg.models.linear import Linear
from mambaseg.models.pretrained import Pretrained
from mambaseg.models.stochastic import Dropout
from mambaseg.models.unet import conv_norm_relu
from mambaseg.models.vit_weights import read_hybrid_vit

PATCH = 16  # pixels of the image per token: the ResNet's stride, at which each pixel is a token


class StandardConv2d(nn.Conv2d):
    """A convolution whose kernels are shifted and scaled to mean 0 and variance 1; no bias."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
        padding = kernel_size // 2
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `(B, C, H, W)`."""
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        kernel = (self.weight - mean) * torch.rsqrt(variance + 1e-5)
        return F.conv2d(x, kernel, None, self.stride, self.padding)


def group_norm(channels: int) -> nn.GroupNorm:
    """Normalise in 32 groups."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class Bottleneck(nn.Module):
    """Narrow, convolve, widen; added to the input, which is projected where its shape differs.

    The narrow part has a quarter of the channels that go out.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        narrow = out_channels // 4
        self.conv1 = StandardConv2d(in_channels, narrow, 1, 1)
        self.gn1 = group_norm(narrow)
        self.conv2 = StandardConv2d(narrow, narrow, 3, stride)
        self.gn2 = group_norm(narrow)
        self.conv3 = StandardConv2d(narrow, out_channels, 1, 1)
        self.gn3 = group_norm(out_channels)
        self.conv_proj: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.conv_proj = StandardConv2d(in_channels, out_channels, 1, stride)
            self.gn_proj = nn.GroupNorm(out_channels, out_channels)  # a group per channel

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, in_channels, H, W)` to `(B, out_channels, H / stride, W / stride)`."""
        shortcut = x if self.conv_proj is None else self.gn_proj(self.conv_proj(x))
        x = F.relu(self.gn1(self.conv1(x)))
        x = F.relu(self.gn2(self.conv2(x)))
        return F.relu(shortcut + self.gn3(self.conv3(x)))


class ResNet(nn.Module):
    """The first stages of ResNet-50 (version of BiT), of `units` bottlenecks each."""

    def __init__(self, width: int, units: Sequence[int], channels: int) -> None:
        super().__init__()
        self.conv_root = StandardConv2d(channels, width, 7, 2)
        self.gn_root = group_norm(width)
        self.widths = [width, *(width * 4 * 2**stage for stage in range(len(units)))]
        self.blocks = nn.ModuleList()
        for stage, count in enumerate(units):
            inputs, outputs = self.widths[stage : stage + 2]
            first = Bottleneck(inputs, outputs, stride=2 if stage else 1)
            rest = (Bottleneck(outputs, outputs, 1) for _ in range(count - 1))
            self.blocks.append(nn.Sequential(first, *rest))

    def forward(self, image: Tensor) -> list[Tensor]:
        """Map `(B, C, H, W)` to maps of width `widths`, at strides 2, 4, 8, 16."""
        maps = [F.relu(self.gn_root(self.conv_root(image)))]
        x = F.max_pool2d(maps[0], kernel_size=3, stride=2)  # unpadded: one pixel short of stride 4
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        maps[1] = F.pad(maps[1], (0, 1, 0, 1))
        return maps


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        require_whole_heads(dim, heads)
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.out = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, L, C)` to `(B, L, C)`."""
        q, k, v = rearrange(self.qkv(x), "b l (n h c) -> n b h l c", n=3, h=self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(mixed, "b h l c -> b l (h c)"))


class TransformerBlock(nn.Module):
    """Pre-normed attention and two-layer perceptron, each with a residual."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        first, second = Linear(dim, hidden), Linear(hidden, dim)
        self.mlp = nn.Sequential(first, nn.GELU(), Dropout(dropout), second, Dropout(dropout))
        for layer in (first, second):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, L, C)` to `(B, L, C)`."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """ResNet, then a transformer of `depth` blocks over its coarsest map."""

    def __init__(
        self,
        dim: int,
        units: Sequence[int],
        depth: int,
        grid: int,
        dropout: float,
        *,
        channels: int = 3,
        **block: int,
    ) -> None:
        super().__init__()
        self.resnet = ResNet(64, units, channels)
        self.embedding = nn.Conv2d(self.resnet.widths[-1], dim, kernel_size=1)
        self.position = nn.Parameter(torch.zeros(1, dim, grid, grid))
        self.dropout = Dropout(dropout)
        blocks = (TransformerBlock(dim, dropout=dropout, **block) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Map `(B, C, H, W)` to `(B, dim, H/16, W/16)` and the skips at strides 2, 4, 8."""
        *skips, x = self.resnet(image)
        x = self.embedding(x)
        size = x.shape[-2:]
        position: Tensor = self.position
        if position.shape[-2:] != size:
            position = F.interpolate(position, size, mode="bilinear", align_corners=True)
        tokens = rearrange(x + position, "b c h w -> b (h w) c")
        tokens = self.norm(self.blocks(self.dropout(tokens)))
        return rearrange(tokens, "b (h w) c -> b c h w", h=size[0]), skips


class UpStage(nn.Module):
    """Twice the resolution, join the skip if there is one, convolve twice."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        joined = in_channels + skip_channels
        layers = (conv_norm_relu(width, out_channels) for width in (joined, out_channels))
        self.convs = nn.Sequential(*layers)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """Join `(B, in_channels, H, W)` and the skip `(B, skip_channels, 2H, 2W)`."""
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return self.convs(x if skip is None else torch.cat([x, skip], dim=1))


class TransUNet(Pretrained):
    """TransUNet R50-ViT-B/16, 105,276,356 parameters for one channel, four classes and 224².

    Args:
        in_channels: channels of the image; a single one is repeated to three.
        num_classes: K, background included.
        image_size: side of the square image whose grid of tokens the position embedding has.
        units: bottlenecks per stage of the ResNet.
        dim: channels of a token.
        depth: transformer blocks.
        heads: attention heads.
        hidden: channels inside a perceptron.
        dropout: probability, of the embedded tokens and in the perceptrons.
        decoder_widths: channels at strides 8, 4, 2 and 1: one more than `units`.

    Raises:
        ValueError: `image_size` is no multiple of 16, `heads` do not divide `dim`, or
            `decoder_widths` has not one number for each stride.
    """

    size_multiple = PATCH
    backbone = "R50+ViT-B/16 (R50+ViT-B_16.npz)"

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 4,
        *,
        image_size: int = 224,
        units: Sequence[int] = (3, 4, 9),
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden: int = 3072,
        dropout: float = 0.1,
        decoder_widths: Sequence[int] = (256, 128, 64, 16),
    ) -> None:
        super().__init__()
        if image_size % PATCH:
            raise ValueError(f"image_size must be a multiple of {PATCH}, got {image_size}")
        require_levels(len(units) + 1, len(units) + 1, decoder_widths=decoder_widths)
        require_counts(image_size=image_size, decoder_widths=decoder_widths)
        self.repeats_channel = in_channels == 1
        grid = image_size // PATCH
        channels = 3 if self.repeats_channel else in_channels
        self.encoder = Encoder(
            dim, units, depth, grid, dropout, channels=channels, heads=heads, hidden=hidden
        )
        skips = [*reversed(self.encoder.resnet.widths[:-1]), 0]
        self.widen = conv_norm_relu(dim, 512)
        inputs = [512, *decoder_widths[:-1]]
        self.decoder = nn.ModuleList(map(UpStage, inputs, skips, decoder_widths))
        self.head = nn.Conv2d(decoder_widths[-1], num_classes, kernel_size=3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Map `(B, C, H, W)`, H and W multiples of 16, to logits `(B, K, H, W)`."""
        require_multiple(image, PATCH, type(self).__name__)
        if self.repeats_channel:
            image = image.repeat(1, 3, 1, 1)
        x, skips = self.encoder(image)
        x = self.widen(x)
        for stage, skip in zip(self.decoder, [*reversed(skips), None], strict=True):
            x = stage(x, skip)
        return self.head(x)

    def backbone_names(self) -> dict[str, str]:
        """Keep the names that `read_backbone` gives."""
        return {"encoder.": "encoder."}

    def read_backbone(self, path: Path) -> dict[str, Tensor]:
        """Read the published `.npz`, its position embedding resized to this network's grid."""
        return read_hybrid_vit(path, grid=self.encoder.position.shape[-1])
