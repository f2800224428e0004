"""nnU-Net v2's plan for a data set in 2-D: pixel size, patch, batch, stages and grey values of CT.

Source: nnU-Net v2 (Isensee et al. 2021), `ExperimentPlanner` with its defaults for 8 GB. Differs:
images count as a whole, where nnU-Net first crops them to what is not zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mambaseg.data.sizes import pair_of

SMALLEST_MAP = 4  # pixels of the side of the coarsest map
ANISOTROPY = 3
FEATURES, MOST_FEATURES = 32, 512
REFERENCE, REFERENCE_BATCH = 85_000_000, 12  # numbers in the feature maps of a batch in 8 GB
SHARE = 0.05  # of all voxels in a batch, at most
SMALLEST_BATCH = 2

Sides = tuple[int, ...]


@dataclass(frozen=True)
class Plan2D:
    """A plan for slices; rows before columns."""

    spacing: tuple[float, float]  # mm
    patch: Sides  # pixels
    batch: int
    strides: tuple[Sides, ...]  # of each stage
    kernels: tuple[Sides, ...]  # of its convolutions


def features_of(stages: int) -> list[int]:
    """Channels of each stage of a network."""
    return [min(FEATURES * 2**stage, MOST_FEATURES) for stage in range(stages)]


def plan_2d(
    shapes: Sequence[Sequence[int]],
    spacings: Sequence[Sequence[float]],
    *,
    num_classes: int,
    slices: int | None = None,
    pixel: float | Sequence[float] | None = None,
    patch: Sequence[int] | None = None,
) -> Plan2D:
    """Plan as nnU-Net does, from the shapes (Z, H, W) and voxel sizes (z, y, x) of the images.

    Args:
        shapes: of the training images.
        spacings: likewise.
        num_classes: K, background included.
        slices: the axis that is cut; None: that of the largest voxel size, as nnU-Net cuts.
        pixel: its side, or height and width, in mm, in place of the median.
        patch: rows and columns, in place of what fits into 8 GB.
    """
    target = _target_spacing(np.array(shapes), np.array(spacings, float))
    across = int(target.argmax()) if slices is None else slices
    order = [across, *(axis for axis in range(3) if axis != across)]
    if pixel is not None:
        target[order[1:]] = pair_of(pixel)
    resampled = [np.round(np.array(s) / target * np.array(shape)) for shape, s in
                 zip(shapes, spacings, strict=True)]  # fmt: skip
    median = np.median(resampled, 0)[order]
    spacing, extent = target[order][1:], median[1:]
    given, wide = patch, np.round(2048 / spacing * math.sqrt(spacing.prod()))
    start = np.minimum(wide, extent) if given is None else np.array(given, float)
    patch, strides, kernels = _topology(spacing, start)
    most = REFERENCE * REFERENCE_BATCH / SMALLEST_BATCH  # of one image
    while given is None and _map_size(patch, strides, num_classes) > most:
        axis = int(np.argsort(np.array(patch) / extent)[-1])
        less = np.array(patch)
        less[axis] -= math.prod(stage[axis] for stage in strides)
        _, smaller, _ = _topology(spacing, less)
        less = np.array(patch)
        less[axis] -= math.prod(stage[axis] for stage in smaller)
        patch, strides, kernels = _topology(spacing, less)
    size = _map_size(patch, strides, num_classes)
    covered = round(float(median.prod()) * len(shapes) * SHARE / math.prod(patch))
    batch = max(min(round(REFERENCE / size * REFERENCE_BATCH), covered), SMALLEST_BATCH)
    return Plan2D((float(spacing[0]), float(spacing[1])), patch, batch, strides, kernels)


def _target_spacing(shapes: np.ndarray, spacings: np.ndarray) -> np.ndarray:
    """The median voxel size; of thick slices the distance that a tenth of the images is below."""
    target, extent = np.percentile(spacings, 50, 0), np.percentile(shapes, 50, 0)
    worst = int(target.argmax())
    others = [axis for axis in range(3) if axis != worst]
    finest = target[others].max()
    if target[worst] > ANISOTROPY * finest and extent[worst] * ANISOTROPY < extent[others].min():
        thin = np.percentile(spacings[:, worst], 10)
        target[worst] = thin if thin >= finest else finest + 1e-5
    return target


def _topology(
    spacing: np.ndarray, patch: np.ndarray
) -> tuple[Sides, tuple[Sides, ...], tuple[Sides, ...]]:
    """The patch, enlarged to what the strides divide, strides and kernels of each stage.

    A kernel spans an axis from the stage on in which its pixels are not twice the other's.
    """
    now, size, strides = list(spacing), [float(side) for side in patch], [(1, 1)]
    kernel, kernels = [1, 1], []
    while large := [axis for axis in (0, 1) if size[axis] >= 2 * SMALLEST_MAP]:
        finest = min(now[axis] for axis in large)
        halved = [axis for axis in large if now[axis] / finest < 2]
        if len(halved) == 1 and size[halved[0]] < 3 * SMALLEST_MAP:
            break
        kernel = [3 if now[axis] / min(now) < 2 else kernel[axis] for axis in (0, 1)]
        kernels.append((kernel[0], kernel[1]))
        strides.append((2 if 0 in halved else 1, 2 if 1 in halved else 1))
        for axis in halved:
            now[axis], size[axis] = 2 * now[axis], math.ceil(size[axis] / 2)
    divisors = [math.prod(stage[axis] for stage in strides) for axis in (0, 1)]
    sides = tuple(math.ceil(side / d) * d for side, d in zip(patch, divisors, strict=True))
    return sides, tuple(strides), (*kernels, (3, 3))


def _map_size(patch: Sides, strides: Sequence[Sides], num_classes: int) -> int:
    """Numbers in the feature maps of one image: the outputs of all convolutions."""
    sizes, now = [], list(patch)
    for stage in strides:
        now = [side // step for side, step in zip(now, stage, strict=True)]
        sizes.append(math.prod(now))
    features = features_of(len(strides))
    total = sum(2 * size * width for size, width in zip(sizes, features, strict=True))
    # each decoder stage: the transposed convolution and two more
    total += sum(3 * size * width for size, width in zip(sizes[:-1], features, strict=False))
    return total + num_classes * sizes[0]
