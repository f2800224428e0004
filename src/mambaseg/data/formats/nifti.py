"""NIfTI files as arrays, with their geometry."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mambaseg.data.case import DataError
from mambaseg.data.files import AGAIN, check_array, check_file

MM_PER_UNIT = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}
SPACING_MM = (0.01, 100.0)  # beyond these it is no scan of a body
MAX_QUATERNION = 1.001  # length that rounding explains
MAX_COSINE = 0.01  # between two axes of a rectangular grid
GZIP_MAGIC = b"\x1f\x8b"
HEADER_BYTES = 348
MAX_OFFSET = 2**24  # bytes before the voxels: header and extensions
BLOCK = 2**20


@dataclass(frozen=True)
class Nifti:
    """One NIfTI file.

    Attributes:
        array: `(Z, H, W)` or `(T, Z, H, W)`, the file's (x, y, z, t) transposed; with
            the header's slope applied.
        spacing: mm as (z, y, x); None when unknown (see `read_nifti`).
        affine: 4x4, voxel (x, y, z) to mm, as stored; None without sform and qform.
        orientation: axis codes of (x, y, z); None when the spacing is unknown.
    """

    array: np.ndarray
    spacing: tuple[float, float, float] | None
    affine: np.ndarray | None
    orientation: str | None


@dataclass(frozen=True)
class Frames:
    """A volume or a cine, with what a label map on the same grid takes from its header.

    Attributes:
        array: `(T, Z, H, W)`; T is 1 for a volume.
        spacing: mm as (z, y, x); None when unknown (see `read_nifti`).
        geometry: a NIfTI-1 header's fields that say where the voxels lie.
    """

    array: np.ndarray
    spacing: tuple[float, float, float] | None
    geometry: dict[str, Any]


# of a NIfTI-1 header: the grid and its place in space and time. Nothing else of somebody's header
# reaches a result: its free text and its extensions may name a patient.
_GEOMETRY = (
    "dim", "pixdim", "xyzt_units", "toffset", "qform_code", "sform_code",
    "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "srow_x", "srow_y", "srow_z",
)  # fmt: skip


def read_frames(path: Path) -> Frames:
    """Read a `.nii` or `.nii.gz` file of one volume (3-D) or of one per time (4-D).

    Raises:
        UserError: as `read_nifti`.
    """
    image = _load(path, dimensions=(3, 4))
    array = _voxels(path, image)
    array = array[None] if array.ndim == 3 else array
    check_affine(path, np.asarray(image.affine), _distances(image.header))
    return Frames(array, _spacing_mm(image.header), geometry_of(image.header))


def geometry_of(header: Any) -> dict[str, Any]:
    """Those fields of a nibabel NIfTI-1 header that `Frames.geometry` holds."""
    return {name: header[name].copy() for name in _GEOMETRY}


def geometry_on(
    shape: Sequence[int],
    affine: np.ndarray,
    spacing: tuple[float, float, float] | None,
    *,
    time: float | None = None,
) -> dict[str, Any]:
    """`Frames.geometry` of an image of another format; its unit is mm where the spacing is known.

    Args:
        shape: (T, Z, H, W); T = 1 gets no axis of time unless `time` says how far apart it is.
        affine: 4x4, voxel (x, y, z) to mm; to no known unit without a spacing.
        spacing: as `Frames.spacing`.
        time: from one volume to the next, in no known unit; None where it is unknown.
    """
    import nibabel

    header = nibabel.Nifti1Header()
    cine = time is not None or shape[0] > 1
    header.set_data_shape(shape[::-1] if cine else shape[:0:-1])
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    header.set_zooms((*sides, time or 0.0) if cine else sides)
    header.set_qform(affine, code=1)
    header.set_sform(affine, code=1)
    header.set_xyzt_units("unknown" if spacing is None else "mm")
    return geometry_of(header)


def voxel_size(path: Path, sides: Sequence[float]) -> tuple[float, float, float]:
    """Voxel size (z, y, x) in mm as it is given, if it can be that of a scan.

    Raises:
        UserError: it cannot.
    """
    low, high = SPACING_MM
    z, y, x = (float(side) for side in sides)
    if not all(low <= side <= high for side in (z, y, x)):  # also for NaN
        problem = f"the voxel size is ({x:g}, {y:g}, {z:g}) mm (x, y, z)"
        raise DataError(problem, path, f"Possible are {low:g} to {high:g}: export it again.")
    return z, y, x


def to_nifti(
    array: np.ndarray, geometry: dict[str, Any], *, slope: float = 1.0, label: bool = False
) -> bytes:
    """The content of a `.nii.gz` file; the same array gives the same bytes.

    Args:
        array: (T, Z, H, W) or, with classes, (T, K, Z, H, W); uint8. T = 1 leaves no axis of time
            where the geometry has none; classes become the last axis.
        geometry: of `read_frames`, bit for bit in the file but for the axis of the classes.
        slope: what the numbers are to be multiplied with.
        label: whether to mark the file as a label map.
    """
    import nibabel

    header = nibabel.Nifti1Header()
    for name, value in geometry.items():
        header[name] = value
    header.set_data_dtype(np.uint8)
    voxels = array.T  # (W, H, Z[, K], T)
    if array.ndim == 5:
        voxels = np.moveaxis(voxels, 3, -1)  # (W, H, Z, T, K)
    if int(geometry["dim"][0]) == 3:
        voxels = voxels[:, :, :, 0]
    if label:
        header.set_intent("label")
    image = nibabel.Nifti1Image(voxels, None, header)
    image.header.set_slope_inter(slope, 0.0)
    stream = io.BytesIO()
    image.header.write_to(stream)  # it knows where the voxels begin by then
    packer = zlib.compressobj(6, wbits=31)  # as gzip, without name and time
    blocks = [packer.compress(stream.getvalue().ljust(int(image.header["vox_offset"]), b"\0"))]
    # Voxels in the file's order, x first; volume by volume, as probabilities may fill the memory.
    volumes = array[None] if array.ndim == 4 else array.swapaxes(0, 1)  # ([K or 1], T, Z, H, W)
    for volume in (each for frames in volumes for each in frames):
        blocks.append(packer.compress(np.ascontiguousarray(volume).data))
    return b"".join([*blocks, packer.flush()])


def read_nifti(path: Path, *, dimensions: tuple[int, ...] = (3,)) -> Nifti:
    """Read a `.nii` or `.nii.gz` file completely, check sum included.

    The header is read first and must be plausible; then as much is unpacked as it promises, so a
    small file cannot fill the memory.

    The spacing counts as unknown when the header's unit is unknown *and* all zooms are 1: such a
    header was never filled in, and its axes mean nothing either. An unknown unit with other zooms
    is taken as mm, as every ACDC reader does.

    Raises:
        UserError: missing, truncated, damaged or not NIfTI; longer or shorter than its header
            says; not one 3-D volume of real numbers (or of as many `dimensions`); without a usable
        voxel size or affine.
    """
    image = _load(path, dimensions=dimensions)
    array = _voxels(path, image)
    spacing = _spacing_mm(image.header)
    affine = np.asarray(image.affine)
    check_affine(path, affine, _distances(image.header))
    import nibabel

    orientation = "".join(nibabel.aff2axcodes(affine)) if spacing is not None else None
    placed = image.header["sform_code"] > 0 or image.header["qform_code"] > 0
    return Nifti(array, spacing, affine if placed else None, orientation)


def _load(path: Path, *, dimensions: tuple[int, ...]) -> Any:
    """The whole file as a nibabel image."""
    check_file(path)
    import nibabel

    content = _read_bytes(path, dimensions)
    try:
        return nibabel.Nifti1Image.from_bytes(_with_unit_quaternion(content))
    except Exception as error:  # whatever a damaged header makes nibabel raise, the remedy is one
        raise _unreadable(path, error) from error


def _with_unit_quaternion(content: bytes) -> bytes:
    """The file with a quaternion of at most unit length: rounding may leave it a little longer.

    nibabel refuses it then, as far as it is not within its own narrower limit.
    """
    import nibabel

    header = nibabel.Nifti1Header(content[:HEADER_BYTES], check=False)
    names = ("quatern_b", "quatern_c", "quatern_d")
    length = float(np.sqrt(sum(float(header[name]) ** 2 for name in names)))
    if not 1 < length <= MAX_QUATERNION:
        return content
    for name in names:
        header[name] = header[name] / length
    return bytes(header.binaryblock) + content[HEADER_BYTES:]


def _voxels(path: Path, image: Any) -> np.ndarray:
    try:
        return np.asarray(image.dataobj).T
    except Exception as error:  # as above
        raise _unreadable(path, error) from error


def _read_bytes(path: Path, dimensions: tuple[int, ...]) -> bytes:
    """The file's content, unpacked when it is gzip (by its first bytes, not by its name)."""
    try:
        with path.open("rb") as file:
            is_gzip = file.read(2) == GZIP_MAGIC
            file.seek(0)
            stream = gzip.GzipFile(fileobj=file) if is_gzip else file
            promised = _promised_bytes(path, stream.read(HEADER_BYTES), dimensions)
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


def _promised_bytes(path: Path, head: bytes, dimensions: tuple[int, ...]) -> int:
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
    check_array(path, shape, dtype, dimensions=dimensions)
    low, high = SPACING_MM
    possible = (zooms * factor >= low) & (zooms * factor <= high)  # False for NaN
    # along an axis of one voxel there is no distance; nnU-Net's 2-D images have 999 mm there
    possible |= (np.array(shape[:3]) == 1) & (zooms > 0) & np.isfinite(zooms)
    if not possible.all():
        shown = ", ".join(f"{zoom * factor:g}" for zoom in zooms)
        raise DataError(
            f"the header's voxel size is ({shown}) mm (x, y, z); possible are {low:g} to {high:g}",
            path,
            "Write the scanner's voxel size into the header (pixdim), or export the file again.",
        )
    return offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _spacing_mm(header: Any) -> tuple[float, float, float] | None:
    """Voxel size (z, y, x) in mm from a nibabel header, or None."""
    zooms = [float(zoom) for zoom in header.get_zooms()[:3]]
    unit = header.get_xyzt_units()[0]
    if unit == "unknown" and zooms == [1.0, 1.0, 1.0]:
        return None
    factor = MM_PER_UNIT[unit]
    return zooms[2] * factor, zooms[1] * factor, zooms[0] * factor


def _distances(header: Any) -> list[float]:
    """The zooms (x, y, z), NaN along an axis of one voxel, where there is no distance."""
    zooms, shape = header.get_zooms()[:3], header.get_data_shape()[:3]
    return [float(zoom) if size > 1 else np.nan for zoom, size in zip(zooms, shape, strict=True)]


def check_affine(path: Path, affine: np.ndarray, sides: Sequence[float]) -> None:
    """Make sure that an affine is that of a rectangular grid with this voxel size.

    Args:
        path: of the file.
        affine: 4x4.
        sides: of a voxel (x, y, z), in the unit of the affine; NaN where there is no distance.

    Raises:
        UserError: it is singular or not finite, its axes are not at right angles (0.5 degrees are
            let pass), or their lengths are other than `sides` by more than 1 %.
    """
    axes = affine[:3, :3]
    lengths = np.linalg.norm(axes, axis=0)
    remedy = "Export the file again with a valid orientation (sform or qform)."
    if not (np.isfinite(affine).all() and lengths.all()):
        problem = f"the header's affine is singular or not finite ({axes.tolist()})"
        raise DataError(problem, path, remedy)
    angles = (axes / lengths).T @ (axes / lengths) - np.eye(3)
    if np.abs(angles).max() > MAX_COSINE:
        off = np.degrees(np.arcsin(min(1.0, np.abs(angles).max())))
        raise DataError(
            f"the header's axes are {off:.2g} degrees off right angles: the voxels are sheared",
            path, "Resample the image to a rectangular grid.",
        )  # fmt: skip
    wrong = np.abs(lengths / sides - 1) > 0.01  # False for NaN
    if wrong.any():
        given, shown = (", ".join(f"{x:g}" for x in some) for some in (sides, lengths))
        raise DataError(
            f"the header contradicts itself: the voxel size is ({given}) (x, y, z), and ({shown}) "
            "by its affine", path, "Write the true one into both, or export the file again.",
        )  # fmt: skip


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"not a readable NIfTI file ({type(error).__name__}: {error})", path, AGAIN)
