"""U-shapes of patches: the encoder that four networks share, and the U of Swin-UNet and Mamba-UNet.

Source: Swin-Unet (Cao et al. 2021, section 3); Mamba-UNet (Wang et al. 2024, arXiv 2402.05079) is
the same U with another block. As in both repositories' code:

* a skip carries what *enters* a stage, so the finest one is the bare patch embedding;
* the bottom is the encoder's last stage, a norm and an expansion, without decoder blocks;
* decoder depths mirror the encoder's, whatever the configurations there say.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mambaseg.models.any_size import require_multiple
from mambaseg.models.arguments import require_counts, require_levels
from mambaseg.models.linear import Linear
from mambaseg.models.norm import LayerNorm
from mambaseg.models.patch import PatchEmbed, PatchExpand, PatchMerging, PixelHead, pixel_logits
from mambaseg.models.pretrained import Original, Pretrained
from mambaseg.models.stochastic import falling_schedule, linear_schedule

BlockFactory = Callable[[int, int, int, float], nn.Module]
"""(channels, stage, index within the stage, drop path rate) -> block `(B, H, W, C)` to the same."""


def make_blocks(
    make_block: BlockFactory, dim: int, stage: int, rates: Sequence[float]
) -> nn.Sequential:
    """Make the blocks of one stage, one per drop path rate."""
    return nn.Sequential(*(make_block(dim, stage, index, rate) for index, rate in enumerate(rates)))


class PatchEncoder(Pretrained, Original):
    """A network with a hierarchical encoder: patches, then stages of blocks with merging between.

    Each stage, `blocks` and `downsample`, maps `(B, H, W, C)` to `(B, H/2, W/2, 2C)`; the last one
    keeps the resolution.
    """

    original_parts: ClassVar[dict[str, str]] = {".ln_1.": ".norm.", ".self_attention.": ".ss2d."}
    """Of VMamba's checkpoints (version 0) and its descendants'; Swin's have none of these."""
    embedding: ClassVar[type[Any]] = PatchEmbed
    merging: ClassVar[type[Any]] = PatchMerging
    decoder: nn.ModuleList
    repeats_channel = False
    """Whether a single channel of the image is repeated to three."""

    def _embed(
        self,
        in_channels: int,
        make_block: BlockFactory,
        embed_dim: int,
        depths: Sequence[int],
        patch_size: int,
        drop_path_rate: float,
    ) -> None:
        """Make `patch_embed` and `encoder`; see `UShape` for the arguments.

        Raises:
            ValueError: there is no stage, or a number is 0.
        """
        require_levels(depths=depths)
        require_counts(embed_dim=embed_dim, patch_size=patch_size)
        self.patch_size = patch_size
        self.size_multiple = patch_size * 2 ** (len(depths) - 1)
        self.dims = [embed_dim * 2**stage for stage in range(len(depths))]
        channels = 3 if self.repeats_channel else in_channels
        self.patch_embed = self.embedding(channels, embed_dim, patch_size)
        self.encoder = nn.ModuleList()
        self.rates = linear_schedule(drop_path_rate, (*depths,))
        for stage, rates in enumerate(self.rates):
            dim, last = self.dims[stage], stage == len(depths) - 1
            blocks = make_blocks(make_block, dim, stage, rates)
            down = nn.Identity() if last else self.merging(dim)
            self.encoder.append(nn.Sequential(OrderedDict(blocks=blocks, downsample=down)))

    def _patches(self, image: Tensor) -> Tensor:
        return self.patch_embed(image.repeat(1, 3, 1, 1) if self.repeats_channel else image)

    def _stage_inputs(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Embed and encode `(B, C, H, W)`: what enters each stage, and what leaves the last."""
        maps = [self._patches(image)]
        for stage in self.encoder:
            maps.append(stage(maps[-1]))
        return maps[:-1], maps[-1]

    def _stage_outputs(self, image: Tensor) -> list[Tensor]:
        """Embed and encode `(B, C, H, W)`: what leaves each stage, before merging."""
        outputs, x = [], self._patches(image)
        for stage in self.encoder:
            assert isinstance(stage, nn.Sequential)
            blocks, downsample = stage
            outputs.append(blocks(x))
            x = downsample(outputs[-1])
        return outputs

    def mirrored_names(self) -> dict[str, str]:
        """Map each encoder stage's blocks to the decoder's of the same width, if it has blocks."""
        last = len(self.decoder) - 1
        return {f"encoder.{i}.blocks.": f"decoder.{last - i}.blocks." for i in range(last + 1)}

    def backbone_names(self) -> dict[str, str]:
        """Map a hierarchical backbone's key prefixes to ours."""
        names = {f"layers.{stage}.": f"encoder.{stage}." for stage in range(len(self.encoder))}
        return names | {"patch_embed.": "patch_embed."}


class DecoderStage(nn.Module):
    """Up from the coarser resolution, join the skip, then blocks."""

    def __init__(
        self, dim: int, blocks: nn.Sequential, expand: type[PatchExpand] = PatchExpand
    ) -> None:
        super().__init__()
        self.expand = expand(2 * dim, dim, factor=2)
        self.fuse = Linear(2 * dim, dim)
        self.blocks = blocks

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Join `(B, H/2, W/2, 2C)` and the skip `(B, H, W, C)` to `(B, H, W, C)`."""
        x = self.expand(x)
        x = self.fuse(torch.cat([x, skip.to(x.dtype)], dim=-1))
        return self.blocks(x)


class UShape(PatchEncoder):
    """A U of patch merging and expanding around any block.

    Args:
        in_channels: channels of the image; a single one is repeated to three, as in the original
            networks (so that ImageNet weights fit), any other number is taken as it is.
        num_classes: K, background included.
        make_block: makes a block from (channels, stage, index within the stage, drop path rate).
        embed_dim: channels of the finest stage; each stage doubles them.
        depths: encoder blocks per stage; the decoder mirrors all but the last.
        patch_size: side of a patch in pixels.
        drop_path_rate: of the last encoder block; rises linearly from 0 over the encoder's blocks,
            and a decoder block has the rate of its mirror image.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        make_block: BlockFactory,
        embed_dim: int,
        depths: Sequence[int],
        patch_size: int,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.repeats_channel = in_channels == 1
        self._embed(in_channels, make_block, embed_dim, depths, patch_size, drop_path_rate)
        bottom = len(depths) - 1
        self.bottom_norm = LayerNorm(self.dims[bottom])
        self.decoder = nn.ModuleList(
            DecoderStage(dim, make_blocks(make_block, dim, stage, self.rates[stage]))
            for stage, dim in reversed([*enumerate(self.dims[:bottom])])
        )
        self.norm = LayerNorm(embed_dim)
        self.final_expand = PatchExpand(embed_dim, embed_dim, factor=patch_size)
        self.head = PixelHead(embed_dim, num_classes, kernel_size=1, bias=False)
        self.apply(init_linear)

    def forward(self, image: Tensor) -> Tensor:
        """Map `(B, C, H, W)`, H and W multiples of `size_multiple`, to logits `(B, K, H, W)`."""
        require_multiple(image, self.size_multiple, type(self).__name__)
        skips, x = self._stage_inputs(image)
        x = self.bottom_norm(x)
        for stage, skip in zip(self.decoder, reversed(skips[:-1]), strict=True):
            x = stage(x, skip)
        return pixel_logits(self.head, self.final_expand, self.norm(x))

    def backbone_names(self) -> dict[str, str]:
        """Map the key prefixes of a backbone, and of the original encoder, to ours."""
        return super().backbone_names() | {"norm.": "bottom_norm."}

    def original_names(self) -> dict[str, str]:
        """Map the original networks' key prefixes to ours."""
        names = self.backbone_names()
        for stage in range(len(self.decoder)):
            # There, a decoder layer ends with an expansion; here, the next stage begins with it.
            expand = f"layers_up.{stage}.upsample." if stage else "layers_up.0."
            names[f"layers_up.{stage + 1}.blocks."] = f"decoder.{stage}.blocks."
            names[f"concat_back_dim.{stage + 1}."] = f"decoder.{stage}.fuse."
            names[expand] = f"decoder.{stage}.expand."
        return names | {"norm_up.": "norm.", "up.": "final_expand.", "output.": "head."}


class LateSkips(PatchEncoder):
    """U-Net whose skip connections carry each stage's output; decoder stages have two blocks."""

    def _decode(
        self,
        num_classes: int,
        make_block: BlockFactory,
        drop_path_rate: float,
        expand: type[PatchExpand] = PatchExpand,
    ) -> None:
        """Make everything behind the encoder.

        Args:
            num_classes: K, background included.
            make_block: see `UShape`.
            drop_path_rate: of the first decoder block; falls to 0 at the last one.
            expand: makes an expansion from channels before, channels after, and a factor.
        """
        coarser = len(self.dims) - 1
        rates = falling_schedule(drop_path_rate, (2,) * coarser)[::-1]  # by stage
        self.decoder = nn.ModuleList(
            DecoderStage(dim, make_blocks(make_block, dim, stage, rates[stage]), expand)
            for stage, dim in reversed([*enumerate(self.dims[:coarser])])
        )
        self.final_expand = expand(self.dims[0], self.dims[0], factor=self.patch_size)
        self.head = PixelHead(self.dims[0], num_classes, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        """Map `(B, C, H, W)`, H and W multiples of `size_multiple`, to logits `(B, K, H, W)`."""
        require_multiple(image, self.size_multiple, type(self).__name__)
        *skips, x = self._stage_outputs(image)
        for stage, skip in zip(self.decoder, reversed(skips), strict=True):
            x = stage(x, skip)
        return pixel_logits(self.head, self.final_expand, x)

    def mirrored_names(self) -> dict[str, str]:
        """Map nothing: the decoder's blocks are others."""
        return {}


def init_linear(module: nn.Module) -> None:
    """Set a linear layer to a truncated normal (0.02) and zero bias; norms are 1 and 0 anyway."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
