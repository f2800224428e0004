"""The tasks of the `numba` backend: what part of the tensors a thread works on, in which order.

Letters as in `reference`. A task is some channels of one batch element, through all K groups and
all steps. Tasks share no memory that they write, and their number and extent depend on the shapes
only: so results are the same bits whatever the number of threads and their timing.

Every tensor is a flat array with a row of `strides`: those of batch, group, step, and channel (for
B and C: state). A group stride of 0 says that the groups share one tensor: all read the same
input, and outputs are summed.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit, prange

from mambaseg.scan import numba_lanes, numba_tiles
from mambaseg.scan.numba_lanes import LANES, empty_rows, store
from mambaseg.scan.numba_tiles import (
    STEPS,
    empty_tiles,
    finish_tile_gradients,
    load,
    load_parameter,
    load_tile,
    load_tiles,
    prefetch_tile,
    scan_tile,
    scan_tile_backward,
    store_parameter,
    store_tile,
    store_tiles,
    to_rates,
    to_steps,
    to_steps_and_slopes,
    work_tiles,
)

MOST_CHANNELS = 96
"""Channels per task: B and C are loaded, their gradients summed, once per task."""
TASKS = 8
"""How many tasks there should be, so that as many threads have work, before they grow larger."""
MOST_STATES = 4
"""States that are computed at once, in registers of their own."""

X, DELTA, B_, C_, Y = 0, 1, 2, 3, 4  # rows of `strides`
D_X, D_DELTA, D_B, D_C = 5, 6, 7, 8  # rows that the backward has in addition; Y is that of d_y


def channels_per_task(batch: int, channels: int) -> int:
    """Channels of a task: a function of the shape alone."""
    blocks = batch * ((channels + LANES - 1) // LANES)
    return LANES * min(MOST_CHANNELS // LANES, (blocks + TASKS - 1) // TASKS)


def states_at_once(states: int) -> tuple[int, ...]:
    """A tuple of as many elements as states are computed at once: 1, 2 or 4."""
    return (0,) * min(MOST_STATES, 1 << (states - 1).bit_length())


@njit
def _scan_channels(batch, first, extent, inputs, positions, strides, y, checkpoints, many):
    """Forward of `extent` channels from `first` on of one batch element."""
    x, delta, A, B, C, D, bias = inputs
    groups, channels, N = A.shape
    length = positions.shape[1]
    blocks = (min(extent, channels - first) + LANES - 1) // LANES
    h, skips = _parameter_tiles(blocks, N, many)
    rates, biases = _parameter_tiles(blocks, N, many)
    limits, _ = _parameter_tiles(blocks, N, many)
    B_tiles, C_tiles = _state_tiles(N), _state_tiles(N)
    tiles = empty_tiles(4)
    x_tile, y_tile, delta_tile, delta_x = tiles[0], tiles[1], tiles[2], tiles[3]
    for group in range(groups):
        base = batch * strides[:, 0] + group * strides[:, 1]
        add = group > 0 and strides[Y, 1] == 0
        _load_parameters(A, D, bias, group, first, rates, limits, skips, biases)
        h[:] = np.float32(0.0)
        for chunk in range((length + STEPS - 1) // STEPS):
            steps = min(STEPS, length - chunk * STEPS)
            walk = positions[group % positions.shape[0]]
            places = walk[chunk * STEPS : chunk * STEPS + steps]
            coming = walk[(chunk + 1) * STEPS : (chunk + 2) * STEPS]
            load_tiles(B, base[B_], strides[B_], places, N, B_tiles)
            load_tiles(C, base[C_], strides[C_], places, N, C_tiles)
            for block in range(blocks):
                channel = first + block * LANES
                width = min(LANES, channels - channel)
                if checkpoints.size:
                    for n in range(N):
                        store(checkpoints[batch, group, chunk, n], channel, load(h[block, n], 0))
                at = base + channel * strides[:, 3]
                load_tile(delta, at[DELTA], strides[DELTA], places, width, delta_tile)
                to_steps(delta_tile, biases[block], steps)
                load_tile(x, at[X], strides[X], places, width, x_tile)
                prefetch_tile(delta, at[DELTA], strides[DELTA], coming)
                prefetch_tile(x, at[X], strides[X], coming)
                prefetch_tile(y, at[Y], strides[Y], coming)
                scan_tile(
                    delta_tile, x_tile, rates[block], limits[block], B_tiles, C_tiles,
                    skips[block], h[block], steps, delta_x, y_tile, many,
                )  # fmt: skip
                store_tile(y, at[Y], strides[Y], places, width, y_tile, add)


@njit
def _scan_channels_backward(
    batch, first, extent, inputs, positions, strides, checkpoints, d_y, gradients, many
):
    """Gradient of `_scan_channels`; d_B and d_C are the parts that these channels contribute."""
    x, delta, A, B, C, D, bias = inputs
    d_x, d_delta, d_A, d_B, d_C, d_D, d_bias = gradients
    groups, channels, N = A.shape
    length = positions.shape[1]
    blocks = (min(extent, channels - first) + LANES - 1) // LANES
    h, skips = _parameter_tiles(blocks, N, many)
    rates, biases = _parameter_tiles(blocks, N, many)
    d_h, d_skips = _parameter_tiles(blocks, N, many)
    d_rates, d_biases = _parameter_tiles(blocks, N, many)
    limits, _ = _parameter_tiles(blocks, N, many)
    B_tiles, C_tiles = _state_tiles(N), _state_tiles(N)
    d_B_tiles, d_C_tiles = _state_tiles(N), _state_tiles(N)
    tiles = empty_tiles(6 + work_tiles(many))
    x_tile, d_y_tile, delta_tile, slopes = tiles[0], tiles[1], tiles[2], tiles[3]
    d_delta_x, d_exponent, work = tiles[4], tiles[5], tiles[6:]
    for group in range(groups):
        base = batch * strides[:, 0] + group * strides[:, 1]
        add = group > 0 and strides[D_X, 1] == 0
        _load_parameters(A, D, bias, group, first, rates, limits, skips, biases)
        for gradient in (d_h, d_rates, d_skips, d_biases):
            gradient[:] = np.float32(0.0)
        for chunk in range((length + STEPS - 1) // STEPS - 1, -1, -1):
            steps = min(STEPS, length - chunk * STEPS)
            walk = positions[group % positions.shape[0]]
            places = walk[chunk * STEPS : chunk * STEPS + steps]
            coming = walk[max(chunk - 1, 0) * STEPS : chunk * STEPS]
            load_tiles(B, base[B_], strides[B_], places, N, B_tiles)
            load_tiles(C, base[C_], strides[C_], places, N, C_tiles)
            d_B_tiles[:] = np.float32(0.0)
            d_C_tiles[:] = np.float32(0.0)
            for block in range(blocks):
                channel = first + block * LANES
                width = min(LANES, channels - channel)
                for n in range(N):
                    store(h[block], n * LANES, load(checkpoints[batch, group, chunk, n], channel))
                at = base + channel * strides[:, 3]
                load_tile(delta, at[DELTA], strides[DELTA], places, width, delta_tile)
                to_steps_and_slopes(delta_tile, biases[block], steps, slopes)
                load_tile(x, at[X], strides[X], places, width, x_tile)
                load_tile(d_y, at[Y], strides[Y], places, width, d_y_tile)
                prefetch_tile(delta, at[DELTA], strides[DELTA], coming)
                prefetch_tile(x, at[X], strides[X], coming)
                prefetch_tile(d_y, at[Y], strides[Y], coming)
                prefetch_tile(d_x, at[D_X], strides[D_X], coming)
                scan_tile_backward(
                    delta_tile, x_tile, rates[block], limits[block], B_tiles, C_tiles, h[block],
                    steps, d_y_tile, d_h[block], work, d_delta_x, d_exponent, d_rates[block],
                    d_B_tiles, d_C_tiles, many,
                )  # fmt: skip
                finish_tile_gradients(
                    delta_tile, slopes, x_tile, skips[block], d_y_tile, steps, d_delta_x,
                    d_exponent, d_skips[block], d_biases[block],
                )  # fmt: skip
                store_tile(d_x, at[D_X], strides[D_X], places, width, d_delta_x, add)
                store_tile(d_delta, at[D_DELTA], strides[D_DELTA], places, width, d_exponent, False)
            store_tiles(d_B, base[D_B], strides[D_B], places, N, d_B_tiles)
            store_tiles(d_C, base[D_C], strides[D_C], places, N, d_C_tiles)
        for block in range(blocks):
            channel = first + block * LANES
            store_parameter(d_A, group, channel, d_rates[block])
            store_parameter(d_D, group, channel, d_skips[block])
            store_parameter(d_bias, group, channel, d_biases[block])


@njit
def _parameter_tiles(blocks, N, many):
    """Zeros: a tile (blocks, N, lane), N filled up to whole vectors, and one (blocks, 1, lane)."""
    whole = (N + len(many) - 1) // len(many) * len(many)
    large = empty_rows(blocks * whole).reshape(blocks, whole, LANES)
    small = empty_rows(blocks).reshape(blocks, 1, LANES)
    large[:] = np.float32(0.0)
    small[:] = np.float32(0.0)
    return large, small


@njit
def _state_tiles(N):
    """Tiles (step, state) for B, C or a gradient of them."""
    return empty_tiles((N + LANES - 1) // LANES)


@njit
def _load_parameters(A, D, bias, group, first, rates, limits, skips, biases):
    """Load the parameters of all blocks of a task."""
    for block in range(len(rates)):
        channel = first + block * LANES
        load_parameter(A, group, channel, rates[block])
        to_rates(rates[block], limits[block])
        load_parameter(D, group, channel, skips[block])
        load_parameter(bias, group, channel, biases[block])


def _compile(sources: str) -> tuple[Any, Any]:
    """The two entry points, compiled at their first call and kept in numba's disk cache.

    numba's cache looks at the file and at the closure of a function, not at the other files whose
    functions were inlined: the digest of these is in the closure, so that a change is noticed.
    """

    @njit(parallel=True, cache=True)
    def scan(inputs, positions, strides, batch, extent, y, checkpoints, many):
        _ = sources
        tasks = (inputs[2].shape[1] + extent - 1) // extent
        for index in prange(batch * tasks):
            one, part = index // tasks, index % tasks
            _scan_channels(
                one, part * extent, extent, inputs, positions, strides, y, checkpoints, many
            )  # fmt: skip

    @njit(parallel=True, cache=True)
    def scan_backward(inputs, positions, strides, batch, extent, checkpoints, d_y, gradients, many):
        _ = sources
        d_x, d_delta, d_A, d_B, d_C, d_D, d_bias = gradients
        tasks = (inputs[2].shape[1] + extent - 1) // extent
        for index in prange(batch * tasks):
            one, part = index // tasks, index % tasks
            _scan_channels_backward(
                one, part * extent, extent, inputs, positions, strides, checkpoints, d_y,
                (d_x, d_delta, d_A[one], d_B[part], d_C[part], d_D[one], d_bias[one]), many,
            )  # fmt: skip

    return scan, scan_backward


def _digest(*paths: str) -> str:
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()


scan, scan_backward = _compile(_digest(numba_lanes.__file__, numba_tiles.__file__))
