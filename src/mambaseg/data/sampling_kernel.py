"""What `sampling` reads of one image and its label, in one pass; compiled at the first call.

Each pixel takes the same roundings in the same order as there, so the bits are the same. It loads
numba, so `sampling` imports it when it is needed.
"""

import math

import numpy as np
from numba import njit

_ONE = np.float32(1)


@njit(cache=True, nogil=True)
def read(image, label, last, rows, columns, matrix, offset, smooth, beyond):
    """Read an image (C, H, W) float32 and its label (H, W) uint8 at the crossings of an affine map.

    `last` are the row and column of the last pixel that belongs to the image; rows (S,), columns
    (T,), matrix (4,) and offset (2,) are float64 and say where a pixel lies, in pixels. The image
    is read between its pixels if `smooth`, otherwise at the nearest one, like the label.

    Returns:
        Image (C, S, T) float32, zero beyond it; label (S, T) uint8, `beyond` beyond it; which
        pixels (S, T) bool lie in the image.
    """
    channels = len(image)
    size = len(rows), len(columns)
    grid = np.zeros((channels, *size), np.float32)
    labels, inside = np.full(size, beyond, np.uint8), np.zeros(size, np.bool_)
    for i in range(size[0]):
        down, across = matrix[0] * rows[i], matrix[2] * rows[i]
        for j in range(size[1]):
            row = down + (matrix[1] * columns[j] + offset[0])
            column = across + (matrix[3] * columns[j] + offset[1])
            if row >= 0 and row <= last[0] and column >= 0 and column <= last[1]:
                y, x = math.floor(row + 0.5), math.floor(column + 0.5)
                inside[i, j] = True
                labels[i, j] = label[y, x]
                if not smooth:
                    for channel in range(channels):
                        grid[channel, i, j] = image[channel, y, x]
            if smooth:
                for channel in range(channels):
                    grid[channel, i, j] = _between(image[channel], row, column)
    return grid, labels, inside


@njit
def _between(image, row, column):
    """The value between four pixels, those beyond the image being zero."""
    row = min(max(row, -1.0), float(image.shape[0])) + 1
    column = min(max(column, -1.0), float(image.shape[1])) + 1
    top, left = math.floor(row), math.floor(column)
    down, right = np.float32(row - top), np.float32(column - left)
    y, x = top - 1, left - 1
    upper = _pixel(image, y, x) * (_ONE - right) + _pixel(image, y, x + 1) * right
    lower = _pixel(image, y + 1, x) * (_ONE - right) + _pixel(image, y + 1, x + 1) * right
    return upper * (_ONE - down) + lower * down


@njit
def _pixel(image, y, x):
    if 0 <= y < image.shape[0] and 0 <= x < image.shape[1]:
        return image[y, x]
    return np.float32(0)
