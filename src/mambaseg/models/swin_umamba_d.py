"""Swin-UMamba†: the pretrained VMamba encoder with a light decoder of the same blocks.

Source: Liu et al. 2024, arXiv 2402.03302, in the version of its released code (`SwinUMambaD`).

The decoder is that of Mamba-UNet: expand, join the skip, blocks. What differs from Mamba-UNet:

* the encoder has VMamba-T's own depths, the decoder two blocks per stage whatever these are;
* a skip carries what *leaves* a stage, before merging, so the finest one has been through blocks;
* no norms at the bottom and before the last expansion; the head has a bias;
* one channel is not repeated to three, and then no weights of a patch embedding are loaded;
* convolutions start as He et al. 2015 (slope 0.01), the decoder's linear layers as PyTorch's.

Differs from the original in having no heads at coarser maps (for deep supervision).
"""

from collections.abc import Sequence

from mambaseg.models.swin_umamba import VMambaEncoder
from mambaseg.models.u_mamba import init_convolution
from mambaseg.models.ushape import LateSkips, init_linear
from mambaseg.models.vss import vss_blocks


class SwinUMambaD(LateSkips, VMambaEncoder):
    """Swin-UMamba†, 27,487,300 parameters for one channel and four classes.

    Args:
        in_channels: channels of the image, taken as they are.
        num_classes: see `UShape`, like all that is not named here.
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
        depths: Sequence[int] = (2, 2, 9, 2),
        d_state: int = 16,
        patch_size: int = 4,
        drop_path_rate: float = 0.2,
        scan_backend: str = "auto",
    ) -> None:
        super().__init__()
        make_block = vss_blocks(d_state, scan_backend)
        self._embed(in_channels, make_block, embed_dim, depths, patch_size, drop_path_rate)
        self.encoder.apply(init_linear)
        self.original_unused = tuple(f"decoder.seg_layers.{i}." for i in range(len(depths) - 1))
        self._decode(num_classes, make_block, drop_path_rate)
        self.apply(init_convolution)

    def original_names(self) -> dict[str, str]:
        """Map the original network's key prefixes to ours."""
        names, stages = super().original_names(), len(self.decoder)
        for stage in range(stages):
            names[f"decoder.expand_layers.{stage}."] = f"decoder.{stage}.expand."
            names[f"decoder.concat_back_dim.{stage}."] = f"decoder.{stage}.fuse."
            names[f"decoder.stages.{stage}.blocks."] = f"decoder.{stage}.blocks."
        names[f"decoder.expand_layers.{stages}."] = "final_expand."
        names[f"decoder.seg_layers.{stages}."] = "head."
        return names
