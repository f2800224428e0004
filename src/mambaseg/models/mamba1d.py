"""The Mamba block on sequences of tokens `(B, L, C)`.

Source: Mamba (Gu & Dao 2023, arXiv 2312.00752, section 3.4 and figure 3). The numbers and the
parameters' names are those of `Mamba` in the package mamba-ssm, so its weights load as they are.

Differences: there is no step-by-step decoding, and no bias in the projections in and out (mamba-ssm
offers one; its default, and every network here, is without).

Glossary (paper letter = code):
    C   = dim               channels of a token
    D   = 2 C               inner channels
    N   = d_state           states per channel
    R   = rank              of the projection to the step size, ceil(C / 16)
    Δ   = delta             step size, softplus(delta + dt_proj.bias) inside the scan
    A   = −exp(A_log)       decay, negative
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseg.models.linear import Linear, linear
from mambaseg.models.selective import LinearPair, ScanBlock, initial_step_bias, wide
from mambaseg.scan import causal_conv1d, selective_scan

CONV_WIDTH = 4  # of the causal convolution in front of the scan


class Mamba1d(ScanBlock):
    """Gated selective scan of a sequence, from its first token to its last.

    Args:
        dim: C, channels of a token.
        d_state: N, states per channel.
        scan_backend: name for `mambaseg.scan`, or `auto`.
    """

    exact: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_proj.bias")
    no_weight_decay: ClassVar[tuple[str, ...]] = ("A_log", "D")

    def __init__(self, dim: int, *, d_state: int = 16, scan_backend: str = "auto") -> None:
        super().__init__()
        self.d_state = d_state
        self.scan_backend = scan_backend
        self.inner = 2 * dim
        self.rank = math.ceil(dim / 16)
        self.in_proj = LinearPair(dim, 2 * self.inner, bias=False)
        self.conv1d = nn.Conv1d(self.inner, self.inner, CONV_WIDTH, groups=self.inner)
        self.x_proj = Linear(self.inner, self.rank + 2 * d_state, bias=False)
        self.dt_proj = Linear(self.rank, self.inner)
        states = torch.arange(1, d_state + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(states.log().repeat(self.inner, 1))
        self.D = nn.Parameter(torch.ones(self.inner))
        self.out_proj = Linear(self.inner, dim, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        self.dt_proj.bias = nn.Parameter(initial_step_bias((self.inner,)))

    def scan_size(self, x: Tensor) -> tuple[int, int]:
        """Give the steps L and the channels D of the scan of one sample."""
        return x.shape[1], self.inner

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, L, C)` to `(B, L, C)`."""
        x, gate = self.in_proj(x)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        x = causal_conv1d(x.transpose(1, 2), weight, bias, activation="silu")
        y = self._scan(x).transpose(1, 2)
        return self.out_proj(y * F.silu(gate))

    def _scan(self, x: Tensor) -> Tensor:
        """Scan `(B, D, L)` to `(B, D, L)`."""
        projected = self.x_proj(x.transpose(1, 2))
        delta, B, C = projected.split([self.rank, self.d_state, self.d_state], dim=-1)
        delta = linear(delta, self.dt_proj.weight)  # its bias is added inside the scan
        sequences = (x, *(t.transpose(1, 2) for t in (delta, B, C)))
        u, delta, B, C = (t.unsqueeze(1) for t in sequences)  # one group
        rates = (-torch.exp(wide(self.A_log)), wide(self.D), wide(self.dt_proj.bias))
        A, D, bias = (t.unsqueeze(0) for t in rates)
        y = selective_scan(u, delta, A, B, C, D, bias, backend=self.scan_backend)
        return y.squeeze(1)
