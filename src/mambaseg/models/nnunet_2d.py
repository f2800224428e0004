"""nnU-Net's plain 2-D U-Net: MONAI's `DynUNet`, with heads of their own sizes.

Source: Isensee et al. 2021, Nature Methods 18.
"""

import math

from monai.networks.nets import DynUNet
from torch import Tensor

from mambaseg.models.any_size import require_multiple


class NNUNet2D(DynUNet):
    """MONAI's `DynUNet`, image (B, C, H, W) -> logits (B, K, H, W), which does not enlarge heads.

    With deep supervision it gives, in training, the logits of all heads, finest first, each as
    large as the map that it reads. (`DynUNet` enlarges and stacks them: the loss of a coarse head
    would cost as much as that of the finest.)
    """

    block = 1
    """Rows and columns of the image that are one pixel of the network."""

    @property
    def size_multiple(self) -> list[int]:
        """What height and width must be multiples of: `block` times the product of the strides."""
        pairs = [(one, one) if isinstance(one, int) else tuple(one) for one in self.strides]
        # lists within, which torch.compile takes
        return [self.block * math.prod([pair[axis] for pair in pairs]) for axis in (0, 1)]

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Logits of an image, or of all heads.

        Raises:
            UserError: height or width is no multiple of `size_multiple`.
        """
        require_multiple(image, self.size_multiple, type(self).__name__)
        return self._logits(image)

    def _logits(self, image: Tensor) -> Tensor | list[Tensor]:
        finest: Tensor = self.output_block(self.skip_layers(image))
        if not self.deep_supervision:
            return finest
        coarse = list(self.heads)
        self.heads[:] = [finest.new_empty(0)] * len(coarse)  # else they live until the next pass
        return [finest, *coarse] if self.training else finest
