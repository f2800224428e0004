"""One file as a volume, whatever its format: NIfTI, MetaImage, NRRD, PNG, TIFF, DICOM."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mambaseg.data.formats.nifti import read_nifti
from mambaseg.data.validation import DataError, check_file, check_grey_values, check_same_geometry
from mambaseg.data.volume import Volume
from mambaseg.errors import UserError

NIFTI = (".nii.gz", ".nii")
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
META_IMAGE = (".mha", ".mhd", ".nrrd")
DICOM = (".dcm", ".ima")
ENDINGS = (*NIFTI, *META_IMAGE, *PICTURES)  # of files that are images on their own


def without_ending(name: str, endings: Iterable[str] = (*ENDINGS, *DICOM)) -> str:
    """A file's name without its ending, of those given the first that fits."""
    for ending in endings:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def content_digest(files: Iterable[Path], what: str) -> str:
    """Hash files, and those that they refer to for their voxels, in this order: 32 hex digits."""
    from mambaseg.data.formats.itk import voxel_files

    found: dict[Path, None] = {}  # in order, each once
    for path in files:
        detached = voxel_files(path) if path.suffix.lower() in META_IMAGE else []
        found |= dict.fromkeys([path, *detached])
    digest = hashlib.blake2b(digest_size=16)
    for path in found:
        check_file(path)  # a pipe or a device would never end
        try:
            with path.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
        except OSError as error:
            raise UserError(
                f"cannot read {path} of {what}: {error.strerror}. Restore the file or its "
                "permissions, or run mambaseg check on the folder"
            ) from error
        digest.update(b"|")  # so that bytes cannot move from one file to the next unseen
    return digest.hexdigest()


def read_image(path: Path, channels: int = 1) -> Volume:
    """Read a file as `image` (T, Z, C, H, W) of its own data type.

    Without a known ending it is a DICOM file. `channels` is for `pictures.read_pixels`.
    """
    name = path.name.lower()
    if name.endswith(NIFTI):
        return read_nifti(path, dimensions=(2, 3, 4))
    if name.endswith(META_IMAGE):
        from mambaseg.data.formats.itk import read_itk

        return read_itk(path)
    if name.endswith(PICTURES):
        from mambaseg.data.formats.pictures import read_picture

        return read_picture(path, channels)
    from mambaseg.data.formats.dicom import read_dicom

    return read_dicom((path,))


def read_channels(paths: Sequence[Path], channels: int = 1) -> Volume:
    """Read an image whose channels may be files of their own; its place is the first one's.

    `UserError` as of `read_image`, and for files on different grids.
    """
    first, *others = (read_image(path, channels) for path in paths)
    check_grey_values(paths[0], first.image)
    for path, other in zip(paths[1:], others, strict=True):
        shape, expected = other.image.shape, first.image.shape
        if shape != expected:
            problem = f"the channel has shape {shape} (t, z, channel, y, x), the first {expected}"
            raise DataError(problem, path, "Resample it onto the first.")
        check_same_geometry(first, other, paths[0], path)
        check_grey_values(path, other.image)
    arrays = [one.image for one in (first, *others)]
    return replace(first, image=np.concatenate(arrays, axis=2)) if others else first


def read_volume(path: Path, *further: Path, channels: int = 1) -> Volume:
    """Read an image for training as (Z, C, H, W); a fourth axis of a file is its channels.

    `further` are files of further channels, `channels` is for `pictures.read_pixels`. `UserError`
    as of `read_channels`, and for DICOM files.
    """
    paths = (path, *further)
    for one in paths:
        if not one.name.lower().endswith(ENDINGS):
            raise DataError("this format is not read", one, f"Known endings: {', '.join(ENDINGS)}.")
    volume = read_channels(paths, channels)
    times, slices, held, height, width = volume.image.shape
    array = volume.image.swapaxes(0, 1).reshape(slices, times * held, height, width)
    return replace(volume, image=array)


def read_label(path: Path) -> Volume:
    """Read a file of labels, not JPEG, as `image` (T, Z, 1, H, W): numbers as stored."""
    if not path.name.lower().endswith(PICTURES):
        return read_image(path)
    from mambaseg.data.formats.pictures import read_mask

    numbers, lossy = read_mask(path)
    if lossy:
        remedy = "Save it as PNG before JPEG has blurred its numbers."
        raise DataError("a JPEG file cannot hold class numbers", path, remedy)
    return Volume(numbers[None, None, None])
