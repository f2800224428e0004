"""The `numba` backend: one fused pass forward and one backward on the CPU, compiled at first use.

The 2-D form walks the four directions by address and sums them in place; nothing is flipped,
transposed or copied on the way. Where gradients are wanted, the forward keeps one state per 64
steps, and the backward recomputes the others. Gradients of B and C are summed in a fixed order: the
same inputs give the same bits.

`numba_kernels` holds the loops; here they become an operator that autograd and torch.compile know.
Decays end at 2**-120 (and, were A positive, growth at 2**120 per step), where float32's own range
would end at 2**-149; a NaN comes out as a NaN. Nothing depends on the number of threads; processors
with registers of another width may differ in the last bits.

Inputs may have any strides. Narrower floats are computed in float32; float64 goes to `chunked`.
"""

import ctypes
import mmap
from functools import lru_cache

import llvmlite.binding  # type: ignore[import-untyped]  # ships no types
import numba
import numpy as np
import torch
from torch import Tensor

from mambaseg.scan import chunked
from mambaseg.scan.numba_kernels import channels_per_task, scan, scan_backward, states_at_once
from mambaseg.scan.numba_lanes import LANES, numbers_per_register
from mambaseg.scan.numba_tiles import STEPS
from mambaseg.scan.operators import Inputs, make_forms, make_operator, sum_parts

LARGE = 2**22
"""Bytes from which on memory is worth a request for large pages, which have 2 MiB."""


def _forward(inputs: Inputs, width: int, keep: bool) -> tuple[Tensor, Tensor]:
    """Compute y, and if they are to be kept the states that the backward starts its chunks from."""
    x, delta, A, B, C, _, _ = inputs
    y, checkpoints = (_on_large_pages(t) for t in _empty(inputs, width, keep))
    _use_torch_threads()
    scan(
        _arrays(inputs), _positions(x.shape[1], width), _strides(x, delta, B, C, y), len(x),
        channels_per_task(len(x), A.shape[1]), _flat(y), checkpoints.numpy(),
        states_at_once(A.shape[2]),
    )  # fmt: skip
    return y, checkpoints


def _empty(inputs: Inputs, width: int, keep: bool) -> tuple[Tensor, Tensor]:
    x = inputs.x
    groups, channels, states = inputs.A.shape
    chunks = -(-x.shape[1] // STEPS) if keep else 0
    whole = -(-channels // LANES) * LANES
    return torch.empty_like(x), x.new_empty(len(x), groups, chunks, states, whole)


def _backward(
    d_y: Tensor, inputs: Inputs, checkpoints: Tensor, width: int, keep: bool
) -> list[Tensor]:
    x, delta, A, B, C, D, bias = inputs
    d_x, d_delta = (_on_large_pages(t) for t in _empty_gradients(inputs)[:2])
    extent = channels_per_task(len(x), A.shape[1])
    tasks = -(-A.shape[1] // extent)
    # Parts that are summed below: per batch element, or per task of channels.
    d_A, d_D, d_bias = (t.new_empty(len(x), *t.shape) for t in (A, D, bias))
    d_B, d_C = (t.new_empty(tasks, *t.transpose(1, 2).shape) for t in (B, C))
    _use_torch_threads()
    scan_backward(
        _arrays(inputs), _positions(x.shape[1], width),
        _strides(x, delta, B, C, d_y, d_x, d_delta, *(t[0].transpose(1, 2) for t in (d_B, d_C))),
        len(x), extent, checkpoints.detach().numpy(), _flat(d_y),
        (_flat(d_x), _flat(d_delta), d_A.numpy(), d_B.flatten(1).numpy(), d_C.flatten(1).numpy(),
         d_D[..., None].numpy(), d_bias[..., None].numpy()),
        states_at_once(A.shape[2]),
    )  # fmt: skip
    d_A, d_B, d_C, d_D, d_bias = sum_parts((d_A, d_B, d_C, d_D, d_bias), inputs)
    return [d_x, d_delta, d_A, d_B.transpose(1, 2), d_C.transpose(1, 2), d_D, d_bias]


def _on_large_pages(t: Tensor) -> Tensor:
    """Ask Linux to back fresh memory by large pages: small ones cost thousands of page faults."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None and t.nbytes >= LARGE:
        start = -(-t.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = t.data_ptr() + t.nbytes - start
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)
    return t


def _empty_gradients(inputs: Inputs) -> tuple[Tensor, ...]:
    x, delta, A, B, C, D, bias = inputs
    d_B, d_C = (t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (B, C))
    d_A, d_D, d_bias = (t.new_empty(t.shape) for t in (A, D, bias))
    return torch.empty_like(x), torch.empty_like(delta), d_A, d_B, d_C, d_D, d_bias


_scan = make_operator(
    "numba_scan",
    _forward,
    _backward,
    _empty,
    empty_gradients=_empty_gradients,
    options=", SymInt width, bool keep",
)


def _scan_keeping(*inputs_and_width: Tensor | int) -> tuple[Tensor, Tensor]:
    """Scan, and keep states where somebody wants gradients."""
    wanted = any(isinstance(t, Tensor) and t.requires_grad for t in inputs_and_width)
    return _scan(*inputs_and_width, torch.is_grad_enabled() and wanted)


def _ready(inputs: Inputs) -> Inputs:
    return Inputs(*(t.float() for t in inputs))


selective_scan, selective_scan_2d = make_forms(_scan_keeping, _ready, chunked.selective_scan)


def threading_layer() -> tuple[str, int]:
    """Which library runs numba's threads, and how many there can be; known after a first scan."""
    return str(numba.threading_layer()), int(numba.config.NUMBA_NUM_THREADS)


def instruction_sets() -> tuple[str, str]:
    """What numba compiles for, and what the processor has: AVX512, AVX2 or DEFAULT, as in ATen."""
    names = {16: "AVX512", 8: "AVX2", 4: "DEFAULT"}
    host = llvmlite.binding.get_host_cpu_features().flatten()
    return names[LANES], names[numbers_per_register(host)]


def _use_torch_threads() -> None:
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    # numba starts its threads at its first use; where both share one OpenMP library, that sets
    # the number of PyTorch's threads too.
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _arrays(inputs: Inputs) -> tuple[np.ndarray, ...]:
    """The inputs as the kernels take them: flat, but for the parameters (K, D, N) or (K, D, 1)."""
    x, delta, A, B, C, D, bias = (t.detach() for t in inputs)
    rates, skips, biases = (t.contiguous().numpy() for t in (A, D[..., None], bias[..., None]))
    return _flat(x), _flat(delta), rates, _flat(B), _flat(C), skips, biases


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
        batch, step, group, channel = t.stride()
        rows.append((batch, 0 if t.shape[2] == 1 else group, step, channel))
    return np.array(rows, np.int64)


@lru_cache(maxsize=64)
def _positions(length: int, width: int) -> np.ndarray:
    """Where each step is: (1, L) for a sequence, (4, L) for an image in VMamba's directions."""
    rows = np.arange(length)
    if width == 0:
        return rows[None]
    columns = rows.reshape(-1, width).T.ravel()
    return np.stack((rows, columns, rows[::-1], columns[::-1]))
