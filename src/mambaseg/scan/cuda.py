"""The `cuda` backend: one fused pass forward and one backward, in CUDA C++.

The kernels (`cuda_kernels.cu`, compiled at run time: see `nvrtc`) go through the sequence step by
step with the states in registers; the 2-D form walks the four directions by address, so nothing is
flipped, transposed or copied, and inputs are read where they lie. The forward keeps one state per
STEPS steps and the backward recomputes the others in shared memory. A device that has more lanes
than there are channels gets the sequence in segments, which run side by side after a short pass
that finds the state each of them starts from. No sum is left to atomics: the same inputs give the
same bits on the same kind of device.

float32 and bfloat16 are read as they are, with states in float32; float64, and more than
`MAX_STATES` states, go to `chunked`. Letters as in `reference`, and G: K where each group has its
own x and y, 1 where all share them.
"""

import ctypes
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambaseg.scan import chunked, cross, nvrtc

nvrtc.require()

SOURCE = Path(__file__).with_name("cuda_kernels.cu")
MAX_STATES = 64
STEPS = 12
"""Steps from one kept state to the next; their states must fit into shared memory."""


@dataclass(frozen=True)
class Sizes:
    """How a kernel is laid out: see `cuda_kernels.cu`."""

    warps: int
    unroll: int
    min_blocks: int
    busy: int
    """Warps that a sub-partition of the device should have: the sequence is split to get them."""


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


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> Tensor:
    """The scan of `reference.selective_scan`: same arguments, same result."""
    if u.dtype == torch.float64 or A.shape[2] > MAX_STATES:
        return chunked.selective_scan(u, delta, A, B, C, D, delta_bias)
    x, delta, B, C = (_readable(t.permute(0, 3, 1, 2)) for t in (u, delta, B, C))
    y, _ = _scan(x, delta, _rates(A), *_alike(B, C), *_wide(D, delta_bias), 0)
    return y.permute(0, 2, 3, 1).to(u.dtype)


def selective_scan_2d(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> Tensor:
    """The scan of `cross.selective_scan_2d`: same arguments after the first, same result."""
    if x.dtype == torch.float64 or A.shape[2] > MAX_STATES:
        return cross.selective_scan_2d(chunked.selective_scan, x, delta, A, B, C, D, delta_bias)
    shared = _readable(x.flatten(1, 2).unsqueeze(2))  # (B, L, 1, D)
    delta, B, C = (_readable(t.flatten(1, 2)) for t in (delta, B, C))
    y, _ = _scan(shared, delta, _rates(A), *_alike(B, C), *_wide(D, delta_bias), x.shape[2])
    return y.view(x.shape).to(x.dtype)


def _readable(t: Tensor) -> Tensor:
    """What the kernels read: float32 or bfloat16, the last dimension without gaps."""
    t = t if t.dtype == torch.bfloat16 else t.float()
    return t if _without_gaps(t) else t.contiguous()


def _without_gaps(t: Tensor) -> bool:
    return t.shape[-1] == 1 or t.stride(-1) == 1


def _alike(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """B and C in one dtype."""
    return (B, C) if B.dtype == C.dtype else (B.float(), C.float())


def _wide(*parameters: Tensor) -> tuple[Tensor, ...]:
    """Parameters as the kernels read them: contiguous, float32."""
    return tuple(t.float().contiguous() for t in parameters)


def _rates(A: Tensor) -> Tensor:
    """Scale A (K, D, N) for powers of two, and lay it out for the kernels: (K, N, D)."""
    return (A.float() * math.log2(math.e)).transpose(1, 2).contiguous()


# ------------------------------------------------------------------ the kernels as operators


@torch.library.custom_op("mambaseg::cuda_scan", mutates_args=())
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
    """Forward: y like x, and the states (B, K, L / STEPS, N or more, D) the backward starts from.

    Args:
        x: Input, (B, L, G, D).
        delta: Raw step sizes, (B, L, K, D).
        rates: A log2(e), (K, N, D), contiguous.
        B: Input weights, (B, L, K, N).
        C: Output weights, (B, L, K, N).
        D: Skip weights, (K, D), contiguous.
        delta_bias: Bias of delta, (K, D), contiguous.
        width: Width of the image whose positions L are, walked in four directions; 0: a sequence.
    """
    inputs = (x, delta, rates, B, C, D, delta_bias)
    _, starts = _empty_outputs(*inputs, width)
    y = x.new_empty(delta.shape)  # of each direction
    ends = _carry("scan_carry", FORWARD, inputs, width)
    _launch("scan", FORWARD, inputs, width, out=y, starts=starts, ends=ends)
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
    starts = rates.new_empty(batch, groups, chunks, _padded(rates.shape[1]), channels)
    return x.new_empty(x.shape), starts


@torch.library.custom_op("mambaseg::cuda_scan_backward", mutates_args=())
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
    d_y = d_y if _without_gaps(d_y) else d_y.contiguous()
    d_x, d_delta = x.new_empty(delta.shape), torch.empty_like(delta)
    # Parts that are summed below, in a fixed order: per segment of each batch element, or per block
    # of channels.
    blocks, _, rows = _layout(BACKWARD, inputs, width).grid
    d_rates, d_D, d_bias = (t.new_empty(rows, *t.shape) for t in (rates, D, delta_bias))
    d_B, d_C = (rates.new_empty(blocks, *t.shape) for t in (B, C))
    reverse = (d_y, delta, rates, C, C, D, delta_bias)
    ends = _carry("scan_backward_carry", BACKWARD, reverse, width)
    _launch(
        "scan_backward", BACKWARD, inputs, width, out=d_x, starts=starts, ends=ends, d_y=d_y,
        d_delta=d_delta, d_rates=d_rates, d_B=d_B, d_C=d_C, d_skip=d_D, d_bias=d_bias,
    )  # fmt: skip
    d_rates, d_D, d_bias = (t.sum(0) for t in (d_rates, d_D, d_bias))
    d_B, d_C = (
        (part[0] if blocks == 1 else part.sum(0)).to(t.dtype) for part, t in ((d_B, B), (d_C, C))
    )
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
    x, rates, B, C, D, delta_bias = (t.new_empty(t.shape) for t in (x, rates, B, C, D, delta_bias))
    return x, torch.empty_like(delta), rates, B, C, D, delta_bias


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.width = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)  # of the states, zeros of their size


def _backward(ctx: Any, d_y: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_y is None:
        return (None,) * 8
    return (*_scan_backward(d_y, *ctx.saved_tensors, ctx.width), None)


_scan.register_autograd(_backward, setup_context=_save_for_backward)


def _merge(each: Tensor, width: int) -> Tensor:
    """Sum the four directions of an image, in float32 and in a fixed order: (B, L, G, D)."""
    return each.sum(dim=2, keepdim=True) if width else each


# ------------------------------------------------------------------ how they are launched

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_POINTERS = (
    "x", "delta", "rates", "B", "C", "skip", "bias", "d_y", "out", "ends", "starts", "d_delta",
    "d_rates", "d_B", "d_C", "d_skip", "d_bias",
)  # fmt: skip
_STRIDED = ("x", "delta", "B", "C", "d_y", "d_delta")
_SIZES = ("height", "width", "channels", "states", "image", "segments", "segment_chunks")


class _Place(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_longlong), ("group", ctypes.c_longlong), ("position", ctypes.c_int),
    ]  # fmt: skip


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((f"at_{name}", _Place) for name in _STRIDED),
        *((name, ctypes.c_int) for name in _SIZES),
    ]


@dataclass(frozen=True)
class _Layout:
    defines: nvrtc.Defines
    grid: tuple[int, int, int]  # blocks of channels, groups, segments of all batch elements
    threads: int
    segments: int
    segment_chunks: int
    shared: dict[str, int]  # dynamic bytes per block, of each kernel


def _padded(states: int) -> int:
    """States per channel as the kernels hold them: 1, 4, 8, 16, 32, ..."""
    return 1 if states == 1 else max(4, 2 ** (states - 1).bit_length())


def _parts(states: int) -> int:
    """Lanes per channel: each holds 8 states, or as many as `PARTS` leaves it."""
    padded = _padded(states)
    wanted = PARTS or max(1, padded // 8)
    return max(padded // 16, min(wanted, padded // 4), 1)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _segments(chunks: int, warps: int, busy: int, processors: int) -> tuple[int, int]:
    """Segments of a sequence, and chunks of each.

    Args:
        chunks: Chunks of the sequence.
        warps: Warps that one segment would have on the whole device.
        busy: Warps per sub-partition that are wanted.
        processors: Multiprocessors of the device, of four sub-partitions each.
    """
    wanted = SEGMENTS or min(round(busy * 4 * processors / warps), chunks // SEGMENT_CHUNKS)
    each = math.ceil(chunks / max(wanted, 1))
    return math.ceil(chunks / each), each


def _layout(sizes: Sizes, inputs: Inputs, width: int) -> _Layout:
    x, delta, rates, B, *_ = inputs
    batch, length, groups, channels = delta.shape
    padded, parts = _padded(rates.shape[1]), _parts(rates.shape[1])
    per_warp = 32 // parts
    warps = min(sizes.warps, math.ceil(channels / per_warp))
    block = warps * per_warp  # channels
    defines = {
        "R": padded // parts, "S": parts, "WARPS": warps, "STEPS": STEPS, "UNROLL": sizes.unroll,
        "MIN_BLOCKS": sizes.min_blocks, "X_BF16": x.dtype == torch.bfloat16,
        "DELTA_BF16": delta.dtype == torch.bfloat16, "BC_BF16": B.dtype == torch.bfloat16,
    }  # fmt: skip
    blocks = math.ceil(channels / block)
    segments, each = _segments(
        math.ceil(length / STEPS),
        blocks * groups * batch * warps,
        sizes.busy,
        _processors(x.device),
    )
    return _Layout(
        defines=tuple((name, int(value)) for name, value in defines.items()),
        grid=(blocks, groups, batch * segments),
        threads=32 * warps,
        segments=segments,
        segment_chunks=each,
        shared={
            "scan_carry": 0,
            "scan": 0,
            "scan_backward_carry": 0,
            "scan_backward": 4 * STEPS * padded * block,
        },
    )


def _carry(name: str, sizes: Sizes, inputs: Inputs, width: int) -> Tensor:
    """What each segment leaves to the next: (B, segments, K, N or more, and one, D)."""
    _, delta, rates, *_ = inputs
    batch, _, groups, channels = delta.shape
    layout = _layout(sizes, inputs, width)
    rows = _padded(rates.shape[1]) + 1
    ends = rates.new_empty(batch * (layout.segments > 1), layout.segments, groups, rows, channels)
    if layout.segments > 1:
        blocks, _, all_segments = layout.grid
        grid = (blocks, groups, all_segments - batch)  # the last one of each has none to leave to
        _launch(name, sizes, inputs, width, grid, ends=ends)
    return ends


def _launch(
    name: str,
    sizes: Sizes,
    inputs: Inputs,
    width: int,
    grid: tuple[int, int, int] | None = None,
    **tensors: Tensor,
) -> None:
    """Run a kernel on the inputs of `_scan` and on the other tensors that it takes."""
    x, delta, rates, B, C, D, delta_bias = inputs
    tensors |= {"x": x, "delta": delta, "rates": rates, "B": B, "C": C, "skip": D}
    tensors["bias"] = delta_bias
    if not all(_without_gaps(tensors[t]) for t in _STRIDED if t in tensors):
        raise ValueError("the CUDA kernels read tensors without gaps in the last dimension only")
    if not all(t.is_contiguous() for n, t in tensors.items() if n not in _STRIDED):
        raise ValueError("the CUDA kernels read contiguous parameters only")
    _, length, _, channels = delta.shape
    layout = _layout(sizes, inputs, width)
    arguments = _Arguments(
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        height=length // width if width else 1,
        width=width or length,
        channels=channels,
        states=rates.shape[1],
        image=int(width > 0),
        segments=layout.segments,
        segment_chunks=layout.segment_chunks,
    )
    for name_ in _STRIDED:
        if name_ in tensors:
            bytes_ = tensors[name_].element_size()
            of_batch, of_position, of_group, _ = (n * bytes_ for n in tensors[name_].stride())
            if of_position >= 2**31:
                raise ValueError(f"the positions of {name_} lie too far apart for the CUDA kernels")
            shared = width and name_ in ("x", "d_y")
            setattr(arguments, f"at_{name_}", (of_batch, 0 if shared else of_group, of_position))
    shape = (grid or layout.grid, layout.threads, layout.shared[name])
    with torch.cuda.device_of(x):
        nvrtc.launch(SOURCE, name, layout.defines, *shape, arguments)
