"""The scan and its gradient on small tiles (step, lane), and the way between memory and tiles.

Letters as in `reference`. A sequence of LANES channels is cut into chunks of `STEPS` steps; what a
chunk needs is copied into tiles that stay in the nearest caches, and all arithmetic happens there.
Where the elements of a tile lie in memory is told by strides and by a table of positions, one per
step: the same code serves sequences and images walked in four directions, and no tensor is ever
flipped or transposed. B and C, and their gradients, are tiles (step, state).
"""

import math

import numpy as np
from numba import njit

from mambaseg.scan.numba_lanes import (
    LANES,
    LEAST,
    LOG2_E,
    add_sums_over_lanes,
    empty_rows,
    exp2_of_product,
    load_states,
    prefetch,
    repeat,
    softplus_and_slope,
    splat,
    splat_states,
    store,
    sum_states,
    transpose,
)

STEPS = 64
"""Steps per chunk; the state before each chunk is kept for the backward. A multiple of LANES."""
ROWS = STEPS + 17
"""Rows per tile, STEPS of them in use (one more for states). The others keep tiles that are worked
on together apart: were they 4096 bytes apart, as 64 rows are, or one row more, then a load would
wait for a store of another tile that only shares the last 12 bits of its address (a quarter of the
time)."""
LINE = 16
"""Numbers in a cache line."""

MOST_RATE = np.float32(1e30)  # infinite ones would make NaN of steps that are cut to zero
LN_2 = np.float32(np.log(2.0))
ONE = (0,)


@njit
def load(array, offset):
    """The LANES numbers from an offset on, counted in numbers, of a contiguous array."""
    return load_states(array, offset, ONE)


@njit
def empty_tiles(count):
    """Uninitialised tiles, (count, ROWS, lane)."""
    return empty_rows(count * ROWS).reshape(count, ROWS, LANES)


@njit
def is_straight(positions):
    """Do the steps follow each other in memory?"""
    jumps = 0
    for t in range(positions.size):
        jumps |= positions[t] - positions[0] - t
    return jumps == 0


@njit
def load_tile(memory, base, strides, positions, channels, tile):
    """Copy steps x channels into a tile; what is beyond them becomes zero.

    `base` is the offset of the first channel in the flat `memory`, `strides` those of batch, group,
    step and channel, `positions` the places of the steps.
    """
    steps, step_stride, channel_stride = positions.size, strides[2], strides[3]
    if channel_stride == 1 and channels == LANES:
        for t in range(steps):
            store(tile, t * LANES, load(memory, base + positions[t] * step_stride))
    elif step_stride == 1 and channels == LANES and steps == STEPS and is_straight(positions):
        for t in range(0, steps, LANES):
            start = base + positions[0] + t
            transpose(memory, start, channel_stride, tile, t * LANES, LANES)
    else:
        for t in range(steps):
            start = base + positions[t] * step_stride
            for lane in range(LANES):
                value = np.float32(0.0)
                if lane < channels:
                    value = memory[start + lane * channel_stride]
                tile[t, lane] = value
    for t in range(steps, STEPS):
        store(tile, t * LANES, splat(np.float32(0.0)))


@njit
def prefetch_tile(memory, base, strides, positions):
    """Ask for the tile that comes next; it may be pages away from this one."""
    step_stride, channel_stride = strides[2], strides[3]
    if channel_stride == 1:
        for t in range(positions.size):
            prefetch(memory, base + positions[t] * step_stride)
    elif step_stride == 1:
        for lane in range(LANES):
            for t in range(0, positions.size, LINE):
                prefetch(memory, base + lane * channel_stride + positions[t])


@njit
def store_tile(memory, base, strides, positions, channels, tile, add):
    """Copy, or add, a tile to memory."""
    steps, step_stride, channel_stride = positions.size, strides[2], strides[3]
    if channel_stride == 1 and channels == LANES:
        for t in range(steps):
            start = base + positions[t] * step_stride
            value = load(tile, t * LANES)
            if add:
                value = value + load(memory, start)
            store(memory, start, value)
    elif (
        step_stride == 1 and channels == LANES and steps == STEPS and not add
        and is_straight(positions)
    ):  # fmt: skip
        for t in range(0, steps, LANES):
            start = base + positions[0] + t
            transpose(tile, t * LANES, LANES, memory, start, channel_stride)
    else:
        for t in range(steps):
            start = base + positions[t] * step_stride
            for lane in range(channels):
                index = start + lane * channel_stride
                memory[index] = tile[t, lane] + (memory[index] if add else np.float32(0.0))


@njit
def load_tiles(memory, base, strides, positions, states, tiles):
    """Copy B or C of some steps into tiles (step, state), LANES states in each."""
    for i in range(len(tiles)):
        first = i * LANES
        start = base + first * strides[3]
        load_tile(memory, start, strides, positions, min(LANES, states - first), tiles[i])


@njit
def store_tiles(memory, base, strides, positions, states, tiles):
    """Copy tiles (step, state) to the gradient of B or C."""
    for i in range(len(tiles)):
        first = i * LANES
        start = base + first * strides[3]
        store_tile(memory, start, strides, positions, min(LANES, states - first), tiles[i], False)


@njit
def load_parameter(memory, group, first, tile):
    """Copy LANES channels of a parameter (K, D, N) into a tile (N, lane), zero beyond D and N."""
    tile[:] = np.float32(0.0)
    for n in range(memory.shape[2]):
        for lane in range(min(LANES, memory.shape[1] - first)):
            tile[n, lane] = memory[group, first + lane, n]


@njit
def to_rates(A, limits):
    """Turn A (N, lane) into the rates of powers of two, and find the longest steps they allow."""
    for n in range(A.shape[0]):
        for lane in range(LANES):
            rate = A[n, lane] * LOG2_E
            if rate != rate:
                rate = np.float32(np.nan)  # of all NaNs one that `exp2_of_product` passes on
            elif abs(rate) > MOST_RATE:
                rate = math.copysign(MOST_RATE, rate)
            A[n, lane] = rate
            limits[n, lane] = LEAST / abs(rate) if rate != 0.0 else np.float32(np.inf)


@njit
def store_parameter(memory, group, first, tile):
    """Copy a tile (N, lane) to the gradient of a parameter."""
    for n in range(memory.shape[2]):
        for lane in range(min(LANES, memory.shape[1] - first)):
            memory[group, first + lane, n] = tile[n, lane]


@njit
def to_steps(delta, bias, steps):
    """Turn a tile of raw delta into one of Δ = softplus(delta + bias), in place."""
    shift = load(bias, 0)
    for t in range(steps):
        at = t * LANES
        store(delta, at, softplus_and_slope(load(delta, at) + shift)[0])


@njit
def to_steps_and_slopes(delta, bias, steps, slopes):
    """Do as `to_steps`, and give the derivatives of Δ after delta."""
    shift = load(bias, 0)
    for t in range(steps):
        at = t * LANES
        step, slope = softplus_and_slope(load(delta, at) + shift)
        store(delta, at, step)
        store(slopes, at, slope)


# ------------------------------------------------------------------ the scan of one tile


@njit
def scan_tile(delta, x, A, limits, B, C, D, h, steps, delta_x, y, many):
    """Compute y = C h + D x over the steps of a tile; h (N, lane) goes on from tile to tile.

    Several states at a time: they share what is loaded and stored, and none waits for another.
    """
    skip = load(D, 0)
    for t in range(steps):
        at = t * LANES
        store(delta_x, at, load(delta, at) * load(x, at))
        store(y, at, skip * load(x, at))
    for n in range(0, h.shape[0], len(many)):
        here, column = n * LANES, n // LANES * ROWS * LANES + n % LANES
        rate, limit = load_states(A, here, many), load_states(limits, here, many)
        state = load_states(h, here, many)
        for t in range(steps):
            at = t * LANES
            decay = exp2_of_product(repeat(load(delta, at), many), rate, limit)
            inflow = repeat(load(delta_x, at), many) * splat_states(B, column + at, many)
            state = decay * state + inflow
            out = sum_states(state * splat_states(C, column + at, many))
            store(y, at, load(y, at) + out)
        store(h, here, state)


@njit
def recompute_states(delta, delta_x, rate, limit, state, B, column, steps, states, decays, many):
    """Keep what the backward needs: h before and after every step, and the decays."""
    store(states, 0, state)
    for t in range(steps):
        at, wide = t * LANES, t * LANES * len(many)
        decay = exp2_of_product(repeat(load(delta, at), many), rate, limit)
        inflow = repeat(load(delta_x, at), many) * splat_states(B, column + at, many)
        state = decay * state + inflow
        store(decays, wide, decay)
        store(states, wide + LANES * len(many), state)


@njit
def scan_tile_backward(
    delta, x, A, limits, B, C, h, steps, d_y, d_h, work, d_delta_x, d_exponent, d_A, d_B, d_C, many
):
    """Gradients of `scan_tile`, several states at a time: forwards to recompute h, then backwards.

    d_h (N, lane) comes from the tile behind and goes on to the one before; d_A, d_B and d_C add up.
    d_delta_x is the gradient of Δ u, d_exponent that of Δ through exp2(Δ A). `work` is scratch of
    `work_tiles(many)` tiles.
    """
    delta_x, decays, states = work[0], work[1], work[1 + len(many) :]
    zero = splat(np.float32(0.0))
    for t in range(steps):
        at = t * LANES
        store(delta_x, at, load(delta, at) * load(x, at))
        store(d_delta_x, at, zero)
        store(d_exponent, at, zero)
    for n in range(0, h.shape[0], len(many)):
        here, column = n * LANES, n // LANES * ROWS * LANES + n % LANES
        rate, limit = load_states(A, here, many), load_states(limits, here, many)
        recompute_states(
            delta, delta_x, rate, limit, load_states(h, here, many), B, column, steps, states,
            decays, many,
        )  # fmt: skip
        d_state, d_rate = load_states(d_h, here, many), load_states(d_A, here, many)
        for t in range(steps - 1, -1, -1):
            at, wide = t * LANES, t * LANES * len(many)
            d_out = repeat(load(d_y, at), many)
            after = load_states(states, wide + LANES * len(many), many)
            d_state = d_state + d_out * splat_states(C, column + at, many)
            add_sums_over_lanes(
                d_B, column + at, d_state * repeat(load(delta_x, at), many),
                d_C, column + at, d_out * after,
            )  # fmt: skip
            d_inflow = sum_states(d_state * splat_states(B, column + at, many))
            store(d_delta_x, at, load(d_delta_x, at) + d_inflow)
            d_state = d_state * load_states(decays, wide, many)
            d_power = d_state * load_states(states, wide, many)
            d_rate = d_rate + d_power * repeat(load(delta, at), many)
            store(d_exponent, at, load(d_exponent, at) + sum_states(d_power * rate))
        store(d_h, here, d_state)
        store(d_A, here, d_rate)


@njit
def work_tiles(many):
    """Tiles of scratch that `scan_tile_backward` wants."""
    return 1 + 2 * len(many)


@njit
def finish_tile_gradients(delta, slopes, x, D, d_y, steps, d_delta_x, d_exponent, d_D, d_bias):
    """Turn gradients of Δ u and Δ A into those of u (in d_delta_x) and delta (in d_exponent)."""
    skip = load(D, 0)
    d_skip = load(d_D, 0)
    d_shift = load(d_bias, 0)
    for t in range(steps):
        at = t * LANES
        d_product = load(d_delta_x, at)
        d_step = load(d_exponent, at) * splat(LN_2) + d_product * load(x, at)
        d_raw = d_step * load(slopes, at)
        store(d_exponent, at, d_raw)
        store(d_delta_x, at, d_product * load(delta, at) + skip * load(d_y, at))
        d_shift = d_shift + d_raw
        d_skip = d_skip + load(d_y, at) * load(x, at)
    store(d_D, 0, d_skip)
    store(d_bias, 0, d_shift)
