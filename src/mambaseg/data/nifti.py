"""NIfTI files as arrays, with their geometry."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mambaseg.data.case import DataError

MM_PER_UNIT = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}
GZIP_MAGIC = b"\x1f\x8b"
AGAIN = "The download or copy was probably cut off: get the file again."


@dataclass(frozen=True)
class Nifti:
    """One NIfTI file.

    Attributes:
        array: `(Z, H, W)`, the file's (x, y, z) transposed; with the header's slope applied.
        spacing: mm as (z, y, x); None when unknown (see `read_nifti`).
        affine: 4x4, voxel (x, y, z) to mm, as stored.
        orientation: axis codes of (x, y, z); None when the spacing is unknown.
    """

    array: np.ndarray
    spacing: tuple[float, float, float] | None
    affine: np.ndarray
    orientation: str | None


def read_nifti(path: Path) -> Nifti:
    """Read a `.nii` or `.nii.gz` file completely, check sum included.

    The spacing counts as unknown when the header's unit is unknown *and* all zooms are 1: such a
    header was never filled in, and its axes mean nothing either. An unknown unit with other zooms
    is taken as mm, as every ACDC reader does. A file with other than three dimensions is returned
    as it is, without spacing; `validate_volume` rejects it.

    Raises:
        UserError: missing, truncated, damaged or not NIfTI.
    """
    content = _read_bytes(path)
    import nibabel

    try:
        image = nibabel.Nifti1Image.from_bytes(content)
        array = np.asarray(image.dataobj).T
    except Exception as error:  # whatever a damaged header makes nibabel raise, the remedy is one
        problem = f"not a readable NIfTI file ({type(error).__name__}: {error})"
        raise DataError(problem, path, AGAIN) from error
    spacing = _spacing_mm(image.header)
    codes: tuple[str | None, ...] = nibabel.aff2axcodes(image.affine)
    known = [code for code in codes if code is not None] if spacing is not None else []
    orientation = "".join(known) if len(known) == 3 else None
    return Nifti(array, spacing, np.asarray(image.affine), orientation)


def _read_bytes(path: Path) -> bytes:
    """The file's content, unpacked when it is gzip (by its first bytes, not by its name).

    Unpacking at once is faster than nibabel's stream, and verifies the check sum at the end.
    """
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(GZIP_MAGIC) else content
    except FileNotFoundError as error:
        raise DataError("the file is missing", path, "Get it again.") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"truncated or damaged gzip file ({error})", path, AGAIN) from error
    except OSError as error:
        problem = f"the file cannot be read ({error.strerror or error})"
        raise DataError(problem, path, "Check its permissions and the disk.") from error


def _spacing_mm(header: Any) -> tuple[float, float, float] | None:
    """Voxel size (z, y, x) in mm from a nibabel header, or None."""
    zooms = [float(zoom) for zoom in header.get_zooms()]
    unit = header.get_xyzt_units()[0]
    if len(zooms) != 3 or (unit == "unknown" and zooms == [1.0, 1.0, 1.0]):
        return None
    factor = MM_PER_UNIT[unit]
    return zooms[2] * factor, zooms[1] * factor, zooms[0] * factor
