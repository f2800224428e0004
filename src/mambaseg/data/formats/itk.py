"""MetaImage files and DICOM series, through SimpleITK; the only file that imports it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mambaseg.data.case import DataError
from mambaseg.data.files import AGAIN, check_array, check_file
from mambaseg.data.formats.image import Image
from mambaseg.data.formats.nifti import SPACING_MM, geometry_of
from mambaseg.errors import UserError

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])  # ITK's axes of the patient, and NIfTI's


def _simpleitk() -> Any:
    try:
        import SimpleITK
    except ImportError as error:
        raise UserError(
            "MetaImage and DICOM are read with SimpleITK: pip install -e '.[images]'"
        ) from error
    SimpleITK.ProcessObject_GlobalWarningDisplayOff()  # what is wrong ends in an error of ours
    return SimpleITK


def series_in(folder: Path) -> list[str]:
    """Identities of the DICOM series in a folder, sorted.

    Raises:
        UserError: SimpleITK is not installed.
    """
    return sorted(_simpleitk().ImageSeriesReader.GetGDCMSeriesIDs(str(folder)))


def series_files(folder: Path, series: str) -> list[Path]:
    """The files of a DICOM series, sorted by the position of their slices.

    Raises:
        UserError: there are none, or SimpleITK is not installed.
    """
    files = _simpleitk().ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series)
    if not files:
        raise DataError(f"no DICOM series {series}", folder, AGAIN)
    return [Path(file) for file in files]


def read_series(folder: Path, series: str) -> Image:
    """Read a DICOM series as one volume; slices are sorted by their position.

    Raises:
        UserError: it cannot be read, or its slices are no grid.
    """
    sitk, files = _simpleitk(), series_files(folder, series)
    headers = [_header(sitk, file) for file in files]
    _check(files[0], headers[0], (*headers[0].GetSize()[:2], len(files)))
    steps = np.diff([header.GetOrigin() for header in headers], axis=0)  # mm from slice to slice
    if len(steps) and not np.allclose(steps, steps[0], atol=0.01 * np.linalg.norm(steps[0]) or -1):
        raise DataError(
            f"the {len(files)} slices of the series are not equally spaced: one is missing, or "
            "there are several per position",
            folder,
            "Export one volume per series, complete.",
        )
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(file) for file in files])
    try:
        image = reader.Execute()
    except Exception as error:  # ITK has one type for all that can be wrong
        raise _unreadable(folder, error) from error
    return _as_image(folder, image)


def read_file(path: Path) -> Image:
    """Read a `.mha`, `.mhd` or single DICOM file: 2-D, 3-D, or 4-D with the time last.

    Raises:
        UserError: missing, damaged, too large, or not grey.
    """
    sitk = _simpleitk()
    _check(path, reader := _header(sitk, path), reader.GetSize())
    try:
        image = reader.Execute()
    except Exception as error:  # as above
        raise _unreadable(path, error) from error
    return _as_image(path, image)


def _header(sitk: Any, path: Path) -> Any:
    """A reader that has read the header and no voxel."""
    check_file(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except Exception as error:  # as above
        raise _unreadable(path, error) from error
    return reader


def _check(path: Path, reader: Any, size: tuple[int, ...]) -> None:
    if (channels := reader.GetNumberOfComponents()) != 1:
        raise DataError(f"the image has {channels} channels", path, "Use a grey-scale image.")
    size = (*size, 1) if len(size) == 2 else size
    check_array(path, size, np.dtype(np.float64), "image", dimensions=(3, 4))


def _as_image(path: Path, image: Any) -> Image:
    import nibabel
    import SimpleITK

    array = SimpleITK.GetArrayFromImage(image)  # (T, Z, H, W), as far as there are so many
    array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    dimension = image.GetDimension()
    spacing, origin = np.ones(3), np.zeros(3)
    axes = np.eye(3)
    given = min(dimension, 3)
    spacing[:given], origin[:given] = image.GetSpacing()[:given], image.GetOrigin()[:given]
    axes[:given, :given] = np.reshape(image.GetDirection(), (dimension, -1))[:given, :given]
    low, high = SPACING_MM
    if not ((spacing >= low) & (spacing <= high)).all():
        problem = f"the voxel size is {tuple(map(float, spacing))} mm (x, y, z)"
        raise DataError(problem, path, f"Possible are {low:g} to {high:g}: export it again.")
    affine = np.eye(4)
    affine[:3, :3] = _LPS_TO_RAS @ axes @ np.diag(spacing)
    affine[:3, 3] = _LPS_TO_RAS @ origin
    header = nibabel.Nifti1Header()
    shape = array.shape[::-1] if dimension == 4 else array.shape[:0:-1]
    header.set_data_shape(shape)
    header.set_zooms((*spacing, *image.GetSpacing()[3:]))
    header.set_qform(affine, code=1)
    header.set_sform(affine, code=1)
    header.set_xyzt_units("mm", "sec")
    z, y, x = (float(side) for side in spacing[::-1])
    return Image(array[:, :, None], (z, y, x), geometry_of(header))


def _unreadable(path: Path, error: Exception) -> DataError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[-1][:200] if lines else type(error).__name__
    return DataError(f"cannot be read by SimpleITK ({reason})", path, AGAIN)
