"""The `numba` backend: one fused pass forward and one backward on the CPU, compiled at first use.

The 2-D form walks the four directions by address and sums them in place; nothing is flipped,
transposed or copied on the way. Where gradients are wanted, the forward keeps one state per 64
steps, and the backward recomputes the others. Gradients of B and C are summed in a fixed order: the
same inputs give the same bits.

`numba_kernels` holds the loops; here they become operators that autograd and torch.compile know.

Inputs may have any strides. Narrower floats are computed in float32; float64 goes to `reference`.
Letters as there, and G: K where each group has its own x and y, 1 where all share them.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from mambaseg.scan import cross, reference
from mambaseg.scan.numba_kernels import channels_per_task, scan, scan_backward
from mambaseg.scan.numba_lanes import LANES
from mambaseg.scan.numba_tiles import STEPS


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> Tensor:
    """The scan of `reference.selective_scan`: same arguments, same result."""
    if u.dtype == torch.float64:
        return reference.selective_scan(u, delta, A, B, C, D, delta_bias)
    x, delta, B, C = (t.float().transpose(2, 3) for t in (u, delta, B, C))
    inputs = (x, delta, A.float(), B, C, D.float(), delta_bias.float())
    y, _ = _scan(*inputs, 0, _wants_gradient(inputs))
    return y.transpose(2, 3).to(u.dtype)


def selective_scan_2d(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> Tensor:
    """The scan of `cross.selective_scan_2d`: same arguments after the first, same result."""
    if x.dtype == torch.float64:
        return cross.selective_scan_2d(reference.selective_scan, x, delta, A, B, C, D, delta_bias)
    shared = x.float().flatten(1, 2).unsqueeze(1)  # (B, 1, L, D)
    delta, B, C = (t.float().flatten(1, 2).transpose(1, 2) for t in (delta, B, C))
    inputs = (shared, delta, A.float(), B, C, D.float(), delta_bias.float())
    y, _ = _scan(*inputs, x.shape[2], _wants_gradient(inputs))
    return y.view(x.shape).to(x.dtype)


@torch.library.custom_op("mambaseg::numba_scan", mutates_args=(), device_types="cpu")
def _scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    width: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Forward: y, and the states that the backward starts its chunks from.

    Args:
        x: Input, (B, G, L, D).
        delta: Raw step sizes, (B, K, L, D).
        A: Decay rates, (K, D, N).
        B: Input weights, (B, K, L, N).
        C: Output weights, (B, K, L, N).
        D: Skip weights, (K, D).
        delta_bias: Bias of delta, (K, D).
        width: Width of the image whose positions L are, walked in four directions; 0: a sequence.
        keep: Keep states for a backward; without, there are none.
    """
    y, checkpoints = _empty_outputs(x, delta, A, B, C, D, delta_bias, width, keep)
    _use_torch_threads()
    strides = _strides(x, delta, B, C, y)
    scan(
        *_inputs(x, delta, A, B, C, D, delta_bias), _positions(x.shape[2], width), strides, len(x),
        channels_per_task(len(x), A.shape[1]), _flat(y), checkpoints.numpy(),
    )  # fmt: skip
    return y, checkpoints


@_scan.register_fake
def _empty_outputs(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    width: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    groups, channels, states = A.shape
    chunks = (x.shape[2] + STEPS - 1) // STEPS if keep else 0
    whole = (channels + LANES - 1) // LANES * LANES
    return torch.empty_like(x), x.new_empty(x.shape[0], groups, chunks, states, whole)


@torch.library.custom_op("mambaseg::numba_scan_backward", mutates_args=(), device_types="cpu")
def _scan_backward(
    d_y: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    checkpoints: Tensor,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, delta, A, B, C, D and delta_bias."""
    d_x, d_delta = torch.empty_like(x), torch.empty_like(delta)
    # Parts that are summed below, in a fixed order: per batch element, or per task of channels.
    d_A, d_D, d_bias = (t.new_empty(len(x), *t.shape) for t in (A, D[..., None], D[..., None]))
    extent = channels_per_task(len(x), A.shape[1])
    tasks = (A.shape[1] + extent - 1) // extent
    d_B, d_C = (t.new_empty(tasks, *t.shape) for t in (B, C))
    _use_torch_threads()
    strides = _strides(x, delta, B, C, d_y, d_x, d_delta, d_B[0], d_C[0])
    scan_backward(
        *_inputs(x, delta, A, B, C, D, delta_bias), _positions(x.shape[2], width), strides, len(x),
        extent, checkpoints.detach().numpy(), _flat(d_y), _flat(d_x), _flat(d_delta), d_A.numpy(),
        d_B.flatten(1).numpy(), d_C.flatten(1).numpy(), d_D.numpy(), d_bias.numpy(),
    )  # fmt: skip
    d_A, d_B, d_C, d_D, d_bias = (t.sum(0) for t in (d_A, d_B, d_C, d_D, d_bias))
    return d_x, d_delta, d_A, d_B, d_C, d_D[..., 0].clone(), d_bias[..., 0].clone()


@_scan_backward.register_fake
def _empty_gradients(
    d_y: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    checkpoints: Tensor,
    width: int,
) -> tuple[Tensor, ...]:
    whole = (torch.empty_like(t) for t in (x, delta))
    summed = (t.new_empty(t.shape) for t in (A, B, C, D, delta_bias))
    return (*whole, *summed)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.width, _ = inputs
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, d_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_scan_backward(d_y, *ctx.saved_tensors, ctx.width), None, None)


_scan.register_autograd(_backward, setup_context=_save_for_backward)


def threading_layer() -> tuple[str, int]:
    """Which library runs numba's threads, and how many there can be; known after a first scan."""
    return str(numba.threading_layer()), int(numba.config.NUMBA_NUM_THREADS)


def _wants_gradient(inputs: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in inputs)


def _use_torch_threads() -> None:
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    # numba starts its threads at its first use; where both share one OpenMP library, that sets
    # the number of PyTorch's threads too.
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _inputs(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> tuple[np.ndarray, ...]:
    """The inputs as the kernels take them: flat, but for the parameters (K, D, N) or (K, D, 1)."""
    parameters = (t.detach().contiguous().numpy() for t in (A, D[..., None], delta_bias[..., None]))
    A_array, D_array, bias_array = parameters
    return _flat(x), _flat(delta), A_array, _flat(B), _flat(C), D_array, bias_array


def _flat(t: Tensor) -> np.ndarray:
    """The memory from the first to the last element of a tensor, as one flat array."""
    steps = zip(t.shape, t.stride(), strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in steps)
    array: np.ndarray = t.detach().as_strided((extent,), (1,)).numpy()
    return array


def _strides(*tensors: Tensor) -> np.ndarray:
    """Strides of tensors (batch, group, step, channel or state); 0 for a group that all share."""
    rows = []
    for t in tensors:
        batch, group, step, channel = t.stride()
        rows.append((batch, 0 if t.shape[1] == 1 else group, step, channel))
    return np.array(rows, np.int64)


@lru_cache(maxsize=64)
def _positions(length: int, width: int) -> np.ndarray:
    """Where each step is: (1, L) for a sequence, (4, L) for an image in VMamba's directions."""
    rows = np.arange(length)
    if width == 0:
        return rows[None]
    columns = rows.reshape(-1, width).T.ravel()
    return np.stack((rows, columns, rows[::-1], columns[::-1]))
