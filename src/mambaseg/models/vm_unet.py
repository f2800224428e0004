"""VM-UNet: visual state space blocks on both sides of a U whose skips are added.

Source: Ruan, Xiang, Xie 2024, arXiv 2402.02491, in the version of its released code.

What differs from Mamba-UNet, which has the same encoder:

* a skip is added to what enters a decoder stage, before that stage raises the resolution. So the
  skips lie at strides 32, 16 and 8, and the bare patch embedding (stride 4) is none of them;
* the decoder has blocks at stride 32 too, and depths and drop path rates of its own;
* the bottom has no norm, the last expansion narrows to `embed_dim / 4` channels, the head a bias.

Differs from the original in returning logits for a single class too (there: probabilities).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from mambaseg.models.any_size import require_multiple
from mambaseg.models.patch import PatchEmbed, PatchExpand, PixelHead, place_pixels
from mambaseg.models.pretrained import LoadReport, load_encoder, load_renamed
from mambaseg.models.stochastic import falling_schedule, linear_schedule
from mambaseg.models.ushape import encoder_names, init_linear, make_blocks, make_encoder
from mambaseg.models.vss import ORIGINAL_NAMES, vss_blocks


class DecoderStage(nn.Module):
    """Up from the coarser resolution (except at the bottom), then blocks.

    Maps `(B, H/2, W/2, 2C)` to `(B, H, W, C)`; at the bottom `(B, H, W, C)` to itself.
    """

    def __init__(self, dim: int, blocks: Sequence[nn.Module], *, upsample: bool) -> None:
        super().__init__()
        self.expand: nn.Module = nn.Identity()
        if upsample:  # blocks add to its output
            self.expand = PatchExpand(2 * dim, dim, factor=2, keeps_float32=True)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Expand and run the blocks, see above."""
        out: Tensor = self.blocks(self.expand(x))
        return out


class VMUNet(nn.Module):
    """VM-UNet, 27,427,636 parameters for one channel and four classes.

    With `depths=(2, 2, 9, 2)` and `decoder_depths=(2, 9, 2, 2)`, the defaults of the original's
    class, it has 44,273,908. Both of its released configurations use the depths given here.

    Args:
        in_channels: channels of the image; one is repeated to three.
        num_classes: K, background included.
        embed_dim: channels of the finest stage, a multiple of `patch_size`.
        depths: blocks per encoder stage, fine to coarse.
        decoder_depths: blocks per decoder stage, coarse to fine.
        d_state: states per channel of the scan.
        patch_size: side of a patch in pixels.
        drop_path_rate: of the last encoder block and of the first decoder block; rises linearly
            from 0 along the encoder and falls back to 0 along the decoder.
        scan_backend: which implementation of `mambaseg.scan` to use; `auto` takes the fastest.

    Raises:
        ValueError: encoder and decoder have different numbers of stages.
    """

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
        if len(depths) != len(decoder_depths):
            raise ValueError(
                f"depths and decoder_depths must name equally many stages, "
                f"got {list(depths)} and {list(decoder_depths)}"
            )
        self.repeats_channel = in_channels == 1
        self.patch_size = patch_size
        self.size_multiple = patch_size * 2 ** (len(depths) - 1)
        dims = [embed_dim * 2**stage for stage in range(len(depths))]
        bottom = len(depths) - 1
        make_block = vss_blocks(d_state, scan_backend)
        self.patch_embed = PatchEmbed(
            3 if self.repeats_channel else in_channels, embed_dim, patch_size
        )
        self.encoder = make_encoder(make_block, dims, linear_schedule(drop_path_rate, (*depths,)))
        rates = falling_schedule(drop_path_rate, (*decoder_depths,))
        self.decoder = nn.ModuleList(
            DecoderStage(
                dims[stage],
                make_blocks(make_block, dims[stage], stage, rates[bottom - stage]),
                upsample=stage < bottom,
            )
            for stage in reversed(range(len(dims)))
        )
        self.final_expand = PatchExpand(embed_dim, embed_dim // patch_size, factor=patch_size)
        self.head = PixelHead(embed_dim // patch_size, num_classes, kernel_size=1)
        self.apply(init_linear)

    def forward(self, image: Tensor) -> Tensor:
        """Map `(B, C, H, W)`, H and W multiples of `size_multiple`, to logits `(B, K, H, W)`."""
        require_multiple(image, self.size_multiple, type(self).__name__)
        if self.repeats_channel:
            image = image.repeat(1, 3, 1, 1)
        x = self.patch_embed(image)
        skips = []
        for stage in self.encoder:
            skips.append(x)
            x = stage(x)
        x = self.decoder[0](x)
        for stage, skip in zip(self.decoder[1:], reversed(skips[1:]), strict=True):
            x = stage(x + skip)
        return place_pixels(self.head(self.final_expand.pixels(x)), self.patch_size)

    def load_original_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load weights of the original repository's `VMUNet`, strictly.

        Raises:
            UserError: a key is missing or left over, or a shape differs.
        """
        names = encoder_names(len(self.encoder))
        for stage in range(len(self.decoder)):
            names[f"layers_up.{stage}.blocks."] = f"decoder.{stage}.blocks."
            names[f"layers_up.{stage}.upsample."] = f"decoder.{stage}.expand."
        names |= {"final_up.": "final_expand.", "final_conv.": "head."}
        load_renamed(self, state_dict, names, ORIGINAL_NAMES, wrapper="vmunet.")

    def load_pretrained_encoder(self, path: str | Path, *, mirror: bool = True) -> LoadReport:
        """Fill the encoder from VMamba (version 0; the original takes VMamba-S, epoch 238).

        Args:
            path: `.pth` or `.safetensors` with the backbone's keys, at the top or under `model`.
                Blocks beyond a stage's depth are left out.
            mirror: also give each encoder block's weights to the decoder block of the same width
                and index, as the original does, at stride 32 too.

        Raises:
            UserError: not a weights file, or less than half of the encoder's parameters matched.
        """
        last = len(self.encoder) - 1
        mirrored = {f"encoder.{i}.blocks.": f"decoder.{last - i}.blocks." for i in range(last + 1)}
        return load_encoder(
            self,
            Path(path),
            encoder_names(last + 1),
            ORIGINAL_NAMES,
            mirrored=mirrored if mirror else {},
        )
