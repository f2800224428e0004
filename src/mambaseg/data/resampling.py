"""Images at another spacing: how many pixels they have there, and where these lie.

The centres of the native and the resampled image coincide. Positions are (row, column) in native
pixels; the first pixel's centre is at (0, 0).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambaseg.data.sampling import precision
from mambaseg.errors import UserError

Pixel = tuple[float, float]

FINEST, COARSEST = 0.01, 100.0  # mm, as for the headers of images
LARGEST_SIDE = 8192  # pixels of a resampled image


def is_spacing(value: Any) -> bool:
    """Whether a value is the side of a pixel in mm."""
    return isinstance(value, (int, float)) and FINEST <= value <= COARSEST  # not so of nan


def steps(pixel: Pixel, spacing: float) -> tuple[float, float]:
    """Return how many native pixels one of `spacing` mm measures, down and across.

    Headers hold float32: six digits are what they mean, so that 0.7 mm is 0.7 mm.
    """
    down, across = (max(round(spacing / side, 6), 1e-6) for side in pixel)
    return down, across


class Resampled:
    """One image at another spacing.

    Args:
        native: Height and width in native pixels.
        step: Native pixels per pixel.

    Attributes:
        shape: Height and width in pixels, at least one.

    Raises:
        UserError: It has more than `LARGEST_SIDE` pixels on a side, and more than natively.
    """

    def __init__(self, native: tuple[int, int], step: tuple[float, float]) -> None:
        self.native, self.step = native, step
        height, width = (max(1, round(side / s)) for side, s in zip(native, step, strict=True))
        self.shape = height, width
        if max(self.shape) > max(LARGEST_SIDE, *native):
            raise UserError(
                f"a slice of {native[0]} × {native[1]} pixels would become {height} × {width}: "
                "choose a larger data.spacing"
            )

    def starts(self, lead: tuple[int, int]) -> tuple[float, float]:
        """Return the native position of a pixel, `lead` pixels after the first; it may lie outside.

        Whole pixels apart from the first one, so that nothing is interpolated where the spacings
        are the same.
        """
        row, column = (
            (side - 1) / 2 + s * (first + 0.5 - count / 2)
            for side, s, first, count in zip(self.native, self.step, lead, self.shape, strict=True)
        )
        return row, column

    def whole(self, least: int) -> Frame:
        """Return the frame of all of it; where it is smaller, of `least` pixels around it."""
        return Frame(self, least)


class Frame:
    """A resampled image with the zeros around it.

    Args:
        image: The image.
        least: Rows and columns that there are at least; the image is in their middle.

    Attributes:
        extent: Number of rows and of columns.
    """

    def __init__(self, image: Resampled, least: int) -> None:
        height, width = (max(side, least) for side in image.shape)
        self.image, self.extent = image, (height, width)
        self._margin = -((image.shape[0] - height) // 2), -((image.shape[1] - width) // 2)

    def native_positions(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where its rows (1, height) and columns (1, width) lie in native pixels."""
        starts = self.image.starts((-self._margin[0], -self._margin[1]))
        rows, columns = (
            (step * _count(extent, device) + start)[None]
            for step, start, extent in zip(self.image.step, starts, self.extent, strict=True)
        )
        return rows, columns

    def positions_of_native(
        self, shape: tuple[int, int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Where rows (1, H) and columns (1, W) of the native image lie in it.

        Beyond the image its border takes their place: its own logits count there, not those of the
        zeros around it.

        Args:
            shape: H and W; others than `image.native` where the image was reduced before.
            device: Of the result.
        """
        starts = self.image.starts((-self._margin[0], -self._margin[1]))
        rows, columns = (
            (((_count(side, device) + 0.5) * (native / side) - 0.5 - start) / step)
            .clamp(first, first + count - 1)[None]
            for side, native, start, step, first, count in zip(
                shape, self.image.native, starts, self.image.step, self._margin, self.image.shape,
                strict=True,
            )
        )  # fmt: skip
        return rows, columns


def _count(number: int, device: torch.device) -> Tensor:
    return torch.arange(number, device=device, dtype=precision(device))
