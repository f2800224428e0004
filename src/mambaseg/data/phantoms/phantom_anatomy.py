"""Parametric hearts: what the synthetic phantom's ventricles look like, at which depth and when.

The model is in millimetres around the long axis of the left ventricle (LV). `depth` runs along it,
from 0 at the valve plane in end-diastole (ED) to the apex, which stays where it is. `ejected` is
the share of the stroke volume that has left: 0 at ED, 1 at end-systole (ES). A contour is a radius
in mm for each of `ANGLES`, counted from the image's +x axis towards its +y axis (downwards).

Cavity and epicardium are truncated ellipsoids. Volumes are drawn first (per pathology group, after
the ejection fractions computed from the labels of ACDC) and the sizes follow from them:

* the valve plane descends, so that the LV shortens by the factor λ(ejected);
* the cavity's radius shrinks by k, with k²λ = 1 - EF · ejected; inside an infarct k stays near 1
  and the remote wall makes up for it;
* myocardium is incompressible: epi² = endo² + (epi_ED² - endo_ED²) / λ at each angle, so that the
  wall thickens by itself and its volume stays;
* the right ventricle (RV) is what a bump on the septal side of the epicardium adds; its height
  follows from the area the RV must have at that depth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

GROUPS = ("NOR", "MINF", "DCM", "HCM", "RV")
ANGLES = np.arange(360) * (2 * np.pi / 360)
_STEP = 2 * np.pi / 360
_TAPER = 2.2  # exponent of the ellipsoids; above 2: fuller towards the apex than a sphere
_RV_TAPER = 0.85  # RV area falls almost linearly from base to apex
_AKINESIA = 0.9  # share of the motion that an infarct loses


@dataclass(frozen=True)
class _Group:
    """Means of one pathology group; volumes in ml, ejection fractions as shares, lengths in mm."""

    edv: float
    ef: float
    ef_sd: float
    wall: float
    elongation: float  # LV length / basal diameter
    shortening: float  # λ at ES
    rv_ratio: float  # RV / LV volume at ED
    rv_ef: float
    asymmetry: float = 0.0  # additional thickness of the septum, as a share
    flattening: float = 0.0  # the septum pressed towards the LV by a loaded RV, as a share
    infarct: bool = False


_PROFILES = {
    "NOR": _Group(120, 0.60, 0.040, 8.5, 1.55, 0.87, 1.05, 0.55),
    "MINF": _Group(180, 0.31, 0.060, 8.5, 1.45, 0.94, 0.75, 0.50, infarct=True),
    "DCM": _Group(245, 0.18, 0.050, 7.5, 1.30, 0.95, 0.70, 0.33),
    "HCM": _Group(115, 0.67, 0.050, 14.0, 1.60, 0.87, 0.95, 0.62, asymmetry=0.35),
    "RV": _Group(95, 0.52, 0.050, 8.0, 1.60, 0.88, 1.85, 0.31, flattening=0.16),
}


@dataclass(frozen=True)
class Heart:
    """One patient's heart; lengths in mm, volumes in mm³, angles in rad, depths as shares."""

    group: str
    septum: float
    length: float  # valve plane to epicardial apex at ED
    cavity_length: float
    cavity_radius: float
    wall: float
    ef: float
    shortening: float
    rv_edv: float
    rv_ef: float
    rv_end: float  # depth of the RV's apex
    shape: np.ndarray  # (360,) relative deviation of the contours from circles
    thickness: np.ndarray  # (360,) wall thickness relative to the mean wall
    infarct: np.ndarray  # (360,) how much of the wall's motion is lost at each angle, 0..1
    infarct_start: float  # depth from which the infarct reaches to the apex
    motion: tuple[float, float]  # see `_motion_moments`
    bump: np.ndarray  # (360,) reach of the RV, at most 1, 0 outside the septal side


@dataclass(frozen=True)
class Contours:
    """Radii (360,) in mm at one depth and moment."""

    endo: np.ndarray  # LV cavity; 0 below its apex
    epi: np.ndarray  # outside of the LV's myocardium
    right: np.ndarray  # outside of the right heart's cavity, `epi` where there is none
    is_rv: bool  # the right heart is the ventricle here; False: the atrium above it


def draw_heart(group: str, rng: np.random.Generator) -> Heart:
    """Draw a heart of a pathology group, one of `GROUPS`."""
    profile = _PROFILES[group]
    edv = profile.edv * _around(rng, 1.0, 0.10) * 1e3
    elongation = profile.elongation * _around(rng, 1.0, 0.04)
    fill = float(np.mean(_ellipsoid(np.linspace(0, 1, 1001)) ** 2))
    radius = (edv / (2 * np.pi * elongation * fill)) ** (1 / 3)
    cavity_length = 2 * radius * elongation
    wall = profile.wall * _around(rng, 1.0, 0.07)
    septum = np.pi + np.deg2rad(rng.uniform(-20, 20))
    infarct = np.zeros_like(ANGLES)
    if profile.infarct:
        centre, reach = rng.uniform(0, 2 * np.pi), np.deg2rad(rng.uniform(75, 100))
        infarct = np.clip((reach - np.abs(_wrap(ANGLES - centre))) / np.deg2rad(20) + 0.5, 0, 1)
    start = rng.uniform(0.0, 0.2)
    septal = np.cos(ANGLES - septum).clip(0)
    shape = _harmonics(rng) - profile.flattening * septal**2
    return Heart(
        group=group,
        septum=septum,
        length=cavity_length + wall,
        cavity_length=cavity_length,
        cavity_radius=radius,
        wall=wall,
        ef=_around(rng, profile.ef, profile.ef_sd),
        shortening=1 - (1 - profile.shortening) * _around(rng, 1.0, 0.1),
        rv_edv=edv * profile.rv_ratio * _around(rng, 1.0, 0.08),
        rv_ef=_around(rng, profile.rv_ef, 0.04),
        rv_end=rng.uniform(0.80, 0.90),
        shape=shape,
        thickness=1
        + profile.asymmetry * septal
        + 0.05 * np.cos(ANGLES - rng.uniform(0, 2 * np.pi)),
        infarct=infarct,
        infarct_start=start,
        motion=_motion_moments(infarct, start),
        bump=_rv_bump(septum, np.deg2rad(rng.uniform(66, 74) + 40 * profile.flattening), rng),
    )


def valve_plane(heart: Heart, ejected: float) -> float:
    """Depth in mm of the LV's valve plane: 0 at ED, deeper while the heart shortens."""
    return heart.length * (1 - heart.shortening) * ejected


def contours(heart: Heart, depth: float, ejected: float) -> Contours | None:
    """Contours at a depth and moment; None above the valve plane and below the apex.

    `depth` is in mm below the valve plane's position at ED, `ejected` the share of the stroke
    volume that has left, 0 (ED) to 1 (ES).
    """
    length_factor = 1 - (1 - heart.shortening) * ejected
    t = (depth - valve_plane(heart, ejected)) / (heart.length * length_factor)
    if not 0 <= t < 1:
        return None
    below = _below(heart.infarct_start, t)
    inner = heart.cavity_radius * _ellipsoid(t * heart.length / heart.cavity_length)
    outer = (heart.cavity_radius + heart.wall) * _ellipsoid(t)
    scar = 1 - 0.3 * heart.infarct * below  # an old infarct is thin
    endo_ed = inner * (1 + heart.shape)
    epi_ed = endo_ed + (outer - inner) * heart.thickness * scar
    # The endocardial radius shrinks by k(angle), such that the whole cavity ejects its share. With
    # x = 1 - k of the healthy wall and motion g, k = 1 - gx. The cavity keeps the share
    # q = (1 - EF · ejected) / λ of its cross-sections: 1 - 2x mean(g) + x² mean(g²) = q.
    first, second = heart.motion
    lost = 1 - (1 - heart.ef * ejected) / length_factor
    x = (first - np.sqrt(max(first**2 - second * lost, 0.0))) / second
    endo = endo_ed * (1 - x * (1 - _AKINESIA * heart.infarct * below))
    epi = np.sqrt(endo**2 + (epi_ed**2 - endo_ed**2) / length_factor)
    reach, is_rv = _right_reach(heart, depth, ejected, epi)
    return Contours(endo=endo, epi=epi, right=epi + reach, is_rv=is_rv)


def volumes(heart: Heart, depths: np.ndarray, ejected: float) -> np.ndarray:
    """(LV, RV) sums over slices of the cavities' areas in mm²: volume per mm of slice distance."""
    total = np.zeros(2)
    for depth in depths:
        ring = contours(heart, float(depth), ejected)
        if ring is not None:
            right = ring.right**2 - ring.epi**2 if ring.is_rv else np.zeros_like(ANGLES)
            total += 0.5 * _STEP * np.array([(ring.endo**2).sum(), right.sum()])
    return total


def tune_ejection(heart: Heart, depths: np.ndarray) -> Heart:
    """The heart whose ejection fractions *as summed over these slices* are those of `heart`.

    A valve plane that moves by half a slice changes a sum of few thick discs by several per cent;
    what is written in a report, and in the tables of ACDC, is the sum.
    """
    wanted = np.array([heart.ef, heart.rv_ef])
    before = volumes(heart, depths, 0.0)
    low, high = np.full(2, 0.02), np.array([0.85, 0.85])
    for _ in range(12):
        middle = (low + high) / 2
        heart = replace(heart, ef=float(middle[0]), rv_ef=float(middle[1]))
        more = 1 - volumes(heart, depths, 1.0) / before < wanted
        low, high = np.where(more, middle, low), np.where(more, high, middle)
    return heart


def _motion_moments(infarct: np.ndarray, start: float) -> tuple[float, float]:
    """mean(g) and mean(g²) over the cavity, g(angle, depth): the share of motion that is kept."""
    depths = np.linspace(0, 1, 65)
    motion = np.stack([1 - _AKINESIA * infarct * _below(start, depth) for depth in depths])
    weights = _ellipsoid(depths) ** 2
    first = np.average(motion.mean(1), weights=weights)
    return float(first), float(np.average((motion**2).mean(1), weights=weights))


def _below(start: float, t: float) -> float:
    """0 above the depth where the infarct starts, 1 below, over a tenth of the length."""
    return float(np.clip((t - start) / 0.1, 0, 1))


def _right_reach(
    heart: Heart, depth: float, ejected: float, epi: np.ndarray
) -> tuple[np.ndarray, bool]:
    """Reach (360,) in mm of the right heart's cavity beyond `epi`, and whether it is the RV.

    The area between `epi` and `epi + h · bump` is h ∫epi·bump + h²/2 ∫bump²; h solves it for the
    area that the RV's volume asks for at this depth.
    """
    # The tricuspid ring descends further than the mitral one: the RV leaves the basal slice first.
    base = 1.25 * valve_plane(heart, ejected)
    length = heart.rv_end * heart.length - base
    t = (depth - base) / length
    if t >= 1:
        return np.zeros_like(ANGLES), False
    volume = heart.rv_edv * (1 - heart.rv_ef * ejected)
    area = volume / length * (1 + _RV_TAPER) * (1 - max(t, 0.0)) ** _RV_TAPER
    linear = float((epi * heart.bump).sum() * _STEP)
    square = float((heart.bump**2).sum() * _STEP)
    height = (np.sqrt(linear**2 + 2 * square * area) - linear) / square
    return (height if t >= 0 else 0.85 * height) * heart.bump, t >= 0


def _rv_bump(septum: float, half_width: float, rng: np.random.Generator) -> np.ndarray:
    """Crescent between the two insertion points, a little larger on the anterior (upper) side."""
    offset = _wrap(ANGLES - septum - rng.uniform(-0.1, 0.1)) / half_width
    form = np.clip(1 - np.abs(offset) ** 2.6, 0, None) ** 0.75
    form = form * (1 + rng.uniform(0.05, 0.25) * offset)
    return form / form.max()


def _harmonics(rng: np.random.Generator) -> np.ndarray:
    orders = np.arange(2, 6)
    amplitude = rng.normal(0, 1, orders.size) * np.array([0.035, 0.018, 0.010, 0.006])
    phase = rng.uniform(0, 2 * np.pi, orders.size)
    return np.asarray((amplitude * np.cos(orders * ANGLES[:, None] + phase)).sum(1))


def _ellipsoid(t: np.ndarray | float) -> np.ndarray:
    """Relative radius at t = depth / length: narrower at the valve plane, 0 from the apex on."""
    t = np.asarray(t, dtype=np.float64)
    return np.sqrt(np.clip(1 - np.abs(t) ** _TAPER, 0, None)) * (
        0.93 + 0.07 * np.clip(t / 0.25, 0, 1)
    )


def _around(rng: np.random.Generator, mean: float, sd: float) -> float:
    """Normal, cut at two standard deviations: no heart beyond belief."""
    return float(mean + sd * np.clip(rng.normal(), -2, 2))


def _wrap(angle: np.ndarray) -> np.ndarray:
    return (angle + np.pi) % (2 * np.pi) - np.pi
