"""Between resolutions: patch embedding, merging and expanding on channels-last `(B, H, W, C)` maps.

Source: Swin Transformer (Liu et al. 2021, section 3.1) for embedding and merging; Swin-Unet
(Cao et al. 2021, section 3) for expanding. Mamba-UNet uses the same three.
"""

from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mambaseg.models.linear import Linear
from mambaseg.models.norm import LayerNorm


def on_image(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a layer for images to a map `(B, H, W, C)`."""
    return rearrange(layer(rearrange(x, "b h w c -> b c h w")), "b c h w -> b h w c")


class PatchEmbed(nn.Module):
    """Cut the image into patches of `patch_size`² pixels, one token of `dim` channels each."""

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = LayerNorm(dim, keeps_float32=True)  # blocks add to it

    def forward(self, image: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, H / patch, W / patch, dim)`."""
        return self.norm(rearrange(self.proj(image), "b c h w -> b h w c"))


class PatchMerging(nn.Module):
    """Halve the resolution and double the channels: `(B, H, W, C)` to `(B, H/2, W/2, 2C)`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm(4 * dim)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, H, W, C)` with even H and W to `(B, H/2, W/2, 2C)`."""
        # Column parity is the slower index, as in the published weights.
        x = rearrange(x, "b (h p) (w q) c -> b h w (q p c)", p=2, q=2)
        return self.reduction(self.norm(x))


class PatchExpand(nn.Module):
    """Raise height and width by a factor, paid for with channels made by a linear layer."""

    def __init__(self, dim: int, out_dim: int, factor: int, *, keeps_float32: bool = False) -> None:
        super().__init__()
        self.factor = factor
        self.expand: nn.Module = Linear(dim, factor**2 * out_dim, bias=False)
        self.norm = LayerNorm(out_dim, keeps_float32=keeps_float32)

    def pixels(self, x: Tensor) -> Tensor:
        """Map `(B, H, W, dim)` to `(B, H, W, factor², out_dim)`: a token's, in reading order."""
        return self.norm(self.expand(x).unflatten(-1, (self.factor**2, -1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, H, W, dim)` to `(B, factor H, factor W, out_dim)`."""
        p = self.factor
        return rearrange(self.pixels(x), "b h w (p q) c -> b (h p) (w q) c", p=p, q=p)


class PixelHead(nn.Conv2d):
    """A 1x1 convolution of pixels that lie anyhow: a matrix product, with a convolution's weights.

    (PyTorch's own takes several times as long for a few output channels on a CPU.)
    """

    def forward(self, pixels: Tensor) -> Tensor:
        """Map `(..., in)` to `(..., out)`."""
        return F.linear(pixels, self.weight.flatten(1), self.bias)


def pixel_logits(head: PixelHead, expand: PatchExpand, x: Tensor) -> Tensor:
    """Expand tokens `(B, H, W, C)` and classify each pixel: `(B, K, factor H, factor W)`.

    The head works on single pixels: so K channels are put in their places rather than C.
    """
    p = expand.factor
    return rearrange(head(expand.pixels(x)), "b h w (p q) c -> b c (h p) (w q)", p=p, q=p)
