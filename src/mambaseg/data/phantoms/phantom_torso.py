"""The phantom's brushes, and the chest around its heart: everything that is not to be segmented.

Positions are in mm from the LV's axis, x to the right and y downwards in the image.
"""

from __future__ import annotations

import numpy as np

from mambaseg.data.phantoms.phantom_anatomy import ANGLES, Heart, contours


class Polar:
    """Pixel positions of a slice around the LV's axis, for looking contours up."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self.x, self.y = x, y
        self.radius = np.hypot(x, y)
        self._index = (
            np.rint(np.arctan2(y, x) * (ANGLES.size / (2 * np.pi))).astype(np.int64) % ANGLES.size
        )

    def take(self, ring: np.ndarray) -> np.ndarray:
        """A contour's radius (360,) in each pixel's direction (H, W)."""
        return ring.astype(np.float32)[self._index]

    def inside(self, ring: np.ndarray, width: np.ndarray) -> np.ndarray:
        """Share of each pixel (H, W) inside a contour whose edge is `width` mm wide (360,)."""
        return edge(self.take(ring) - self.radius, self.take(width))


def edge(distance: np.ndarray, width: np.ndarray | float) -> np.ndarray:
    """0 outside, 1 inside, linear over `width` around distance 0 (positive inside)."""
    return np.clip(distance / width + 0.5, 0, 1)


def disc(x: np.ndarray, y: np.ndarray, radius: float, width: float) -> np.ndarray:
    """Cover (0..1) of a disc around x = y = 0."""
    return edge(radius - np.hypot(x, y), width)


def over(image: np.ndarray, cover: np.ndarray, value: np.ndarray | float) -> np.ndarray:
    """Paint `value` over the image where `cover` (0..1) says so."""
    return np.asarray(image + cover * (value - image), dtype=np.float32)


def blobs(
    x: np.ndarray, y: np.ndarray, count: int, radius: float, peak: float, rng: np.random.Generator
) -> np.ndarray:
    """Vessels that cross the slice: bright spots at random places."""
    image = np.zeros((y.size, x.size), np.float32)
    for px, py, size, height in zip(
        rng.uniform(x.min(), x.max(), count),
        rng.uniform(y.min(), y.max(), count),
        radius * rng.uniform(0.7, 1.8, count),
        peak * rng.uniform(0.5, 1.0, count),
        strict=True,
    ):
        spot = np.exp(-((x - px) ** 2) / (2 * size**2)) * np.exp(-((y - py) ** 2) / (2 * size**2))
        np.maximum(image, np.float32(height) * spot.astype(np.float32), out=image)
    return image


def smooth_noise(shape: tuple[int, ...], sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Noise of unit variance, correlated over about `sigma` pixels."""
    from scipy.ndimage import gaussian_filter

    noise = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma, mode="wrap")
    return np.asarray(noise / noise.std(), dtype=np.float32)


def smooth_ring(rng: np.random.Generator) -> np.ndarray:
    """Smooth periodic noise (360,) of roughly unit variance."""
    orders = np.arange(1, 5)
    a, b = rng.normal(0, 0.5, (2, orders.size))
    return np.asarray(
        (a * np.cos(orders * ANGLES[:, None]) + b * np.sin(orders * ANGLES[:, None])).sum(1)
    )


class Torso:
    """Everything around the heart, in mm from the LV's axis; drifts slowly from base to apex."""

    def __init__(self, heart: Heart, rng: np.random.Generator, *, fat: float, blood: float) -> None:
        ring = contours(heart, 0.0, 0.0)
        assert ring is not None
        left = float((ring.right * np.cos(ANGLES)).min())
        top = float((ring.right * np.sin(ANGLES)).min())
        self.fat, self.blood = fat, blood
        self.heart_bottom = float((ring.epi * np.sin(ANGLES)).max())
        self.axes = np.array([rng.uniform(125, 150), rng.uniform(95, 115)])
        corner = np.array([left - rng.uniform(14, 26), top - rng.uniform(24, 42)])
        self.middle = corner + self.axes
        self.drift = -0.5 * np.array([left, top])  # the apex lies close to the chest wall
        self.skin, self.muscle = rng.uniform(8, 18), rng.uniform(7, 11)
        self.liver = float(rng.uniform(0.26, 0.36))
        self.slope = rng.uniform(-0.15, 0.25)
        self.aorta = np.array([rng.uniform(50, 68), rng.uniform(30, 48)])
        self.stomach = np.array([rng.uniform(25, 50), self.heart_bottom + rng.uniform(24, 34)])
        self.ribs = rng.uniform(0, 2 * np.pi)

    def paint(
        self, x: np.ndarray, y: np.ndarray, t: float, pixel: float, rng: np.random.Generator
    ) -> np.ndarray:
        """Image (H, W) of the torso without the heart at depth t (share of the heart's length)."""
        soft = 1.5 * pixel
        (ax, ay), (mx, my) = self.axes, self.middle + self.drift * t
        u, v = (x - mx) / ax, (y - my) / ay
        deep = (1 - np.sqrt(u**2 + v**2)) * min(ax, ay)  # mm below the skin, roughly
        image = over(np.full(deep.shape, 0.02, np.float32), edge(deep, soft), self.fat)
        image = over(image, edge(deep - self.skin, soft), 0.24)
        rib = np.cos(11 * np.arctan2(v, u) + self.ribs + 2.5 * t) - 0.55
        marrow = edge(deep - self.skin - 2, soft) * np.clip(2.5 * rib, 0, 1)
        image = over(image, marrow, 0.48)
        chest = edge(deep - self.skin - self.muscle, soft)
        image = over(image, chest, 0.06)
        image = np.maximum(image, chest * blobs(x, y, 26, 1.5, 0.45, rng))
        # Below the diaphragm: liver with vessels, filled stomach; beside it the aorta.
        top = self.heart_bottom + 5 - 6 * t + self.slope * x + 0.0025 * (x + 10) ** 2
        below = edge(y - top, soft) * chest
        image = over(image, below, 0.8 * self.fat)
        liver = edge(y - top - 3, soft) * chest
        image = over(image, liver, self.liver)
        image = np.maximum(image, liver * blobs(x, y, 22, 2.6, 0.7, rng))
        sx, sy = self.stomach + np.array([4.0, -3.0]) * t
        r = np.sqrt(((x - sx) / 1.35) ** 2 + (y - sy) ** 2)
        image = over(image, edge(21 - r, soft) * below, 0.7 * self.fat)
        image = over(image, edge(18 - r, soft) * below, 0.22)
        content = 0.42 + 0.22 * smooth_noise(image.shape, 2.0, rng)
        image = over(image, edge(15 - r, soft) * below, content)
        bx, by = self.aorta + np.array([2.0, 3.0]) * t
        image = over(image, disc(x - bx, y - by, 12.0, soft), 0.2)
        return over(image, disc(x - bx, y - by, 10.5, soft), 0.95 * self.blood)
