"""The loops of the `triton` backend, and how a program finds its way through an image.

Letters as in `reference`. A program owns BLOCK_D channels of one batch element and one direction,
and goes through all L steps with its states [N, BLOCK_D] in registers: the channels lie along the
lanes, so that reads are coalesced in every direction and the recurrence needs no exchange between
lanes. Inputs are read UNROLL steps ahead of the arithmetic, because a read takes far longer.

Every tensor is contiguous, with its positions in the order of the image and the direction behind
them: (B, L, K, D), and N in place of D for B and C. x and d_y may have one group that all
directions share. `rates` is A log2(e), so that exp(Δ A) = exp2(Δ rates). Channels beyond D and
states beyond N read zero: they do nothing, and are not written.
"""

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softplus_and_slope(z):
    """log(1 + exp(z)) and its derivative, both accurate to single precision in both tails."""
    w = tl.exp2(-tl.abs(z) * LOG2_E)  # exp(-|z|), in (0, 1]
    # log(1 + w) = 2 artanh(s) = 2 (s + s^3/3 + s^5/5 + ...) with s = w / (2 + w) <= 1/3
    s = w / (2.0 + w)
    square = s * s
    series = 2.0 / 15.0
    series = series * square + 2.0 / 13.0
    series = series * square + 2.0 / 11.0
    series = series * square + 2.0 / 9.0
    series = series * square + 2.0 / 7.0
    series = series * square + 2.0 / 5.0
    series = series * square + 2.0 / 3.0
    series = series * square + 2.0
    positive = z > 0.0
    softplus = tl.where(positive, z, 0.0) + s * series
    slope = tl.where(positive, 1.0, w) / (1.0 + w)
    return softplus, slope


@triton.jit
def route(direction, height, width):
    """Give the way of a direction: positions per line, the step along it, the jump to the next."""
    down = direction % 2 == 1
    line = tl.where(down, height, width)
    step = tl.where(down, width, 1)
    jump = tl.where(down, 1 - (height - 1) * width, 1)
    sign = tl.where(direction >= 2, -1, 1)
    return line, step * sign, jump * sign


@triton.jit
def place_of(t, direction, height, width):
    """Give the position of step t, and how far into its line that is."""
    down = direction % 2 == 1
    line = tl.where(down, height, width)
    offset = t % line
    place = tl.where(down, offset * width + t // line, t)
    return tl.where(direction >= 2, height * width - 1 - place, place), offset


@triton.jit
def step_on(place, offset, line, step, jump):
    """Give the next position on a route, and how far into its line that is."""
    last = offset + 1 == line
    return place + tl.where(last, jump, step), tl.where(last, 0, offset + 1)


@triton.jit
def step_back(place, offset, line, step, jump):
    """Give the position before, and how far into its line that is; undoes `step_on`."""
    first = offset == 0
    return place - tl.where(first, jump, step), tl.where(first, line - 1, offset - 1)


@triton.jit
def read_step(x, delta, B, in_d, in_n, valid):
    """Read what moves the states in one step; zeros for a step that is not valid."""
    return (
        tl.load(x, mask=in_d & valid, other=0.0),
        tl.load(delta, mask=in_d & valid, other=0.0),
        tl.load(B, mask=in_n & valid, other=0.0),
    )


@triton.jit
def weigh_step(read, shift, valid):
    """Give Δ, its slope, u and B of a step that was read; Δ is zero if the step is not valid."""
    softplus, slope = softplus_and_slope(read[1].to(tl.float32) + shift)
    size = tl.where(valid, softplus, 0.0)  # so that the states stay as they are
    return size, slope, read[0].to(tl.float32), read[2].to(tl.float32)


@triton.jit
def move(h, size, rate, u, b):
    """Give the states after one step, [N, BLOCK_D], and the decay."""
    decay = tl.exp2(size[None, :] * rate)
    return decay * h + (size * u)[None, :] * b[:, None], decay


@triton.jit
def read_parameters(rates, skip, bias, d, n, channels, states):
    """Read the parameters of a program: rates [N, BLOCK_D], D and the bias of delta [BLOCK_D]."""
    group = tl.program_id(1)
    in_d, in_n = d < channels, n < states
    of_rates = group * states * channels + n[:, None] * channels + d[None, :]
    return (
        tl.load(rates + of_rates, mask=in_n[:, None] & in_d[None, :], other=0.0),
        tl.load(skip + group * channels + d, mask=in_d, other=0.0),
        tl.load(bias + group * channels + d, mask=in_d, other=0.0),
    )


# ------------------------------------------------------------------ forward


@triton.jit
def scan(
    x,
    delta,
    rates,
    B,
    C,
    skip,
    bias,
    y,
    starts,
    height,
    width,
    channels,
    states,
    IMAGE: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Forward; writes y of each direction, and to `starts` the states before each STEPS steps."""
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    groups, length = tl.num_programs(1), height * width
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, N)
    in_d, in_n = d < channels, n < states
    rate, weight, shift = read_parameters(rates, skip, bias, d, n, channels, states)
    step_d, step_n = groups * channels, groups * states  # from one position to the next
    step_x = channels if IMAGE else step_d
    x += batch * length * step_x + (0 if IMAGE else group * channels) + d
    delta += batch * length * step_d + group * channels + d
    y += batch * length * step_d + group * channels + d
    B += batch * length * step_n + group * states + n
    C += batch * length * step_n + group * states + n
    chunks = tl.cdiv(length, STEPS)
    starts += (batch * groups + group) * chunks * states * channels
    starts += n[:, None] * channels + d[None, :]

    line, step, jump = route(group * IMAGE, height, width)
    place, offset = place_of(0, group * IMAGE, height, width)
    h = tl.zeros([N, BLOCK_D], tl.float32)
    for chunk in range(chunks):
        tl.store(starts + chunk * states * channels, h, mask=in_n[:, None] & in_d[None, :])
        steps = tl.minimum(STEPS, length - chunk * STEPS)
        for first in range(0, steps, UNROLL):
            ahead = ()
            for i in tl.static_range(UNROLL):
                valid = first + i < steps
                at_d, at_n = place * step_d, place * step_n
                read = read_step(x + place * step_x, delta + at_d, B + at_n, in_d, in_n, valid)
                ahead += ((read, tl.load(C + at_n, mask=in_n & valid, other=0.0), at_d),)
                place, offset = step_on(place, offset, line, step, jump)
            for i in tl.static_range(UNROLL):
                valid = first + i < steps
                read, c, at_d = ahead[i]
                size, _, u, b = weigh_step(read, shift, valid)
                h, _ = move(h, size, rate, u, b)
                out = tl.sum(h * c.to(tl.float32)[:, None], axis=0) + weight * u
                tl.store(y + at_d, out.to(y.dtype.element_ty), mask=in_d & valid)


# ------------------------------------------------------------------ backward


@triton.jit
def recompute(
    h,
    x,
    delta,
    B,
    rate,
    shift,
    scratch,
    start,
    steps,
    height,
    width,
    step_x,
    step_d,
    step_n,
    in_d,
    in_n,
    direction,
    SIZE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Go through a chunk from its first states h; write those before each step to `scratch`."""
    line, step, jump = route(direction, height, width)
    place, offset = place_of(start, direction, height, width)
    for first in range(0, steps, UNROLL):
        ahead = ()
        for i in tl.static_range(UNROLL):
            at_x, at_d, at_n = place * step_x, place * step_d, place * step_n
            valid = first + i < steps
            ahead += (read_step(x + at_x, delta + at_d, B + at_n, in_d, in_n, valid),)
            place, offset = step_on(place, offset, line, step, jump)
        for i in tl.static_range(UNROLL):
            size, _, u, b = weigh_step(ahead[i], shift, first + i < steps)
            tl.store(scratch + (first + i) * SIZE, h)
            h, _ = move(h, size, rate, u, b)


@triton.jit
def step_gradients(d_h, before, size, slope, u, b, c, d_y, rate, weight):
    """Gradients of one step, from that of the states after it through later steps, d_h.

    Returns d_h of the step before; the gradients of u, delta, B and C; that of the rates over ln 2.
    """
    h, decay = move(before, size, rate, u, b)
    d_h += c[:, None] * d_y[None, :]
    d_c = tl.sum(h * d_y[None, :], axis=1)
    d_b = tl.sum(d_h * (size * u)[None, :], axis=1)
    d_inflow = tl.sum(d_h * b[:, None], axis=0)
    d_h *= decay
    d_power = d_h * before
    d_size = tl.sum(d_power * rate, axis=0) * LN_2 + d_inflow * u
    d_u = d_inflow * size + weight * d_y
    return d_h, d_u, d_size * slope, d_b, d_c, d_power * size[None, :]


@triton.jit
def scan_backward(
    x,
    delta,
    rates,
    B,
    C,
    skip,
    bias,
    starts,
    d_y,
    scratch,
    d_x,
    d_delta,
    d_rates,
    d_B,
    d_C,
    d_skip,
    d_bias,
    height,
    width,
    channels,
    states,
    IMAGE: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Backward, STEPS steps at a time: forwards to recompute their states, then backwards.

    `scratch` holds the states of STEPS steps for each program. Gradients of parameters are written
    per batch element, those of B and C per block of channels, that of x per direction: they are
    summed elsewhere.
    """
    block, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    groups, length, direction = tl.num_programs(1), height * width, tl.program_id(1) * IMAGE
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, N)
    in_d, in_n = d < channels, n < states
    in_nd = in_n[:, None] & in_d[None, :]
    rate, weight, shift = read_parameters(rates, skip, bias, d, n, channels, states)
    step_d, step_n = groups * channels, groups * states  # from one position to the next
    step_x = channels if IMAGE else step_d
    x += batch * length * step_x + (0 if IMAGE else group * channels) + d
    d_y += batch * length * step_x + (0 if IMAGE else group * channels) + d
    mine_d = batch * length * step_d + group * channels + d
    delta, d_x, d_delta = delta + mine_d, d_x + mine_d, d_delta + mine_d
    mine_n = batch * length * step_n + group * states + n
    part = tl.num_programs(2).to(tl.int64) * length * step_n * block
    B, C, d_B, d_C = B + mine_n, C + mine_n, d_B + part + mine_n, d_C + part + mine_n
    row = batch * groups + group  # of all tensors that start with (B, K)
    chunks = tl.cdiv(length, STEPS)
    starts += row * chunks * states * channels + n[:, None] * channels + d[None, :]
    scratch += (row * tl.num_programs(0) + block) * STEPS * N * BLOCK_D
    scratch += n[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]

    line, step, jump = route(direction, height, width)
    d_h = tl.zeros([N, BLOCK_D], tl.float32)
    d_rate = tl.zeros([N, BLOCK_D], tl.float32)
    d_weight = tl.zeros([BLOCK_D], tl.float32)
    d_shift = tl.zeros([BLOCK_D], tl.float32)
    for chunk in range(chunks - 1, -1, -1):
        steps = tl.minimum(STEPS, length - chunk * STEPS)
        h = tl.load(starts + chunk * states * channels, mask=in_nd, other=0.0)
        recompute(
            h, x, delta, B, rate, shift, scratch, chunk * STEPS, steps, height, width,
            step_x, step_d, step_n, in_d, in_n, direction, N * BLOCK_D, UNROLL,
        )  # fmt: skip
        tl.debug_barrier()  # all lanes have written their states
        whole = tl.cdiv(steps, UNROLL) * UNROLL
        place, offset = place_of(chunk * STEPS + whole - 1, direction, height, width)
        for first in range(0, whole, UNROLL):
            last = whole - 1 - first
            ahead = ()
            for i in tl.static_range(UNROLL):
                valid = last - i < steps
                at_x, at_d, at_n = place * step_x, place * step_d, place * step_n
                read = read_step(x + at_x, delta + at_d, B + at_n, in_d, in_n, valid)
                c = tl.load(C + at_n, mask=in_n & valid, other=0.0)
                d_out = tl.load(d_y + at_x, mask=in_d & valid, other=0.0)
                before = tl.load(scratch + (last - i) * N * BLOCK_D)
                ahead += ((read, c, d_out, before, at_d, at_n),)
                place, offset = step_back(place, offset, line, step, jump)
            for i in tl.static_range(UNROLL):
                valid = last - i < steps
                read, c, d_out, before, at_d, at_n = ahead[i]
                size, slope, u, b = weigh_step(read, shift, valid)
                c, d_out = c.to(tl.float32), d_out.to(tl.float32)
                d_h, d_u, d_raw, d_b, d_c, d_power = step_gradients(
                    d_h, before, size, slope, u, b, c, d_out, rate, weight
                )
                tl.store(d_x + at_d, d_u.to(d_x.dtype.element_ty), mask=in_d & valid)
                tl.store(d_delta + at_d, d_raw.to(d_delta.dtype.element_ty), mask=in_d & valid)
                tl.store(d_B + at_n, d_b, mask=in_n & valid)
                tl.store(d_C + at_n, d_c, mask=in_n & valid)
                d_rate += d_power
                d_shift += tl.where(valid, d_raw, 0.0)
                d_weight += d_out * u
        tl.debug_barrier()  # all lanes have read their states
    at_rates = row * states * channels + n[:, None] * channels + d[None, :]
    tl.store(d_rates + at_rates, d_rate * LN_2, mask=in_nd)
    tl.store(d_skip + row * channels + d, d_weight, mask=in_d)
    tl.store(d_bias + row * channels + d, d_shift, mask=in_d)
