"""The `cuda` backend: one fused pass forward and one backward, in CUDA C++.

The kernels (`cuda_kernels.cu`, compiled at run time: see `nvrtc`) go through the sequence step by
step with the states in registers; the 2-D form walks the four directions by address, so nothing is
flipped, transposed or copied, and inputs are read where they lie. The forward keeps one state per
STEPS steps and the backward recomputes the others in shared memory. A device that has more lanes
than there are channels gets the sequence in segments, which run side by side after a short pass
that finds the state each of them starts from. No sum is left to atomics: the same inputs give the
same bits on the same kind of device.

float32 and bfloat16 are read as they are, with states in float32; float64, and more than
`MAX_STATES` states, go to `chunked`.
"""

import ctypes
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mambaseg.scan import chunked, nvrtc
from mambaseg.scan.operators import (
    Inputs,
    for_gpu,
    make_forms,
    make_operator,
    merge_directions,
    sum_parts,
)

nvrtc.require()

SOURCE = Path(__file__).with_name("cuda_kernels.cu")
MAX_STATES = 64
STEPS = 12
"""Steps from one kept state to the next; their states must fit into shared memory."""


class Sizes(NamedTuple):
    """How a kernel is laid out: see `cuda_kernels.cu`."""

    warps: int
    unroll: int
    min_blocks: int
    busy: int  # warps that a sub-partition should have: the sequence is split to get them


FORWARD = Sizes(3, 2, 5, 2)
BACKWARD = Sizes(3, 2, 3, 8)
"""Three warps, two lanes per channel: the backward then fits a multiprocessor of an H100 four times
and spills no registers. Two warps nearly saturate the forward, and its extra pass costs two thirds
of the main one: it is split only where a device would be half empty. By the compiled code; not yet
measured."""
PARTS: int | None = None
"""Lanes per channel, each with a part of its states; None: a lane for 8 states."""
SEGMENTS: int | None = None
"""Segments of the sequence that run side by side; None: as many as the device needs."""
SEGMENT_CHUNKS = 4
"""A segment has at least so many chunks: a shorter one would not repay its extra pass."""


def _forward(inputs: Inputs, width: int) -> tuple[Tensor, Tensor]:
    """Compute y, like x, and the states before each chunk, (B, K, L / STEPS, N or more, D)."""
    _, starts = _empty(inputs, width)
    y = inputs.x.new_empty(inputs.delta.shape)  # of each direction
    layout = _lay_out(FORWARD, inputs)
    ends = _carry("scan_carry", layout, inputs, width)
    _launch("scan", layout, inputs, width, out=y, starts=starts, ends=ends)
    return merge_directions(y, width), starts


def _empty(inputs: Inputs, width: int) -> tuple[Tensor, Tensor]:
    batch, length, groups, channels = inputs.delta.shape
    states = _padded(inputs.A.shape[1])
    starts = inputs.A.new_empty(batch, groups, -(-length // STEPS), states, channels)
    return inputs.x.new_empty(inputs.x.shape), starts


def _backward(d_y: Tensor, inputs: Inputs, starts: Tensor, width: int) -> list[Tensor]:
    x, delta, rates, B, C, D, delta_bias = inputs
    d_y = _without_gaps(d_y.to(x.dtype))  # the kernels read it as they read x
    d_x, d_delta = x.new_empty(delta.shape), torch.empty_like(delta)
    layout = _lay_out(BACKWARD, inputs)
    # Parts that are summed below: per segment of each batch element, or per block of channels.
    blocks, _, rows = layout.grid
    d_rates, d_D, d_bias = (t.new_empty(rows, *t.shape) for t in (rates, D, delta_bias))
    d_B, d_C = (rates.new_empty(blocks, *t.shape) for t in (B, C))
    ends = _carry("scan_backward_carry", layout, inputs._replace(x=d_y, B=C), width)
    _launch(
        "scan_backward", layout, inputs, width, out=d_x, starts=starts, ends=ends, d_y=d_y,
        d_delta=d_delta, d_rates=d_rates, d_B=d_B, d_C=d_C, d_skip=d_D, d_bias=d_bias,
    )  # fmt: skip
    parts = (d_rates, d_B, d_C, d_D, d_bias)
    return [merge_directions(d_x, width), d_delta, *sum_parts(parts, inputs)]


def _empty_gradients(inputs: Inputs) -> Inputs:
    contiguous = Inputs(*(t.new_empty(t.shape) for t in inputs))
    return contiguous._replace(delta=torch.empty_like(inputs.delta))


def _has_gaps(t: Tensor) -> bool:
    return t.shape[-1] != 1 and t.stride(-1) != 1


def _without_gaps(t: Tensor) -> Tensor:
    return t.contiguous() if _has_gaps(t) else t


def _ready(inputs: Inputs) -> Inputs:
    """Inputs as the kernels read them: no gaps in the last dimension, B and C in one dtype."""
    if inputs.B.dtype != inputs.C.dtype:
        inputs = inputs._replace(B=inputs.B.float(), C=inputs.C.float())
    return for_gpu(inputs, _without_gaps)


_scan = make_operator("cuda_scan", _forward, _backward, _empty, empty_gradients=_empty_gradients)
selective_scan, selective_scan_2d = make_forms(_scan, _ready, chunked.selective_scan, MAX_STATES)


# ------------------------------------------------------------------ how they are launched

_POINTERS = (
    "x", "delta", "rates", "B", "C", "skip", "bias", "d_y", "out", "ends", "starts", "d_delta",
    "d_rates", "d_B", "d_C", "d_skip", "d_bias",
)  # fmt: skip
_STRIDED = ("x", "delta", "B", "C", "d_y", "d_delta")
_SIZES = ("height", "width", "channels", "states", "image", "segments", "segment_chunks")


class _Place(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_longlong),
        ("group", ctypes.c_longlong),
        ("position", ctypes.c_int),
    ]


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((f"at_{name}", _Place) for name in _STRIDED),
        *((name, ctypes.c_int) for name in _SIZES),
    ]


class _Layout(NamedTuple):
    defines: nvrtc.Defines
    grid: tuple[int, int, int]  # blocks of channels, groups, segments of all batch elements
    threads: int
    segments: int
    segment_chunks: int
    backward_shared: int  # dynamic bytes per block, of `scan_backward` alone


def _padded(states: int) -> int:
    """States per channel as the kernels hold them: 1, 4, 8, 16, 32, ..."""
    return 1 if states == 1 else max(4, 2 ** (states - 1).bit_length())


def _parts(states: int) -> int:
    """Lanes per channel: each holds 8 states, or as many as `PARTS` leaves it."""
    padded = _padded(states)
    wanted = PARTS or max(1, padded // 8)
    return max(padded // 16, min(wanted, padded // 4), 1)


def _segments(chunks: int, warps: int, busy: int, processors: int) -> tuple[int, int]:
    """Segments of a sequence, and chunks of each, for `busy` warps per sub-partition.

    One segment would have `warps` on the device; a processor has four sub-partitions.
    """
    wanted = SEGMENTS or min(round(busy * 4 * processors / warps), chunks // SEGMENT_CHUNKS)
    each = math.ceil(chunks / max(wanted, 1))
    return math.ceil(chunks / each), each


def _lay_out(sizes: Sizes, inputs: Inputs) -> _Layout:
    x, delta, rates, B, *_ = inputs
    batch, length, groups, channels = delta.shape
    padded, parts = _padded(rates.shape[1]), _parts(rates.shape[1])
    per_warp = 32 // parts
    warps = min(sizes.warps, math.ceil(channels / per_warp))
    block = warps * per_warp  # channels
    defines = {
        "R": padded // parts,
        "S": parts,
        "WARPS": warps,
        "STEPS": STEPS,
        "UNROLL": sizes.unroll,
        "MIN_BLOCKS": sizes.min_blocks,
        "X_BF16": x.dtype == torch.bfloat16,
        "DELTA_BF16": delta.dtype == torch.bfloat16,
        "BC_BF16": B.dtype == torch.bfloat16,
    }
    blocks = math.ceil(channels / block)
    processors = 1
    if x.is_cuda:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    segments, each = _segments(
        math.ceil(length / STEPS), blocks * groups * batch * warps, sizes.busy, processors
    )
    return _Layout(
        defines=tuple((name, int(value)) for name, value in defines.items()),
        grid=(blocks, groups, batch * segments),
        threads=32 * warps,
        segments=segments,
        segment_chunks=each,
        backward_shared=4 * STEPS * padded * block,
    )


def _carry(name: str, layout: _Layout, inputs: Inputs, width: int) -> Tensor:
    """What each segment leaves to the next: (B, segments, K, N or more, and one, D)."""
    batch, _, groups, channels = inputs.delta.shape
    rows, segments = _padded(inputs.A.shape[1]) + 1, layout.segments
    ends = inputs.A.new_empty(batch * (segments > 1), segments, groups, rows, channels)
    if segments > 1:
        grid = (*layout.grid[:2], layout.grid[2] - batch)  # the last of each has none to leave to
        _launch(name, layout._replace(grid=grid), inputs, width, ends=ends)
    return ends


def _launch(name: str, layout: _Layout, inputs: Inputs, width: int, **tensors: Tensor) -> None:
    """Run a kernel on the inputs and on the other tensors that it takes."""
    tensors |= dict(zip(_POINTERS, inputs, strict=False))
    strided = {key: tensors[key] for key in _STRIDED if key in tensors}
    if any(_has_gaps(t) for t in strided.values()):
        raise ValueError("the CUDA kernels read tensors without gaps in the last dimension only")
    if not all(t.is_contiguous() for key, t in tensors.items() if key not in strided):
        raise ValueError("the CUDA kernels read contiguous parameters only")
    _, length, _, channels = inputs.delta.shape
    arguments = _Arguments(
        **{key: tensor.data_ptr() for key, tensor in tensors.items()},
        height=length // width if width else 1,
        width=width or length,
        channels=channels,
        states=inputs.A.shape[1],
        image=int(width > 0),
        segments=layout.segments,
        segment_chunks=layout.segment_chunks,
    )
    for key, tensor in strided.items():
        batch, position, group, _ = (n * tensor.element_size() for n in tensor.stride())
        if position >= 2**31:
            raise ValueError(f"the positions of {key} lie too far apart for the CUDA kernels")
        shared = width and key in ("x", "d_y")
        setattr(arguments, f"at_{key}", (batch, 0 if shared else group, position))
    shared_bytes = layout.backward_shared if name == "scan_backward" else 0
    with torch.cuda.device_of(inputs.x):
        nvrtc.launch(
            SOURCE, name, layout.defines, layout.grid, layout.threads, shared_bytes, arguments
        )
