"""One file as a volume, whatever its format: NIfTI, MetaImage, NRRD, PNG, TIFF."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from mambaseg.data.case import Case, DataError, Volume
from mambaseg.data.formats.image import Image
from mambaseg.data.formats.images import META_IMAGE, NIFTI, PICTURES
from mambaseg.data.formats.nifti import read_nifti

ENDINGS = (*NIFTI, *META_IMAGE, *PICTURES)


class Located(Protocol):
    """What knows its grid: `spacing`, `affine` and `orientation` as of a `Volume`, or None."""

    @property
    def spacing(self) -> tuple[float, float, float] | None: ...  # noqa: D102 - see the class
    @property
    def affine(self) -> np.ndarray | None: ...  # noqa: D102 - see the class
    @property
    def orientation(self) -> str | None: ...  # noqa: D102 - see the class


def read_volume(path: Path, channels: int = 1) -> Volume:
    """Read a file as `image` (Z, C, H, W) of its own data type; a fourth axis is the channels.

    Args:
        path: of the file.
        channels: asked of a picture, see `pictures.read_pixels`.

    Raises:
        UserError: missing, damaged, too large, or of a format that is not read.
    """
    name = path.name.lower()
    if name.endswith(NIFTI):
        nifti = read_nifti(path, dimensions=(3, 4))
        array = nifti.array if nifti.array.ndim == 4 else nifti.array[None]
        return Volume(array.swapaxes(0, 1), None, nifti.spacing, nifti.affine, nifti.orientation)
    if name.endswith(META_IMAGE):
        from mambaseg.data.formats.itk import read_file

        return _from_image(read_file(path))
    if name.endswith(PICTURES):
        from mambaseg.data.formats.pictures import read_pixels

        return Volume(read_pixels(path, channels)[None], None)
    raise DataError("this format is not read", path, f"Known endings: {', '.join(ENDINGS)}.")


def read_label(path: Path) -> Volume:
    """Read a file of labels as `image` (Z, C, H, W): numbers as they are stored.

    Raises:
        UserError: as `read_volume`.
    """
    if path.name.lower().endswith(PICTURES):
        from mambaseg.data.formats.pictures import read_mask

        return Volume(read_mask(path)[0][None, None], None)
    return read_volume(path)


def _from_image(image: Image) -> Volume:
    import nibabel

    affine = np.eye(4)
    affine[:3] = [image.geometry[row] for row in ("srow_x", "srow_y", "srow_z")]
    orientation = "".join(nibabel.aff2axcodes(affine))
    array = image.frames[:, :, 0].swapaxes(0, 1)  # the axis after x, y, z as channels
    return Volume(array, None, image.spacing, affine, orientation)


def check_same_geometry(case: Case, image: Located, other: Located, path: Path | None) -> None:
    """Make sure that two arrays whose voxels are paired by index show the same place.

    A header that was never filled in says nothing.

    Args:
        case: of both.
        image: of the case's image.
        other: of the file at `path`: its label, or a further channel.
        path: of that file.

    Raises:
        UserError: the axes, the voxel sizes or directions (by more than 1 %), or the places of the
            first voxel (by more than half a voxel) differ.
    """
    if image.spacing is None or other.spacing is None:
        return
    name = f"the image ({case.image_path.name})"
    if image.orientation != other.orientation:
        differs = f"has axes {other.orientation} but {name} has {image.orientation}"
    elif not np.allclose(image.spacing, other.spacing, rtol=0.01):
        differs = f"has voxel size {other.spacing} (z, y, x) but {name} has {image.spacing}"
    elif image.affine is None or other.affine is None:
        return
    else:
        theirs, ours = _affine_in_mm(other), _affine_in_mm(image)
        between = np.linalg.solve(ours, theirs)  # voxels of `other` to voxels of the image
        shift, turned = np.abs(between[:3, 3]), np.abs(between - np.eye(4))[:3, :3]
        if shift.max() <= 0.5 and turned.max() <= 0.01:
            return
        first = f"({', '.join(f'{place:.4g}' for place in theirs[:3, 3])})"
        differs = (
            f"has its first voxel at {first} mm, {shift.max():.3g} voxels from that of {name}"
            if shift.max() > 0.5
            else f"is turned or sheared against {name} by the headers' affines"
        )
    what = "label" if path == case.label_path else "channel"
    raise DataError(
        f"the {what} of {case.id} {differs}",
        path,
        "Voxels are paired by index: bring both files to the same axes and the same place, or take "
        "both from the same download. If only the header is wrong, copy the image's into the file.",
    )


def _affine_in_mm(one: Located) -> np.ndarray:
    """Its affine, which a header may hold in metres or microns, unlike `spacing`."""
    assert one.spacing is not None and one.affine is not None
    lengths = np.linalg.norm(one.affine[:3, :3], axis=0)
    ratio = float(np.mean(np.array(one.spacing[::-1]) / lengths))
    unit = 1000.0 ** round(np.log(ratio) / np.log(1000.0))
    return np.diag([unit, unit, unit, 1.0]) @ one.affine
