"""Shifted-window attention, the block of Swin-UNet, on channels-last `(B, H, W, C)` maps.

Source: Swin Transformer (Liu et al. 2021, section 3.2). Two deliberate differences, both without
effect where the original runs at all (maps that are whole windows, 224² images):

* A map that is not whole windows is padded inside the attention, and padded tokens are masked out:
  no valid token sees one. The original fixes the image size instead.
* The shift is dropped per axis when one window covers the axis; the original shrinks the window.

Glossary: T = tokens of a window (window²), n = windows of a map.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mambaseg.models.arguments import require_whole_heads
from mambaseg.models.linear import Linear, Mlp
from mambaseg.models.norm import LayerNorm
from mambaseg.models.stochastic import DropPath


def relative_position_index(window: int) -> Tensor:
    """Number the offsets between the tokens of a window.

    Returns:
        `(T, T)` int64 in [0, (2 window − 1)²), by row offset, then column offset (query − key).
    """
    token = torch.arange(window**2)
    row, column = token // window, token % window
    row_offset = row[:, None] - row[None, :] + window - 1
    column_offset = column[:, None] - column[None, :] + window - 1
    return row_offset * (2 * window - 1) + column_offset


def _axis_regions(size: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Label positions along one axis after the roll: 0 in place, 1 wrapped around, 2 padding."""
    padded = size + -size % window
    position = torch.arange(padded, device=device)
    wrapped = (position >= padded - shift).long()
    source = (position + shift) % padded
    return torch.where(source < size, wrapped, 2)


def attention_mask(
    height: int, width: int, window: int, shift: tuple[int, int], device: torch.device
) -> Tensor:
    """Say which tokens of a window may attend to which: those of one region of the unrolled map.

    Rolling a map brings its first rows next to its last ones, which are no neighbours. Every token
    may attend to itself, so no row is empty.

    Args:
        height: of the map before padding, in tokens, like `width`.
        width: likewise.
        window: side of a window.
        shift: by how much rows and columns were rolled, each in [0, window).
        device: where the mask is made.

    Returns:
        Boolean `(n, 1, T, T)`, True = may attend.
    """
    rows = _axis_regions(height, window, shift[0], device)
    columns = _axis_regions(width, window, shift[1], device)
    region = 3 * rows[:, None] + columns[None, :]
    region = rearrange(region, "(nh p) (nw q) -> (nh nw) (p q)", p=window, q=window)
    return (region[:, :, None] == region[:, None, :]).unsqueeze(1)


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a learned relative position bias.

    Args:
        dim: channels, a multiple of `heads`.
        heads: attention heads.
        window: side of a window in tokens.
        shifted: move the windows by half their side (every second block).
    """

    no_weight_decay = ("relative_position_bias_table",)

    def __init__(self, dim: int, heads: int, window: int, *, shifted: bool) -> None:
        super().__init__()
        require_whole_heads(dim, heads)
        self.heads = heads
        self.window = window
        self.shift = window // 2 if shifted else 0
        self.scale = (dim // heads) ** -0.5
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.position_index: Tensor
        self.register_buffer("position_index", relative_position_index(window), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, H, W, C)` to `(B, H, W, C)`, any H and W."""
        height, width = x.shape[1:3]
        bottom, right = -height % self.window, -width % self.window
        if bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        rows, columns = x.shape[1] // self.window, x.shape[2] // self.window
        shift = (self.shift if rows > 1 else 0, self.shift if columns > 1 else 0)
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), dims=(1, 2))

        sides = {"p": self.window, "q": self.window}
        windows = rearrange(x, "b (nh p) (nw q) c -> b (nh nw) (p q) c", **sides)
        mask = None
        if bottom or right or any(shift):
            mask = attention_mask(height, width, self.window, shift, x.device)
        windows = self._attend(windows, mask)
        x = rearrange(windows, "b (nh nw) (p q) c -> b (nh p) (nw q) c", nh=rows, **sides)
        if any(shift):
            x = x.roll(shift, dims=(1, 2))
        return x[:, :height, :width]

    def _attend(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """Attend within each window: `(B, n, T, C)` to `(B, n, T, C)`."""
        pattern = "b n t (three heads d) -> three b n heads t d"
        query, key, value = rearrange(self.qkv(windows), pattern, three=3, heads=self.heads)
        bias = self.relative_position_bias_table[self.position_index].permute(2, 0, 1)
        scores = (query * self.scale) @ key.mT + bias  # (B, n, heads, T, T)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        attended = scores.softmax(dim=-1) @ value
        return self.proj(rearrange(attended, "b n heads t d -> b n t (heads d)"))


class SwinBlock(nn.Module):
    """Window attention and an MLP, each a pre-normed residual branch.

    Args:
        dim: channels.
        heads: attention heads.
        window: side of a window in tokens.
        shifted: use the shifted windows.
        drop_path: probability that a sample skips a branch in training.
    """

    def __init__(
        self, dim: int, heads: int, window: int, *, shifted: bool, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window, shifted=shifted)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim)
        # two layers: told its numbers, one would drop both branches of the same samples
        self.drop_path, self.drop_mlp = DropPath(drop_path), DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, H, W, C)` to `(B, H, W, C)`."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_mlp(self.mlp(self.norm2(x)))
