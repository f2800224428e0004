"""The visual state space block of VMamba and Mamba-UNet, on channels-last `(B, H, W, C)` maps.

Source: VMamba (Liu et al. 2024, arXiv 2401.10166v1, section 3), in the version Mamba-UNet uses: no
MLP, N = 16 states. The original projects four direction-ordered copies of the map; here the
projections, being pointwise, run once on the map as it lies: the numbers are the same.

Glossary (paper letter = code):
    C   = dim               channels of the map
    D   = 2 C               inner channels
    N   = d_state           states per channel
    R   = rank              of the projection to the step size, ceil(C / 16)
    K   = 4                 directions: rows, columns, and both reversed
    Δ   = delta             step size, softplus(delta + bias) inside the scan
    A   = −exp(A_logs)      decay, negative
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mambaseg.models.linear import Linear, linear
from mambaseg.models.norm import LayerNorm
from mambaseg.models.selective import LinearPair, ScanBlock, initial_step_bias, wide
from mambaseg.models.stochastic import DropPath
from mambaseg.scan import selective_scan_2d

DIRECTIONS = 4


class GatedMixer(nn.Module, ABC):
    """What SS2D is around its scan: widen, convolve, mix over the map, normalise, gate, narrow.

    A subclass gives `mix`, which mixes the positions of D = 2 `dim` channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = 2 * dim
        self.in_proj = LinearPair(dim, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, kernel_size=3, padding=1, groups=inner)
        self.out_norm = LayerNorm(inner)
        self.out_proj = Linear(inner, dim, bias=False)

    @abstractmethod
    def mix(self, x: Tensor) -> Tensor:
        """Map `(B, H, W, D)` to `(B, H, W, D)`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, H, W, C)` to `(B, H, W, C)`."""
        x, gate = self.in_proj(x)
        x = self.conv2d(rearrange(x, "b h w d -> b d h w"))
        x = F.silu(rearrange(x, "b d h w -> b h w d"))
        return self.out_proj(self.out_norm(self.mix(x), gate))


class CrossScan(ScanBlock):
    """The selective scan of a map in four directions, without what is around it."""

    exact: ClassVar[tuple[str, ...]] = ("A_logs", "Ds", "dt_projs_bias")
    no_weight_decay: ClassVar[tuple[str, ...]] = ("A_logs", "Ds")
    dense: bool | None = None
    """As in `per_direction`; None: on a GPU only."""

    def _make_scan(self, inner: int, rank: int, d_state: int, scan_backend: str) -> None:
        """Make the parameters of a scan of D = `inner` channels."""
        self.inner, self.rank, self.d_state = inner, rank, d_state
        self.scan_backend = scan_backend
        # One projection per direction: (K, R + 2N, D) and (K, D, R), (K, D).
        self.x_proj_weight = nn.Parameter(torch.empty(DIRECTIONS, self.rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(DIRECTIONS, inner, self.rank))
        self.dt_projs_bias = nn.Parameter(initial_step_bias((DIRECTIONS, inner)))
        # Directions folded into channels, (K D, N) and (K D,), as in the published checkpoints.
        states = torch.arange(1, d_state + 1, dtype=torch.float32)
        self.A_logs = nn.Parameter(states.log().repeat(DIRECTIONS * inner, 1))
        self.Ds = nn.Parameter(torch.ones(DIRECTIONS * inner))
        nn.init.uniform_(self.x_proj_weight, -(inner**-0.5), inner**-0.5)  # as nn.Linear's default
        nn.init.uniform_(self.dt_projs_weight, -(self.rank**-0.5), self.rank**-0.5)

    def scan_size(self, x: Tensor) -> tuple[int, int]:
        """Give the steps L = H W and the channels K D of the scans of one sample."""
        return x.shape[1] * x.shape[2], DIRECTIONS * self.inner

    def mix(self, x: Tensor) -> Tensor:
        """Sum the scans of `(B, H, W, D)` in all directions, `(B, H, W, D)`."""
        projected = linear(x, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (DIRECTIONS, -1))
        delta, B, C = projected.split([self.rank, self.d_state, self.d_state], dim=-1)
        dense = x.is_cuda if self.dense is None else self.dense
        delta = per_direction(delta, self.dt_projs_weight, dense=dense)
        A = -torch.exp(wide(self.A_logs)).unflatten(0, (DIRECTIONS, -1))
        D = wide(self.Ds).unflatten(0, (DIRECTIONS, -1))
        bias = wide(self.dt_projs_bias)
        return selective_scan_2d(x, delta, A, B, C, D, bias, backend=self.scan_backend)


class SS2D(CrossScan, GatedMixer):
    """Gated selective scan of a map in four directions (VMamba's 2D-Selective-Scan).

    Args:
        dim: C, channels of the map.
        d_state: N, states per channel.
        scan_backend: name for `mambaseg.scan`, or `auto`.
    """

    def __init__(self, dim: int, *, d_state: int = 16, scan_backend: str = "auto") -> None:
        super().__init__(dim)
        self._make_scan(2 * dim, math.ceil(dim / 16), d_state, scan_backend)


def per_direction(x: Tensor, weight: Tensor, *, dense: bool) -> Tensor:
    """Multiply each direction of (B, H, W, K, R) by its own matrix of (K, D, R): (B, H, W, K, D).

    `dense`: as one product with a block-diagonal matrix, most of it zero. On a GPU multiplications
    cost nothing beside memory: the result is contiguous, and the gradient of the weight is one
    large product instead of K narrow ones (R is 6).
    """
    if not dense:
        return torch.einsum("bhwkr,kdr->bhwkd", x, weight)
    return linear(x.flatten(-2), torch.block_diag(*weight)).unflatten(-1, weight.shape[:2])


class MixerBlock(nn.Module):
    """A pre-normed residual branch around a mixer; no MLP.

    Args:
        dim: channels of the map.
        mixer: maps `(B, H, W, C)` to the same; kept as `.ss2d`, so that twins share their keys.
        drop_path: probability that a sample skips the branch in training.
    """

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.ss2d = mixer
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, H, W, C)` to `(B, H, W, C)`."""
        return x + self.drop_path(self.ss2d(self.norm(x)))


class VSSBlock(MixerBlock):
    """The visual state space block: `MixerBlock` around `SS2D`, where the arguments are told."""

    def __init__(
        self, dim: int, *, d_state: int = 16, drop_path: float = 0.0, scan_backend: str = "auto"
    ) -> None:
        super().__init__(dim, SS2D(dim, d_state=d_state, scan_backend=scan_backend), drop_path)


def vss_blocks(d_state: int, scan_backend: str) -> Callable[[int, int, int, float], VSSBlock]:
    """Return a maker of blocks for a U; see `ushape.BlockFactory`."""
    return lambda dim, stage, index, drop_path: VSSBlock(
        dim, d_state=d_state, drop_path=drop_path, scan_backend=scan_backend
    )
