"""Between a volume as it was measured and the grid that the network sees.

Train, validation, test and prediction share one `Preprocessing`; its name travels with checkpoints
and results. B: images, Z: slices of a volume, C: channels, H, W: native size in pixels, S, T: rows
and columns of the grid, K: classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mambaseg.data.intensity import (
    CT,
    SCALINGS,
    WINDOW,
    CtValues,
    Window,
    ct_scaled,
    is_ct,
    is_window,
    rescaled,
)
from mambaseg.data.sampling import (
    bilinear,
    look_up_or_zero,
    nearest_pixel,
    nearest_positions,
    precision,
)
from mambaseg.data.sizes import Size, is_spacing, pair_of, plain_lists, sides_of
from mambaseg.data.validation import SPACING_MM
from mambaseg.errors import UserError

Stack = TypeVar("Stack", Tensor, NDArray[np.float32])
Pixel = tuple[float, float]  # height and width in mm
LARGEST_SIDE = 8192  # pixels of a resampled image

# preset -> intensity per volume and channel (see `intensity`), geometry
PRESETS = {
    "paper": ("minmax", "stretch"),
    "percentile": ("percentile", "stretch"),
    "zscore": ("zscore", "stretch"),
    "modern": ("percentile", "fit"),
    "spacing": ("percentile", "spacing"),
    "native": ("percentile", "native"),
}


class Resampled:
    """One image at another spacing, in the middle of the zeros that fill the network's grid.

    `native` is (H, W) and `step` native pixels per pixel, down and across; there are at least
    `least` (rows, columns). The centres of the native and the resampled image coincide. Positions
    are in native pixels, the first pixel's centre at 0. `shape` is its height and width in pixels,
    `extent` with the zeros; `UserError` for more than `LARGEST_SIDE` and more than natively.
    """

    def __init__(
        self, native: tuple[int, int], step: tuple[float, float], least: tuple[int, int]
    ) -> None:
        self.native, self.step = native, step
        height, width = (max(1, round(side / s)) for side, s in zip(native, step, strict=True))
        self.shape = height, width
        self.extent = max(height, least[0]), max(width, least[1])
        if max(self.shape) > max(LARGEST_SIDE, *native):
            raise UserError(
                f"a slice of {native[0]} × {native[1]} pixels would become {height} × {width}: "
                "choose a larger data.spacing"
            )

    def _axes(self) -> Iterator[tuple[int, float, int, int, int, float]]:
        """Of each axis: native size, step, size, extent, first pixel, the extent's native start."""
        for native, step, count, extent in zip(
            self.native, self.step, self.shape, self.extent, strict=True
        ):
            first = -((count - extent) // 2)  # whole pixels: equal spacings interpolate nothing
            start = (native - 1) / 2 + step * (0.5 - first - count / 2)
            yield native, step, count, extent, first, start

    def positions(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where rows (1, height) and columns (1, width) of its extent lie in native pixels."""
        rows, columns = (
            (step * _count(extent, device) + start)[None]
            for _, step, _, extent, _, start in self._axes()
        )
        return rows, columns

    def positions_of_native(
        self, shape: tuple[int, int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Where rows (1, H) and columns (1, W) of the native image lie in its extent.

        Beyond the image its border takes their place: its own logits count there, not those of the
        zeros around it. `shape` is (H, W); not `native` where the image was reduced before.
        """
        rows, columns = (
            (((_count(side, device) + 0.5) * (native / side) - 0.5 - start) / step)
            .clamp(first, first + count - 1)[None]
            for side, (native, step, count, _, first, start) in zip(
                shape, self._axes(), strict=True
            )
        )  # fmt: skip
        return rows, columns


def _count(number: int, device: torch.device) -> Tensor:
    return torch.arange(number, device=device, dtype=precision(device))


@dataclass(frozen=True)
class Preprocessing:
    """A named intensity scaling and a named way onto the grid (see `PRESETS`).

    * *stretch*: as published (Mamba-UNet, after SSL4MIS): each axis is resampled to the grid by
      nearest neighbour, images and labels; the aspect ratio is not kept.
    * *fit*: the image fills the grid in one direction, in the centre on zeros; images are
      bilinear (no antialiasing), logits go back bilinearly before the argmax.
    * *spacing*: pixels become squares (or rectangles) of `spacing` mm, bilinear as in fit.
      Smaller images sit in the grid's centre on zeros. Of larger ones training sees a part of the
      grid's size, evaluation and prediction all.
    * *native*: likewise, with the pixels as they are; the voxel size plays no part.
    """

    name: str
    size: Size  # of the grid in pixels; two equal sides become one
    intensity: str = ""  # minmax, percentile, zscore, window or ct; empty: the preset's own
    window: Window | None = None  # grey values that become 0 and 1; its intensity is `window`
    spacing: float | Sequence[float] | None = None  # of a pixel in mm, of geometry `spacing`
    longest_side: int | None = None  # pixels to which larger pictures are reduced when read
    neighbours: int = 0  # slices above, and as many below, that a slice has as further channels
    ct: Sequence[CtValues | None] | None = None  # of each channel, see `ct_scaled`; None: z-score

    def __post_init__(self) -> None:
        if self.name not in PRESETS:
            known = ", ".join(PRESETS)
            raise UserError(f"data.preprocessing={self.name}: choose one of {known}")
        sides = sides_of(self.size)
        object.__setattr__(self, "size", sides[0] if sides[0] == sides[1] else sides)
        if self.longest_side is not None and self.longest_side < 1:
            raise UserError(
                f"data.longest_side={self.longest_side}: give a positive number of pixels"
            )
        if self.neighbours < 0:
            raise UserError(
                f"data.neighbours={self.neighbours}: give a number of slices, 0 or more"
            )
        if self.window is not None:
            if not is_window(self.window):
                raise UserError(
                    f"data.window={self.window}: give the lowest and the highest grey value, such "
                    "as [-125, 275] for the abdomen in CT or [0, 255] for pictures of 8 bits"
                )
            low, high = map(float, self.window)
            object.__setattr__(self, "window", (low, high))
        if self.ct is not None:
            if not is_ct(self.ct):
                raise UserError(
                    f"data.ct={self.ct}: give [low, high, mean, deviation] in the files' grey "
                    "values for each channel, or null for a z-score: [[-960, 300, 100, 250]]"
                )
            object.__setattr__(self, "ct", tuple(one and tuple(map(float, one)) for one in self.ct))
        implied = WINDOW if self.window else CT if self.ct else PRESETS[self.name][0]
        object.__setattr__(self, "intensity", self.intensity or implied)
        if (self.window and self.ct) or self.intensity not in (
            (implied,) if self.window or self.ct else SCALINGS
        ):
            raise UserError(
                f"data.intensity={self.intensity} with data.window={self.window} and data.ct="
                f"{self.ct}: choose one of {', '.join(SCALINGS)} without either; a window needs "
                "its two grey values, ct its four per channel"
            )
        resamples = self.geometry == "spacing"
        if not (is_spacing(self.spacing) if resamples else self.spacing is None):
            low, high = SPACING_MM
            raise UserError(
                f"data.preprocessing={self.name} with data.spacing={self.spacing}: the preset "
                f"spacing needs the side of a pixel in mm ({low} to {high:g}), such as "
                "data.spacing=1.25, or its height and width; others have none"
            )
        if isinstance(self.spacing, (list, tuple)):
            object.__setattr__(self, "spacing", tuple(map(float, self.spacing)))

    @classmethod
    def restored(cls, description: Mapping[str, Any]) -> "Preprocessing":
        """Make the preprocessing of a `describe`; what it left unsaid is the preset's."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: description[name] for name in names if name in description})

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the grid."""
        return sides_of(self.size)

    @property
    def geometry(self) -> str:
        """Name of the way onto the grid: `stretch`, `fit`, `spacing` or `native`."""
        return PRESETS[self.name][1]

    @property
    def interpolation(self) -> str:
        """How images are sampled: `nearest` or `bilinear`. Labels are always `nearest`."""
        return "nearest" if self.geometry == "stretch" else "bilinear"

    @property
    def windowed(self) -> bool:
        """Whether an image may be larger than the grid, which is then a window on it."""
        return self.geometry in ("spacing", "native")

    def _plain(self) -> dict[str, Any]:
        return {field.name: plain_lists(getattr(self, field.name)) for field in fields(self)}

    def describe(self) -> dict[str, Any]:
        """Return plain data that describes this, for checkpoints and results."""
        how = {"geometry": self.geometry, "interpolation": self.interpolation}
        described = {**self._plain(), **how, "neighbours": self.neighbours or None}
        return {key: value for key, value in described.items() if value is not None}

    def settings(self) -> dict[str, Any]:
        """Return the values of `data.*` that ask for this; None where the preset decides."""
        values = self._plain()
        if self.intensity in (PRESETS[self.name][0], WINDOW, CT):
            values["intensity"] = None
        return {"preprocessing": values.pop("name"), **values}

    @property
    def slices(self) -> int:
        """How many slices a network sees at once."""
        return 2 * self.neighbours + 1

    def stacked(self, volume: Stack, start: int, stop: int) -> Stack:
        """Return slices of a volume (Z, C, H, W) with their neighbours as channels, lowest first.

        Beyond the first and the last slice these are repeated.

        Returns:
            (stop - start, `slices` * C, H, W).
        """
        if not self.neighbours:
            return volume[start:stop]
        near = np.arange(-self.neighbours, self.neighbours + 1)
        places = np.clip(np.arange(start, stop)[:, None] + near, 0, len(volume) - 1)
        stack = volume[places]  # (n, slices, C, H, W)
        return stack.reshape(stop - start, -1, *volume.shape[2:])

    def scale_intensity(self, image: NDArray[Any]) -> NDArray[np.float32]:
        """Scale one whole volume (Z, C, H, W) to float32, each channel on its own.

        A constant channel becomes zeros, but not through a window or as `ct`.
        """
        image = np.asarray(image, dtype=np.float32)
        if self.window is not None:
            return rescaled(image, *self.window)
        if self.ct is not None:
            if len(self.ct) != image.shape[1]:
                raise UserError(
                    f"data.ct has {len(self.ct)} entries for images of {image.shape[1]} channels"
                )
            return ct_scaled(image, self.ct)
        scale = SCALINGS[self.intensity]
        return np.stack([scale(channel) for channel in image.swapaxes(0, 1)], axis=1)

    def resampled(self, shape: tuple[int, int], pixel: Pixel | None = None) -> Resampled:
        """Say how an image of `shape` (H, W) lies at the spacing of a `windowed` geometry.

        `UserError` where that needs the size of a pixel in mm and has none.
        """
        if self.spacing is None:
            return Resampled(shape, (1.0, 1.0), self.sides)
        if pixel is None:
            raise UserError(
                "the voxel size is unknown, and the preprocessing resamples to "
                f"{self.spacing} mm. Use files whose headers hold it, or train with another "
                "preset: data.preprocessing=native or modern"
            )
        # Headers hold float32: six digits are what they mean, so that 0.7 mm is 0.7 mm.
        target = pair_of(self.spacing)
        down, across = (
            max(round(wanted / side, 6), 1e-6) for wanted, side in zip(target, pixel, strict=True)
        )
        return Resampled(shape, (down, across), self.sides)

    def grid_positions(self, shapes: Tensor) -> tuple[Tensor, Tensor]:
        """Say where in native images of `shapes` (B, 2) the rows and columns of the grid lie.

        Returns:
            Rows (B, S) and columns (B, T) in pixels, float64; NaN for a sample that reads as zero.
        """
        if self.geometry == "stretch":
            rows, columns = map(nearest_positions, shapes.unbind(1), self.sides)
            return rows, columns
        native = shapes.to(precision(shapes.device))
        sides = torch.tensor(self.sides, device=shapes.device, dtype=native.dtype)
        step = (native / sides).amax(dim=1, keepdim=True)  # native pixels per pixel of the grid
        rows, columns = (
            (_count(side, shapes.device) + 0.5 - side / 2) * step + (extent - 1) / 2
            for side, extent in zip(self.sides, native.split(1, dim=1), strict=True)
        )
        return rows, columns

    def to_grid(self, image: Tensor, pixel: Pixel | None = None) -> Tensor:
        """Bring intensity-scaled slices (Z, C, H, W) onto the grid; `pixel` as for `resampled`.

        Returns:
            (Z, C, S, T), dtype kept; of a `windowed` geometry (Z, C, S or more, T or more).
        """
        shape = torch.tensor([image.shape[-2:]], device=image.device)
        if self.windowed:
            whole = self.resampled((image.shape[-2], image.shape[-1]), pixel)
            rows, columns = whole.positions(image.device)
        else:
            rows, columns = self.grid_positions(shape)
        return self._read(image, rows, columns, shape)

    def logits_to_native(
        self,
        logits: Tensor,
        shape: tuple[int, int],
        pixel: Pixel | None = None,
        *,
        seen: tuple[int, int] | None = None,
        as_published: bool = False,
    ) -> Tensor:
        """Bring logits (Z, K, ...) of what `to_grid` made of slices back to native pixels.

        `shape` is the native height and width, `seen` those that `to_grid` got, where larger slices
        were reduced to it; `pixel` is as for `to_grid`.

        Returns:
            (Z, K, H, W) float32. A last row or column that `nearest_positions` finds beyond the
            grid is that of the grid, or `as_published` has the logit 0 for every class.
        """
        device = logits.device
        extent = torch.tensor([self.sides], device=device)
        if self.geometry == "stretch":
            rows, columns = map(nearest_positions, extent.unbind(1), seen or shape)
            if not as_published:
                rows, columns = (
                    one.nan_to_num(side - 1)
                    for one, side in zip((rows, columns), self.sides, strict=True)
                )
            if seen not in (None, shape):  # a reduced pixel stands for those that it was made of
                rows, columns = (
                    one[:, ((_count(side, device) + 0.5) * (few / side)).long().clamp(max=few - 1)]
                    for one, side, few in zip((rows, columns), shape, seen, strict=True)
                )
        elif self.windowed:
            rows, columns = self.resampled(seen or shape, pixel).positions_of_native(shape, device)
        else:
            scale = min(whole / side for whole, side in zip(self.sides, shape, strict=True))
            # in float32: it decides ties as every earlier result did
            rows, columns = (
                ((torch.arange(side, device=device) + 0.5 - side / 2) * scale + (whole - 1) / 2)
                .clamp(0, whole - 1)[None]
                for whole, side in zip(self.sides, shape, strict=True)
            )  # fmt: skip
        return self._read(logits.float(), rows, columns, extent)

    def labels_to_native(
        self,
        logits: Tensor,
        shape: tuple[int, int],
        pixel: Pixel | None = None,
        *,
        seen: tuple[int, int] | None = None,
    ) -> Tensor:
        """The class of each native pixel (Z, H, W) uint8, from what `logits_to_native` takes.

        With the preset `paper` a last row or column that the published pipelines read as zero is
        background, as there.
        """
        # Slice by slice: K native-size maps at a time are enough to hold.
        how: Any = {"seen": seen, "as_published": True}
        maps = (self.logits_to_native(one, shape, pixel, **how) for one in logits.split(1))
        return torch.cat([one.argmax(dim=1) for one in maps]).to(torch.uint8)

    def _read(self, image: Tensor, rows: Tensor, columns: Tensor, shape: Tensor) -> Tensor:
        """Images (Z, C, ...) at the crossings of rows (1, S) and columns (1, T)."""
        rows, columns = rows[:, :, None], columns[:, None, :]
        if self.interpolation == "bilinear":
            return bilinear(image, rows, columns)
        return look_up_or_zero(image, nearest_pixel(rows, columns, shape, image.shape))
