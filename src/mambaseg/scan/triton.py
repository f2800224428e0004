"""The `triton` backend: one fused pass forward and one backward on the GPU.

The kernels go through the sequence step by step with the states in registers (see
`triton_kernels`); the 2-D form walks the four directions by address, so nothing is flipped,
transposed or copied. The forward keeps one state per 16 steps and the backward recomputes the
others. No sum is left to atomics: the same inputs give the same bits.

float32 and bfloat16 are read as they are, with states in float32; float64 goes to `chunked`.
Letters as in `reference`, and G: K where each group has its own x and y, 1 where all share them.
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from mambaseg.errors import UserError
from mambaseg.scan import chunked, cross
from mambaseg.scan.triton_kernels import scan, scan_backward

BLOCK_D = 32
"""Channels per program: a lane for each."""
WARPS = 1
"""Warps per program."""
MOST = 2**31 - 1
"""Elements of one batch element that the kernels find their way in; batches may be larger."""
STEPS = 16
"""Steps from one kept state to the next. The backward writes the states between them to memory and
reads them again: there should be few enough for the cache of the GPU."""
UNROLL = 8
UNROLL_BACKWARD = 4
"""Steps whose inputs are read ahead; both divide STEPS. More would not fit the registers."""


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> Tensor:
    """The scan of `reference.selective_scan`: same arguments, same result."""
    if u.dtype == torch.float64:
        return chunked.selective_scan(u, delta, A, B, C, D, delta_bias)
    x, delta, B, C = (_readable(t.permute(0, 3, 1, 2)) for t in (u, delta, B, C))
    y, _ = _scan(x, delta, _rates(A), B, C, *_wide(D, delta_bias), 0)
    return y.permute(0, 2, 3, 1).to(u.dtype)


def selective_scan_2d(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> Tensor:
    """The scan of `cross.selective_scan_2d`: same arguments after the first, same result."""
    if x.dtype == torch.float64:
        return cross.selective_scan_2d(chunked.selective_scan, x, delta, A, B, C, D, delta_bias)
    shared = _readable(x.flatten(1, 2).unsqueeze(2))  # (B, L, 1, D)
    delta, B, C = (_readable(t.flatten(1, 2)) for t in (delta, B, C))
    y, _ = _scan(shared, delta, _rates(A), B, C, *_wide(D, delta_bias), x.shape[2])
    return y.view(x.shape).to(x.dtype)


def _readable(t: Tensor) -> Tensor:
    """What the kernels read: contiguous, float32 or bfloat16."""
    return (t if t.dtype == torch.bfloat16 else t.float()).contiguous()


def _wide(*parameters: Tensor) -> tuple[Tensor, ...]:
    """Parameters as the kernels read them: contiguous, float32."""
    return tuple(t.float().contiguous() for t in parameters)


def _rates(A: Tensor) -> Tensor:
    """Scale A (K, D, N) for powers of two, and lay it out for the kernels: (K, N, D)."""
    return (A.float() * math.log2(math.e)).transpose(1, 2).contiguous()


# ------------------------------------------------------------------ the kernels as operators


@torch.library.custom_op("mambaseg::triton_scan", mutates_args=())
def _scan(
    x: Tensor,
    delta: Tensor,
    rates: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Forward: y like x, and the states (B, K, L / STEPS, N, D) that the backward starts from.

    All tensors are contiguous.

    Args:
        x: Input, (B, L, G, D).
        delta: Raw step sizes, (B, L, K, D).
        rates: A log2(e), (K, N, D).
        B: Input weights, (B, L, K, N).
        C: Output weights, (B, L, K, N).
        D: Skip weights, (K, D).
        delta_bias: Bias of delta, (K, D).
        width: Width of the image whose positions L are, walked in four directions; 0: a sequence.
    """
    inputs = (x, delta, rates, B, C, D, delta_bias)
    if not all(t.is_contiguous() for t in inputs):
        raise ValueError("the Triton kernels read contiguous tensors only")
    if (largest := max(t[:1].numel() for t in (delta, B))) > MOST:
        raise UserError(
            f"the scan of one image has {largest} elements, and scan_backend=triton "
            "counts them in 32 bits: choose a smaller data.size, or model.scan_backend=chunked."
        )
    _, starts = _empty_outputs(*inputs, width)
    y = x.new_empty(delta.shape)  # of each direction
    with torch.cuda.device_of(x):
        scan[_grid(delta)](*inputs, y, starts, **_sizes(delta, rates, width), UNROLL=UNROLL)
    return _merge(y, width), starts


@_scan.register_fake
def _empty_outputs(
    x: Tensor,
    delta: Tensor,
    rates: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    width: int,
) -> tuple[Tensor, Tensor]:
    batch, length, groups, channels = delta.shape
    chunks = (length + STEPS - 1) // STEPS
    starts = rates.new_empty(batch, groups, chunks, rates.shape[1], channels)
    return x.new_empty(x.shape), starts


@torch.library.custom_op("mambaseg::triton_scan_backward", mutates_args=())
def _scan_backward(
    d_y: Tensor,
    x: Tensor,
    delta: Tensor,
    rates: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    starts: Tensor,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, delta, rates, B, C, D and delta_bias."""
    inputs = (x, delta, rates, B, C, D, delta_bias)
    sizes, grid = _sizes(delta, rates, width), _grid(delta)
    programs = math.prod(grid)
    scratch = rates.new_empty(programs, STEPS, sizes["N"], BLOCK_D)
    d_x, d_delta = x.new_empty(delta.shape), torch.empty_like(delta)
    # Parts that are summed below, in a fixed order: per batch element, or per block of channels.
    d_rates, d_D, d_bias = (t.new_empty(len(x), *t.shape) for t in (rates, D, delta_bias))
    d_B, d_C = (rates.new_empty(grid[0], *t.shape) for t in (B, C))
    with torch.cuda.device_of(x):
        scan_backward[grid](
            *inputs, starts, d_y.contiguous(), scratch, d_x, d_delta, d_rates, d_B, d_C, d_D,
            d_bias, **sizes, UNROLL=UNROLL_BACKWARD,
        )  # fmt: skip
    d_rates, d_D, d_bias = (t.sum(0) for t in (d_rates, d_D, d_bias))
    d_B, d_C = d_B.sum(0).to(B.dtype), d_C.sum(0).to(C.dtype)
    return _merge(d_x, width), d_delta, d_rates, d_B, d_C, d_D, d_bias


@_scan_backward.register_fake
def _empty_gradients(
    d_y: Tensor,
    x: Tensor,
    delta: Tensor,
    rates: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    starts: Tensor,
    width: int,
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (x, delta, rates, B, C, D, delta_bias))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.width = inputs
    ctx.set_materialize_grads(False)  # or the states' gradient, which nobody has, costs zeros
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, d_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_scan_backward(d_y, *ctx.saved_tensors, ctx.width), None)


_scan.register_autograd(_backward, setup_context=_save_for_backward)


def _grid(delta: Tensor) -> tuple[int, int, int]:
    """One program per block of channels, direction and batch element."""
    batch, _, groups, channels = delta.shape
    return triton.cdiv(channels, BLOCK_D), groups, batch


def _sizes(delta: Tensor, rates: Tensor, width: int) -> dict[str, int]:
    """Arguments that both kernels share."""
    length, states = delta.shape[1], rates.shape[1]
    return {
        "height": length // width if width else 1,
        "width": width or length,
        "channels": delta.shape[3],
        "states": states,
        "IMAGE": int(width > 0),
        "N": triton.next_power_of_2(states),
        "BLOCK_D": BLOCK_D,
        "STEPS": STEPS,
        "num_warps": WARPS,
    }


def _merge(each: Tensor, width: int) -> Tensor:
    """Sum the four directions of an image, in float32 and in a fixed order: (B, L, G, D)."""
    return each.sum(dim=2, keepdim=True) if width else each
