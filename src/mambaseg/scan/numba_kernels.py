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
from mambaseg.scan.numba_lanes import LANES, LOG2_E, load, store
from mambaseg.scan.numba_tiles import (
    STEPS,
    Array,
    finish_tile_gradients,
    load_parameter,
    load_states,
    load_steps,
    load_tile,
    scan_tile,
    scan_tile_backward,
    store_parameter,
    store_states,
    store_tile,
)

BLOCKS = 2
"""Blocks of LANES channels per task: B and C are loaded, their gradients summed, once per task."""

X, DELTA, B_, C_, Y = 0, 1, 2, 3, 4  # rows of `strides`
D_X, D_DELTA, D_B, D_C = 5, 6, 7, 8  # rows that the backward has in addition; Y is that of d_y


@njit
def _scan_channels(
    batch: int,
    first: int,
    x: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array,
    bias: Array,
    positions: Array,
    strides: Array,
    y: Array,
    checkpoints: Array,
) -> None:
    """Forward of the channels from `first` on of one batch element."""
    groups, channels, N = A.shape
    length = positions.shape[1]
    blocks = min(BLOCKS, (channels - first + LANES - 1) // LANES)
    one = np.float32(1.0)
    h = np.empty((blocks, N, LANES), np.float32)
    rates = np.empty((blocks, N, LANES), np.float32)
    skips = np.empty((blocks, 1, LANES), np.float32)
    biases = np.empty((blocks, 1, LANES), np.float32)
    B_rows = np.empty((N, STEPS), np.float32)
    C_rows = np.empty((N, STEPS), np.float32)
    x_tile = np.empty((STEPS, LANES), np.float32)
    y_tile = np.empty((STEPS, LANES), np.float32)
    delta_tile = np.empty((STEPS, LANES), np.float32)
    slopes = np.empty((STEPS, LANES), np.float32)
    delta_x = np.empty((STEPS, LANES), np.float32)
    for group in range(groups):
        base = batch * strides[:, 0] + group * strides[:, 1]
        add = group > 0 and strides[Y, 1] == 0
        for block in range(blocks):
            channel = first + block * LANES
            load_parameter(A, group, channel, LOG2_E, rates[block])
            load_parameter(D, group, channel, one, skips[block])
            load_parameter(bias, group, channel, one, biases[block])
        h[:] = np.float32(0.0)
        for chunk in range((length + STEPS - 1) // STEPS):
            steps = min(STEPS, length - chunk * STEPS)
            places = positions[group % positions.shape[0], chunk * STEPS : chunk * STEPS + steps]
            load_states(B, base[B_], strides[B_], places, B_rows)
            load_states(C, base[C_], strides[C_], places, C_rows)
            for block in range(blocks):
                channel = first + block * LANES
                width = min(LANES, channels - channel)
                for n in range(N):
                    store(checkpoints[batch, group, chunk, n], channel, load(h[block, n], 0))
                at = base[DELTA] + channel * strides[DELTA, 3]
                load_steps(
                    delta, at, strides[DELTA], places, width, biases[block], delta_tile, slopes
                )
                at = base[X] + channel * strides[X, 3]
                load_tile(x, at, strides[X], places, width, x_tile)
                scan_tile(
                    delta_tile, x_tile, rates[block], B_rows, C_rows, skips[block], h[block],
                    steps, delta_x, y_tile,
                )  # fmt: skip
                at = base[Y] + channel * strides[Y, 3]
                store_tile(y, at, strides[Y], places, width, y_tile, add)


@njit
def _scan_channels_backward(
    batch: int,
    first: int,
    x: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array,
    bias: Array,
    positions: Array,
    strides: Array,
    checkpoints: Array,
    d_y: Array,
    d_x: Array,
    d_delta: Array,
    d_A: Array,
    d_B: Array,
    d_C: Array,
    d_D: Array,
    d_bias: Array,
) -> None:
    """Gradient of `_scan_channels`; d_B and d_C are the parts that these channels contribute."""
    groups, channels, N = A.shape
    length = positions.shape[1]
    blocks = min(BLOCKS, (channels - first + LANES - 1) // LANES)
    zero, one = np.float32(0.0), np.float32(1.0)
    h = np.empty((N, LANES), np.float32)
    rates = np.empty((blocks, N, LANES), np.float32)
    skips = np.empty((blocks, 1, LANES), np.float32)
    biases = np.empty((blocks, 1, LANES), np.float32)
    d_h = np.empty((blocks, N, LANES), np.float32)
    d_rates = np.empty((blocks, N, LANES), np.float32)
    d_skips = np.empty((blocks, 1, LANES), np.float32)
    d_biases = np.empty((blocks, 1, LANES), np.float32)
    B_rows = np.empty((N, STEPS), np.float32)
    C_rows = np.empty((N, STEPS), np.float32)
    d_B_rows = np.empty((N, STEPS), np.float32)
    d_C_rows = np.empty((N, STEPS), np.float32)
    x_tile = np.empty((STEPS, LANES), np.float32)
    delta_tile = np.empty((STEPS, LANES), np.float32)
    slopes = np.empty((STEPS, LANES), np.float32)
    d_y_tile = np.empty((STEPS, LANES), np.float32)
    delta_x = np.empty((STEPS, LANES), np.float32)
    states = np.empty((STEPS + 1, LANES), np.float32)
    decays = np.empty((STEPS, LANES), np.float32)
    products = np.empty((2 * LANES, LANES), np.float32)
    d_delta_x = np.empty((STEPS, LANES), np.float32)
    d_exponent = np.empty((STEPS, LANES), np.float32)
    for group in range(groups):
        base = batch * strides[:, 0] + group * strides[:, 1]
        add = group > 0 and strides[D_X, 1] == 0
        for block in range(blocks):
            channel = first + block * LANES
            load_parameter(A, group, channel, LOG2_E, rates[block])
            load_parameter(D, group, channel, one, skips[block])
            load_parameter(bias, group, channel, one, biases[block])
        d_h[:] = zero
        d_rates[:] = zero
        d_skips[:] = zero
        d_biases[:] = zero
        for chunk in range((length + STEPS - 1) // STEPS - 1, -1, -1):
            steps = min(STEPS, length - chunk * STEPS)
            places = positions[group % positions.shape[0], chunk * STEPS : chunk * STEPS + steps]
            load_states(B, base[B_], strides[B_], places, B_rows)
            load_states(C, base[C_], strides[C_], places, C_rows)
            d_B_rows[:] = zero
            d_C_rows[:] = zero
            for block in range(blocks):
                channel = first + block * LANES
                width = min(LANES, channels - channel)
                for n in range(N):
                    store(h, n * LANES, load(checkpoints[batch, group, chunk, n], channel))
                at = base[DELTA] + channel * strides[DELTA, 3]
                load_steps(
                    delta, at, strides[DELTA], places, width, biases[block], delta_tile, slopes
                )
                at = base[X] + channel * strides[X, 3]
                load_tile(x, at, strides[X], places, width, x_tile)
                at = base[Y] + channel * strides[Y, 3]
                load_tile(d_y, at, strides[Y], places, width, d_y_tile)
                scan_tile_backward(
                    delta_tile, x_tile, rates[block], B_rows, C_rows, h, steps, d_y_tile,
                    d_h[block], delta_x, states, decays, products, d_delta_x, d_exponent,
                    d_rates[block], d_B_rows, d_C_rows,
                )  # fmt: skip
                finish_tile_gradients(
                    delta_tile, slopes, x_tile, skips[block], d_y_tile, steps, d_delta_x,
                    d_exponent, d_skips[block], d_biases[block],
                )  # fmt: skip
                at = base[D_X] + channel * strides[D_X, 3]
                store_tile(d_x, at, strides[D_X], places, width, d_delta_x, add)
                at = base[D_DELTA] + channel * strides[D_DELTA, 3]
                store_tile(d_delta, at, strides[D_DELTA], places, width, d_exponent, False)
            store_states(d_B, base[D_B], strides[D_B], places, d_B_rows)
            store_states(d_C, base[D_C], strides[D_C], places, d_C_rows)
        for block in range(blocks):
            channel = first + block * LANES
            store_parameter(d_A, group, channel, d_rates[block])
            store_parameter(d_D, group, channel, d_skips[block])
            store_parameter(d_bias, group, channel, d_biases[block])


def _compile(sources: str) -> tuple[Any, Any]:
    """The two entry points, compiled at their first call and kept in numba's disk cache.

    numba's cache looks at the file and at the closure of a function, not at the other files whose
    functions were inlined: the digest of these is in the closure, so that a change is noticed.
    """

    @njit(parallel=True, cache=True)
    def scan(
        x: Array,
        delta: Array,
        A: Array,
        B: Array,
        C: Array,
        D: Array,
        bias: Array,
        positions: Array,
        strides: Array,
        batch: int,
        y: Array,
        checkpoints: Array,
    ) -> None:
        _ = sources
        extent = BLOCKS * LANES
        tasks = (A.shape[1] + extent - 1) // extent
        for index in prange(batch * tasks):
            _scan_channels(
                index // tasks, index % tasks * extent, x, delta, A, B, C, D, bias, positions,
                strides, y, checkpoints,
            )  # fmt: skip

    @njit(parallel=True, cache=True)
    def scan_backward(
        x: Array,
        delta: Array,
        A: Array,
        B: Array,
        C: Array,
        D: Array,
        bias: Array,
        positions: Array,
        strides: Array,
        batch: int,
        checkpoints: Array,
        d_y: Array,
        d_x: Array,
        d_delta: Array,
        d_A: Array,
        d_B: Array,
        d_C: Array,
        d_D: Array,
        d_bias: Array,
    ) -> None:
        _ = sources
        extent = BLOCKS * LANES
        tasks = (A.shape[1] + extent - 1) // extent
        for index in prange(batch * tasks):
            one, part = index // tasks, index % tasks
            _scan_channels_backward(
                one, part * extent, x, delta, A, B, C, D, bias, positions, strides, checkpoints,
                d_y, d_x, d_delta, d_A[one], d_B[part], d_C[part], d_D[one], d_bias[one],
            )  # fmt: skip

    return scan, scan_backward


def _digest(*paths: str) -> str:
    return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()


scan, scan_backward = _compile(_digest(numba_lanes.__file__, numba_tiles.__file__))
