"""Mamba-UNet without its scan: what does the scan itself buy?

Ours, in the spirit of the twins of nnU-Net Revisited (Isensee et al. 2024, arXiv 2404.09556): the
network, its gate and its norms stay, and only what mixes positions in a block is another.
"""

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor, nn

from mambaseg.models.ushape import UShape
from mambaseg.models.vss import GatedMixer, MixerBlock


class GatedConv(GatedMixer):
    """`SS2D` with a depthwise convolution, of odd `kernel_size`, in place of the scan."""

    def __init__(self, dim: int, *, kernel_size: int) -> None:
        super().__init__(dim)
        if kernel_size < 1 or kernel_size % 2 == 0:  # an even one would enlarge the map
            raise ValueError(f"model.kernel_size={kernel_size}: must be odd")
        inner = 2 * dim
        self.mixer = nn.Conv2d(inner, inner, kernel_size, padding=kernel_size // 2, groups=inner)

    def mix(self, x: Tensor) -> Tensor:
        """Convolve `(B, H, W, D)`."""
        return rearrange(self.mixer(rearrange(x, "b h w d -> b d h w")), "b d h w -> b h w d")


class MambaUNetNoScan(UShape):
    """Mamba-UNet with 7×7 depthwise convolutions for scans.

    15,900,672 parameters for one channel and four classes; Mamba-UNet has 19,121,664.

    Weights of VMamba-T fill what both have: a load leaves the convolutions as initialised.

    Args:
        in_channels: see `UShape`, like all that is not named here.
        kernel_size: of the convolution that replaces the scan, odd.
    """

    fresh_parts = (".mixer.",)

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 4,
        *,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 2, 2),
        kernel_size: int = 7,
        patch_size: int = 4,
        drop_path_rate: float = 0.2,
    ) -> None:
        def make_block(dim: int, stage: int, index: int, drop_path: float) -> nn.Module:
            return MixerBlock(dim, GatedConv(dim, kernel_size=kernel_size), drop_path)

        super().__init__(
            in_channels, num_classes, make_block, embed_dim, depths, patch_size, drop_path_rate
        )
