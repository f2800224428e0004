"""Mamba-UNet: the shared U-shape with visual state space blocks.

Source: Wang et al. 2024, arXiv 2402.05079.
"""

from collections.abc import Sequence

from mambaseg.models.ushape import UShape
from mambaseg.models.vss import vss_blocks


class MambaUNet(UShape):
    """Mamba-UNet, 19,121,664 parameters for one channel and four classes.

    With `depths=(2, 2, 9, 2)`, VMamba-T's own, it has 35,862,528. The published network uses
    (2, 2, 2, 2): the depths in its default configuration are overridden by its YAML file.

    Args:
        in_channels: see `UShape`, like all that is not named here.
        d_state: states per channel of the scan.
        scan_backend: which implementation of `mambaseg.scan` to use; `auto` takes the fastest.
    """

    original_wrapper = "mamba_unet."

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 4,
        *,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 2, 2),
        d_state: int = 16,
        patch_size: int = 4,
        drop_path_rate: float = 0.2,
        scan_backend: str = "auto",
    ) -> None:
        blocks = vss_blocks(d_state, scan_backend)
        super().__init__(
            in_channels, num_classes, blocks, embed_dim, depths, patch_size, drop_path_rate
        )
