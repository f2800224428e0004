"""MSVM-UNet: VMamba's second version as encoder, multi-scale blocks and large expansions after it.

Source: Chen et al. 2024, arXiv 2408.13735, in the version of its released code
(gndlwch2w/msvm-unet, commit abb1a8e).

* A skip carries what leaves a stage, before merging.
* A decoder block is the encoder's with depthwise convolutions of three sizes in its MLP (MS-FFN).
* Expansions have a convolution behind the linear layer (LKPE); the last one, by four, and the head
  work on the whole image.

Differs from the original in the channels of an image: one is repeated to three, as there; others
are taken as they are.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseg.models.patch import PatchExpand, on_image
from mambaseg.models.ushape import LateSkips, init_linear
from mambaseg.models.vss_v2 import VMambaV2Encoder, vss_blocks_v2

SIDES = (1, 3, 5)  # of the kernels in a decoder block


class OnMap(nn.Sequential):
    """Layers for images, on maps `(B, H, W, C)`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, H, W, C)` to `(B, H, W, C')`."""
        return on_image(super().forward, x)


class MultiScale(nn.ModuleList):
    """Add depthwise convolutions of several sizes to a map; they are computed as one."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.Conv2d(dim, dim, side, groups=dim, bias=False) for side in SIDES)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to the same."""
        half = SIDES[-1] // 2
        kernels = [F.pad(w, [half - w.shape[-1] // 2] * 4) for w in self.parameters()]
        return x + F.conv2d(x, torch.stack(kernels).sum(0), padding=half, groups=x.shape[1])


class KernelExpand(PatchExpand):
    """Raise height and width by a factor; a depthwise convolution sees the neighbours first."""

    def __init__(self, dim: int, out_dim: int, factor: int) -> None:
        super().__init__(dim, out_dim, factor)
        wide = factor**2 * out_dim
        self.expand = OnMap(
            nn.Conv2d(dim, wide, kernel_size=1),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            nn.Conv2d(wide, wide, kernel_size=3, padding=1, groups=wide),
        )


class MSVMUNet(LateSkips, VMambaV2Encoder):
    """MSVM-UNet, 35,925,028 parameters for one channel and four classes.

    Args:
        in_channels: see `UShape`, like all that is not named here.
        embed_dim: channels of the finest stage.
        depths: blocks per encoder stage, fine to coarse; a decoder stage has two.
        d_state: states per channel of the scan.
        drop_path_rate: of the last encoder block and of the first decoder block; rises linearly
            from 0 along the encoder and falls back to 0 along the decoder.
        scan_backend: which implementation of `mambaseg.scan` to use; `auto` takes the fastest.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 4,
        *,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 8, 2),
        d_state: int = 1,
        drop_path_rate: float = 0.2,
        scan_backend: str = "auto",
    ) -> None:
        super().__init__()
        self.repeats_channel = in_channels == 1
        make_block = vss_blocks_v2(d_state, scan_backend)
        self._embed(in_channels, make_block, embed_dim, depths, 4, drop_path_rate)
        self.encoder.apply(init_linear)
        make_block = vss_blocks_v2(
            d_state, scan_backend, between=lambda dim: OnMap(MultiScale(dim))
        )
        self._decode(num_classes, make_block, drop_path_rate, KernelExpand)

    def original_names(self) -> dict[str, str]:
        """Map the original network's key prefixes to ours."""
        names = {f"encoder.{old}": new for old, new in self.backbone_names().items()}
        for old, new in {"0.0": "conv1", "0.2": "norm1", "1.0": "conv2", "1.2": "norm2"}.items():
            names[f"encoder.layer{old}."] = f"patch_embed.{new}."
        for stage in range(len(self.encoder)):
            names[f"encoder.downsamples.{stage}.1."] = f"encoder.{stage}.downsample.conv."
            names[f"encoder.downsamples.{stage}.3."] = f"encoder.{stage}.downsample.norm."
        for stage in range(len(self.decoder)):
            names[f"decoder.layers.{stage}.up."] = f"decoder.{stage}.expand."
            names[f"decoder.layers.{stage}.concat_layer."] = f"decoder.{stage}.fuse."
            names[f"decoder.layers.{stage}.vss_layer."] = f"decoder.{stage}."
        names["decoder.out_layers.0.out."] = "head."
        return names | {"decoder.out_layers.0.": "final_expand."}

    original_parts = VMambaV2Encoder.original_parts | {
        ".multiscale_conv.dw_convs.": ".between.0.",
    }
