"""Layer normalisation of the last dimension, in one pass on a GPU under autocast to bfloat16.

There PyTorch's own reads and writes float32: what comes in bfloat16 is copied first, and the linear
layer behind copies the result back. The kernels of `norm_kernels` read both, and round once, to
what the linear layer reads. Everywhere else this is `nn.LayerNorm`, bit for bit.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaseg.scan.dispatch import obstacle

ENABLED = False
"""False: PyTorch's own everywhere. The kernels have been interpreted and compiled, but no GPU has
run them yet: they stay off until one has (`pytest tests/models/test_norm.py` there)."""
MOST = 4096  # channels of a row that a program holds in registers; longer rows are PyTorch's
TILE = 2048  # numbers of the rows that a program holds at once
# Programs of the backward at most, each with a share of the sums over rows: eight for each of the
# 132 processors of an H100. Each takes at least TILES_EACH tiles: shares cost memory.
PROGRAMS, TILES_EACH = 1056, 4


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` with an optional gate, `norm(x) * silu(gate)`.

    `keeps_float32`, under autocast too, is for outputs that are added to something; a linear layer
    or convolution behind rounds anyway.
    """

    def __init__(self, dim: int, *, keeps_float32: bool = False) -> None:
        super().__init__(dim)
        self.keeps_float32 = keeps_float32

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Map `(..., C)`, and a gate like it, to `(..., C)`."""
        if not self._fuses(x, gate):
            y = super().forward(x)
            return y if gate is None else y * F.silu(gate)
        dtype = torch.float32 if self.keeps_float32 else torch.bfloat16
        gate = None if gate is None else gate.contiguous()
        return _norm(x.contiguous(), self.weight, self.bias, gate, self.eps, dtype)

    def _fuses(self, x: Tensor, gate: Tensor | None) -> bool:
        """Say whether the kernels take it: on a GPU under autocast to bfloat16."""
        return (
            ENABLED
            and x.is_cuda
            and torch.is_autocast_enabled("cuda")
            and torch.get_autocast_dtype("cuda") == torch.bfloat16
            and all(t is None or t.dtype in (torch.float32, torch.bfloat16) for t in (x, gate))
            and (gate is None or gate.shape == x.shape)
            and self.weight.dtype == self.bias.dtype == torch.float32
            and 0 < x.shape[-1] == self.normalized_shape[0] <= MOST
            and _runs_here()
        )


@torch.compiler.assume_constant_result  # imports stay out of compiled graphs
@cache
def _runs_here() -> bool:
    """Say whether Triton is installed, and the GPU knows bfloat16 (older ones: PyTorch's own)."""
    knows = torch.cuda.is_bf16_supported(including_emulation=False)
    return knows and obstacle("triton", "cuda") is None


@torch.library.custom_op("mambaseg::norm", mutates_args=())
def _norm(
    x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """Normalise x (..., C) of float32 or bfloat16 to y of `dtype`.

    The gate is None or like x; weight and bias are (C,) float32; all are contiguous.
    """
    from mambaseg.models.norm_kernels import norm

    _check_contiguous(x, weight, bias, gate)
    y = x.new_empty(x.shape, dtype=dtype)
    rows, sizes = x.numel() // x.shape[-1], _sizes(x, gate)
    if rows:
        with torch.cuda.device_of(x):
            grid = (-(-rows // sizes["ROWS"]),)
            norm[grid](x, weight, bias, x if gate is None else gate, y, rows, eps, **sizes)
    return y


@_norm.register_fake
def _empty_output(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=others[-1])


@torch.library.custom_op("mambaseg::norm_backward", mutates_args=())
def _norm_backward(
    d_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and gate in their dtypes, and of weight and bias, (2, C) float32.

    Without a gate, its gradient is empty.
    """
    from mambaseg.models.norm_kernels import norm_backward

    d_y = d_y.contiguous()
    _check_contiguous(x, weight, bias, gate)
    rows, sizes = x.numel() // x.shape[-1], _sizes(x, gate)
    d_x, d_gate, _ = _empty_gradients(d_y, x, weight, bias, gate, eps)
    programs = min(PROGRAMS, -(-rows // (sizes["ROWS"] * TILES_EACH)))
    sums = weight.new_empty(2, programs, len(weight))
    if programs:
        with torch.cuda.device_of(x):
            inputs = d_y, x, weight, bias, x if gate is None else gate
            norm_backward[(programs,)](*inputs, d_x, d_gate, sums, rows, eps, **sizes)
    return d_x, d_gate, sums.sum(1)  # in a fixed order


@_norm_backward.register_fake
def _empty_gradients(
    d_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    d_gate = x.new_empty(0) if gate is None else torch.empty_like(gate)
    return torch.empty_like(x), d_gate, weight.new_empty(2, len(weight))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    d_x, d_gate, sums = _norm_backward(d_y, *ctx.saved_tensors, ctx.eps)
    gated = ctx.saved_tensors[-1] is not None
    return d_x, sums[0], sums[1], d_gate if gated else None, None, None


_norm.register_autograd(_backward, setup_context=_save_for_backward)


def _sizes(x: Tensor, gate: Tensor | None) -> dict[str, Any]:
    """Arguments that both kernels share."""
    block = 1 << (x.shape[-1] - 1).bit_length()
    rows, warps = max(1, TILE // block), max(4, block // 512)
    gated = gate is not None
    sizes = {"CHANNELS": x.shape[-1], "GATED": gated, "ROWS": rows, "BLOCK": block}
    return sizes | {"num_warps": warps}


def _check_contiguous(*tensors: Tensor | None) -> None:
    if not all(t is None or t.is_contiguous() for t in tensors):
        raise ValueError("the Triton kernels read contiguous tensors only")
