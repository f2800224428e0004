"""Between a volume as it was measured and the square grid that the network sees.

Train, validation, test and prediction share one `Preprocessing`; its name travels with checkpoints
and results. B: images, Z: slices of a volume, C: channels, H, W: native size in pixels, S: side of
the grid, K: classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mambaseg.data.intensity import SCALINGS, WINDOW, Window, is_window, through_window
from mambaseg.data.resampling import COARSEST, FINEST, Pixel, Resampled, is_spacing, steps
from mambaseg.data.sampling import bilinear, nearest, nearest_positions, precision
from mambaseg.errors import UserError

# preset -> (intensity, geometry)
_PRESETS = {
    "paper": ("minmax", "stretch"),
    "percentile": ("percentile", "stretch"),
    "zscore": ("zscore", "stretch"),
    "modern": ("percentile", "fit"),
    "spacing": ("percentile", "spacing"),
    "native": ("percentile", "native"),
}
_WINDOWED = ("spacing", "native")  # geometries in which an image may be larger than the grid


@dataclass(frozen=True)
class Preprocessing:
    """A named intensity scaling and a named way onto the (size, size) grid.

    | preset       | intensity, per volume           | geometry |
    |--------------|---------------------------------|----------|
    | `paper`      | min–max to [0, 1]               | stretch  |
    | `percentile` | clip 0.5–99.5 %, then to [0, 1] | stretch  |
    | `zscore`     | mean 0, standard deviation 1    | stretch  |
    | `modern`     | clip 0.5–99.5 %, then to [0, 1] | fit      |
    | `spacing`    | clip 0.5–99.5 %, then to [0, 1] | spacing  |
    | `native`     | clip 0.5–99.5 %, then to [0, 1] | native   |

    Another intensity scaling may take the place of a preset's own: `intensity`, or a `window`,
    which clips to [low, high] in the files' grey values and maps these to 0 and 1.

    * *stretch*: as published (Mamba-UNet, after SSL4MIS): each axis is resampled to the grid by
      nearest neighbour, the aspect ratio is not kept; labels go back by nearest neighbour.
    * *fit*: the aspect ratio is kept, the longer side fills the grid, the image sits in its
      centre on zeros; images are bilinear (no antialiasing), logits go back bilinearly before the
      argmax.
    * *spacing*: pixels become squares of `spacing` mm, bilinear as in fit. An image that is smaller
      than the grid sits in its centre on zeros. Of a larger one training sees a part of the
      grid's size (`Augmentation` says which); evaluation and prediction see all of it.
    * *native*: likewise, with the pixels as they are; the voxel size plays no part.

    Args:
        name: The preset.
        size: Side S of the grid in pixels.
        intensity: `minmax`, `percentile`, `zscore` or `window`; empty: the preset's own.
        window: [low, high] in the files' grey values; its `intensity` is `window`.
        spacing: Side of a pixel in mm, of geometry `spacing`.
        longest_side: Pixels; larger pictures were reduced to it when they were read, so that
            pictures are reduced before prediction too. None: read as they are.
    """

    name: str
    size: int
    intensity: str = ""
    window: Window | None = None
    spacing: float | None = None
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
        if (self.geometry == "spacing") != (self.spacing is not None):
            raise UserError(
                f"data.preprocessing={self.name} with data.spacing={self.spacing}: the preset "
                "spacing needs the side of a pixel in mm, such as data.spacing=1.25; others have "
                "none"
            )
        if self.spacing is not None and not is_spacing(self.spacing):
            raise UserError(
                f"data.spacing={self.spacing}: give the side of a pixel in mm, "
                f"{FINEST} to {COARSEST}"
            )

    @classmethod
    def restored(cls, description: Mapping[str, Any]) -> "Preprocessing":
        """Make the preprocessing that `describe` told of; what it left unsaid is the preset's.

        Raises:
            UserError: There is none like that.
        """
        fields = ("intensity", "window", "spacing", "longest_side")
        given = {key: description[key] for key in fields if key in description}
        return cls(description["name"], description["size"], **given)

    @property
    def geometry(self) -> str:
        """Name of the way onto the grid: `stretch`, `fit`, `spacing` or `native`."""
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
        if self.spacing is not None:
            description["spacing"] = self.spacing
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
            "spacing": self.spacing,
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

    @property
    def windowed(self) -> bool:
        """Whether an image may be larger than the grid, which is then a window on it."""
        return self.geometry in _WINDOWED

    def resampled(self, shape: tuple[int, int], pixel: Pixel | None = None) -> Resampled:
        """Say how one image lies at the spacing of a `windowed` geometry.

        Args:
            shape: Its native height and width.
            pixel: Height and width of its pixels in mm, None where they are unknown.

        Raises:
            UserError: The geometry needs to know them, or the image would be far too large.
        """
        if self.spacing is None:
            return Resampled(shape, (1.0, 1.0))
        if pixel is None:
            raise UserError(
                "the voxel size is unknown, and the preprocessing resamples to "
                f"{self.spacing:g} mm. Use files whose headers hold it, or train with another "
                "preset: data.preprocessing=native or modern"
            )
        return Resampled(shape, steps(pixel, self.spacing))

    def grid_positions(self, shapes: Tensor) -> tuple[Tensor, Tensor]:
        """Say where in each native image the rows and columns of the grid lie, if all of it does.

        Args:
            shapes: (B, 2) integers: height and width of each image.

        Returns:
            Rows (B, S) and columns (B, S) in pixels, float64: whole numbers for `stretch` (NaN for
            a sample that reads as zero), fractions for `fit`.
        """
        if self.geometry == "stretch":
            heights, widths = shapes.unbind(1)
            return nearest_positions(heights, self.size), nearest_positions(widths, self.size)
        grid = torch.arange(self.size, device=shapes.device, dtype=precision(shapes.device))
        native = shapes.to(grid.dtype)
        step = native.amax(dim=1, keepdim=True) / self.size  # native pixels per pixel of the grid
        centred = (grid + 0.5 - self.size / 2) * step  # (B, S)
        rows, columns = (centred + (extent - 1) / 2 for extent in native.split(1, dim=1))
        return rows, columns

    def to_grid(self, image: Tensor, pixel: Pixel | None = None) -> Tensor:
        """Bring intensity-scaled slices onto the grid.

        Args:
            image: (Z, C, H, W).
            pixel: Height and width of a native pixel in mm, None where they are unknown.

        Returns:
            (Z, C, S, S), dtype kept; of a `windowed` geometry (Z, C, S or more, S or more).

        Raises:
            UserError: See `resampled`.
        """
        shape = torch.tensor([image.shape[-2:]], device=image.device)
        if self.windowed:
            whole = self.resampled((image.shape[-2], image.shape[-1]), pixel).whole(self.size)
            rows, columns = whole.native_positions(image.device)
        else:
            rows, columns = self.grid_positions(shape)
        rows, columns = rows[:, :, None], columns[:, None, :]
        if self.interpolation == "nearest":
            return nearest(image, rows, columns, shape)
        return bilinear(image, rows, columns)

    def labels_to_native(
        self,
        logits: Tensor,
        shape: tuple[int, int],
        pixel: Pixel | None = None,
        *,
        seen: tuple[int, int] | None = None,
    ) -> Tensor:
        """Decide the class of each native pixel.

        Args:
            logits: (Z, K, ...) of what `to_grid` made of the slices.
            shape: Native height and width.
            pixel: As for `to_grid`.
            seen: Height and width of what `to_grid` got, where larger slices were reduced to it.

        Returns:
            Labels (Z, H, W) uint8.
        """
        rows, columns, extent = self._native_positions(shape, pixel, seen or shape, logits.device)
        if self.geometry == "stretch":
            labels = logits.argmax(dim=1, keepdim=True).to(torch.uint8)
            return nearest(labels, rows, columns, extent)[:, 0]
        # Slice by slice: K native-size maps at a time are enough to hold.
        native = [bilinear(one.float(), rows, columns).argmax(dim=1) for one in logits.split(1)]
        return torch.cat(native).to(torch.uint8)

    def logits_to_native(
        self,
        logits: Tensor,
        shape: tuple[int, int],
        pixel: Pixel | None = None,
        *,
        seen: tuple[int, int] | None = None,
    ) -> Tensor:
        """Bring logits (Z, K, ...) back to native pixels: (Z, K, H, W) float32.

        Their argmax over K is `labels_to_native`. A pixel whose sample reads as zero (see
        `nearest_index`) has the logit 0 for every class.
        """
        rows, columns, extent = self._native_positions(shape, pixel, seen or shape, logits.device)
        if self.geometry == "stretch":
            return nearest(logits.float(), rows, columns, extent)
        return bilinear(logits.float(), rows, columns)

    def _native_positions(
        self,
        shape: tuple[int, int],
        pixel: Pixel | None,
        seen: tuple[int, int],
        device: torch.device,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where on the grid native rows (1, H, 1) and columns (1, 1, W) lie; its extent (1, 2)."""
        extent = torch.tensor([[self.size, self.size]], device=device)
        if self.geometry == "stretch":
            rows, columns = (
                nearest_positions(side, target)
                for side, target in zip(extent.unbind(1), shape, strict=True)
            )
        elif self.windowed:
            whole = self.resampled(seen, pixel).whole(self.size)
            rows, columns = whole.positions_of_native(shape, device)
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
