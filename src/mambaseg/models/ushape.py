"""The U-shape that Swin-UNet and Mamba-UNet share, with the block left open.

Source: Swin-Unet (Cao et al. 2021, section 3); Mamba-UNet (Wang et al. 2024, arXiv 2402.05079) is
the same U with another block. As in both repositories' code:

* a skip carries what *enters* a stage, so the finest one is the bare patch embedding;
* the bottom is the encoder's last stage, a norm and an expansion, without decoder blocks;
* decoder depths mirror the encoder's, whatever the configurations there say.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from mambaseg.models.any_size import require_multiple
from mambaseg.models.norm import LayerNorm
from mambaseg.models.patch import (
    PatchEmbed,
    PatchExpand,
    PatchMerging,
    PixelHead,
    place_pixels,
)
from mambaseg.models.pretrained import LoadReport, load_encoder, load_renamed
from mambaseg.models.stochastic import linear_schedule

BlockFactory = Callable[[int, int, int, float], nn.Module]
"""(channels, stage, index within the stage, drop path rate) -> block `(B, H, W, C)` to the same."""


class EncoderStage(nn.Module):
    """Blocks at one resolution, then down to the next (except at the bottom)."""

    def __init__(self, dim: int, blocks: Sequence[nn.Module], *, downsample: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = PatchMerging(dim) if downsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, H, W, C)` to `(B, H/2, W/2, 2C)`, or to itself at the bottom."""
        out: Tensor = self.downsample(self.blocks(x))
        return out


def make_blocks(
    make_block: BlockFactory, dim: int, stage: int, rates: Sequence[float]
) -> list[nn.Module]:
    """Make the blocks of one stage, one per drop path rate."""
    return [make_block(dim, stage, index, rate) for index, rate in enumerate(rates)]


def make_encoder(
    make_block: BlockFactory, dims: Sequence[int], rates: Sequence[Sequence[float]]
) -> nn.ModuleList:
    """Make the stages of an encoder; all but the last halve the resolution at their end."""
    bottom = len(dims) - 1
    return nn.ModuleList(
        EncoderStage(
            dim, make_blocks(make_block, dim, stage, rates[stage]), downsample=stage < bottom
        )
        for stage, dim in enumerate(dims)
    )


class DecoderStage(nn.Module):
    """Up from the coarser resolution, join the skip, then blocks."""

    def __init__(self, dim: int, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.expand = PatchExpand(2 * dim, dim, factor=2)
        self.fuse = nn.Linear(2 * dim, dim)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Join `(B, H/2, W/2, 2C)` and the skip `(B, H, W, C)` to `(B, H, W, C)`."""
        x = self.expand(x)
        x = self.fuse(torch.cat([x, skip.to(x.dtype)], dim=-1))
        out: Tensor = self.blocks(x)
        return out


class UShape(nn.Module):
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

    original_prefix: ClassVar[str] = ""
    """What a checkpoint of the original repository's wrapper class puts before every key."""
    original_block_names: ClassVar[Mapping[str, str]] = {}
    """Original name -> ours, for parts of a block."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        make_block: BlockFactory,
        *,
        embed_dim: int,
        depths: Sequence[int],
        patch_size: int,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.repeats_channel = in_channels == 1
        self.patch_size = patch_size
        self.size_multiple = patch_size * 2 ** (len(depths) - 1)
        dims = [embed_dim * 2**stage for stage in range(len(depths))]
        rates = linear_schedule(drop_path_rate, tuple(depths))
        bottom = len(depths) - 1
        self.patch_embed = PatchEmbed(
            3 if self.repeats_channel else in_channels, embed_dim, patch_size
        )
        self.encoder = make_encoder(make_block, dims, rates)
        self.bottom_norm = LayerNorm(dims[bottom])
        self.decoder = nn.ModuleList(
            DecoderStage(dims[stage], make_blocks(make_block, dims[stage], stage, rates[stage]))
            for stage in reversed(range(bottom))
        )
        self.norm = LayerNorm(embed_dim)
        self.final_expand = PatchExpand(embed_dim, embed_dim, factor=patch_size)
        self.head = PixelHead(embed_dim, num_classes, kernel_size=1, bias=False)
        self.apply(init_linear)

    def forward(self, image: Tensor) -> Tensor:
        """Map `(B, C, H, W)`, H and W multiples of `size_multiple`, to logits `(B, K, H, W)`."""
        require_multiple(image, self.size_multiple, type(self).__name__)
        if self.repeats_channel:
            image = image.repeat(1, 3, 1, 1)
        x = self.patch_embed(image)
        skips = []
        for stage in self.encoder:
            skips.append(x)
            x = stage(x)
        x = self.bottom_norm(x)
        skips.pop()  # what enters the bottom stage is no skip
        for stage, skip in zip(self.decoder, reversed(skips), strict=True):
            x = stage(x, skip)
        # The head works on single pixels: so K channels are put in their places rather than C.
        return place_pixels(self.head(self.final_expand.pixels(self.norm(x))), self.patch_size)

    def backbone_names(self) -> dict[str, str]:
        """Map the key prefixes of a backbone, and of the original encoder, to ours."""
        return encoder_names(len(self.encoder)) | {"norm.": "bottom_norm."}

    def original_names(self) -> dict[str, str]:
        """Map the original networks' key prefixes to ours."""
        names = self.backbone_names()
        for stage in range(len(self.decoder)):
            # There, a decoder layer ends with an expansion; here, the next stage begins with it.
            expand = f"layers_up.{stage}.upsample." if stage else "layers_up.0."
            names[f"layers_up.{stage + 1}.blocks."] = f"decoder.{stage}.blocks."
            names[f"concat_back_dim.{stage + 1}."] = f"decoder.{stage}.fuse."
            names[expand] = f"decoder.{stage}.expand."
        return names | {
            "norm_up.": "norm.",
            "up.": "final_expand.",
            "output.": "head.",
        }

    def mirrored_names(self) -> dict[str, str]:
        """Map each encoder stage's blocks to the decoder blocks of the same width."""
        last = len(self.decoder) - 1
        return {f"encoder.{i}.blocks.": f"decoder.{last - i}.blocks." for i in range(last + 1)}

    def load_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load weights of the original repository's network, strictly.

        Raises:
            UserError: a key is missing or left over, or a shape differs.
        """
        load_renamed(
            self,
            state_dict,
            self.original_names(),
            self.original_block_names,
            wrapper=self.original_prefix,
        )

    def load_pretrained_encoder(self, path: str | Path, *, mirror: bool = True) -> LoadReport:
        """Fill the encoder from an ImageNet backbone, as `.pth` or `.safetensors`.

        Args:
            path: weights with the backbone's key names, at the top or under `model`.
            mirror: also give each encoder block's weights to the decoder block of the same width
                and index, as the original's code does (the paper speaks of the encoder only).

        Raises:
            UserError: not a weights file, or less than half of the encoder's parameters matched.
        """
        return load_encoder(
            self,
            Path(path),
            self.backbone_names(),
            self.original_block_names,
            mirrored=self.mirrored_names() if mirror else {},
        )


def encoder_names(stages: int) -> dict[str, str]:
    """Map the key prefixes of a hierarchical backbone to those of `make_encoder`'s stages."""
    names = {f"layers.{stage}.": f"encoder.{stage}." for stage in range(stages)}
    return names | {"patch_embed.": "patch_embed."}


def init_linear(module: nn.Module) -> None:
    """Set a linear layer to a truncated normal (0.02) and zero bias; norms are 1 and 0 anyway."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
