"""The one container for voxels and where they lie, from a file to the label map made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mambaseg.errors import UserError

Spacing = tuple[float, float, float]
SLICINGS = ("stored", "spacing")
CLEARLY = 1.5  # times the voxel size along each other axis


def slice_axis(spacing: Spacing | None, rule: str, shape: Sequence[int] = ()) -> int:
    """Which of the axes (z, y, x) becomes the one along which the network's slices are stacked.

    `stored`: the file's last one (z), as ACDC and most scans are stored. `spacing`: the one with
    clearly the largest voxel size; else z, as of a nearly isotropic scan the largest says nothing
    about how it was made. Of a single slice it is the axis of one voxel, whose size says nothing:
    `shape` is (Z, H, W). The rule looks at the case alone, so prediction cuts as training would.
    """
    if rule not in SLICINGS:
        raise UserError(f"unknown data.slicing={rule!r}: choose one of {', '.join(SLICINGS)}")
    if rule == "spacing" and 1 in shape:
        return list(shape).index(1)
    if rule == "stored" or spacing is None:
        return 0
    axis = int(np.argmax(spacing))
    others = [side for index, side in enumerate(spacing) if index != axis]
    # to six digits, which is what the float32 of a header means
    return axis if round(spacing[axis] / max(others), 6) >= CLEARLY else 0


@dataclass(frozen=True)
class Volume:
    """Voxels with their place; "z" is the axis along which slices are stacked."""

    #: (Z, C, H, W) in the file's own units; of a file that may be a cine (T, Z, C, H, W)
    image: np.ndarray
    label: np.ndarray | None = None  #: (Z, H, W) uint8
    spacing: Spacing | None = None  #: mm (z, y, x); None when the file does not tell
    affine: np.ndarray | None = None  #: 4x4, voxel (x, y, z) to mm
    orientation: str | None = None  #: axis codes of (x, y, z) such as "LPS"
    header: Any = None  #: nibabel's, with the place of the grid alone, for label maps on it
    frames: int = 1  #: of a cine, one after the other along z
    flat: bool = False  #: whether it is one 2-D picture, whose labels are a picture too

    @property
    def grid(self) -> tuple[int, ...]:
        """(Z, H, W) of the image."""
        return *self.image.shape[-4:-3], *self.image.shape[-2:]

    @property
    def place(self) -> str:
        """Axes, voxel size and place of the first voxel in words."""
        first = "an unknown place"
        if self.affine is not None:
            x, y, z = (f"{place:.4g}" for place in self.affine[:3, 3] + 0.0)
            first = f"({x}, {y}, {z}) mm"
        axes = f"axes {self.orientation}, voxel size {self.spacing} mm (z, y, x)"
        return f"{axes}, first voxel at {first}"

    def sliced(self, axis: int) -> Volume:
        """The volume with its slices stacked along another axis of (z, y, x); the header stays."""
        if axis == 0:
            return self
        order = axis, *(other for other in range(3) if other != axis)
        columns = [2 - place for place in reversed(order)]  # of (x, y, z)
        image = np.moveaxis(self.image.swapaxes(-4, -3), axis - 3, -3).swapaxes(-4, -3)
        label, spacing, affine = self.label, self.spacing, self.affine
        return replace(
            self,
            image=np.ascontiguousarray(image),
            label=None if label is None else np.ascontiguousarray(np.moveaxis(label, axis, 0)),
            spacing=spacing and (spacing[order[0]], spacing[order[1]], spacing[order[2]]),
            affine=None if affine is None else affine[:, [*columns, 3]],
            orientation=self.orientation and "".join(self.orientation[c] for c in columns),
        )

    def with_times_as_channels(self) -> Volume:
        """(T, Z, 1, H, W) as one volume of T channels, which the MSD stores as a fourth axis."""
        header = self.header.copy()
        header["dim"][0], header["dim"][4] = 3, 1
        return replace(self, image=self.image.swapaxes(0, 2), header=header)


def unsliced(array: np.ndarray, axis: int, at: int) -> np.ndarray:
    """Undo `Volume.sliced` for an array whose axes `at`, at + 1, at + 2 are spatial.

    What was not cut otherwise is the array itself, in whatever order it has in memory.
    """
    return array if axis == 0 else np.ascontiguousarray(np.moveaxis(array, at, at + axis))
