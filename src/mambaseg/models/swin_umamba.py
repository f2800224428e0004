"""Swin-UMamba: a pretrained VMamba encoder in a convolutional U of the UNETR kind.

Source: Liu et al. 2024, arXiv 2402.03302, in the version of its released code; the decoder's
blocks are those of UNETR (Hatamizadeh et al. 2021, arXiv 2103.10504).

A skip carries what *leaves* a stage, before merging, through a residual block of convolutions that
widens it to the decoder's channels. Two finer skips come from before the encoder: the image itself
and the stem.

Differs from the original in what a pretrained file fills: nothing of the patch embedding, which
takes the stem's channels here (there, a slip in the list of exceptions lets its norm's bias in).
Its recipe freezes the encoder for ten epochs; that is the training's concern, not the network's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mambaseg.models.any_size import require_multiple
from mambaseg.models.patch import PatchEmbed
from mambaseg.models.pretrained import LoadReport, load_encoder, load_renamed
from mambaseg.models.stochastic import linear_schedule
from mambaseg.models.ushape import EncoderStage, init_linear, make_encoder
from mambaseg.models.vss import ORIGINAL_NAMES, vss_blocks

COARSE_HEADS = 3  # with deep supervision, beside the head at full resolution


class ResidualConvs(nn.Module):
    """Two 3×3 convolutions with instance norms (without scale and shift), and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.InstanceNorm2d(out_channels),
            nn.LeakyReLU(),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.InstanceNorm2d(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False),
                nn.InstanceNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, in_channels, H, W)` to `(B, out_channels, H, W)`."""
        return F.leaky_relu(self.convs(x) + self.shortcut(x))


class UpBlock(nn.Module):
    """Up by a transposed convolution, join the skip, convolve."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2, bias=False)
        self.block = ResidualConvs(2 * out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Join `(B, in_channels, H/2, W/2)` and the skip `(B, out_channels, H, W)`."""
        joined: Tensor = self.block(torch.cat([self.up(x), skip], dim=1))
        return joined


class SwinUMamba(nn.Module):
    """Swin-UMamba, 59,879,428 parameters for one channel and four classes.

    With `deep_supervision` it has 59,882,128: the original's class holds the coarser heads always.

    Args:
        in_channels: channels of the image, taken as they are.
        num_classes: K, background included.
        embed_dim: channels at stride 4; the stem has half of them.
        depths: blocks per encoder stage.
        d_state: states per channel of the scan.
        drop_path_rate: of the last encoder block; rises linearly from 0.
        deep_supervision: heads at strides 2, 4 and 8 too, whose logits training mode returns.
        scan_backend: which implementation of `mambaseg.scan` to use; `auto` takes the fastest.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 4,
        *,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 9, 2),
        d_state: int = 16,
        drop_path_rate: float = 0.2,
        deep_supervision: bool = False,
        scan_backend: str = "auto",
    ) -> None:
        super().__init__()
        self.size_multiple = 4 * 2 ** (len(depths) - 1)
        stem = embed_dim // 2
        dims = [embed_dim * 2**stage for stage in range(len(depths))]
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, stem, kernel_size=7, stride=2, padding=3),
            nn.InstanceNorm2d(stem, affine=True),
        )
        self.patch_embed = PatchEmbed(stem, embed_dim, patch_size=2)
        self.encoder = make_encoder(
            vss_blocks(d_state, scan_backend), dims, linear_schedule(drop_path_rate, (*depths,))
        )
        self.encoder.apply(init_linear)
        # Maps from fine to coarse: image, stem and all stages but the last; then the last itself.
        widths = [stem, *dims]
        self.laterals = nn.ModuleList(map(ResidualConvs, [in_channels, *widths[:-1]], widths))
        coarse_to_fine = widths[::-1]
        self.decoder = nn.ModuleList(map(UpBlock, [dims[-1], *coarse_to_fine[:-1]], coarse_to_fine))
        self.refine = ResidualConvs(stem, stem)
        self.head = nn.Conv2d(stem, num_classes, kernel_size=1)
        coarse = widths[1 : 1 + COARSE_HEADS] if deep_supervision else []
        self.coarse_heads = nn.ModuleList(
            nn.Conv2d(width, num_classes, kernel_size=1) for width in coarse
        )

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Map `(B, C, H, W)`, H and W multiples of `size_multiple`, to logits `(B, K, H, W)`.

        Returns:
            The logits; in training mode with deep supervision a list of them, at strides 1, 2, 4
            and 8.
        """
        require_multiple(image, self.size_multiple, type(self).__name__)
        stem = self.stem(image)
        outputs = stage_outputs(self.encoder, self.patch_embed(stem))
        *maps, x = [image, stem, *(rearrange(y, "b h w c -> b c h w") for y in outputs)]
        decoded: list[Tensor] = []  # fine to coarse
        for stage, lateral, y in zip(
            self.decoder, reversed(self.laterals), reversed(maps), strict=True
        ):
            x = stage(x, lateral(y))
            decoded.insert(0, x)
        logits: Tensor = self.head(self.refine(x))
        if self.training and self.coarse_heads:
            coarse = decoded[1 : 1 + len(self.coarse_heads)]
            heads = zip(self.coarse_heads, coarse, strict=True)
            return [logits, *(head(y) for head, y in heads)]
        return logits

    def load_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load weights of the original repository's `SwinUMamba`, strictly.

        The heads of coarser maps, which it always holds, are left out without deep supervision.

        Raises:
            UserError: a key is missing or left over, or a shape differs.
        """
        last = len(self.decoder) - 1
        names = original_encoder_names(len(self.encoder))
        for i in range(last + 1):
            names[f"encoder{i + 1}.layer."] = f"laterals.{i}."
            names[f"decoder{i + 2}.transp_conv.conv."] = f"decoder.{last - i}.up."
            names[f"decoder{i + 2}.conv_block."] = f"decoder.{last - i}.block."
        names |= {"decoder1.layer.": "refine.", "out_layers.0.conv.conv.": "head."}
        coarse = {
            f"out_layers.{i + 1}.conv.conv.": f"coarse_heads.{i}." for i in range(COARSE_HEADS)
        }
        convolutions = {
            ".conv1.conv.": ".convs.0.",
            ".conv2.conv.": ".convs.3.",
            ".conv3.conv.": ".shortcut.0.",
        }
        if not self.coarse_heads:
            state_dict = {k: v for k, v in state_dict.items() if not k.startswith(tuple(coarse))}
        load_renamed(self, state_dict, names | coarse, ORIGINAL_NAMES | convolutions)

    def load_pretrained_encoder(self, path: str | Path) -> LoadReport:
        """Fill the stages of the encoder, but not the patch embedding, from VMamba-T (version 0).

        Args:
            path: `.pth` or `.safetensors` with the backbone's keys, at the top or under `model`.

        Raises:
            UserError: not a weights file, or less than half of the encoder's parameters matched.
        """
        names = {f"layers.{stage}.": f"encoder.{stage}." for stage in range(len(self.encoder))}
        return load_encoder(self, Path(path), names, ORIGINAL_NAMES, mirrored={})


def stage_outputs(encoder: nn.ModuleList, x: Tensor) -> list[Tensor]:
    """Run `make_encoder`'s stages, and return what leaves each of them, before merging.

    Args:
        encoder: the stages.
        x: `(B, H, W, C)`.

    Returns:
        `(B, H, W, C)`, `(B, H/2, W/2, 2C)`, ...
    """
    outputs = []
    for stage in encoder:
        assert isinstance(stage, EncoderStage)
        outputs.append(stage.blocks(x))
        x = stage.downsample(outputs[-1])
    return outputs


def original_encoder_names(stages: int) -> dict[str, str]:
    """Map the key prefixes of both Swin-UMambas' encoders to ours."""
    names = {"vssm_encoder.patch_embed.": "patch_embed."}
    for stage in range(stages):
        names[f"vssm_encoder.layers.{stage}."] = f"encoder.{stage}."
        names[f"vssm_encoder.downsamples.{stage}."] = f"encoder.{stage}.downsample."
    return names
