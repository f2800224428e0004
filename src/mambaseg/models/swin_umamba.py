"""Swin-UMamba: a pretrained VMamba encoder in a convolutional U of the UNETR kind.

Source: Liu et al. 2024, arXiv 2402.03302, in the version of its released code; the decoder's
blocks are those of UNETR (Hatamizadeh et al. 2021, arXiv 2103.10504).

A skip carries what *leaves* a stage, before merging, through a residual block of convolutions that
widens it to the decoder's channels. Two finer skips come from before the encoder: the image itself
and the stem.

Differs from the original in having no heads at coarser maps (for deep supervision), and in taking
nothing of a pretrained patch embedding (there, a slip in the list of exceptions lets its norm's
bias in). Its recipe freezes the encoder for ten epochs (`optim.freeze_encoder`).
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mambaseg.models.any_size import require_multiple
from mambaseg.models.unet import UpJoin
from mambaseg.models.ushape import PatchEncoder, init_linear
from mambaseg.models.vss import vss_blocks

BACKBONE_CHANNELS = 3  # of the images that VMamba has seen


class VMambaEncoder(PatchEncoder):
    """What both Swin-UMambas have in common: VMamba-T, its names, and what it fills."""

    encoder_parts: ClassVar[tuple[str, ...]] = ("encoder.",)  # stem and embedding are never filled

    def original_names(self) -> dict[str, str]:
        """Map the key prefixes of the original networks' encoders to ours."""
        names = {"vssm_encoder.patch_embed.": "patch_embed."}
        for stage in range(len(self.encoder)):
            names[f"vssm_encoder.layers.{stage}."] = f"encoder.{stage}."
            names[f"vssm_encoder.downsamples.{stage}."] = f"encoder.{stage}.downsample."
        return names

    def backbone_names(self) -> dict[str, str]:
        """Map VMamba's key prefixes to ours, without an embedding for other channels."""
        names = super().backbone_names()
        if self.patch_embed.proj.in_channels != BACKBONE_CHANNELS:
            del names["patch_embed."]  # its bias and norm belong to a kernel that does not fit
        return names


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


class SwinUMamba(VMambaEncoder):
    """Swin-UMamba, 59,879,428 parameters for one channel and four classes.

    Args:
        in_channels: channels of the image, taken as they are.
        num_classes: K, background included.
        embed_dim: channels at stride 4; the stem has half of them.
        depths: blocks per encoder stage.
        d_state: states per channel of the scan.
        drop_path_rate: of the last encoder block; rises linearly from 0.
        scan_backend: which implementation of `mambaseg.scan` to use; `auto` takes the fastest.
    """

    original_parts: ClassVar[dict[str, str]] = VMambaEncoder.original_parts | {
        ".conv1.conv.": ".convs.0.",
        ".conv2.conv.": ".convs.3.",
        ".conv3.conv.": ".shortcut.0.",
    }
    original_unused = tuple(f"out_layers.{i}." for i in (1, 2, 3))  # the coarser heads

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 4,
        *,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 9, 2),
        d_state: int = 16,
        drop_path_rate: float = 0.2,
        scan_backend: str = "auto",
    ) -> None:
        super().__init__()
        stem = embed_dim // 2
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, stem, kernel_size=7, stride=2, padding=3),
            nn.InstanceNorm2d(stem, affine=True),
        )
        blocks = vss_blocks(d_state, scan_backend)
        self._embed(stem, blocks, embed_dim, depths, 2, drop_path_rate)
        self.size_multiple *= 2  # the stem's stride
        self.encoder.apply(init_linear)
        # Maps from fine to coarse: image, stem and all stages but the last; then the last itself.
        widths = [stem, *self.dims]
        self.laterals = nn.ModuleList(map(ResidualConvs, [in_channels, *widths[:-1]], widths))
        self.decoder = nn.ModuleList()
        for coarse, width in pairwise([widths[-1], *widths[::-1]]):
            up = nn.ConvTranspose2d(coarse, width, kernel_size=2, stride=2, bias=False)
            convs = ResidualConvs(2 * width, width)
            self.decoder.append(UpJoin(OrderedDict(up=up, block=convs)))
        self.refine = ResidualConvs(stem, stem)
        self.head = nn.Conv2d(stem, num_classes, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        """Map `(B, C, H, W)`, H and W multiples of `size_multiple`, to logits `(B, K, H, W)`."""
        require_multiple(image, self.size_multiple, type(self).__name__)
        stem = self.stem(image)
        outputs = self._stage_outputs(stem)
        *maps, x = [image, stem, *(rearrange(y, "b h w c -> b c h w") for y in outputs)]
        for stage, lateral, y in zip(
            self.decoder, reversed(self.laterals), reversed(maps), strict=True
        ):
            x = stage(x, lateral(y))
        return self.head(self.refine(x))

    def original_names(self) -> dict[str, str]:
        """Map the original network's key prefixes to ours."""
        names, last = super().original_names(), len(self.decoder) - 1
        for i in range(last + 1):
            names[f"encoder{i + 1}.layer."] = f"laterals.{i}."
            names[f"decoder{i + 2}.transp_conv.conv."] = f"decoder.{last - i}.up."
            names[f"decoder{i + 2}.conv_block."] = f"decoder.{last - i}.block."
        return names | {"decoder1.layer.": "refine.", "out_layers.0.conv.conv.": "head."}
