"""NIfTI files as arrays, with their geometry."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mambaseg.data.case import DataError
from mambaseg.data.files import AGAIN, check_array, check_file

MM_PER_UNIT = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}
SPACING_MM = (0.01, 100.0)  # beyond these it is no scan of a body
GZIP_MAGIC = b"\x1f\x8b"
HEADER_BYTES = 348
MAX_OFFSET = 2**24  # bytes before the voxels: header and extensions
BLOCK = 2**20


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

    The header is read first and must be plausible; then as much is unpacked as it promises, so a
    small file cannot fill the memory.

    The spacing counts as unknown when the header's unit is unknown *and* all zooms are 1: such a
    header was never filled in, and its axes mean nothing either. An unknown unit with other zooms
    is taken as mm, as every ACDC reader does.

    Raises:
        UserError: missing, truncated, damaged or not NIfTI; longer or shorter than its header
            says; not one 3-D volume of real numbers; without a usable voxel size or affine.
    """
    check_file(path)
    import nibabel

    content = _read_bytes(path)
    try:
        image = nibabel.Nifti1Image.from_bytes(content)
        array = np.asarray(image.dataobj).T
    except Exception as error:  # whatever a damaged header makes nibabel raise, the remedy is one
        raise _unreadable(path, error) from error
    spacing = _spacing_mm(image.header)
    affine = np.asarray(image.affine)
    _check_affine(path, affine)
    orientation = "".join(nibabel.aff2axcodes(affine)) if spacing is not None else None
    return Nifti(array, spacing, affine, orientation)


def _read_bytes(path: Path) -> bytes:
    """The file's content, unpacked when it is gzip (by its first bytes, not by its name)."""
    try:
        with path.open("rb") as file:
            is_gzip = file.read(2) == GZIP_MAGIC
            file.seek(0)
            stream = gzip.GzipFile(fileobj=file) if is_gzip else file
            promised = _promised_bytes(path, stream.read(HEADER_BYTES))
            stream.seek(0)
            blocks, left = [], promised + 1
            while left and (block := stream.read(min(left, BLOCK))):
                blocks.append(block)
                left -= len(block)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"truncated or damaged gzip file ({error})", path, AGAIN) from error
    except OSError as error:
        problem = f"the file cannot be read ({error.strerror or error})"
        raise DataError(problem, path, "Check its permissions and the disk.") from error
    if left != 1:
        held = f"only {promised + 1 - left}" if left else "more"
        problem = (
            f"not a readable NIfTI file (its header promises {promised} bytes, it holds {held})"
        )
        raise DataError(problem, path, AGAIN)
    return b"".join(blocks)


def _promised_bytes(path: Path, head: bytes) -> int:
    """How long the (unpacked) file must be, from a header that is worth reading on."""
    import nibabel

    try:
        header = nibabel.Nifti1Header(head, check=False)
        if bytes(header["magic"]) not in (b"n+1", b"n+1\0"):
            raise ValueError("no NIfTI-1 header")
        shape, dtype = header.get_data_shape(), header.get_data_dtype()
        offset, zooms = int(header["vox_offset"]), header["pixdim"][1:4].astype(float)
        factor = MM_PER_UNIT[header.get_xyzt_units()[0]]
        if not HEADER_BYTES <= offset <= MAX_OFFSET:
            raise ValueError(f"voxels begin at byte {offset}")
    except Exception as error:  # as above
        raise _unreadable(path, error) from error
    check_array(path, shape, dtype)
    low, high = SPACING_MM
    if not ((zooms * factor >= low) & (zooms * factor <= high)).all():  # False for NaN
        shown = ", ".join(f"{zoom * factor:g}" for zoom in zooms)
        raise DataError(
            f"the header's voxel size is ({shown}) mm (x, y, z); possible are {low:g} to {high:g}",
            path,
            "Write the scanner's voxel size into the header (pixdim), or export the file again.",
        )
    return offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _spacing_mm(header: Any) -> tuple[float, float, float] | None:
    """Voxel size (z, y, x) in mm from a nibabel header, or None."""
    zooms = [float(zoom) for zoom in header.get_zooms()]
    unit = header.get_xyzt_units()[0]
    if unit == "unknown" and zooms == [1.0, 1.0, 1.0]:
        return None
    factor = MM_PER_UNIT[unit]
    return zooms[2] * factor, zooms[1] * factor, zooms[0] * factor


def _check_affine(path: Path, affine: np.ndarray) -> None:
    """The affine is finite, and its axes are three different directions."""
    axes = affine[:3, :3]
    lengths = np.linalg.norm(axes, axis=0)
    if np.isfinite(affine).all() and lengths.all():
        volume = abs(np.linalg.det(axes / lengths))
        if volume > 1e-3:
            return
    raise DataError(
        f"the header's affine is singular or not finite ({axes.tolist()})",
        path,
        "Export the file again with a valid orientation (sform or qform).",
    )


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"not a readable NIfTI file ({type(error).__name__}: {error})", path, AGAIN)
