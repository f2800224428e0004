"""U-Mamba: nnU-Net's residual U-Net with Mamba blocks, as published, in 2-D.

Source: Ma, Li & Wang 2024, U-Mamba (arXiv 2401.04722), in the code of January 2024, which made the
published numbers (63 M and 67 M parameters); since March 2024 the repository holds other networks
under the same names. Convolutional parts: the residual encoder of nnU-Net v2, with the blocks of
ResNet-D (He et al. 2018, arXiv 1812.01187). The twin without Mamba is the "No-Mamba Base" of
nnU-Net Revisited (Isensee et al. 2024, arXiv 2404.09556), which found it no worse.

As in the original code, the Mamba layer has no residual connection: it replaces the map.

Differences:

* The coarse heads are there (they are in the published counts and checkpoints), but frozen and not
  used unless the loss asks for them (`loss=deep_supervision`).
* nnU-Net plans strides, kernels and depth per dataset and axis; here every kernel is 3 × 3, and
  every stage but the first halves height and width.
* Mamba runs under autocast like the rest: the scan keeps its state and its decays in float32. (The
  original's encoder variant switches autocast off around Mamba, for it gave NaN.)
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

from torch import Tensor, nn

from mambaseg.errors import UserError
from mambaseg.models.any_size import require_multiple
from mambaseg.models.arguments import require_counts, require_levels
from mambaseg.models.heads import ManyHeads
from mambaseg.models.mamba1d import Mamba1d
from mambaseg.models.pretrained import Original
from mambaseg.models.unet import UpJoin

SLOPE = 0.01  # of the leaky ReLU


class ConvNorm(nn.Sequential):
    """Convolution and instance norm: `(B, in_channels, H, W)` to `(B, out_channels, H', W')`."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, *, stride: int = 1
    ) -> None:
        padding, bias = kernel_size // 2, kernel_size > 1  # a shortcut's projection has no bias
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        norm = nn.InstanceNorm2d(out_channels, eps=1e-5, affine=True)
        super().__init__(OrderedDict(conv=conv, norm=norm))


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut that is pooled and projected where it has to be."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, out_channels, stride=stride)
        self.conv2 = ConvNorm(out_channels, out_channels)
        self.nonlin = nn.LeakyReLU(SLOPE, inplace=True)
        shortcut: list[nn.Module] = [nn.AvgPool2d(stride)] if stride > 1 else []
        if in_channels != out_channels:
            shortcut.append(ConvNorm(in_channels, out_channels, kernel_size=1))
        self.skip = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, in_channels, H, W)` to `(B, out_channels, H / stride, W / stride)`."""
        branch = self.conv2(self.nonlin(self.conv1(x)))
        return self.nonlin(branch + self.skip(x))


def residual_stage(inputs: int, outputs: int, blocks: int, *, stride: int = 1) -> nn.Sequential:
    """Chain residual blocks, of which the first changes width and resolution."""
    first = ResidualBlock(inputs, outputs, stride=stride)
    return nn.Sequential(first, *(ResidualBlock(outputs, outputs) for _ in range(blocks - 1)))


class MambaLayer(nn.Module):
    """Layer norm and Mamba over the pixels of a map, read row by row."""

    def __init__(self, dim: int, *, d_state: int, scan_backend: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mamba = Mamba1d(dim, d_state=d_state, scan_backend=scan_backend)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C, H, W)`."""
        tokens = x.flatten(2).transpose(1, 2)
        tokens = self.mamba(self.norm(tokens))
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


class UMamba(ManyHeads, Original):
    """U-Mamba_Bot, U-Mamba_Enc and their twin without Mamba.

    Parameters for one channel and four classes: 40,506,676 with Mamba at the bottom, 42,800,180
    with Mamba in the encoder, 38,810,932 without; 3,856 of them are the frozen coarse heads'.

    Args:
        in_channels: channels of the image.
        num_classes: K, background included.
        mamba: where the Mamba layers are: one at the `bottom` (U-Mamba_Bot), one after every stage
            of the `encoder` (U-Mamba_Enc), or `none`.
        widths: channels per stage; each stage after the first halves the resolution.
        blocks: residual blocks per stage, of encoder and decoder.
        d_state: states per channel of the scan.
        scan_backend: which implementation of `mambaseg.scan` to use; `auto` takes the fastest.

    Raises:
        ValueError: there is no stage to halve to, or a width is 0.
    """

    encoder_twins = MappingProxyType({"mamba_layers.": "encoder."})  # a Mamba layer per stage
    original_unused = (".all_modules.", "decoder.encoder.")  # further names of the same tensors

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 4,
        *,
        mamba: Literal["bottom", "encoder", "none"] = "bottom",
        widths: Sequence[int] = (32, 64, 128, 256, 512, 512),
        blocks: int = 2,
        d_state: int = 16,
        scan_backend: str = "auto",
    ) -> None:
        super().__init__()
        require_levels(2, widths=widths)
        require_counts(widths=widths)
        bottom = len(widths) - 1
        placements = {"bottom": (bottom,), "encoder": tuple(range(len(widths))), "none": ()}
        if mamba not in placements:
            raise UserError(f"model.mamba is {mamba!r}: choose one of {', '.join(placements)}")
        self.mamba = mamba
        self.size_multiple = 2**bottom
        self.stem = ConvNorm(in_channels, widths[0])
        self.nonlin = nn.LeakyReLU(SLOPE, inplace=True)
        self.encoder = nn.ModuleList(
            residual_stage(widths[max(stage - 1, 0)], width, blocks, stride=2 if stage else 1)
            for stage, width in enumerate(widths)
        )
        self.mamba_layers = nn.ModuleList(nn.Identity() for _ in widths)
        for stage in placements[mamba]:
            self.mamba_layers[stage] = MambaLayer(
                widths[stage], d_state=d_state, scan_backend=scan_backend
            )
        coarse_to_fine = list(widths)[::-1]
        self.decoder = nn.ModuleList()
        for width, skip in pairwise(coarse_to_fine):
            up = nn.ConvTranspose2d(width, skip, kernel_size=2, stride=2)
            convs = residual_stage(2 * skip, skip, blocks)
            self.decoder.append(UpJoin(OrderedDict(expand=up, blocks=convs)))
        self.heads = nn.ModuleList(nn.Conv2d(w, num_classes, 1) for w in coarse_to_fine[1:])
        self.apply(init_convolution)
        if mamba == "encoder":
            self.apply(_close_branch)
        self.supervise_deeply(False)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Map `(B, C, H, W)` to logits `(B, K, H, W)`; see `ManyHeads`.

        Raises:
            UserError: height and width are not multiples of `size_multiple`, or both no larger.
        """
        require_multiple(image, self.size_multiple, type(self).__name__)
        height, width = image.shape[-2:]
        if max(height, width) <= self.size_multiple:
            raise UserError(
                f"an image of {height} × {width} pixels comes down to one pixel in the last of the "
                f"{len(self.encoder)} stages of UMamba, where there is nothing to normalise: use "
                "larger images (data.size) or fewer stages (model.widths)."
            )
        x = self.nonlin(self.stem(image))
        skips = []
        for stage, mamba in zip(self.encoder, self.mamba_layers, strict=True):
            x = mamba(stage(x))
            skips.append(x)
        x = skips.pop()
        maps = []
        for stage, skip in zip(self.decoder, reversed(skips), strict=True):
            x = stage(x, skip)
            maps.append(x)
        return self.logits(maps)

    def original_names(self) -> dict[str, str]:
        """Map the key prefixes of `UMambaBot` and `UMambaEnc` (January 2024) to ours.

        In nnU-Net's checkpoint files their weights are the entry `network_weights`.
        """
        bottom = f"mamba_layers.{len(self.encoder) - 1}"
        names = {
            "encoder.stem.convs.0.": "stem.",
            "encoder.mamba_layers.": "mamba_layers.",
            "ln.": f"{bottom}.norm.",
            "mamba.": f"{bottom}.mamba.",
            "decoder.seg_layers.": "heads.",
        }
        for stage in range(len(self.encoder)):
            names[f"encoder.stages.{stage}.blocks."] = f"encoder.{stage}."
            names[f"decoder.stages.{stage}.blocks."] = f"decoder.{stage}.blocks."
            names[f"decoder.transpconvs.{stage}."] = f"decoder.{stage}.expand."
        return names


def init_convolution(module: nn.Module) -> None:
    """Set a convolution to He's normal for the leaky ReLU and zero bias; Mamba's stays as it is."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.kaiming_normal_(module.weight, a=SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _close_branch(module: nn.Module) -> None:
    """Let a residual block begin as its shortcut alone."""
    if isinstance(module, ResidualBlock):
        for parameter in module.conv2[1].parameters():
            nn.init.zeros_(parameter)
