"""Scale the grey values of a volume, one channel at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]
Window = tuple[float, float]
CtValues = Sequence[float]  # lowest and highest grey value, mean, standard deviation

LARGEST_GREY_VALUE = 1e6  # float32 still tells its neighbours apart


def min_max(image: Image) -> Image:
    """Map the smallest value to 0 and the largest to 1; a constant image becomes zeros."""
    return rescaled(image, float(image.min()), float(image.max()))


def percentile(image: Image) -> Image:
    """Clip to the 0.5 % and 99.5 % points and map these to 0 and 1."""
    low, high = np.percentile(image, (0.5, 99.5))
    # Fewer than one bright voxel in 200: the percentiles see none of them.
    return rescaled(image, float(low), float(high)) if high > low else min_max(image)


def z_score(image: Image) -> Image:
    """Bring the mean to 0 and the standard deviation to 1; a constant image becomes zeros."""
    mean, deviation = image.mean(dtype=np.float64), image.std(dtype=np.float64)
    # Below float32's resolution the "deviation" of a constant volume is rounding.
    if deviation <= 1e-6 * abs(mean) or deviation == 0:
        return np.zeros_like(image)
    return ((image - mean) / deviation).astype(np.float32)


def rescaled(image: Image, low: float, high: float) -> Image:
    """Clip to [low, high] and map that range to [0, 1]; without a range, zeros."""
    if not high > low:
        return np.zeros_like(image)
    scaled = (np.clip(image, low, high) - np.float32(low)) / np.float32(high - low)
    return np.clip(scaled, 0, 1)


SCALINGS: dict[str, Callable[[Image], Image]] = {
    "minmax": min_max,
    "percentile": percentile,
    "zscore": z_score,
}
WINDOW, CT = "window", "ct"


def ct_scaled(image: Image, foreground: Sequence[CtValues | None]) -> Image:
    """Clip each channel of (Z, C, H, W) to [low, high], then take the mean off and divide.

    The four values are those of the foreground of a training set, the same for every image; a
    channel without them becomes a z-score of its own. (Source: nnU-Net v2, `CTNormalization`.)
    """
    channels = []
    for channel, known in zip(image.swapaxes(0, 1), foreground, strict=True):
        if known is None:
            channels.append(z_score(channel))
            continue
        low, high, mean, deviation = (np.float32(one) for one in known)
        channels.append((np.clip(channel, low, high) - mean) / deviation)
    return np.stack(channels, axis=1)


def is_window(value: Any) -> bool:
    """Whether a value is [low, high] in grey values that float32 can tell apart."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(isinstance(one, (int, float)) and abs(one) <= LARGEST_GREY_VALUE for one in value)
        and value[1] - value[0] >= 1e-6  # not so of nan
    )


def is_ct(value: Any) -> bool:
    """Whether a value has for every channel low < high, mean, deviation > 0, or None."""
    if not isinstance(value, (list, tuple)) or not any(value):
        return False
    return all(
        one is None
        or (isinstance(one, (list, tuple)) and len(one) == 4 and is_window(one[:2])
            and all(isinstance(n, (int, float)) and abs(n) <= LARGEST_GREY_VALUE for n in one)
            and one[3] >= 1e-6)
        for one in value
    )  # fmt: skip
