"""Random numbers without hidden state: a pure function of what they are drawn for."""

import numpy as np
from numpy.typing import NDArray

ORDER, AUGMENTATION, DROPPING, LEARNING, FOREGROUND = 0, 1, 2, 3, 4
"""Streams: one number for each use, so that no two uses ever share their draws."""


def draws(
    seed: int, stream: int, *, step: int = 0, position: int = 0, count: int
) -> NDArray[np.uint64]:
    """Return `count` random 64-bit integers that depend on the arguments and on nothing else.

    Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) encrypts a
    counter, so the numbers for one sample of one step can be had without drawing those before it:
    by any worker, on any device count, after any restart. NumPy keeps the raw output of its bit
    generators stable between versions, unlike that of `Generator`'s methods.
    """
    key = np.array([seed % 2**64, stream], dtype=np.uint64)
    counter = np.array([0, 0, position, step], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def uniforms(
    seed: int, stream: int, *, step: int = 0, position: int = 0, count: int
) -> NDArray[np.float64]:
    """Return `count` random numbers in [0, 1) that depend on the arguments and on nothing else."""
    raw = draws(seed, stream, step=step, position=position, count=count)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
