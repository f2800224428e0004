"""Swin-UMamba†: the pretrained VMamba encoder with a light decoder of the same blocks.

Source: Liu et al. 2024, arXiv 2402.03302, in the version of its released code (`SwinUMambaD`).

The decoder is that of Mamba-UNet: expand, join the skip, blocks. What differs from Mamba-UNet:

* the encoder has VMamba-T's own depths, the decoder two blocks per stage whatever these are;
* a skip carries what *leaves* a stage, before merging, so the finest one has been through blocks;
* no norms at the bottom and before the last expansion; the head has a bias;
* one channel is not repeated to three, and then no weights of a patch embedding are loaded;
* convolutions start as He et al. 2015 (slope 0.01), the decoder's linear layers as PyTorch's.

Its recipe freezes the encoder for ten epochs; that is the training's concern, not the network's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from einops import rearrange
from torch import Tensor, nn

from mambaseg.models.any_size import require_multiple
from mambaseg.models.patch import PatchEmbed, PatchExpand, PixelHead, place_pixels
from mambaseg.models.pretrained import LoadReport, load_encoder, load_renamed
from mambaseg.models.stochastic import falling_schedule, linear_schedule
from mambaseg.models.swin_umamba import original_encoder_names, stage_outputs
from mambaseg.models.ushape import (
    DecoderStage,
    encoder_names,
    init_linear,
    make_blocks,
    make_encoder,
)
from mambaseg.models.vss import ORIGINAL_NAMES, vss_blocks

DECODER_DEPTH = 2
BACKBONE_CHANNELS = 3  # of the images that VMamba has seen


class SwinUMambaD(nn.Module):
    """Swin-UMamba†, 27,487,300 parameters for one channel and four classes.

    With `deep_supervision` it has 27,490,000: the original's class holds the coarser heads always.

    Args:
        in_channels: channels of the image, taken as they are.
        num_classes: K, background included.
        embed_dim: channels of the finest stage.
        depths: blocks per encoder stage.
        d_state: states per channel of the scan.
        patch_size: side of a patch in pixels.
        drop_path_rate: of the last encoder block and of the first decoder block; rises linearly
            from 0 along the encoder and falls back to 0 along the decoder.
        deep_supervision: heads at every decoder stage too, whose logits training mode returns.
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
        deep_supervision: bool = False,
        scan_backend: str = "auto",
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.size_multiple = patch_size * 2 ** (len(depths) - 1)
        dims = [embed_dim * 2**stage for stage in range(len(depths))]
        bottom = len(depths) - 1
        make_block = vss_blocks(d_state, scan_backend)
        self.patch_embed = PatchEmbed(in_channels, embed_dim, patch_size)
        self.encoder = make_encoder(make_block, dims, linear_schedule(drop_path_rate, (*depths,)))
        self.encoder.apply(init_linear)
        rates = falling_schedule(drop_path_rate, (DECODER_DEPTH,) * bottom)[::-1]  # by stage
        self.decoder = nn.ModuleList(
            DecoderStage(dims[stage], make_blocks(make_block, dims[stage], stage, rates[stage]))
            for stage in reversed(range(bottom))
        )
        self.final_expand = PatchExpand(embed_dim, embed_dim, factor=patch_size)
        self.head = PixelHead(embed_dim, num_classes, kernel_size=1)
        self.coarse_heads = nn.ModuleList(
            PixelHead(dim, num_classes, kernel_size=1)
            for dim in (reversed(dims[:bottom]) if deep_supervision else ())
        )
        self.apply(_init_convolution)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Map `(B, C, H, W)`, H and W multiples of `size_multiple`, to logits `(B, K, H, W)`.

        Returns:
            The logits; in training mode with deep supervision a list of them, at full resolution
            and then that of each decoder stage, fine to coarse.
        """
        require_multiple(image, self.size_multiple, type(self).__name__)
        *skips, x = stage_outputs(self.encoder, self.patch_embed(image))
        decoded = []
        for stage, skip in zip(self.decoder, reversed(skips), strict=True):
            x = stage(x, skip)
            decoded.append(x)
        logits = place_pixels(self.head(self.final_expand.pixels(x)), self.patch_size)
        if self.training and self.coarse_heads:
            coarse = [head(y) for head, y in zip(self.coarse_heads, decoded, strict=True)]
            return [logits, *(rearrange(y, "b h w k -> b k h w") for y in reversed(coarse))]
        return logits

    def load_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load weights of the original repository's `SwinUMambaD`, strictly.

        The heads of coarser maps, which it always holds, are left out without deep supervision.

        Raises:
            UserError: a key is missing or left over, or a shape differs.
        """
        names, coarse = original_encoder_names(len(self.encoder)), {}
        stages = len(self.decoder)
        for stage in range(stages):
            names[f"decoder.expand_layers.{stage}."] = f"decoder.{stage}.expand."
            names[f"decoder.concat_back_dim.{stage}."] = f"decoder.{stage}.fuse."
            names[f"decoder.stages.{stage}.blocks."] = f"decoder.{stage}.blocks."
            coarse[f"decoder.seg_layers.{stage}."] = f"coarse_heads.{stage}."
        names[f"decoder.expand_layers.{stages}."] = "final_expand."
        names[f"decoder.seg_layers.{stages}."] = "head."
        if not self.coarse_heads:
            state_dict = {k: v for k, v in state_dict.items() if not k.startswith(tuple(coarse))}
        load_renamed(self, state_dict, names | coarse, ORIGINAL_NAMES)

    def load_pretrained_encoder(self, path: str | Path) -> LoadReport:
        """Fill the encoder from VMamba-T (version 0).

        Args:
            path: `.pth` or `.safetensors` with the backbone's keys, at the top or under `model`.
                Its patch embedding, made for three channels, is left out for any other number.

        Raises:
            UserError: not a weights file, or less than half of the encoder's parameters matched.
        """
        names = encoder_names(len(self.encoder))
        if self.patch_embed.proj.in_channels != BACKBONE_CHANNELS:
            del names["patch_embed."]  # its bias and norm belong to a kernel that does not fit
        return load_encoder(self, Path(path), names, ORIGINAL_NAMES, mirrored={})


def _init_convolution(module: nn.Module) -> None:
    """Set a convolution as He et al. 2015 for leaky ReLUs of slope 0.01, its bias to zero."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, a=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
