"""One file as a volume, whatever its format: NIfTI, MetaImage, NRRD, PNG, TIFF, DICOM."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from mambaseg.data.formats.nifti import read_nifti
from mambaseg.data.formats.volume import Volume
from mambaseg.data.validation import DataError

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


def read_image(path: Path, channels: int = 1) -> Volume:
    """Read a file as `image` (T, Z, C, H, W) of its own data type.

    Args:
        path: of the file; without a known ending it is a DICOM file.
        channels: asked of a picture, see `pictures.read_pixels`.

    Raises:
        UserError: missing, damaged, too large, or of a format that is not read.
    """
    name = path.name.lower()
    if name.endswith(NIFTI):
        return read_nifti(path, dimensions=(3, 4))
    if name.endswith(META_IMAGE):
        from mambaseg.data.formats.itk import read_itk

        return read_itk(path)
    if name.endswith(PICTURES):
        from mambaseg.data.formats.pictures import read_picture

        return read_picture(path, channels)
    from mambaseg.data.formats.dicom import read_dicom

    return read_dicom((path,))


def read_volume(path: Path, channels: int = 1) -> Volume:
    """Read a file as `image` (Z, C, H, W) of its own data type; a fourth axis is the channels.

    Raises:
        UserError: as `read_image`; DICOM files are not read here.
    """
    if not path.name.lower().endswith(ENDINGS):
        raise DataError("this format is not read", path, f"Known endings: {', '.join(ENDINGS)}.")
    volume = read_image(path, channels)
    times, slices, held, height, width = volume.image.shape
    array = volume.image.swapaxes(0, 1).reshape(slices, times * held, height, width)
    return replace(volume, image=array)


def read_label(path: Path) -> Volume:
    """Read a file of labels as `image` (T, Z, 1, H, W): numbers as they are stored.

    Raises:
        UserError: as `read_image`; JPEG, which blurs numbers.
    """
    if not path.name.lower().endswith(PICTURES):
        return read_image(path)
    from mambaseg.data.formats.pictures import read_mask

    numbers, lossy = read_mask(path)
    if lossy:
        remedy = "Save it as PNG before JPEG has blurred its numbers."
        raise DataError("a JPEG file cannot hold class numbers", path, remedy)
    return Volume(numbers[None, None, None])
