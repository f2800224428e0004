"""The scan and its gradient on small tiles (step, lane), and the way between memory and tiles.

Letters as in `reference`. A sequence of 16 channels is cut into chunks of `STEPS` steps; what a
chunk needs is copied into tiles that stay in the first-level cache, and all arithmetic happens
there. Where the elements of a tile lie in memory is told by strides and by a table of positions,
one per step: the same code serves sequences and images walked in four directions, and no tensor is
ever flipped or transposed.
"""

from typing import Any

import numpy as np
from numba import njit

from mambaseg.scan.numba_lanes import (
    LANES,
    exp2,
    load,
    softplus_and_slope,
    splat,
    store,
    sum_rows,
)

STEPS = 64
"""Steps per chunk; the state before each chunk is kept for the backward. A multiple of LANES."""

Array = Any  # a numba array

LN_2 = np.float32(np.log(2.0))


@njit
def load_tile(
    memory: Array, base: int, strides: Array, positions: Array, channels: int, tile: Array
) -> None:
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
    for t in range(steps, tile.shape[0]):
        store(tile, t * LANES, splat(np.float32(0.0)))


@njit
def store_tile(
    memory: Array,
    base: int,
    strides: Array,
    positions: Array,
    channels: int,
    tile: Array,
    add: bool,
) -> None:
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
def load_states(memory: Array, base: int, strides: Array, positions: Array, rows: Array) -> None:
    """Copy B or C of some steps into rows (state, step), zero beyond the steps."""
    steps, step_stride, state_stride = positions.size, strides[2], strides[3]
    for n in range(rows.shape[0]):
        for t in range(steps):
            rows[n, t] = memory[base + positions[t] * step_stride + n * state_stride]
        for t in range(steps, rows.shape[1]):
            rows[n, t] = np.float32(0.0)


@njit
def store_states(memory: Array, base: int, strides: Array, positions: Array, rows: Array) -> None:
    """Copy rows (state, step) to the gradient of B or C."""
    steps, step_stride, state_stride = positions.size, strides[2], strides[3]
    for t in range(steps):
        start = base + positions[t] * step_stride
        for n in range(rows.shape[0]):
            memory[start + n * state_stride] = rows[n, t]


@njit
def load_parameter(memory: Array, group: int, first: int, scale: float, tile: Array) -> None:
    """Copy 16 channels of a parameter (K, D, N) into a tile (N, lane), zero beyond D."""
    for n in range(tile.shape[0]):
        for lane in range(LANES):
            value = np.float32(0.0)
            if first + lane < memory.shape[1]:
                value = memory[group, first + lane, n] * scale
            tile[n, lane] = value


@njit
def store_parameter(memory: Array, group: int, first: int, tile: Array) -> None:
    """Copy a tile (N, lane) to the gradient of a parameter."""
    for n in range(tile.shape[0]):
        for lane in range(min(LANES, memory.shape[1] - first)):
            memory[group, first + lane, n] = tile[n, lane]


@njit
def load_steps(
    delta: Array,
    base: int,
    strides: Array,
    positions: Array,
    channels: int,
    bias: Array,
    tile: Array,
    slopes: Array,
) -> None:
    """Load raw delta as a tile of softplus(delta + bias), zero beyond the steps, and its slopes."""
    load_tile(delta, base, strides, positions, channels, tile)
    shift = load(bias, 0)
    for t in range(positions.size):
        softplus, slope = softplus_and_slope(load(tile, t * LANES) + shift)
        store(tile, t * LANES, softplus)
        store(slopes, t * LANES, slope)


# ------------------------------------------------------------------ the scan of one tile


@njit
def scan_tile(
    delta: Array,
    x: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array,
    h: Array,
    steps: int,
    delta_x: Array,
    y: Array,
) -> None:
    """Compute y = C h + D x over the steps of a tile; h (N, lane) goes on from tile to tile."""
    skip = load(D, 0)
    for t in range(steps):
        at = t * LANES
        store(delta_x, at, load(delta, at) * load(x, at))
        store(y, at, skip * load(x, at))
    for n in range(h.shape[0]):
        rate = load(A, n * LANES)
        state = load(h, n * LANES)
        for t in range(steps):
            at = t * LANES
            decay = exp2(load(delta, at) * rate)
            state = decay * state + load(delta_x, at) * splat(B[n, t])
            store(y, at, load(y, at) + state * splat(C[n, t]))
        store(h, n * LANES, state)


@njit
def scan_tile_backward(
    delta: Array,
    x: Array,
    A: Array,
    B: Array,
    C: Array,
    h: Array,
    steps: int,
    d_y: Array,
    d_h: Array,
    delta_x: Array,
    states: Array,
    decays: Array,
    products: Array,
    d_delta_x: Array,
    d_exponent: Array,
    d_A: Array,
    d_B: Array,
    d_C: Array,
) -> None:
    """Gradients of `scan_tile`, state by state: forwards to recompute h, then backwards.

    d_h (N, lane) comes from the tile behind and goes on to the one before; d_A, d_B and d_C add up.
    d_delta_x is the gradient of Δ u, d_exponent that of Δ through exp2(Δ A).
    """
    zero = splat(np.float32(0.0))
    for t in range(steps):
        at = t * LANES
        store(delta_x, at, load(delta, at) * load(x, at))
        store(d_delta_x, at, zero)
        store(d_exponent, at, zero)
    for n in range(h.shape[0]):
        rate = load(A, n * LANES)
        state = load(h, n * LANES)
        store(states, 0, state)
        for t in range(steps):
            at = t * LANES
            decay = exp2(load(delta, at) * rate)
            state = decay * state + load(delta_x, at) * splat(B[n, t])
            store(decays, at, decay)
            store(states, at + LANES, state)
        d_state = load(d_h, n * LANES)
        d_rate = load(d_A, n * LANES)
        for first in range((steps - 1) // LANES * LANES, -1, -LANES):
            present = min(LANES, steps - first)
            for i in range(present, LANES):
                store(products, i * LANES, zero)
                store(products, (LANES + i) * LANES, zero)
            for i in range(present - 1, -1, -1):
                t = first + i
                at = t * LANES
                d_out = load(d_y, at)
                d_state = d_state + d_out * splat(C[n, t])
                store(products, i * LANES, d_out * load(states, at + LANES))
                store(products, (LANES + i) * LANES, d_state * load(delta_x, at))
                store(d_delta_x, at, load(d_delta_x, at) + d_state * splat(B[n, t]))
                d_state = d_state * load(decays, at)
                d_power = d_state * load(states, at)
                d_rate = d_rate + d_power * load(delta, at)
                store(d_exponent, at, load(d_exponent, at) + d_power * rate)
            at = n * STEPS + first
            store(d_C, at, load(d_C, at) + sum_rows(products, 0))
            store(d_B, at, load(d_B, at) + sum_rows(products, LANES * LANES))
        store(d_h, n * LANES, d_state)
        store(d_A, n * LANES, d_rate)


@njit
def finish_tile_gradients(
    delta: Array,
    slopes: Array,
    x: Array,
    D: Array,
    d_y: Array,
    steps: int,
    d_delta_x: Array,
    d_exponent: Array,
    d_D: Array,
    d_bias: Array,
) -> None:
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
