"""The encoder of VMamba's second version: a scan with one state, no gate, and an MLP.

Source: VMamba (Liu et al. 2024, arXiv 2401.10166v3), in the version of its released tiny network
(MzeroMiko/VMamba, commit 2ed52ea, `vmambav2v_tiny_224`: `vssm1_tiny_0230s`). Letters as in `vss`.

What differs from the first version, in `vss`, `patch` and `ushape`:

* the scan has D = C channels (there 2 C) and one state each (there 16); nothing gates it;
* each block has an MLP behind the scan;
* patches overlap: two convolutions of stride 2 embed, one halves the map between stages.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mambaseg.models.linear import Linear, Mlp
from mambaseg.models.norm import LayerNorm
from mambaseg.models.patch import on_image
from mambaseg.models.pretrained import read_weights
from mambaseg.models.stochastic import DropPath
from mambaseg.models.ushape import BlockFactory, PatchEncoder
from mambaseg.models.vss import CrossScan, MixerBlock


class PlainSS2D(CrossScan):
    """The selective scan of a map in four directions between two projections, without a gate.

    Args:
        dim: C = D, channels of the map.
        d_state: N, states per channel.
        scan_backend: name for `mambaseg.scan`, or `auto`.
    """

    def __init__(self, dim: int, *, d_state: int = 1, scan_backend: str = "auto") -> None:
        super().__init__()
        self.in_proj = Linear(dim, dim, bias=False)
        self.conv2d = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False)
        self._make_scan(dim, math.ceil(dim / 16), d_state, scan_backend)
        self.out_norm = LayerNorm(dim)
        self.out_proj = Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, H, W, C)` to `(B, H, W, C)`."""
        x = F.silu(on_image(self.conv2d, self.in_proj(x)))
        return self.out_proj(self.out_norm(self.mix(x)))


class VSSBlockV2(MixerBlock):
    """The scan and an MLP, each a pre-normed residual branch, on maps `(B, H, W, C)`.

    Args:
        dim: C, channels of the map.
        d_state: N, states per channel.
        drop_path: probability that a sample skips a branch in training.
        scan_backend: name for `mambaseg.scan`, or `auto`.
        between: makes what works within the MLP, from its width.
    """

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 1,
        drop_path: float = 0.0,
        scan_backend: str = "auto",
        between: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__(dim, PlainSS2D(dim, d_state=d_state, scan_backend=scan_backend), drop_path)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, between(4 * dim) if between else None)
        self.drop_mlp = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, H, W, C)` to `(B, H, W, C)`."""
        x = super().forward(x)
        return x + self.drop_mlp(self.mlp(self.norm2(x)))


def vss_blocks_v2(
    d_state: int, scan_backend: str, between: Callable[[int], nn.Module] | None = None
) -> BlockFactory:
    """Return a maker of blocks for a U; see `ushape.BlockFactory`."""
    return lambda dim, stage, index, drop_path: VSSBlockV2(
        dim, d_state=d_state, drop_path=drop_path, scan_backend=scan_backend, between=between
    )


class OverlappingEmbed(nn.Module):
    """Embed the image by two 3×3 convolutions of stride 2, half of the channels in between."""

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        if patch_size != 4:
            raise ValueError(f"two convolutions of stride 2 make patches of 4, got {patch_size}")
        self.conv1 = nn.Conv2d(in_channels, dim // 2, kernel_size=3, stride=2, padding=1)
        self.norm1 = LayerNorm(dim // 2)
        self.conv2 = nn.Conv2d(dim // 2, dim, kernel_size=3, stride=2, padding=1)
        self.norm2 = LayerNorm(dim, keeps_float32=True)  # blocks add to it

    def forward(self, image: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, H / 4, W / 4, dim)`."""
        x = self.norm1(rearrange(self.conv1(image), "b c h w -> b h w c"))
        return self.norm2(on_image(self.conv2, F.gelu(x)))


class OverlappingMerging(nn.Module):
    """Halve the resolution and double the channels by a 3×3 convolution of stride 2."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, 2 * dim, kernel_size=3, stride=2, padding=1)
        self.norm = LayerNorm(2 * dim, keeps_float32=True)  # blocks add to it

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, H, W, C)` to `(B, H / 2, W / 2, 2C)`."""
        return self.norm(on_image(self.conv, x))


class VMambaV2Encoder(PatchEncoder):
    """A network with the encoder of VMamba's second version, which takes its published weights."""

    backbone = "VMamba-T (vssm1_tiny_0230s_ckpt_epoch_264.pth)"
    original_parts: ClassVar[dict[str, str]] = {".op.": ".ss2d."}
    embedding: ClassVar[type[Any]] = OverlappingEmbed
    merging: ClassVar[type[Any]] = OverlappingMerging

    def read_backbone(self, path: Path) -> dict[str, Tensor]:
        """Read a file of weights; linear layers may be saved as 1×1 convolutions."""
        file = read_weights(path)
        return {key: t.flatten(1) if t.shape[2:] == (1, 1) else t for key, t in file.items()}

    def backbone_names(self) -> dict[str, str]:
        """Map VMamba's key prefixes to ours."""
        names = {"patch_embed.0.": "patch_embed.conv1.", "patch_embed.2.": "patch_embed.norm1."}
        names |= {"patch_embed.5.": "patch_embed.conv2.", "patch_embed.7.": "patch_embed.norm2."}
        for stage in range(len(self.encoder)):
            names[f"layers.{stage}.downsample.1."] = f"encoder.{stage}.downsample.conv."
            names[f"layers.{stage}.downsample.3."] = f"encoder.{stage}.downsample.norm."
            names[f"layers.{stage}.blocks."] = f"encoder.{stage}.blocks."
        return names
