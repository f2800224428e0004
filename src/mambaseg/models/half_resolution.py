"""nnU-Net's 2-D network at half the resolution of its images, for machines without a GPU.

Blocks of 2 × 2 pixels are channels of its input, and the logits of their four pixels are channels
of its output: all convolutions work on a quarter of the pixels.

Source: the network, Isensee et al. 2021, Nature Methods 18; the output, the sub-pixel convolution
of Shi et al. 2016 (arXiv 1609.05158), section 2.2; the input, its inverse.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from mambaseg.models.any_size import require_multiple
from mambaseg.models.nnunet_2d import NNUNet2D

BLOCK = 2  # rows and columns


class HalfResolutionUNet(NNUNet2D):
    """nnU-Net's network on blocks of 2 × 2 pixels, image (B, C, H, W) -> logits (B, K, H, W).

    Height and width must be multiples of `size_multiple`, twice the product of the strides. With
    deep supervision it gives, in training, the logits of all heads, the finest ones first.

    Args:
        in_channels: C.
        out_channels: K.
        strides: of each stage.
        more: the other arguments of MONAI's `DynUNet`.

    Raises:
        UserError: an image's height or width is no such multiple.
    """

    def __init__(
        self, in_channels: int, out_channels: int, strides: Sequence[int], **more: Any
    ) -> None:
        pixels = BLOCK**2
        super().__init__(
            in_channels=pixels * in_channels,
            out_channels=pixels * out_channels,
            strides=strides,
            **more,
        )
        self.size_multiple = BLOCK * math.prod(strides)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Logits of an image, or of all heads."""
        require_multiple(image, self.size_multiple, type(self).__name__)
        blocks = super().forward(pixel_unshuffle(image, BLOCK))
        if isinstance(blocks, list):
            return [pixel_shuffle(head, BLOCK) for head in blocks]
        return pixel_shuffle(blocks, BLOCK)
