"""Images that are arrays in memory, with the checks that files go through."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mambaseg.data.formats.pictures import from_16_bits
from mambaseg.data.validation import DataError, as_float32, voxel_size
from mambaseg.data.volume import Spacing, Volume
from mambaseg.errors import UserError


def volume_of(image: Any, *, channels: int, spacing: Any = None) -> Volume:
    """An array, a tensor or nested lists as a `Volume` of one frame.

    Args:
        image: (H, W), (Z, H, W) or (Z, C, H, W), real numbers. A single slice without a voxel size
            is a picture: black and white, and numbers of 16 bits, come to the scale of 8 bits.
        channels: that the network takes; grey (H, W) is repeated for three, as grey pictures are.
        spacing: voxel size in mm (z, y, x); None where it is unknown.

    Raises:
        UserError: another shape or kind of numbers, or no voxel size of a scan.
    """
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image  # NumPy has no bfloat16
    array = np.asarray(image)
    if array.dtype.kind not in "biuf":
        raise UserError(f"the image holds {array.dtype}: expected are real numbers")
    if array.ndim not in (2, 3, 4) or not array.size:
        raise UserError(
            f"the image has the shape {array.shape}: expected is (H, W), (Z, H, W) or (Z, C, H, W)"
        )
    flat = array.ndim == 2
    array = array[None] if flat else array
    array = array[:, None] if array.ndim == 3 else array
    array = array.repeat(3, axis=1) if flat and channels == 3 else array
    if array.shape[1] != channels:
        raise UserError(
            f"the image has {array.shape[1]} channels, the network takes {channels}: give it as "
            "(Z, C, H, W)"
        )
    if not np.isfinite(array).all():
        raise UserError("the image holds values that are not finite: replace them")
    picture = spacing is None and len(array) == 1  # scaled and reduced as pictures of files are
    if picture:
        array = array * np.uint8(255) if array.dtype == bool else from_16_bits(array)
    # bytes stay bytes, as those of a file do when a picture is reduced
    array = array if array.dtype == np.uint8 else as_float32(Path("the image"), array)
    array = np.array(array, order="C")  # of our own: writable, without negative strides
    return Volume(array[None], spacing=_sides(spacing), flat=picture)


def _sides(spacing: Any) -> Spacing | None:
    if spacing is None:
        return None
    try:
        z, y, x = (float(side) for side in spacing)
    except (TypeError, ValueError):
        raise UserError(
            f"spacing={spacing}: expected are three numbers, the voxel size in mm (z, y, x)"
        ) from None
    try:
        return voxel_size(Path("spacing"), (z, y, x))
    except DataError as error:
        raise UserError(f"spacing=({z:g}, {y:g}, {x:g}): {error.problem}") from None
