"""Layer normalisation with an optional gate as Triton kernels, one pass over memory each way.

A program holds ROWS whole rows in registers: a tile of [ROWS, BLOCK] numbers, channels along the
lanes. Channels beyond the last and rows beyond the last read zero, add nothing, and are not
written. All arithmetic is in float32 whatever the tensors are; offsets are 64-bit.
"""

import triton
import triton.language as tl


@triton.jit
def normalise(value, in_c, eps, CHANNELS: tl.constexpr):
    """Give rows of mean 0 and deviation 1, and 1 / deviation before, [ROWS]."""
    mean = tl.sum(value, 1) / CHANNELS
    centred = tl.where(in_c[None, :], value - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / CHANNELS + eps)
    return centred * scale[:, None], scale


@triton.jit(do_not_specialize=["rows"])
def norm(
    x,
    weight,
    bias,
    gate,
    y,
    rows,
    eps,
    CHANNELS: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write y, the normed x, times silu(gate) if GATED."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    in_c = c < CHANNELS
    inside = (r < rows)[:, None] & in_c[None, :]
    at = r[:, None] * CHANNELS + c[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        z = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + c, mask=in_c, other=0.0)
    b = tl.load(bias + c, mask=in_c, other=0.0)
    normed, _ = normalise(value, in_c, eps, CHANNELS)
    out = normed * w[None, :] + b[None, :]
    if GATED:
        out *= z * tl.sigmoid(z)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def norm_backward(
    d_y,
    x,
    weight,
    bias,
    gate,
    d_x,
    d_gate,
    sums,
    rows,
    eps,
    CHANNELS: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write d_x, d_gate, and each program's share of the weight's and the bias's gradients.

    A program takes every n-th tile of n programs, and writes its shares to sums, (2, n, CHANNELS).
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = tl.arange(0, BLOCK)
    in_c = c < CHANNELS
    w = tl.load(weight + c, mask=in_c, other=0.0)
    if GATED:
        b = tl.load(bias + c, mask=in_c, other=0.0)
    d_w = tl.zeros([ROWS, BLOCK], tl.float32)
    d_b = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        r = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (r < rows)[:, None] & in_c[None, :]
        at = r[:, None] * CHANNELS + c[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        d_out = tl.load(d_y + at, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            z = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
        normed, scale = normalise(value, in_c, eps, CHANNELS)
        if GATED:
            opened = tl.sigmoid(z)
            slope = opened * (1.0 + z * (1.0 - opened))  # of silu
            d_z = d_out * (normed * w[None, :] + b[None, :]) * slope
            tl.store(d_gate + at, d_z.to(d_gate.dtype.element_ty), mask=inside)
            d_out *= z * opened
        d_w += d_out * normed
        d_b += d_out
        d_normed = d_out * w[None, :]
        along = tl.sum(d_normed * normed, 1) / CHANNELS
        shift = tl.sum(d_normed, 1) / CHANNELS
        d_value = (d_normed - shift[:, None] - normed * along[:, None]) * scale[:, None]
        tl.store(d_x + at, d_value.to(d_x.dtype.element_ty), mask=inside)
    share = program.to(tl.int64) * CHANNELS + c
    tl.store(sums + share, tl.sum(d_w, 0), mask=in_c)
    tl.store(sums + programs.to(tl.int64) * CHANNELS + share, tl.sum(d_b, 0), mask=in_c)
