"""NIfTI files as volumes, and label maps and probabilities as NIfTI files."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from mambaseg.data.validation import (
    AGAIN,
    DataError,
    check_affine,
    check_array,
    check_file,
    decoding,
    voxel_size,
)
from mambaseg.data.volume import Spacing, Volume

MM_PER_UNIT = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}
MAX_QUATERNION = 1.001  # length that rounding explains
HEADER_BYTES = 348
NIFTI_2 = 540  # bytes of its header, which are its first number
MAX_OFFSET = 2**24  # bytes before the voxels: header and extensions
BLOCK = 2**20
# The grid of a NIfTI-1 header and its place in space and time. Nothing else of somebody's header
# reaches a result: its free text and its extensions may name a patient.
_GEOMETRY = (
    "dim", "pixdim", "xyzt_units", "toffset", "qform_code", "sform_code",
    "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "srow_x", "srow_y", "srow_z",
)  # fmt: skip


def read_nifti(path: Path, *, dimensions: tuple[int, ...] = (3,)) -> Volume:
    """Read a `.nii` or `.nii.gz` file completely, check sum included: `image` (T, Z, 1, H, W).

    The header is read first and must be plausible; then as much is unpacked as it promises, so a
    small file cannot fill the memory. Its slope is applied. `dimensions` may be 3 for a volume, 4
    for one per time, 2 for one slice.

    The spacing counts as unknown when the header's unit is unknown *and* all zooms are 1: such a
    header was never filled in, and its axes mean nothing either. An unknown unit with other zooms
    is taken as mm, as every ACDC reader does. A file with two dimensions says no depth of its
    slice, so its spacing is unknown too.

    Raises:
        UserError: missing, truncated, damaged or not NIfTI; longer or shorter than its header
            says; no volume of real numbers; without a usable voxel size or affine.
    """
    check_file(path)
    with decoding(path, "NIfTI"):
        file = nibabel.Nifti1Image.from_bytes(_content(path, dimensions))
        array = np.asarray(file.dataobj).T
    header, affine = file.header, np.asarray(file.affine)
    zooms, unit = header["pixdim"][1:4].tolist(), header.get_xyzt_units()[0]
    check_affine(path, affine, np.where(np.array(_grid(file.shape)) > 1, zooms, np.nan).tolist())
    factor = MM_PER_UNIT[unit]
    x, y, z = (zoom * factor for zoom in zooms)
    unknown = file.ndim == 2 or (unit == "unknown" and zooms == [1.0, 1.0, 1.0])
    spacing = None if unknown else (z, y, x)
    placed = header["sform_code"] > 0 or header["qform_code"] > 0
    orientation = spacing and "".join(nibabel.aff2axcodes(affine))
    affine = np.diag([factor, factor, factor, 1.0]) @ affine
    array = array.reshape(-1, *_grid(file.shape)[::-1])[:, :, None]
    return Volume(array, None, spacing, affine if placed else None, orientation, place_of(header))


def place_of(header: Any) -> Any:
    """A new header with the place of a nibabel NIfTI-1 header's grid and nothing else."""
    place = nibabel.Nifti1Header()
    for name in _GEOMETRY:
        place[name] = header[name]
    return place


def place_on(
    shape: Sequence[int], affine: np.ndarray, spacing: Spacing | None, *, time: float | None = None
) -> Any:
    """`Volume.header` of an image of another format; its unit is mm where the spacing is known.

    `shape` is (T, Z, H, W); T = 1 gets no axis of time unless `time` says how far apart volumes
    are, in no known unit. `affine` is 4x4, voxel (x, y, z) to mm, or to no known unit.
    """
    header = nibabel.Nifti1Header()
    cine = time is not None or shape[0] > 1
    header.set_data_shape(shape[::-1] if cine else shape[:0:-1])
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    header.set_zooms((*sides, time or 0.0) if cine else sides)
    header.set_qform(affine, code=1)
    header.set_sform(affine, code=1)
    header.set_xyzt_units("unknown" if spacing is None else "mm")
    return place_of(header)


def to_nifti(array: np.ndarray, place: Any, *, slope: float = 1.0, label: bool = False) -> bytes:
    """The content of a `.nii.gz` file; the same array gives the same bytes.

    The array is uint8, (T, Z, H, W) or, with classes, (T, K, Z, H, W). T = 1 leaves no axis of time
    where the header has none, nor Z = 1 one of slices; classes become the last axis. `place` is
    `Volume.header`, bit for bit in the file but for the axis of the classes. The numbers are to be
    multiplied with `slope`; `label` marks the file as a label map.
    """
    header = place.copy()
    header.set_data_dtype(np.uint8)
    voxels = array.T  # (W, H, Z[, K], T)
    if array.ndim == 5:
        voxels = np.moveaxis(voxels, 3, -1)  # (W, H, Z, T, K)
    if (dimensions := int(place["dim"][0])) <= 3:
        voxels = voxels[:, :, :, 0]
    if dimensions == 2 and array.ndim == 4:
        voxels = voxels[:, :, 0]
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


def _content(path: Path, dimensions: tuple[int, ...]) -> bytes:
    """The file's content, unpacked when it is gzip (by its first bytes, not by its name)."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream = gzip.GzipFile(fileobj=file) if packed else file
        try:
            head = nibabel.Nifti1Header(stream.read(HEADER_BYTES), check=False)
            promised = _promised_bytes(path, head, dimensions)
            blocks, left = [bytes(_mended(head).binaryblock)], promised + 1 - HEADER_BYTES
            while left and (block := stream.read(min(left, BLOCK))):
                blocks.append(block)
                left -= len(block)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"truncated or damaged gzip file ({error})", path, AGAIN) from error
    if left != 1:
        held = f"only {promised + 1 - left}" if left else "more"
        raise ValueError(f"its header promises {promised} bytes, it holds {held}")
    return b"".join(blocks)


def _promised_bytes(path: Path, header: Any, dimensions: tuple[int, ...]) -> int:
    """How long the (unpacked) file must be, from a header that is worth reading on."""
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    offset, zooms = int(header["vox_offset"]), header["pixdim"][1:4].astype(float)
    if int(header["sizeof_hdr"]) == NIFTI_2:
        remedy = "Save it as NIfTI-1, for instance with nibabel.Nifti1Image.from_image."
        raise DataError("it is a NIfTI-2 file, which is not read", path, remedy)
    if bytes(header["magic"]) not in (b"n+1", b"n+1\0"):
        raise ValueError("no NIfTI-1 header")
    if not HEADER_BYTES <= offset <= MAX_OFFSET:
        raise ValueError(f"voxels begin at byte {offset}")
    check_array(path, shape, dtype, dimensions=dimensions)
    sides = zooms * MM_PER_UNIT[header.get_xyzt_units()[0]]
    # along an axis of one voxel there is no distance; nnU-Net's 2-D images have 999 mm there
    free = (np.array(_grid(shape)) == 1) & np.isfinite(zooms)
    free &= (zooms > 0) | (np.arange(3) >= len(shape))
    voxel_size(path, np.where(free, 1.0, sides)[::-1].tolist())
    return offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _grid(shape: Sequence[int]) -> tuple[int, ...]:
    """The voxels along x, y and z of a file with two dimensions or more."""
    return (*shape, 1)[:3]


def _mended(header: Any) -> Any:
    """A header with a depth of its slice, and a quaternion of at most unit length.

    A file with two dimensions need not have the first, and rounding may lengthen the second, which
    nibabel refuses.
    """
    if int(header["dim"][0]) == 2 and not header["pixdim"][3]:
        header["pixdim"][3] = 1.0
    names = ("quatern_b", "quatern_c", "quatern_d")
    length = float(np.sqrt(sum(float(header[name]) ** 2 for name in names)))
    if 1 < length <= MAX_QUATERNION:
        for name in names:
            header[name] = header[name] / length
    return header
