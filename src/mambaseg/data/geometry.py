"""Between a volume as it was measured and the square grid that the network sees.

Train, validation, test and prediction share one `Preprocessing`; its name travels with checkpoints
and results. B: images, Z: slices of a volume, C: channels, H, W: native size in pixels, S: side of
the grid, K: classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from mambaseg.data.intensity import SCALINGS, WINDOW, Window, is_window, through_window
from mambaseg.errors import UserError

# preset -> (intensity, geometry)
_PRESETS = {
    "paper": ("minmax", "stretch"),
    "percentile": ("percentile", "stretch"),
    "zscore": ("zscore", "stretch"),
    "modern": ("percentile", "fit"),
}


@dataclass(frozen=True)
class Preprocessing:
    """A named intensity scaling and a named way onto the (size, size) grid.

    | preset       | intensity, per volume           | geometry |
    |--------------|---------------------------------|----------|
    | `paper`      | min–max to [0, 1]               | stretch  |
    | `percentile` | clip 0.5–99.5 %, then to [0, 1] | stretch  |
    | `zscore`     | mean 0, standard deviation 1    | stretch  |
    | `modern`     | clip 0.5–99.5 %, then to [0, 1] | fit      |

    Another intensity scaling may take the place of a preset's own: `intensity`, or a `window`,
    which clips to [low, high] in the files' grey values and maps these to 0 and 1.

    * *stretch*: as published (Mamba-UNet, after SSL4MIS): each axis is resampled to the grid by
      nearest neighbour, the aspect ratio is not kept; labels go back by nearest neighbour.
    * *fit*: the aspect ratio is kept, the longer side fills the grid, the image sits in its
      centre on zeros; images are bilinear (no antialiasing), logits go back bilinearly before the
      argmax.

    Args:
        name: The preset.
        size: Side S of the grid in pixels.
        intensity: `minmax`, `percentile`, `zscore` or `window`; empty: the preset's own.
        window: [low, high] in the files' grey values; its `intensity` is `window`.
        longest_side: Pixels; larger pictures were reduced to it when they were read, so that
            pictures are reduced before prediction too. None: read as they are.
    """

    name: str
    size: int
    intensity: str = ""
    window: Window | None = None
    longest_side: int | None = None

    def __post_init__(self) -> None:
        if self.name not in _PRESETS:
            raise UserError(
                f"unknown preprocessing {self.name!r}: choose one of {', '.join(_PRESETS)}"
            )
        if self.size < 1:
            raise UserError(f"the size of the network's grid must be positive, not {self.size}")
        if self.longest_side is not None and self.longest_side < 1:
            raise UserError(
                f"data.longest_side={self.longest_side}: give pixels, or null for native size"
            )
        if self.window is not None and not is_window(self.window):
            raise UserError(
                f"data.window={self.window}: give the lowest and the highest grey value, such as "
                "[-125, 275] for the abdomen in CT or [0, 255] for pictures of 8 bits"
            )
        if self.window is not None:
            low, high = map(float, self.window)
            object.__setattr__(self, "window", (low, high))
        implied = _PRESETS[self.name][0] if self.window is None else WINDOW
        object.__setattr__(self, "intensity", self.intensity or implied)
        if self.intensity not in (*SCALINGS, WINDOW):
            raise UserError(
                f"data.intensity={self.intensity}: choose one of {', '.join(SCALINGS)}, {WINDOW}"
            )
        if (self.intensity == WINDOW) != (self.window is not None):
            raise UserError(
                f"data.intensity={self.intensity} with data.window={self.window}: a window needs "
                "its two grey values, another intensity scaling has none"
            )

    @classmethod
    def restored(cls, description: Mapping[str, Any]) -> "Preprocessing":
        """Make the preprocessing that `describe` told of; what it left unsaid is the preset's.

        Raises:
            UserError: There is none like that.
        """
        fields = ("intensity", "window", "longest_side")
        given = {key: description[key] for key in fields if key in description}
        return cls(description["name"], description["size"], **given)

    @property
    def geometry(self) -> str:
        """Name of the way onto the grid: `stretch` or `fit`."""
        return _PRESETS[self.name][1]

    @property
    def interpolation(self) -> str:
        """How images are sampled: `nearest` or `bilinear`. Labels are always `nearest`."""
        return "nearest" if self.geometry == "stretch" else "bilinear"

    def describe(self) -> dict[str, Any]:
        """Return plain data that says what is done, for checkpoints and results."""
        description: dict[str, Any] = {
            "name": self.name,
            "size": self.size,
            "intensity": self.intensity,
            "geometry": self.geometry,
            "interpolation": self.interpolation,
        }
        if self.window is not None:
            description["window"] = list(self.window)
        if self.longest_side is not None:
            description["longest_side"] = self.longest_side
        return description

    def settings(self) -> dict[str, Any]:
        """Return the values of `data.*` that ask for this; None where the preset decides."""
        own = self.intensity in (_PRESETS[self.name][0], WINDOW)
        return {
            "preprocessing": self.name,
            "size": self.size,
            "intensity": None if own else self.intensity,
            "window": self.window and list(self.window),
            "longest_side": self.longest_side,
        }

    def scale_intensity(self, image: NDArray[Any]) -> NDArray[np.float32]:
        """Scale one whole volume (Z, C, H, W) to float32, each channel on its own.

        A constant channel becomes zeros, but not through a window.
        """
        image = np.asarray(image, dtype=np.float32)
        if self.window is not None:
            return through_window(image, self.window)
        scale = SCALINGS[self.intensity]
        return np.stack([scale(channel) for channel in image.swapaxes(0, 1)], axis=1)

    def grid_positions(self, shapes: Tensor) -> tuple[Tensor, Tensor]:
        """Say where in each native image, in pixels, the rows and columns of the grid lie.

        Args:
            shapes: (B, 2) integers: height and width of each image.

        Returns:
            Rows (B, S) and columns (B, S) in float64: whole numbers for `stretch` (NaN for a
            sample that reads as zero), fractions for `fit`.
        """
        if self.geometry == "stretch":
            heights, widths = shapes.unbind(1)
            return nearest_positions(heights, self.size), nearest_positions(widths, self.size)
        grid = torch.arange(self.size, device=shapes.device, dtype=_precision(shapes.device))
        native = shapes.to(grid.dtype)
        step = native.amax(dim=1, keepdim=True) / self.size  # native pixels per pixel of the grid
        centred = (grid + 0.5 - self.size / 2) * step  # (B, S)
        rows, columns = (centred + (extent - 1) / 2 for extent in native.split(1, dim=1))
        return rows, columns

    def to_grid(self, image: Tensor) -> Tensor:
        """Bring intensity-scaled slices (Z, C, H, W) onto the grid: (Z, C, S, S), dtype kept."""
        shape = torch.tensor([image.shape[-2:]], device=image.device)
        rows, columns = self.grid_positions(shape)
        rows, columns = rows[:, :, None], columns[:, None, :]
        if self.interpolation == "nearest":
            return nearest(image, rows, columns, shape)
        return bilinear(image, rows, columns)

    def labels_to_native(self, logits: Tensor, shape: tuple[int, int]) -> Tensor:
        """Decide the class of each native pixel: logits (Z, K, S, S) -> labels (Z, H, W) uint8."""
        rows, columns, extent = self._native_positions(shape, logits.device)
        if self.geometry == "stretch":
            labels = logits.argmax(dim=1, keepdim=True).to(torch.uint8)
            return nearest(labels, rows, columns, extent)[:, 0]
        # Slice by slice: K native-size maps at a time are enough to hold.
        native = [bilinear(one.float(), rows, columns).argmax(dim=1) for one in logits.split(1)]
        return torch.cat(native).to(torch.uint8)

    def logits_to_native(self, logits: Tensor, shape: tuple[int, int]) -> Tensor:
        """Bring logits (Z, K, S, S) back to native pixels: (Z, K, H, W) float32.

        Their argmax over K is `labels_to_native`. A pixel whose sample reads as zero (see
        `nearest_index`) has the logit 0 for every class.
        """
        rows, columns, extent = self._native_positions(shape, logits.device)
        if self.geometry == "stretch":
            return nearest(logits.float(), rows, columns, extent)
        return bilinear(logits.float(), rows, columns)

    def _native_positions(
        self, shape: tuple[int, int], device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where on the grid native rows (1, H, 1) and columns (1, 1, W) lie; its extent (1, 2)."""
        extent = torch.tensor([[self.size, self.size]], device=device)
        if self.geometry == "stretch":
            rows, columns = (
                nearest_positions(side, target)
                for side, target in zip(extent.unbind(1), shape, strict=True)
            )
        else:
            scale = self.size / max(shape)
            rows, columns = (
                (
                    (torch.arange(target, device=device) + 0.5 - target / 2) * scale
                    + (self.size - 1) / 2
                ).clamp(0, self.size - 1)[None]
                for target in shape
            )
        return rows[:, :, None], columns[:, None, :], extent


def nearest_index(source: int, target: int) -> Tensor:
    """Return which of `source` pixels each of `target` pixels copies: (target,) int64.

    This is the index map of `scipy.ndimage.zoom(order=0, grid_mode=False)`, on which the published
    pipelines stand: the centres of the corner pixels coincide, halves round up. For some pairs of
    sizes floating-point rounding carries SciPy's last sample past the last pixel's centre, and it
    then reads as zero; there the index is -1.
    """
    return nearest_positions(torch.tensor([source]), target)[0].nan_to_num(nan=-1).long()


def nearest_positions(source: Tensor, target: int) -> Tensor:
    """Return `nearest_index` for sizes (B,) as float64 (B, target), with NaN for -1."""
    index = torch.arange(target, device=source.device, dtype=_precision(source.device))
    last = source.to(index.dtype)[:, None] - 1
    position = index * (last / (target - 1) if target > 1 else torch.ones_like(last))
    return torch.where(position > last, float("nan"), torch.floor(position + 0.5))


def bilinear(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Read images between their pixels; beyond them they are zero.

    Arithmetic is per pixel, so an image gives the same result alone and in any batch.

    Args:
        image: (B, C, H, W), zero beyond the true size of each image.
        rows: Row positions in pixels, broadcastable with `columns` to (B or 1, S, T).
        columns: Column positions in pixels.

    Returns:
        (B, C, S, T) in the dtype of `image`.
    """
    height, width = image.shape[-2:]
    framed = functional.pad(image, (1, 2, 1, 2))
    rows, columns = rows.clamp(-1, height) + 1, columns.clamp(-1, width) + 1
    top, left = rows.floor(), columns.floor()
    down, right = (
        (p - whole).to(image.dtype)[:, None] for p, whole in ((rows, top), (columns, left))
    )
    stride = width + 3
    pixel = (top * stride + left).long()
    upper = look_up(framed, pixel) * (1 - right) + look_up(framed, pixel + 1) * right
    pixel = pixel + stride
    lower = look_up(framed, pixel) * (1 - right) + look_up(framed, pixel + 1) * right
    return upper * (1 - down) + lower * down


def nearest(image: Tensor, rows: Tensor, columns: Tensor, shapes: Tensor) -> Tensor:
    """Read images at their nearest pixels; what lies outside, or is NaN, reads as zero.

    Args:
        image: (B, C, H, W), each image in the upper left corner of what is given.
        rows: Row positions in pixels, broadcastable with `columns` to (B or 1, S, T).
        columns: Column positions in pixels.
        shapes: (B, 2) or (1, 2) integers: the true height and width of each image.

    Returns:
        (B, C, S, T) in the dtype of `image`.
    """
    return look_up_or_zero(image, nearest_pixel(rows, columns, shapes, image.shape))


def nearest_pixel(
    rows: Tensor, columns: Tensor, shapes: Tensor, image_shape: Sequence[int]
) -> Tensor:
    """Return which pixel of a flattened image (H*W) each position falls in; H*W for none.

    As in SciPy, a position even slightly beyond the centres of the outermost pixels is in none.
    """
    height, width = image_shape[-2:]
    last_row, last_column = (shapes[:, :, None, None] - 1).unbind(1)
    inside = ((rows >= 0) & (rows <= last_row)) & ((columns >= 0) & (columns <= last_column))
    pixel = torch.floor(rows + 0.5) * width + torch.floor(columns + 0.5)
    return torch.where(inside, pixel, height * width).long()


def look_up_or_zero(image: Tensor, pixel: Tensor) -> Tensor:
    """Read images (B, C, H, W) at `nearest_pixel`s (B or 1, S, T) -> (B, C, S, T)."""
    flat = functional.pad(image.flatten(2), (0, 1))  # a zero for the pixels that are outside
    return look_up(flat, pixel)


def look_up(image: Tensor, pixel: Tensor) -> Tensor:
    """Read images (B, C, ...) at flat indices (B or 1, S, T) -> (B, C, S, T)."""
    flat = image.flatten(2)
    if len(pixel) == 1:
        return flat[:, :, pixel[0]]
    index = pixel.flatten(1)[:, None].expand(-1, flat.shape[1], -1)
    return flat.gather(2, index).unflatten(2, pixel.shape[1:])


def _precision(device: torch.device) -> torch.dtype:
    """Return float64, as SciPy computes positions, where the device has it (MPS has not)."""
    return torch.float32 if device.type == "mps" else torch.float64
