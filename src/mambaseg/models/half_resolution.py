"""nnU-Net's 2-D network at half the resolution of its images, for machines without a GPU.

Blocks of 2 × 2 pixels are channels of its input, and the logits of their four pixels are channels
of its output: all convolutions work on a quarter of the pixels.

Source: the network, Isensee et al. 2021, Nature Methods 18; the output, the sub-pixel convolution
of Shi et al. 2016 (arXiv 1609.05158), section 2.2; the input, its inverse.
"""

from typing import Any

from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from mambaseg.models.nnunet_2d import NNUNet2D

BLOCK = 2  # rows and columns


class HalfResolutionUNet(NNUNet2D):
    """nnU-Net's network on blocks of 2 × 2 pixels, image (B, C, H, W) -> logits (B, K, H, W).

    With deep supervision it gives, in training, the logits of all heads, the finest ones first.

    Args:
        in_channels: C.
        out_channels: K.
        more: the other arguments of MONAI's `DynUNet`.
    """

    block = BLOCK

    def __init__(self, in_channels: int, out_channels: int, **more: Any) -> None:
        pixels = BLOCK**2
        super().__init__(
            in_channels=pixels * in_channels, out_channels=pixels * out_channels, **more
        )

    def _logits(self, image: Tensor) -> Tensor | list[Tensor]:
        blocks = super()._logits(pixel_unshuffle(image, BLOCK))
        if isinstance(blocks, list):
            return [pixel_shuffle(head, BLOCK) for head in blocks]
        return pixel_shuffle(blocks, BLOCK)
