"""The `triton` backend: one fused pass forward and one backward on the GPU.

The kernels go through the sequence step by step with the states in registers (see
`triton_kernels`); the 2-D form walks the four directions by address, so nothing is flipped,
transposed or copied. The forward keeps one state per 16 steps and the backward recomputes the
others. No sum is left to atomics: the same inputs give the same bits.

float32 and bfloat16 are read as they are, with states in float32; float64 goes to `chunked`.
"""

import math
import os
import shutil
from typing import Any

import torch
import triton
from torch import Tensor

from mambaseg.errors import UserError
from mambaseg.scan import chunked
from mambaseg.scan.operators import (
    Inputs,
    for_gpu,
    make_forms,
    make_operator,
    merge_directions,
    sum_parts,
)
from mambaseg.scan.triton_kernels import scan, scan_backward

COMPILERS = ("gcc", "clang")
if not (
    os.environ.get("TRITON_INTERPRET") == "1"
    or os.environ.get("CC")
    or any(map(shutil.which, COMPILERS))
):
    raise ImportError("its launcher is compiled: there is no C compiler, install gcc or set CC")

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


def _forward(inputs: Inputs, width: int) -> tuple[Tensor, Tensor]:
    """Compute y, like x, and the states (B, K, L / STEPS, N, D) that the backward starts from."""
    if not all(t.is_contiguous() for t in inputs):
        raise ValueError("the Triton kernels read contiguous tensors only")
    if (largest := max(t[:1].numel() for t in (inputs.delta, inputs.B))) > MOST:
        raise UserError(
            f"the scan of one image has {largest} elements, and scan_backend=triton "
            "counts them in 32 bits: choose a smaller data.size, or model.scan_backend=torch."
        )
    _, starts = _empty(inputs, width)
    y = inputs.x.new_empty(inputs.delta.shape)  # of each direction
    grid, sizes = _layout(inputs, width)
    with torch.cuda.device_of(y):
        scan[grid](*inputs, y, starts, **sizes, UNROLL=UNROLL)
    return merge_directions(y, width), starts


def _empty(inputs: Inputs, width: int) -> tuple[Tensor, Tensor]:
    batch, length, groups, channels = inputs.delta.shape
    chunks, states = triton.cdiv(length, STEPS), inputs.A.shape[1]
    starts = inputs.A.new_empty(batch, groups, chunks, states, channels)
    return inputs.x.new_empty(inputs.x.shape), starts


def _backward(d_y: Tensor, inputs: Inputs, starts: Tensor, width: int) -> list[Tensor]:
    x, delta, rates, B, C, D, delta_bias = inputs
    grid, sizes = _layout(inputs, width)
    scratch = rates.new_empty(math.prod(grid), STEPS, sizes["N"], BLOCK_D)
    d_x, d_delta = x.new_empty(delta.shape), torch.empty_like(delta)
    # Parts that are summed below: per batch element, or per block of channels.
    d_rates, d_D, d_bias = (t.new_empty(len(x), *t.shape) for t in (rates, D, delta_bias))
    d_B, d_C = (rates.new_empty(grid[0], *t.shape) for t in (B, C))
    with torch.cuda.device_of(x):
        scan_backward[grid](
            *inputs, starts, d_y.contiguous(), scratch, d_x, d_delta, d_rates, d_B, d_C, d_D,
            d_bias, **sizes, UNROLL=UNROLL_BACKWARD,
        )  # fmt: skip
    parts = (d_rates, d_B, d_C, d_D, d_bias)
    return [merge_directions(d_x, width), d_delta, *sum_parts(parts, inputs)]


def _layout(inputs: Inputs, width: int) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """One program per block of channels, direction and batch element; what both kernels take."""
    batch, length, groups, channels = inputs.delta.shape
    states = inputs.A.shape[1]
    sizes = {
        "height": length // width if width else 1,
        "width": width or length,
        "channels": channels,
        "states": states,
        "IMAGE": int(width > 0),
        "N": triton.next_power_of_2(states),
        "BLOCK_D": BLOCK_D,
        "STEPS": STEPS,
        "num_warps": WARPS,
    }
    return (triton.cdiv(channels, BLOCK_D), groups, batch), sizes


def _ready(inputs: Inputs) -> Inputs:
    return for_gpu(inputs, Tensor.contiguous)


_scan = make_operator("triton_scan", _forward, _backward, _empty)
selective_scan, selective_scan_2d = make_forms(_scan, _ready, chunked.selective_scan)
