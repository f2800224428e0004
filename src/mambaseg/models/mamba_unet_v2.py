"""Mamba-UNet with the blocks of VMamba's second version: ours, nobody has published it.

Source: this project. The U is Mamba-UNet's (Wang et al. 2024, arXiv 2402.05079); blocks, embedding
and merging are those of VMamba's second version (see `vss_v2`).
"""

from collections.abc import Sequence

from mambaseg.models.ushape import UShape
from mambaseg.models.vss_v2 import VMambaV2Encoder, vss_blocks_v2


class MambaUNetV2(VMambaV2Encoder, UShape):
    """Mamba-UNet on VMamba's second version, 45,065,568 parameters for one channel, four classes.

    Its encoder, 29,478,528 of them, is VMamba-T's whole. With Mamba-UNet's `depths=(2, 2, 2, 2)` it
    has 26,301,792.

    Args:
        in_channels: see `UShape`, like all that is not named here.
        d_state: states per channel of the scan.
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
        blocks = vss_blocks_v2(d_state, scan_backend)
        super().__init__(in_channels, num_classes, blocks, embed_dim, depths, 4, drop_path_rate)

    def backbone_names(self) -> dict[str, str]:
        """Map the key prefixes of the published backbone to ours."""
        return super().backbone_names() | {"classifier.norm.": "bottom_norm."}
