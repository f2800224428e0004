"""Swin-UNet: the shared U-shape with shifted-window attention.

Source: Cao et al. 2021, arXiv 2105.05537.
"""

from collections.abc import Sequence

from torch import nn

from mambaseg.models.arguments import require_counts, require_levels
from mambaseg.models.ushape import UShape
from mambaseg.models.window_attention import SwinBlock


class SwinUNet(UShape):
    """Swin-UNet (tiny), 27,168,420 parameters for one channel and four classes.

    Differs from the original in taking any multiple of 32, not 224² alone (see `window_attention`).

    Args:
        in_channels: see `UShape`, like all that is not named here.
        heads: attention heads per stage.
        window_size: side of a window in tokens.

    Raises:
        ValueError: stages and heads differ in number, or there is no window.
    """

    backbone = "Swin-T (swin_tiny_patch4_window7_224.pth)"
    original_wrapper = "swin_unet."

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 4,
        *,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 2, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        patch_size: int = 4,
        drop_path_rate: float = 0.2,
    ) -> None:
        require_levels(depths=depths, heads=heads)
        require_counts(window_size=window_size)

        def make_block(dim: int, stage: int, index: int, drop_path: float) -> nn.Module:
            shifted = index % 2 == 1
            return SwinBlock(dim, heads[stage], window_size, shifted=shifted, drop_path=drop_path)

        super().__init__(
            in_channels, num_classes, make_block, embed_dim, depths, patch_size, drop_path_rate
        )
