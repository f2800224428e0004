"""VM-UNet: visual state space blocks on both sides of a U whose skips are added.

Source: Ruan, Xiang, Xie 2024, arXiv 2402.02491, in the version of its released code.

What differs from Mamba-UNet, which has the same encoder:

* a skip is added to what enters a decoder stage, before that stage raises the resolution. So the
  skips lie at strides 32, 16 and 8, and the bare patch embedding (stride 4) is none of them;
* the decoder has blocks at stride 32 too, and depths and drop path rates of its own;
* the bottom has no norm, the last expansion narrows to `embed_dim / 4` channels, the head a bias.

Differs from the original in returning logits for a single class too (there: probabilities).
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from mambaseg.models.any_size import require_multiple
from mambaseg.models.arguments import require_levels
from mambaseg.models.patch import PatchExpand, PixelHead, pixel_logits
from mambaseg.models.stochastic import falling_schedule
from mambaseg.models.ushape import PatchEncoder, init_linear, make_blocks
from mambaseg.models.vss import vss_blocks


class VMUNet(PatchEncoder):
    """VM-UNet, 27,427,636 parameters for one channel and four classes.

    With `depths=(2, 2, 9, 2)` and `decoder_depths=(2, 9, 2, 2)`, the defaults of the original's
    class, it has 44,273,908. Both of its released configurations use the depths given here.

    Args:
        in_channels: see `UShape`, like all that is not named here.
        embed_dim: channels of the finest stage, a multiple of `patch_size`.
        depths: blocks per encoder stage, fine to coarse.
        decoder_depths: blocks per decoder stage, coarse to fine.
        d_state: states per channel of the scan.
        drop_path_rate: of the last encoder block and of the first decoder block; rises linearly
            from 0 along the encoder and falls back to 0 along the decoder.
        scan_backend: which implementation of `mambaseg.scan` to use; `auto` takes the fastest.

    Raises:
        ValueError: encoder and decoder have different numbers of stages.
    """

    backbone = "VMamba-S (vssmsmall_dp03_ckpt_epoch_238.pth)"
    original_wrapper = "vmunet."

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 4,
        *,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 2, 2),
        decoder_depths: Sequence[int] = (2, 2, 2, 1),
        d_state: int = 16,
        patch_size: int = 4,
        drop_path_rate: float = 0.2,
        scan_backend: str = "auto",
    ) -> None:
        super().__init__()
        require_levels(depths=depths, decoder_depths=decoder_depths)
        self.repeats_channel = in_channels == 1
        make_block = vss_blocks(d_state, scan_backend)
        self._embed(in_channels, make_block, embed_dim, depths, patch_size, drop_path_rate)
        rates = falling_schedule(drop_path_rate, (*decoder_depths,))[::-1]  # by stage
        self.decoder = nn.ModuleList()
        for stage, dim in reversed([*enumerate(self.dims)]):
            blocks = make_blocks(make_block, dim, stage, rates[stage])
            expand: nn.Module = nn.Identity()
            if stage < len(self.dims) - 1:  # blocks add to its output
                expand = PatchExpand(2 * dim, dim, factor=2, keeps_float32=True)
            self.decoder.append(nn.Sequential(OrderedDict(expand=expand, blocks=blocks)))
        self.final_expand = PatchExpand(embed_dim, embed_dim // patch_size, factor=patch_size)
        self.head = PixelHead(embed_dim // patch_size, num_classes, kernel_size=1)
        self.apply(init_linear)

    def forward(self, image: Tensor) -> Tensor:
        """Map `(B, C, H, W)`, H and W multiples of `size_multiple`, to logits `(B, K, H, W)`."""
        require_multiple(image, self.size_multiple, type(self).__name__)
        skips, x = self._stage_inputs(image)
        x = self.decoder[0](x)
        for stage, skip in zip(self.decoder[1:], reversed(skips[1:]), strict=True):
            x = stage(x + skip)
        return pixel_logits(self.head, self.final_expand, x)

    def original_names(self) -> dict[str, str]:
        """Map the original network's key prefixes to ours."""
        names = self.backbone_names()
        for stage in range(len(self.decoder)):
            names[f"layers_up.{stage}.blocks."] = f"decoder.{stage}.blocks."
            names[f"layers_up.{stage}.upsample."] = f"decoder.{stage}.expand."
        return names | {"final_up.": "final_expand.", "final_conv.": "head."}
