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
from mambaseg.scan.numba_lanes import LANES, LOG2_E, empty_rows, load, store
from mambaseg.scan.numba_tiles import (
    STEPS,
    WORK_TILES,
    empty_tiles,
    finish_tile_gradients,
    load_parameter,
    load_states,
    load_tile,
    scan_tile,
    scan_tile_backward,
    store_parameter,
    store_states,
    store_tile,
    to_steps,
    to_steps_and_slopes,
)

MOST_BLOCKS = 6
"""Blocks of LANES channels per task: B and C are loaded, their gradients summed, once per task."""
TASKS = 8
"""How many tasks there should be, so that as many threads have work, before they grow larger."""

X, DELTA, B_, C_, Y = 0, 1, 2, 3, 4  # rows of `strides`
D_X, D_DELTA, D_B, D_C = 5, 6, 7, 8  # rows that the backward has in addition; Y is that of d_y


def channels_per_task(batch: int, channels: int) -> int:
    """Channels of a task: a function of the shape alone."""
    blocks = batch * ((channels + LANES - 1) // LANES)
    return LANES * min(MOST_BLOCKS, (blocks + TASKS - 1) // TASKS)


@njit
def _scan_channels(batch, first, extent, inputs, positions, strides, y, checkpoints):
    """Forward of `extent` channels from `first` on of one batch element."""
    x, delta, A, B, C, D, bias = inputs
    groups, channels, N = A.shape
    length = positions.shape[1]
    blocks = (min(extent, channels - first) + LANES - 1) // LANES
    h, rates, skips, biases = _parameter_tiles(blocks, N)
    B_rows, C_rows = _state_rows(N), _state_rows(N)
    tiles = empty_tiles(4)
    x_tile, y_tile, delta_tile, delta_x = tiles[0], tiles[1], tiles[2], tiles[3]
    for group in range(groups):
        base = batch * strides[:, 0] + group * strides[:, 1]
        add = group > 0 and strides[Y, 1] == 0
        _load_parameters(A, D, bias, group, first, rates, skips, biases)
        h[:] = np.float32(0.0)
        for chunk in range((length + STEPS - 1) // STEPS):
            steps = min(STEPS, length - chunk * STEPS)
            places = positions[group % positions.shape[0], chunk * STEPS : chunk * STEPS + steps]
            load_states(B, base[B_], strides[B_], places, N, B_rows)
            load_states(C, base[C_], strides[C_], places, N, C_rows)
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
                scan_tile(
                    delta_tile, x_tile, rates[block], B_rows, C_rows, skips[block], h[block],
                    steps, delta_x, y_tile,
                )  # fmt: skip
                store_tile(y, at[Y], strides[Y], places, width, y_tile, add)


@njit
def _scan_channels_backward(
    batch, first, extent, inputs, positions, strides, checkpoints, d_y, gradients
):
    """Gradient of `_scan_channels`; d_B and d_C are the parts that these channels contribute."""
    x, delta, A, B, C, D, bias = inputs
    d_x, d_delta, d_A, d_B, d_C, d_D, d_bias = gradients
    groups, channels, N = A.shape
    length = positions.shape[1]
    blocks = (min(extent, channels - first) + LANES - 1) // LANES
    h, rates, skips, biases = _parameter_tiles(blocks, N)
    d_h, d_rates, d_skips, d_biases = _parameter_tiles(blocks, N)
    B_rows, C_rows = _state_rows(N), _state_rows(N)
    d_B_rows, d_C_rows = _state_rows(N), _state_rows(N)
    tiles = empty_tiles(6 + WORK_TILES)
    x_tile, d_y_tile, delta_tile, slopes = tiles[0], tiles[1], tiles[2], tiles[3]
    d_delta_x, d_exponent, work = tiles[4], tiles[5], tiles[6:]
    for group in range(groups):
        base = batch * strides[:, 0] + group * strides[:, 1]
        add = group > 0 and strides[D_X, 1] == 0
        _load_parameters(A, D, bias, group, first, rates, skips, biases)
        for gradient in (d_h, d_rates, d_skips, d_biases):
            gradient[:] = np.float32(0.0)
        for chunk in range((length + STEPS - 1) // STEPS - 1, -1, -1):
            steps = min(STEPS, length - chunk * STEPS)
            places = positions[group % positions.shape[0], chunk * STEPS : chunk * STEPS + steps]
            load_states(B, base[B_], strides[B_], places, N, B_rows)
            load_states(C, base[C_], strides[C_], places, N, C_rows)
            d_B_rows[:] = np.float32(0.0)
            d_C_rows[:] = np.float32(0.0)
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
                scan_tile_backward(
                    delta_tile, x_tile, rates[block], B_rows, C_rows, h[block], steps, d_y_tile,
                    d_h[block], work, d_delta_x, d_exponent, d_rates[block], d_B_rows, d_C_rows,
                )  # fmt: skip
                finish_tile_gradients(
                    delta_tile, slopes, x_tile, skips[block], d_y_tile, steps, d_delta_x,
                    d_exponent, d_skips[block], d_biases[block],
                )  # fmt: skip
                store_tile(d_x, at[D_X], strides[D_X], places, width, d_delta_x, add)
                store_tile(d_delta, at[D_DELTA], strides[D_DELTA], places, width, d_exponent, False)
            store_states(d_B, base[D_B], strides[D_B], places, N, d_B_rows)
            store_states(d_C, base[D_C], strides[D_C], places, N, d_C_rows)
        for block in range(blocks):
            channel = first + block * LANES
            store_parameter(d_A, group, channel, d_rates[block])
            store_parameter(d_D, group, channel, d_skips[block])
            store_parameter(d_bias, group, channel, d_biases[block])


@njit
def _parameter_tiles(blocks, N):
    """Zeros: two tiles (blocks, N, lane), N made even, and two (blocks, 1, lane)."""
    even = N + N % 2
    one, two = (blocks, even, LANES), (blocks, 1, LANES)
    first, second = empty_rows(blocks * even).reshape(one), empty_rows(blocks * even).reshape(one)
    third, fourth = empty_rows(blocks).reshape(two), empty_rows(blocks).reshape(two)
    for zeros in (first, second, third, fourth):
        zeros[:] = np.float32(0.0)
    return first, second, third, fourth


@njit
def _state_rows(N):
    """Rows (N, step) for B, C or a gradient of them, N made even."""
    even = N + N % 2
    return empty_rows(even * STEPS // LANES).reshape(even, STEPS)


@njit
def _load_parameters(A, D, bias, group, first, rates, skips, biases):
    """Load the parameters of all blocks of a task."""
    one = np.float32(1.0)
    for block in range(len(rates)):
        channel = first + block * LANES
        load_parameter(A, group, channel, LOG2_E, rates[block])
        load_parameter(D, group, channel, one, skips[block])
        load_parameter(bias, group, channel, one, biases[block])


def _compile(sources: str) -> tuple[Any, Any]:
    """The two entry points, compiled at their first call and kept in numba's disk cache.

    numba's cache looks at the file and at the closure of a function, not at the other files whose
    functions were inlined: the digest of these is in the closure, so that a change is noticed.
    """

    @njit(parallel=True, cache=True)
    def scan(inputs, positions, strides, batch, extent, y, checkpoints):
        _ = sources
        tasks = (inputs[2].shape[1] + extent - 1) // extent
        for index in prange(batch * tasks):
            one, part = index // tasks, index % tasks
            _scan_channels(one, part * extent, extent, inputs, positions, strides, y, checkpoints)

    @njit(parallel=True, cache=True)
    def scan_backward(inputs, positions, strides, batch, extent, checkpoints, d_y, gradients):
        _ = sources
        d_x, d_delta, d_A, d_B, d_C, d_D, d_bias = gradients
        tasks = (inputs[2].shape[1] + extent - 1) // extent
        for index in prange(batch * tasks):
            one, part = index // tasks, index % tasks
            _scan_channels_backward(
                one, part * extent, extent, inputs, positions, strides, checkpoints, d_y,
                (d_x, d_delta, d_A[one], d_B[part], d_C[part], d_D[one], d_bias[one]),
            )  # fmt: skip

    return scan, scan_backward


def _digest(*paths: str) -> str:
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()


scan, scan_backward = _compile(_digest(numba_lanes.__file__, numba_tiles.__file__))
