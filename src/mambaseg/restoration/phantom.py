"""A synthetic data set for dehazing: computed street scenes with their depth, and haze on them.

Haze follows the atmospheric scattering model (Koschmieder 1924; Narasimhan & Nayar, IJCV 48, 2002):
I = J t + A (1 - t), with the transmission t = exp(-beta d) of depth d and the airlight A. RESIDE's
own hazy images are made by it too, from photographs with measured or estimated depth.

Images are (H, W, 3) in [0, 1], depth is (H, W) in units of its own, from 0 to `FAR`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mambaseg.data.phantoms.synthetic import write_once
from mambaseg.errors import UserError

Array = NDArray[np.float64]

MANIFEST = "haze_phantom.json"
_GENERATOR = "mambaseg.data.phantoms.haze_phantom"  # where it was when the name was first written
VERSION = 1  # of the generator: raise it whenever the same parameters give other files
FAR = 1.5  # depth of the sky
VARIANTS = 3  # hazy images per scene
BETA, AIRLIGHT = (0.6, 1.8), (0.7, 1.0)  # ranges of RESIDE's indoor training set

_NEAREST = 0.12  # depth of the lowest row
_NOTE = """# Synthetic data: these are no photographs

Scenes, depth and haze were computed by mambaseg (`haze_phantom.json` has the
parameters): I = J t + A (1 - t), t = exp(-beta d). Scores on them say that software runs, nothing
about real haze. The naming is that of RESIDE (Li et al., "Benchmarking Single-Image Dehazing and
Beyond", IEEE TIP 28(1), 2019): `hazy/<scene>_<n>_<beta>.png` belongs to `clear/<scene>.png`.
"""


def transmission(depth: Array, beta: float) -> Array:
    """Share of light that reaches the camera, t = exp(-beta d)."""
    return np.exp(-beta * depth)


def add_haze(clear: Array, t: Array, airlight: float) -> Array:
    """Hazy image I = J t + A (1 - t) of the clear one J, transmission t (H, W) and airlight A."""
    return clear * t[..., None] + airlight * (1 - t[..., None])


def draw_scene(rng: np.random.Generator, height: int, width: int) -> tuple[Array, Array]:
    """A street: sky, ground and blocks with windows, the nearer ones over the farther ones.

    Returns:
        Image (H, W, 3) in [0, 1] and depth (H, W) in (0, FAR].
    """
    horizon = round(height * rng.uniform(0.35, 0.5))
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    image, depth = np.empty((height, width, 3)), np.full((height, width), FAR)
    sky = np.linspace(0, 1, height)[:, None, None]
    image[:] = (1 - sky) * rng.uniform((0.2, 0.4, 0.7), (0.45, 0.6, 0.95)) + sky * 0.8
    scale = _NEAREST * (height - 1 - horizon)  # depth times rows below the horizon
    ground = rows > horizon
    depth[ground] = np.minimum(scale / (rows[ground] - horizon), FAR)
    across = (columns - width / 2) / (width / 2) * depth
    tiles = (np.floor(across / 0.05) + np.floor(np.log(depth) / 0.2)) % 2
    colour = rng.uniform(0.15, 0.6, 3)
    image[ground] = (colour * (1 + 0.35 * tiles[..., None]))[ground]
    for distance in np.sort(rng.uniform(1.2 * _NEAREST, 0.8 * FAR, rng.integers(8, 15)))[::-1]:
        _draw_block(rng, image, depth, distance, foot=horizon + scale / distance)
    grain = rng.normal(0, 0.02, (height, width, 1))
    return np.clip(image * rng.uniform(0.85, 1.0) + grain, 0, 1), depth


def _draw_block(
    rng: np.random.Generator, image: Array, depth: Array, distance: float, foot: float
) -> None:
    """A house front at one distance, into `image` and `depth`."""
    height, width = depth.shape
    tall = height * rng.uniform(0.03, 0.12) / distance
    wide = width * rng.uniform(0.02, 0.06) / distance
    left = rng.uniform(-wide / 2, width - wide / 2)
    top, bottom = max(0, round(foot - tall)), min(height, round(foot))
    start, stop = max(0, round(left)), min(width, round(left + wide))
    if bottom <= top or stop <= start:
        return
    wall, window = rng.uniform(0.1, 0.95, 3), rng.uniform(0.0, 0.5, 3)
    pitch = max(2.0, tall / rng.integers(3, 8))
    rows, columns = np.mgrid[top:bottom, start:stop]
    glass = ((rows - top) % pitch > 0.5 * pitch) & ((columns - start) % pitch > 0.5 * pitch)
    image[top:bottom, start:stop] = np.where(glass[..., None], window, wall)
    depth[top:bottom, start:stop] = distance


def write_haze_phantom(
    root: Path, *, scenes: int = 24, seed: int = 0, height: int = 144, width: int = 192
) -> Path:
    """Write the data set, or return at once when it is there already.

    There are 3 to 9999 scenes, each seen through three kinds of haze; height and width are in
    pixels. Scene k depends on seed, sizes and k only: a larger data set begins with the smaller
    one. It returns `root`, whose parents are made.

    Raises:
        UserError: `root` holds something else, or cannot be written.
    """
    if not 3 <= scenes <= 9999 or seed < 0 or min(height, width) < 16:
        raise UserError(
            f"data.prepare: scenes={scenes} must lie in 3..9999, seed={seed} be 0 or more, and "
            f"images of {height} × {width} pixels have at least 16 × 16"
        )
    parameters = {
        "generator": _GENERATOR,
        "version": VERSION,
        "scenes": scenes,
        "seed": seed,
        "height": height,
        "width": width,
    }

    def save(path: Path, image: Array) -> None:
        from PIL import Image

        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.round(255 * image).astype(np.uint8)).save(path)

    def write(work: Path) -> None:
        for number in range(1, scenes + 1):
            rng = np.random.default_rng([seed, number])
            clear, depth = draw_scene(rng, height, width)
            save(work / "clear" / f"{number:04d}.png", clear)
            for variant in range(1, VARIANTS + 1):
                beta, airlight = round(rng.uniform(*BETA), 2), rng.uniform(*AIRLIGHT)
                hazy = add_haze(clear, transmission(depth, beta), airlight)
                save(work / "hazy" / f"{number:04d}_{variant}_{beta:.2f}.png", hazy)

    return write_once(
        Path(root), parameters, write=write, note=_NOTE, manifest=MANIFEST, what=f"{scenes} scenes"
    )
