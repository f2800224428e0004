"""Augmentation: drawn per sample by a counter, applied to a whole batch on its device.

Every geometric augmentation here is an affine map, so it is composed with the way onto the grid
(`Preprocessing`) and each image is read once. The map runs backwards, from where a pixel of the
augmented native-size image is to where it comes from; positions are (row, column) in pixels, and
centres are at (size - 1) / 2.

B: batch, H, W: native size padded to the batch's largest, S: side of the grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mambaseg.data.counter import AUGMENTATION, uniforms
from mambaseg.data.geometry import Preprocessing
from mambaseg.data.resampling import Pixel
from mambaseg.data.sampling import bilinear, look_up_or_zero, nearest_pixel, precision
from mambaseg.errors import UserError

Array = NDArray[np.float64]

# Columns of the drawn parameters
_MATRIX, _OFFSET, _SHAPE, _TONE = slice(0, 4), slice(4, 6), slice(6, 8), slice(8, 11)
_UNIFORMS = 11  # random numbers per sample: at least as many as the hungriest preset uses
_NEUTRAL_TONE = (1.0, 0.0, 1.0)  # contrast, brightness, gamma

_QUARTER_TURN = np.array([[0.0, 1.0], [-1.0, 0.0]])  # np.rot90, backwards
_FLIPS = (np.diag([-1.0, 1.0]), np.diag([1.0, -1.0]))  # of the rows, of the columns


@dataclass(frozen=True)
class Augmentation:
    """A named augmentation: a pure function of (seed, step, position in the global batch).

    | preset   | what                                                                            |
    |----------|---------------------------------------------------------------------------------|
    | `none`   | nothing                                                                         |
    | `paper`  | 50 %: np.rot90 by 0–3 quarter turns, then always a flip of axis 0 or 1; else,   |
    |          | 50 %: rotation by a whole number of degrees in [-20, 19], zeros outside         |
    | `modern` | rotation ±30°, scale 0.8–1.25, shift ±5 % of the size, flips of each axis 50 %; |
    |          | contrast 0.75–1.25, brightness ±0.1, gamma 0.7–1.5 (each on 50 % of samples)    |

    `paper` is the published augmentation (Mamba-UNet, after SSL4MIS), at native aspect before the
    resize. There it samples twice by nearest neighbour: scipy.ndimage.rotate with order 0, then
    zoom with order 0. Here the two index maps are composed, with the rounding in between, and the
    image is read once: flips, quarter turns and the identity equal the two steps exactly, and
    rotations do up to positions that floating point cannot tell from a tie. (Rounding once, at
    the end, would be the other way to compose them; it moves the border of a structure by at most
    a pixel.) Our differences: the random numbers, and that the original's worker seeding repeats
    the same coin flips every epoch.

    Images are read as `preprocessing` reads them (nearest neighbour or bilinear), so training sees
    what evaluation sees; labels always by nearest neighbour. Where an image may be larger than the
    grid (`Preprocessing.windowed`), the map is one of lengths rather than of pixels, so that what
    is turned keeps its form, and of a larger image the grid shows a part that lies within it (as
    it is before it is turned or scaled): any such part, all equally likely, or the middle under
    `none`. Parts with foreground are not preferred.

    Args:
        preset: `none`, `paper` or `modern`.
        preprocessing: The way onto the grid.
        seed: Seed of the run.
    """

    preset: str
    preprocessing: Preprocessing
    seed: int

    def __post_init__(self) -> None:
        if self.preset not in ("none", "paper", "modern"):
            raise UserError(
                f"unknown augmentation {self.preset!r}: choose one of none, paper, modern"
            )

    @property
    def mirrors(self) -> bool:
        """Whether images are mirrored."""
        return self.preset != "none"

    def draw(
        self,
        step: int,
        positions: Sequence[int],
        shapes: NDArray[np.integer],
        pixels: Sequence[Pixel | None] | None = None,
    ) -> NDArray[np.float64]:
        """Draw what happens to each sample of a (part of a) batch.

        Args:
            step: Optimizer step.
            positions: Places of the samples in the global batch of that step.
            shapes: (B, 2) native height and width.
            pixels: B times height and width of a native pixel in mm, None where unknown; all of
                them are unknown if not given.

        Returns:
            (B, 11): matrix (2x2) and offset (2) from the augmented image (of a `windowed`
            preprocessing, from the grid) to the native one, height and width of the augmented image
            (the grid), contrast, brightness, gamma.

        Raises:
            UserError: The preprocessing needs to know a pixel's size.
        """
        parameters = np.empty((len(positions), 11))
        pixels = pixels or [None] * len(shapes)
        for row, position, shape, pixel in zip(parameters, positions, shapes, pixels, strict=True):
            u = uniforms(self.seed, AUGMENTATION, step=step, position=position, count=_UNIFORMS)
            native = shape.astype(np.float64)
            shift, tone = np.zeros(2), _NEUTRAL_TONE
            if self.preset == "paper":
                matrix = _paper_matrix(u)
            elif self.preset == "modern":
                matrix, shift, tone = _modern_matrix(u), _modern_shift(u, native), _modern_tone(u)
            else:
                matrix = np.eye(2)
            # An odd number of quarter turns exchanges height and width.
            turned = native[::-1] if matrix[0, 0] == 0 == matrix[1, 1] else native
            row[_MATRIX] = matrix.ravel()
            row[_OFFSET] = (native - 1) / 2 - matrix @ ((turned - 1) / 2) + shift
            row[_SHAPE] = turned
            if self.preprocessing.windowed:
                matrix, offset = self._from_grid(u, matrix, shape, pixel)
                row[_MATRIX], row[_OFFSET] = matrix.ravel(), offset + shift
                row[_SHAPE] = self.preprocessing.size
            row[_TONE] = tone
        return parameters

    def _from_grid(
        self, u: Array, matrix: Array, shape: NDArray[np.integer], pixel: Pixel | None
    ) -> tuple[Array, Array]:
        """Return matrix and offset from the grid to the native image; `matrix` is in lengths."""
        image = self.preprocessing.resampled((int(shape[0]), int(shape[1])), pixel)
        turned = matrix[0, 0] == 0 == matrix[1, 1]
        extent = np.array(image.shape[::-1] if turned else image.shape)
        room = extent - self.preprocessing.size
        lead = room // 2
        if self.preset != "none":
            lead = np.where(room > 0, np.floor(u[9:11] * (room + 1)), lead)
        native_per_pixel = np.array(image.step)[:, None] * matrix
        centre = (np.array(image.native) - 1) / 2
        return native_per_pixel, centre + native_per_pixel @ (lead + 0.5 - extent / 2)

    def __call__(
        self, image: Tensor, label: Tensor, shapes: Tensor, parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Augment a batch and bring it onto the grid, all tensors on one device.

        Args:
            image: (B, C, H, W) float32, intensity-scaled, padded at the bottom and right.
            label: (B, H, W) uint8, likewise.
            shapes: (B, 2) integers, the true height and width.
            parameters: (B, 11) from `draw`.

        Returns:
            Image (B, C, S, S) float32 and label (B, S, S) int64.
        """
        # One image's index map fits a CPU's cache, a batch's does not. The results are the same.
        size = 1 if image.device.type == "cpu" else len(image)
        parts = zip(*(x.split(size) for x in (image, label, shapes, parameters)), strict=True)
        images, labels = zip(*(self._apply(*part) for part in parts), strict=True)
        return torch.cat(images), torch.cat(labels).long()

    def _apply(
        self, image: Tensor, label: Tensor, shapes: Tensor, parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return image (B, C, S, S) float32 and label (B, S, S) uint8."""
        if self.preprocessing.windowed:
            count, device = self.preprocessing.size, image.device
            rows = columns = torch.arange(count, device=device, dtype=precision(device))[None]
        else:
            rows, columns = self.preprocessing.grid_positions(parameters[:, _SHAPE])
        row, column = rows[:, :, None], columns[:, None, :]
        m = parameters[:, _MATRIX, None, None].to(rows.dtype)
        offset = parameters[:, _OFFSET, None, None].to(rows.dtype)
        native_rows = m[:, 0] * row + (m[:, 1] * column + offset[:, 0])  # (B, S, S)
        native_columns = m[:, 2] * row + (m[:, 3] * column + offset[:, 1])
        pixel = nearest_pixel(native_rows, native_columns, shapes, image.shape)
        if self.preprocessing.interpolation == "nearest":
            grid = look_up_or_zero(image, pixel)
        else:
            grid = bilinear(image, native_rows, native_columns)
        if self.preset == "modern":
            tone = parameters[:, _TONE, None, None, None].to(grid.dtype)
            inside = pixel[:, None] < image[0, 0].numel()
            grid = torch.where(inside, self._apply_tone(grid, *tone.unbind(1)), grid)
        return grid, look_up_or_zero(label[:, None], pixel)[:, 0]

    def _apply_tone(
        self, image: Tensor, contrast: Tensor, brightness: Tensor, gamma: Tensor
    ) -> Tensor:
        """Change the tone about the middle of the intensity range; gamma only in [0, 1]."""
        if self.preprocessing.intensity == "zscore":
            return image * contrast + brightness
        return ((image - 0.5) * contrast + 0.5 + brightness).clamp(0, 1) ** gamma


def _rotation(degrees: float) -> Array:
    """Return the matrix with which scipy.ndimage.rotate reads, for axes (1, 0)."""
    cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[cosine, sine], [-sine, cosine]])


def _paper_matrix(u: Array) -> Array:
    if u[0] < 0.5:
        turns, axis = int(4 * u[1]), int(2 * u[2])
        return np.linalg.matrix_power(_QUARTER_TURN, turns) @ _FLIPS[axis]
    if u[3] < 0.5:
        return _rotation(int(40 * u[4]) - 20)
    return np.eye(2)


def _modern_matrix(u: Array) -> Array:
    matrix = _rotation(60 * u[0] - 30) / 0.8 ** (1 - 2 * u[1])  # from 0.8 to 1 / 0.8
    for flip, coin in zip(_FLIPS, u[2:4], strict=True):
        matrix = matrix @ flip if coin < 0.5 else matrix
    return matrix


def _modern_shift(u: Array, native: Array) -> Array:
    return native * (0.1 * u[4:6] - 0.05)


def _modern_tone(u: Array) -> tuple[float, float, float]:
    """Return contrast, brightness and gamma, each left alone on half of the samples."""

    def half(number: float, low: float, high: float, neutral: float) -> float:
        return low + (high - low) * (2 * number) if number < 0.5 else neutral

    return half(u[6], 0.75, 1.25, 1.0), half(u[7], -0.1, 0.1, 0.0), half(u[8], 0.7, 1.5, 1.0)
