"""The pyramid vision transformer, second version: attention of all positions on a coarser grid.

Source: Wang et al. 2022, PVT v2, arXiv 2106.13797, sections 3.1 to 3.3. Maps are channels last.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mambaseg.models.arguments import require_whole_heads
from mambaseg.models.linear import Linear
from mambaseg.models.norm import LayerNorm
from mambaseg.models.patch import on_image
from mambaseg.models.stochastic import DropPath, linear_schedule

EPS = 1e-6  # of the norms of blocks and stages; those of embeddings and reductions have 1e-5


def fine_norm(dim: int, *, keeps_float32: bool = False) -> LayerNorm:
    """Make a layer norm with this transformer's epsilon."""
    norm = LayerNorm(dim, keeps_float32=keeps_float32)
    norm.eps = EPS
    return norm


class ReducedAttention(nn.Module):
    """Self-attention whose keys and values come from a map that is `reduction` times coarser."""

    def __init__(self, dim: int, heads: int, reduction: int) -> None:
        super().__init__()
        require_whole_heads(dim, heads)
        self.heads = heads
        self.q = Linear(dim, dim)
        self.kv = Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)
        self.sr: nn.Module = nn.Identity()
        self.norm: nn.Module = nn.Identity()
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, kernel_size=reduction, stride=reduction)
            self.norm = LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, H, W, C)` to the same."""
        query = rearrange(self.q(x), "b h w (n d) -> b n (h w) d", n=self.heads)
        coarse = self.kv(self.norm(on_image(self.sr, x)))
        key, value = rearrange(coarse, "b h w (two n d) -> two b n (h w) d", two=2, n=self.heads)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(rearrange(attended, "b n (h w) d -> b h w (n d)", h=x.shape[1]))


class ConvMlp(nn.Module):
    """An MLP with a depthwise 3×3 convolution in front of its GELU, which tells positions apart."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, H, W, C)` to the same."""
        return self.fc2(F.gelu(on_image(self.dwconv, self.fc1(x))))


class PVTBlock(nn.Module):
    """Attention and an MLP, each a pre-normed residual branch, on maps `(B, H, W, C)`."""

    def __init__(self, dim: int, heads: int, reduction: int, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = fine_norm(dim)
        self.attn = ReducedAttention(dim, heads, reduction)
        self.norm2 = fine_norm(dim)
        self.mlp = ConvMlp(dim, hidden)
        self.drop_attention, self.drop_mlp = DropPath(drop_path), DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, H, W, C)` to the same."""
        x = x + self.drop_attention(self.attn(self.norm1(x)))
        return x + self.drop_mlp(self.mlp(self.norm2(x)))


class PVTStage(nn.Module):
    """Overlapping patches of the map before, blocks, a norm."""

    def __init__(
        self, in_dim: int, dim: int, side: int, heads: int, reduction: int, ratio: int,
        rates: Sequence[float],
    ) -> None:  # fmt: skip
        super().__init__()
        stride = (side + 1) // 2  # patches overlap by half
        self.proj = nn.Conv2d(in_dim, dim, kernel_size=side, stride=stride, padding=side // 2)
        self.embed_norm = LayerNorm(dim, keeps_float32=True)  # blocks add to it
        blocks = (PVTBlock(dim, heads, reduction, ratio * dim, rate) for rate in rates)
        self.blocks = nn.Sequential(*blocks)
        self.norm = fine_norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, in_dim, H, W)` to `(B, dim, H / stride, W / stride)`."""
        x = self.embed_norm(rearrange(self.proj(x), "b c h w -> b h w c"))
        return rearrange(self.norm(self.blocks(x)), "b h w c -> b c h w")


class PVTv2(nn.ModuleList):
    """Four stages at strides 4, 8, 16 and 32; by default B2, 24,849,856 parameters.

    Args:
        widths: channels per stage.
        depths: blocks per stage.
        heads: attention heads per stage.
        drop_path_rate: of the last block; rises linearly from 0.
    """

    reductions, ratios = (8, 4, 2, 1), (8, 8, 4, 4)

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 4, 6, 3),
        heads: Sequence[int] = (1, 2, 5, 8),
        drop_path_rate: float = 0.1,
    ) -> None:
        rates = linear_schedule(drop_path_rate, (*depths,))
        stages = zip(
            (3, *widths[:-1]), widths, (7, 3, 3, 3), heads, self.reductions, self.ratios, rates,
            strict=True,
        )  # fmt: skip
        super().__init__(PVTStage(*stage) for stage in stages)
        self.apply(_init)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Map `(B, 3, H, W)` to the maps of all stages, `(B, C, H, W)`, fine to coarse."""
        maps, x = [], image
        for stage in self:
            x = stage(x)
            maps.append(x)
        return maps

    def published_names(self) -> dict[str, str]:
        """Map the published key prefixes to ours."""
        names = {}
        for stage in range(len(self)):
            names[f"patch_embed{stage + 1}.proj."] = f"{stage}.proj."
            names[f"patch_embed{stage + 1}.norm."] = f"{stage}.embed_norm."
            names[f"block{stage + 1}."] = f"{stage}.blocks."
            names[f"norm{stage + 1}."] = f"{stage}.norm."
        return names


def _init(module: nn.Module) -> None:
    """Set linear layers to a truncated normal, convolutions to He's by their fan out."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.out_channels * module.weight[0, 0].numel() // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
    if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
        nn.init.zeros_(module.bias)
