"""Reading images at positions: whole ones, or between their pixels.

B: images, C: channels, H, W: native size in pixels, S, T: rows and columns of what is read.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


def read_affine(
    image: Tensor,
    label: Tensor,
    shapes: Tensor,
    crossings: tuple[Tensor, Tensor],
    view: tuple[Tensor, Tensor],
    *,
    smooth: bool,
    beyond: int = 0,
    compiled: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Read images (B, C, H, W) float32 and labels (B, H, W) uint8 through affine maps.

    `shapes` (B, 2) are their true sizes, the rest is padding. `crossings` are rows (B or 1, S) and
    columns (B or 1, T), `view` is a matrix (B, 4) and an offset (B, 2) that map these to pixels.
    Images are read between their pixels if `smooth`, otherwise at the nearest one, like labels.
    `compiled` lets a CPU read them by its kernel, which gives the same bits faster.

    Returns:
        Images (B, C, S, T), zero beyond them; labels (B, S, T), `beyond` beyond them; which pixels
        (B, S, T) lie in an image.
    """
    if compiled and image.device.type == "cpu":
        from mambaseg.data.sampling_kernel import read

        maps = (*(one.expand(len(image), -1) for one in crossings), *view)
        arrays = [one.contiguous().numpy() for one in (image, label, shapes - 1, *maps)]
        parts = [read(*one, smooth, beyond) for one in zip(*arrays, strict=True)]
        grid, labels, inside = (torch.from_numpy(np.stack(one)) for one in zip(*parts, strict=True))
        return grid, labels, inside
    row, column = crossings[0][:, :, None], crossings[1][:, None, :]
    m, offset = (part[..., None, None] for part in view)
    rows = m[:, 0] * row + (m[:, 1] * column + offset[:, 0])  # (B, S, T)
    columns = m[:, 2] * row + (m[:, 3] * column + offset[:, 1])
    pixel = nearest_pixel(rows, columns, shapes, image.shape)
    grid = bilinear(image, rows, columns) if smooth else look_up_or_zero(image, pixel)
    labels = look_up_or_zero(label[:, None], pixel, beyond)[:, 0]
    return grid, labels, pixel < image[0, 0].numel()


def nearest_positions(source: Tensor, target: int) -> Tensor:
    """Return which pixel of `source` ones (B,) each of `target` pixels copies: float64 (B, target).

    This is the index map of `scipy.ndimage.zoom(order=0, grid_mode=False)`, on which the published
    pipelines stand: the centres of the corner pixels coincide, halves round up. For some pairs of
    sizes floating-point rounding carries SciPy's last sample past the last pixel's centre, and it
    then reads as zero; there the position is NaN.
    """
    index = torch.arange(target, device=source.device, dtype=precision(source.device))
    last = source.to(index.dtype)[:, None] - 1
    position = index * (last / (target - 1) if target > 1 else torch.ones_like(last))
    return torch.where(position > last, float("nan"), torch.floor(position + 0.5))


def bilinear(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Read images (B, C, H, W) between their pixels -> (B, C, S, T); beyond them they are zero.

    Arithmetic is per pixel, so an image gives the same result alone and in any batch. Rows and
    columns are in pixels, broadcastable to (B or 1, S, T).
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


def nearest_pixel(
    rows: Tensor, columns: Tensor, shapes: Tensor, image_shape: Sequence[int]
) -> Tensor:
    """Return which pixel of a flattened image (H*W) each position falls in; H*W for none.

    As in SciPy, a position even slightly beyond the centres of the outermost pixels is in none.
    Rows and columns are in pixels or NaN, broadcastable to (B or 1, S, T); `shapes` (B or 1, 2) are
    the true sizes of images that lie in the upper left corner of `image_shape` (B, C, H, W).
    """
    height, width = image_shape[-2:]
    last_row, last_column = (shapes[:, :, None, None] - 1).unbind(1)
    inside = ((rows >= 0) & (rows <= last_row)) & ((columns >= 0) & (columns <= last_column))
    pixel = torch.floor(rows + 0.5) * width + torch.floor(columns + 0.5)
    return torch.where(inside, pixel, height * width).long()


def look_up_or_zero(image: Tensor, pixel: Tensor, beyond: int = 0) -> Tensor:
    """Read images (B, C, H, W) at `nearest_pixel`s (B or 1, S, T) -> (B, C, S, T)."""
    flat = functional.pad(image.flatten(2), (0, 1), value=beyond)  # for the pixels outside
    return look_up(flat, pixel)


def look_up(image: Tensor, pixel: Tensor) -> Tensor:
    """Read images (B, C, ...) at flat indices (B or 1, S, T) -> (B, C, S, T)."""
    flat = image.flatten(2)
    if len(pixel) == 1:
        return flat[:, :, pixel[0]]
    index = pixel.flatten(1)[:, None].expand(-1, flat.shape[1], -1)
    return flat.gather(2, index).unflatten(2, pixel.shape[1:])


def precision(device: torch.device) -> torch.dtype:
    """Return the type of positions: float64, as in SciPy, where the device has it (MPS has not)."""
    return torch.float32 if device.type == "mps" else torch.float64
