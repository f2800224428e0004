"""What the scanner sees of a phantom heart: a cine stack of short-axis slices with its labels.

Tissue is painted from back to front (torso, lung, liver, vessels, fat, heart), each edge as soft as
partial volume makes it, in the slice and through it; then come texture, the coil's bias field and
Rician noise. Relative intensities follow balanced SSFP: blood and fat bright, muscle dark, lung and
air black. Labels are hard: the class at the voxel's centre. As in ACDC, papillary muscles
belong to the LV cavity, and what lies above the valve plane is background although it is blood.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mambaseg.data.phantoms.phantom_anatomy import ANGLES, Contours, Heart, contours, valve_plane
from mambaseg.data.phantoms.phantom_torso import Polar, Torso, disc, over, smooth_noise, smooth_ring

RV, MYO, LV = 1, 2, 3
_RV_WALL = 3.0  # mm


@dataclass(frozen=True)
class Scan:
    """How the heart is cut and sampled; lengths in mm."""

    shape: tuple[int, int]  # rows and columns
    spacing: tuple[float, float, float]  # (z, y, x)
    depths: np.ndarray  # (Z,) of the slices along the LV's axis
    centre: np.ndarray  # (Z, 2) row and column of that axis: tilt, and a breath-hold per slice
    ejected: np.ndarray  # (T,) share of the stroke volume ejected at each frame
    noise: float  # standard deviation in each channel, as a share of blood's intensity


def draw_scan(
    heart: Heart, *, ed: int, es: int, frames: int, noise: float, rng: np.random.Generator
) -> Scan:
    """Plan the acquisition of a heart: the field of view follows its size.

    `ed` and `es` are indices of `frames` frames of a cycle; `noise` as in `Scan`.
    """
    pixel = round(float(rng.uniform(1.4, 2.0)), 2)
    gap = float(rng.choice([9.0, 10.0, 10.0, 12.0, 13.0]))
    first = rng.uniform(-0.4, 0.6) * gap
    gap = max(gap, float(np.ceil((heart.length - first) / 9.5 * 2) / 2))
    count = int(np.clip(np.floor((heart.length - first) / gap + rng.uniform(0.8, 1.6)), 6, 10))
    depths = first + gap * np.arange(count)
    ring = contours(heart, max(depths[depths >= 0][0], 0.0), 0.0)
    assert ring is not None
    x, y = ring.right * np.cos(ANGLES), ring.right * np.sin(ANGLES)
    size = []
    for reach, margin in ((np.ptp(y), (1.6, 1.9)), (np.ptp(x), (1.45, 1.75))):
        size.append(int(np.clip(2 * round(reach * rng.uniform(*margin) / pixel / 2), 80, 128)))
    offset = [(y.max() + y.min()) / 2 / pixel, (x.max() + x.min()) / 2 / pixel]
    middle = np.array(size) / 2 - np.array(offset)
    tilt = rng.normal(0, 0.06, 2) * (depths - heart.length / 2)[:, None]
    breath = rng.normal(0, 1.2, (count, 2))
    return Scan(
        shape=(size[0], size[1]),
        spacing=(gap, pixel, pixel),
        depths=depths,
        centre=middle + rng.uniform(-4, 4, 2) / pixel + (tilt + breath) / pixel,
        ejected=_cycle(frames, ed, es),
        noise=noise,
    )


def _cycle(frames: int, ed: int, es: int) -> np.ndarray:
    """Ejected share per frame: 0 at `ed`, 1 at `es`, early filling, diastasis, atrial kick."""
    systole = (es - ed) % frames
    since = (np.arange(frames) - ed) % frames
    up = np.sin(np.pi / 2 * since / systole) ** 2
    late = (since - systole) / (frames - systole)
    down = np.interp(late, [0, 0.15, 0.4, 0.75, 1.0], [1.0, 0.85, 0.35, 0.22, 0.0])
    return np.where(since <= systole, up, down)


def render(heart: Heart, scan: Scan, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Render images (T, Z, H, W) int16 in arbitrary units, and labels (T, Z, H, W) uint8."""
    painter = _Painter(heart, scan, rng)
    slices = zip(*(painter.slice(z) for z in range(len(scan.depths))), strict=True)
    image, label = (np.stack(arrays, axis=1) for arrays in slices)
    image *= painter.bias()
    level = scan.noise * painter.blood
    real = image + level * rng.standard_normal(image.shape, dtype=np.float32)
    imaginary = level * rng.standard_normal(image.shape, dtype=np.float32)
    gain = rng.uniform(250, 900)
    return np.rint(gain * np.hypot(real, imaginary)).astype(np.int16), label


class _Painter:
    """Paints one slice after the other; what the slices share is drawn once."""

    def __init__(self, heart: Heart, scan: Scan, rng: np.random.Generator) -> None:
        self.heart, self.scan, self.rng = heart, scan, rng
        self.pixel = scan.spacing[2]
        self.blood = float(rng.uniform(0.62, 0.80))
        self.myocardium = float(rng.uniform(0.20, 0.30))
        self.fat = float(rng.uniform(0.55, 0.85))
        self.torso = Torso(heart, rng, fat=self.fat, blood=self.blood)
        self.fat_layer = 1.0 + 3.0 * (1 + np.tanh(smooth_ring(rng))) + 4.0 * heart.bump
        self.papillary = heart.septum + np.pi + np.deg2rad(rng.normal([-55, 55], 8))

    def bias(self) -> np.ndarray:
        """Smooth field (H, W) around 1: the surface coil sees the front of the chest better."""
        y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in self.scan.shape)
        a = self.rng.normal([-0.15, -0.12, 0.0, 0.0, 0.0], 0.07).astype(np.float32)
        log = a[0] * y[:, None] + a[1] * x + a[2] * y[:, None] * x
        log = log + a[3] * y[:, None] ** 2 + a[4] * x**2
        return np.exp(log)

    def slice(self, z: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (T, H, W) float32 and label (T, H, W) uint8 of slice z."""
        rows, columns = (np.arange(n, dtype=np.float32) for n in self.scan.shape)
        y = ((rows - self.scan.centre[z, 0]) * self.pixel)[:, None].astype(np.float32)
        x = ((columns - self.scan.centre[z, 1]) * self.pixel).astype(np.float32)
        polar = Polar(x, y)
        depth = float(self.scan.depths[z])
        texture = smooth_noise(self.scan.shape, 1.5, self.rng)
        still = self.torso.paint(x, y, depth / self.heart.length, self.pixel, self.rng)
        still *= 1 + 0.10 * texture
        flow = smooth_noise(self.scan.shape, 3.0, self.rng)
        frames = [
            self._heart(still, polar, depth, float(ejected), np.roll(flow, 5 * frame, 1))
            for frame, ejected in enumerate(self.scan.ejected)
        ]
        images, labels = zip(*frames, strict=True)
        return np.stack(images), np.stack(labels)

    def _heart(
        self, still: np.ndarray, polar: Polar, depth: float, ejected: float, flow: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        rings = contours(self.heart, depth, ejected)
        label = np.zeros(still.shape, np.uint8)
        if rings is None:
            above = depth < valve_plane(self.heart, ejected)
            return (self._atria(still, polar, ejected, flow) if above else still), label
        # Edges are as soft as the contours move within the slice's thickness.
        half = 0.35 * self.scan.spacing[0]
        ends = [contours(self.heart, depth + step, ejected) or rings for step in (-half, half)]
        slopes = (
            np.abs(getattr(ends[0], n) - getattr(ends[1], n)) for n in ("endo", "epi", "right")
        )
        endo_edge, epi_edge, right_edge = (np.hypot(1.3 * self.pixel, slope) for slope in slopes)
        wall = rings.right + np.minimum(_RV_WALL, rings.right - rings.epi)
        blood = self.blood * (1 + 0.08 * flow)
        # Coarse trabeculae cross the right ventricle and make it patchy.
        right = 1 - 0.15 * np.clip(np.roll(flow, 7, 0), 0, 1.5) if rings.is_rv else 0.85
        image = still
        for ring, width, value in (
            (wall + self._fat_at(rings), right_edge, self.fat * (1 + 0.1 * flow)),
            (wall, right_edge, self.myocardium),
            (rings.right, right_edge, right * 0.97 * blood),
            (rings.epi, epi_edge, self.myocardium * (1 + 0.10 * flow)),
            (rings.endo, endo_edge, blood),
        ):
            image = over(image, polar.inside(ring, width), value)
        image = over(image, self._papillary(polar, rings, depth), self.myocardium)
        if rings.is_rv:
            label[polar.radius < polar.take(rings.right)] = RV
        label[polar.radius < polar.take(rings.epi)] = MYO
        label[polar.radius < polar.take(rings.endo)] = LV
        return image, label

    def _papillary(self, polar: Polar, rings: Contours, depth: float) -> np.ndarray:
        """Two muscles from a quarter of the cavity's length downwards; they move with the wall."""
        t = depth / self.heart.length
        size = 4.5 * np.clip((t - 0.2) / 0.15, 0, 1) * np.clip((0.85 - t) / 0.15, 0, 1)
        cover = np.zeros_like(polar.radius)
        if size <= 0:
            return cover
        for angle in self.papillary:
            cavity = np.interp(angle % (2 * np.pi), ANGLES, rings.endo)
            radius = min(size, 0.28 * cavity)
            x, y = (cavity - 1.1 * radius) * np.array([np.cos(angle), np.sin(angle)])
            cover = np.maximum(cover, disc(polar.x - x, polar.y - y, radius, 1.3 * self.pixel))
        return cover

    def _fat_at(self, rings: Contours) -> np.ndarray:
        """Thickness (360,) in mm of the epicardial fat; thinner around the apex."""
        return self.fat_layer * min(1.0, float(rings.epi.mean()) / 28)

    def _atria(
        self, still: np.ndarray, polar: Polar, ejected: float, flow: np.ndarray
    ) -> np.ndarray:
        """Above the valves: atria and great vessels, blood within thin walls, all background."""
        rings = contours(self.heart, valve_plane(self.heart, ejected) + 1e-3, ejected)
        assert rings is not None
        width = np.full_like(ANGLES, 2.0 * self.pixel)
        outside = rings.right + self._fat_at(rings)
        image = over(still, polar.inside(outside, width), self.fat * (1 + 0.1 * flow))
        epi = float(rings.epi.mean())
        right = float(np.interp(self.heart.septum, ANGLES, rings.right)) - epi
        # name: angle from the septum (rad), distance, radius, aspect; towards the spine is positive
        for angle, distance, radius, aspect in (
            (-0.55, epi + 0.45 * right, 0.50 * right + 2, 1.1),  # right atrium
            (0.85, epi + 0.15 * right, 0.35 * right + 5, 1.2),  # outflow tract
            (np.pi - 0.7, 0.30 * epi, 0.68 * epi, 1.25),  # left atrium
            (0.5, 0.42 * epi, 13.0, 1.0),  # aortic root
        ):
            direction = self.heart.septum + angle
            x = (polar.x - distance * np.cos(direction)) / aspect
            y = polar.y - distance * np.sin(direction)
            image = over(image, disc(x, y, radius + 2, 1.5 * self.pixel), self.myocardium * 1.2)
            blood = 0.95 * self.blood * (1 + 0.1 * flow)
            image = over(image, disc(x, y, radius, 1.5 * self.pixel), blood)
        return image
