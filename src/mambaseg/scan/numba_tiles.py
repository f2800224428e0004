"""The scan and its gradient on small tiles (step, lane), and the way between memory and tiles.

Letters as in `reference`. A sequence of 16 channels is cut into chunks of `STEPS` steps; what a
chunk needs is copied into tiles that stay in the first-level cache, and all arithmetic happens
there. Where the elements of a tile lie in memory is told by strides and by a table of positions,
one per step: the same code serves sequences and images walked in four directions, and no tensor is
ever flipped or transposed.
"""

import numpy as np
from numba import njit

from mambaseg.scan.numba_lanes import (
    LANES,
    empty_rows,
    exp2,
    load,
    softplus_and_slope,
    splat,
    store,
    sum_rows,
)

STEPS = 64
"""Steps per chunk; the state before each chunk is kept for the backward. A multiple of LANES."""
ROWS = STEPS + 17
"""Rows per tile, STEPS of them in use (one more for states). The others keep tiles that are worked
on together apart: were they 4096 bytes apart, as 64 rows are, or one row more, then a load would
wait for a store of another tile that only shares the last 12 bits of its address (a quarter of the
time)."""
WORK_TILES = 6
"""Tiles of scratch that `scan_tile_backward` wants."""
SQUARE = LANES * LANES

LN_2 = np.float32(np.log(2.0))


@njit
def empty_tiles(count):
    """Uninitialised tiles, (count, ROWS, lane)."""
    return empty_rows(count * ROWS).reshape(count, ROWS, LANES)


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
    else:
        for t in range(steps):
            start = base + positions[t] * step_stride
            for lane in range(channels):
                index = start + lane * channel_stride
                memory[index] = tile[t, lane] + (memory[index] if add else np.float32(0.0))


@njit
def load_states(memory, base, strides, positions, states, rows):
    """Copy B or C of some steps into rows (state, step), zero beyond the steps and the states."""
    steps, step_stride, state_stride = positions.size, strides[2], strides[3]
    rows[:, steps:] = np.float32(0.0)
    rows[states:] = np.float32(0.0)
    for t in range(steps):
        start = base + positions[t] * step_stride
        if state_stride == 1 and states == LANES:
            for n in range(LANES):
                rows[n, t] = memory[start + n]
        else:
            for n in range(states):
                rows[n, t] = memory[start + n * state_stride]


@njit
def store_states(memory, base, strides, positions, states, rows):
    """Copy rows (state, step) to the gradient of B or C."""
    steps, step_stride, state_stride = positions.size, strides[2], strides[3]
    for t in range(steps):
        start = base + positions[t] * step_stride
        for n in range(states):
            memory[start + n * state_stride] = rows[n, t]


@njit
def load_parameter(memory, group, first, scale, tile):
    """Copy 16 channels of a parameter (K, D, N) into a tile (N, lane), zero beyond D and N."""
    tile[:] = np.float32(0.0)
    for n in range(memory.shape[2]):
        for lane in range(min(LANES, memory.shape[1] - first)):
            tile[n, lane] = memory[group, first + lane, n] * scale


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
def scan_tile(delta, x, A, B, C, D, h, steps, delta_x, y):
    """Compute y = C h + D x over the steps of a tile; h (N, lane) goes on from tile to tile.

    Two states at a time: they share what is loaded and stored, and neither waits for the other.
    """
    skip = load(D, 0)
    for t in range(steps):
        at = t * LANES
        store(delta_x, at, load(delta, at) * load(x, at))
        store(y, at, skip * load(x, at))
    for n in range(0, h.shape[0], 2):
        here, next_ = n * LANES, (n + 1) * LANES
        rate0, rate1 = load(A, here), load(A, next_)
        state0, state1 = load(h, here), load(h, next_)
        for first in range(0, steps, LANES):
            for t in range(first, first + LANES):
                at = t * LANES
                step, inflow = load(delta, at), load(delta_x, at)
                state0 = exp2(step * rate0) * state0 + inflow * splat(B[n, t])
                state1 = exp2(step * rate1) * state1 + inflow * splat(B[n + 1, t])
                out = state0 * splat(C[n, t]) + state1 * splat(C[n + 1, t])
                store(y, at, load(y, at) + out)
        store(h, here, state0)
        store(h, next_, state1)


@njit
def recompute_states(delta, delta_x, rate, state, B_row, steps, states, decays):
    """Keep what the backward needs of one state: h before and after every step, and its decays."""
    store(states, 0, state)
    for first in range(0, steps, LANES):
        for t in range(first, first + LANES):
            at = t * LANES
            decay = exp2(load(delta, at) * rate)
            state = decay * state + load(delta_x, at) * splat(B_row[t])
            store(decays, at, decay)
            store(states, at + LANES, state)


@njit
def scan_tile_backward(
    delta, x, A, B, C, h, steps, d_y, d_h, work, d_delta_x, d_exponent, d_A, d_B, d_C
):
    """Gradients of `scan_tile`, two states at a time: forwards to recompute h, then backwards.

    d_h (N, lane) comes from the tile behind and goes on to the one before; d_A, d_B and d_C add up.
    d_delta_x is the gradient of Δ u, d_exponent that of Δ through exp2(Δ A). `work` is scratch of
    `WORK_TILES` tiles.
    """
    delta_x, decays0, decays1 = work[0], work[1], work[2]
    states0, states1, products = work[3], work[4], work[5]
    zero = splat(np.float32(0.0))
    for t in range(steps):
        at = t * LANES
        store(delta_x, at, load(delta, at) * load(x, at))
        store(d_delta_x, at, zero)
        store(d_exponent, at, zero)
    for n in range(0, h.shape[0], 2):
        here, next_ = n * LANES, (n + 1) * LANES
        rate0, rate1 = load(A, here), load(A, next_)
        recompute_states(delta, delta_x, rate0, load(h, here), B[n], steps, states0, decays0)
        recompute_states(delta, delta_x, rate1, load(h, next_), B[n + 1], steps, states1, decays1)
        d_state0, d_state1 = load(d_h, here), load(d_h, next_)
        d_rate0, d_rate1 = load(d_A, here), load(d_A, next_)
        after0, after1 = load(states0, steps * LANES), load(states1, steps * LANES)
        for first in range((steps - 1) // LANES * LANES, -1, -LANES):
            present = min(LANES, steps - first)
            if present < LANES:  # at the end of a sequence: sums of rows that are not there
                products[:] = np.float32(0.0)
            for i in range(present - 1, -1, -1):
                t = first + i
                at, row = t * LANES, i * LANES
                step, inflow, d_out = load(delta, at), load(delta_x, at), load(d_y, at)
                d_inflow, d_power = load(d_delta_x, at), load(d_exponent, at)
                decay0, decay1 = load(decays0, at), load(decays1, at)
                before0, before1 = load(states0, at), load(states1, at)
                d_state0 = d_state0 + d_out * splat(C[n, t])
                d_state1 = d_state1 + d_out * splat(C[n + 1, t])
                d_inflow = d_inflow + (d_state0 * splat(B[n, t]) + d_state1 * splat(B[n + 1, t]))
                store(products, row, d_out * after0)
                store(products, row + SQUARE, d_out * after1)
                store(products, row + 2 * SQUARE, d_state0 * inflow)
                store(products, row + 3 * SQUARE, d_state1 * inflow)
                d_state0, d_state1 = d_state0 * decay0, d_state1 * decay1
                d_power0, d_power1 = d_state0 * before0, d_state1 * before1
                d_rate0, d_rate1 = d_rate0 + d_power0 * step, d_rate1 + d_power1 * step
                store(d_delta_x, at, d_inflow)
                store(d_exponent, at, d_power + (d_power0 * rate0 + d_power1 * rate1))
                after0, after1 = before0, before1
            at, below = n * STEPS + first, (n + 1) * STEPS + first
            store(d_C, at, load(d_C, at) + sum_rows(products, 0))
            store(d_C, below, load(d_C, below) + sum_rows(products, SQUARE))
            store(d_B, at, load(d_B, at) + sum_rows(products, 2 * SQUARE))
            store(d_B, below, load(d_B, below) + sum_rows(products, 3 * SQUARE))
        store(d_h, here, d_state0)
        store(d_h, next_, d_state1)
        store(d_A, here, d_rate0)
        store(d_A, next_, d_rate1)


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
