"""nnU-Net's plain 2-D U-Net: MONAI's `DynUNet`, with heads of their own sizes.

Source: Isensee et al. 2021, Nature Methods 18.
"""

from monai.networks.nets import DynUNet
from torch import Tensor


class NNUNet2D(DynUNet):
    """MONAI's `DynUNet`, image (B, C, H, W) -> logits (B, K, H, W), which does not enlarge heads.

    With deep supervision it gives, in training, the logits of all heads, finest first, each as
    large as the map that it reads. (`DynUNet` enlarges and stacks them: the loss of a coarse head
    would cost as much as that of the finest.)
    """

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Logits of an image, or of all heads."""
        finest: Tensor = self.output_block(self.skip_layers(image))
        if not (self.training and self.deep_supervision):
            return finest
        coarse = list(self.heads)
        self.heads[:] = [finest.new_empty(0)] * len(coarse)  # else they live until the next pass
        return [finest, *coarse]
