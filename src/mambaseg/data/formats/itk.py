"""MetaImage and NRRD files, and JPEG in DICOM, through SimpleITK; the only file that imports it.

What ITK does not look at is read from the text of the header: whether it gives a voxel size and in
which unit, and whether there are as many voxels as it promises, in files beside it.
"""

from __future__ import annotations

import zlib
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from mambaseg.data.formats.nifti import place_on
from mambaseg.data.validation import (
    DataError,
    check_affine,
    check_array,
    check_file,
    decoding,
    voxel_size,
)
from mambaseg.data.volume import Volume
from mambaseg.errors import UserError

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's axes of the patient, and NIfTI's
_MAX_HEADER = 2**20  # bytes
_FILES = ("elementdatafile", "data file", "datafile")
_SIZES = ("elementspacing", "elementsize", "spacings", "space directions")
_UNITS = ("distanceunits", "space units", "units")
_SKIPS = ("headersize", "byte skip", "line skip")  # voxels that do not begin with their file


def read_itk(path: Path) -> Volume:
    """Read a `.mha`, `.mhd` or `.nrrd` file, 2-D, 3-D, or 4-D: `image` (T, Z, 1, H, W).

    The spacing is unknown where the header gives none, and of a 2-D image.

    Raises:
        UserError: missing, damaged, too large, not grey, in another unit than mm, longer or shorter
            than its header says, or with voxels outside its folder.
    """
    sitk = _simpleitk()
    check_file(path)
    header = _text_header(path)
    files = _voxel_files(path, header)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if path.suffix.lower() == ".nrrd" else "MetaImageIO")
    reader.SetFileName(str(path))
    with decoding(path, path.suffix.upper()):
        reader.ReadImageInformation()
        pixel = sitk.GetArrayViewFromImage(sitk.Image([1, 1], reader.GetPixelID()))
        size, channels = reader.GetSize(), reader.GetNumberOfComponents()
        if channels != 1:
            raise DataError(f"the image has {channels} channels", path, "Use a grey-scale image.")
        padded = (*size, 1) if len(size) == 2 else size
        check_array(path, padded, np.dtype(np.float64), "image", dimensions=(3, 4))
        _check_length(path, header, files, int(np.prod(size)) * pixel.itemsize)
        image = reader.Execute()
    return _as_volume(path, image, in_mm=_in_mm(path, header.fields))


def read_pixels(path: Path) -> np.ndarray:
    """The frames (N, H, W) of a DICOM file, rescaled as its header says."""
    sitk = _simpleitk()
    with decoding(path, "DICOM"):
        array = sitk.GetArrayFromImage(sitk.ReadImage(str(path), imageIO="GDCMImageIO"))
    return array.reshape(-1, *array.shape[-2:])


def voxel_files(path: Path) -> list[Path]:
    """The files of the voxels of a MetaImage or NRRD header: itself, or others beside it."""
    check_file(path)
    return _voxel_files(path, _text_header(path))


def _simpleitk() -> Any:
    try:
        import SimpleITK
    except ImportError as error:
        raise UserError(
            "MetaImage and NRRD are read with SimpleITK: pip install 'mambaseg[images]'"
        ) from error
    SimpleITK.ProcessObject_GlobalWarningDisplayOff()  # what is wrong ends in an error of ours
    return SimpleITK


class _Header(NamedTuple):
    """The text of a header."""

    fields: dict[str, str]  # keys in lower case
    rest: list[str]  # the words after it
    length: int  # in bytes


def _text_header(path: Path) -> _Header:
    """MetaImage's end with ElementDataFile, NRRD's with an empty line or a list of files."""
    with path.open("rb") as file:
        content = file.read(_MAX_HEADER)
    nrrd = path.suffix.lower() == ".nrrd"
    fields: dict[str, str] = {}
    length = 0
    for line in content.splitlines(keepends=True):
        length += len(line)
        key, _, value = line.decode("latin-1").partition(":" if nrrd else "=")
        key, value = key.strip().lower(), value.strip()
        fields[key] = value
        listed = value.upper().startswith("LIST")
        if (not key or (key in _FILES and listed)) if nrrd else key in _FILES:
            break
    return _Header(fields, content[length:].decode("latin-1").split(), length)


def _voxel_files(path: Path, header: _Header) -> list[Path]:
    """The files that hold the voxels, of which ITK would open any that the header names."""
    name = next((header.fields[key] for key in _FILES if key in header.fields), "LOCAL")
    if name.upper() == "LOCAL":
        return [path]
    names = header.rest if name.upper().startswith("LIST") else [name]
    outside = any(PurePath(one).is_absolute() or ".." in PurePath(one).parts for one in names)
    if not names or "%" in name or outside:
        problem = f"its header names voxel files outside its folder or none: {name} {names}"
        raise DataError(problem, path, "Save the image as one .mha or .nrrd file.")
    return [path.parent / one for one in names]


def _check_length(path: Path, header: _Header, files: list[Path], promised: int) -> None:
    """Raise `ValueError` unless there are as many bytes of voxels as the header promises."""
    for file in files:
        check_file(file)
    fields = header.fields
    packed = fields.get("compresseddata", "").lower() == "true"
    encoding = fields.get("encoding", "zlib" if packed else "raw").lower()
    text = fields.get("binarydata", "true").lower() == "false"  # which ITK counts
    if text or any(fields.get(key, "0") != "0" for key in _SKIPS):
        return
    if encoding not in ("raw", "zlib", "gz", "gzip"):
        return  # text as well
    held = 0
    for file in files:
        skipped = header.length if file == path else 0
        if encoding == "raw":
            held += file.stat().st_size - skipped
        else:
            unpack = zlib.decompressobj(zlib.MAX_WBITS | 32)  # zlib or gzip, by its first bytes
            held += len(unpack.decompress(file.read_bytes()[skipped:], promised + 1))
    if held != promised:
        more = "more" if held > promised else f"only {held}"
        raise ValueError(f"its header promises {promised} bytes of voxels, there are {more}")


def _in_mm(path: Path, fields: dict[str, str]) -> bool:
    """Whether the header gives a voxel size, in mm by what it says or as nothing says otherwise."""
    for key in _UNITS:
        if fields.get(key, "").replace('"', "").split()[:1] not in ([], ["mm"], ["?"], ["none"]):
            problem = f"the voxel size is in {fields[key]}"
            raise DataError(problem, path, "Save the image with voxel sizes in mm.")
    return any(key in fields for key in _SIZES)


def _as_volume(path: Path, image: Any, *, in_mm: bool) -> Volume:
    import nibabel
    import SimpleITK

    array = SimpleITK.GetArrayFromImage(image)  # (T, Z, H, W), as far as there are so many
    array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    dimension = image.GetDimension()
    given = min(dimension, 3)
    sides, affine = np.ones(3), np.eye(4)
    sides[:given] = image.GetSpacing()[:given]
    affine[:given, 3] = image.GetOrigin()[:given]
    axes = np.reshape(image.GetDirection(), (dimension, -1))
    affine[:given, :given] = axes[:given, :given] * sides[:given]
    affine = LPS_TO_RAS @ affine
    spacing = voxel_size(path, sides[::-1].tolist())
    check_affine(path, affine, sides.tolist())
    known = spacing if in_mm and given == 3 else None
    time = image.GetSpacing()[3] if dimension == 4 else None
    orientation = known and "".join(nibabel.aff2axcodes(affine))
    header = place_on(array.shape, affine, known, time=time)
    return Volume(array[:, :, None], None, known, affine, orientation, header)
