"""What may be opened and decoded: regular files of a bounded size.

A pipe in place of an image would block for ever, a device never ends, and a few bytes of gzip or
HDF5 can claim more voxels than any machine holds. All of this is found before anything is read.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mambaseg.data.case import DataError

AGAIN = "The download or copy was probably cut off: get the file again."
MAX_VOXELS = 2**28  # 512 × 512 × 1024; 1 GiB as float32
MAX_ITEM_BYTES = 8  # float64
LEVELS = 256  # steps of float32's rounding that the grey values of an image must span
MAX_FILE_BYTES = MAX_VOXELS * MAX_ITEM_BYTES + 2**24  # and what comes before the voxels


def check_file(path: Path) -> None:
    """Make sure that `path` is a regular file that can be opened, and is neither empty nor huge.

    Raises:
        UserError: with what is there instead.
    """
    get_it = "Put the file itself there."
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise DataError("is a folder; a file was expected", path, get_it)
        if not stat.S_ISREG(status.st_mode):
            raise DataError("is a pipe, a socket or a device; a file was expected", path, get_it)
        path.open("rb").close()
    except FileNotFoundError as error:
        if path.is_symlink():
            raise DataError("is a link to a file that does not exist", path, get_it) from error
        raise DataError("the file is missing", path, "Get it again.") from error
    except OSError as error:
        problem = f"the file cannot be read ({error.strerror or error})"
        remedy = "Check its permissions, links and the disk."
        raise DataError(problem, path, remedy) from error
    if status.st_size == 0:
        raise DataError("the file is empty", path, AGAIN)
    if status.st_size > MAX_FILE_BYTES:
        size = f"{status.st_size / 2**30:.1f} GiB"
        problem = f"the file has {size}; at most {MAX_FILE_BYTES / 2**30:.1f} GiB are read"
        raise DataError(problem, path, "Use the file of one frame.")


def check_array(
    path: Path,
    shape: Sequence[int],
    dtype: np.dtype,
    name: str = "volume",
    *,
    dimensions: tuple[int, ...] = (3,),
) -> None:
    """Make sure that a claimed array is one grey-scale or label volume that fits into memory.

    Args:
        path: the file that makes the claim.
        shape: as claimed.
        dtype: as claimed.
        name: what the file calls the array.
        dimensions: how many it may have; 4 is a volume per time.

    Raises:
        UserError: other dimensions, one of them empty, too many voxels, or a data type that is
            no real number of at most 64 bits.
    """
    sizes = tuple(int(size) for size in shape)
    if len(sizes) not in dimensions:
        volume = dimensions == (3,)
        expected = "one 3-D volume" if volume else "a volume (3-D), or one per time (4-D)"
        raise DataError(
            f"the {name} is {len(sizes)}-D (shape {sizes}); expected is {expected}",
            path,
            "Use the file of one frame (patientXXX_frameFF), not the whole cine (_4d)."
            if volume
            else "Split it into such files.",
        )
    if min(sizes) < 1:
        raise DataError(f"the {name} is empty (shape {sizes})", path, "Download the file again.")
    if np.prod(sizes, dtype=object) > MAX_VOXELS:
        raise DataError(
            f"the {name} claims shape {sizes}, more than the {MAX_VOXELS} voxels that are read",
            path,
            "The header is damaged, or this is no volume of one frame: get the file again.",
        )
    if dtype.kind not in "biuf" or dtype.itemsize > MAX_ITEM_BYTES:
        raise DataError(
            f"the {name} has data type {dtype}",
            path,
            "Use a grey-scale image or a label map of whole numbers, at most 64 bits per voxel.",
        )


def check_grey_values(path: Path, array: np.ndarray) -> None:
    """Make sure that float32, in which images are computed with, tells grey values apart.

    An array that holds NaN or infinity is left for others to reject.

    Raises:
        UserError: values beyond its range, or so close together that its rounding would show.
    """
    if not array.size or array.dtype.itemsize < 4 or array.dtype == np.float32:
        return  # exact
    low, high = float(array.min()), float(array.max())
    if not np.isfinite([low, high]).all():
        return
    with np.errstate(over="ignore"):
        step = float(np.spacing(np.float32(max(abs(low), abs(high)))))  # NaN beyond the range
    if not (high - low >= LEVELS * step or (low == high and np.isfinite(step))):
        raise DataError(
            f"the grey values ({low:g} to {high:g}) cannot be told apart as 32-bit floats",
            path,
            "Rescale them, such as to 0..1000, and save the image again.",
        )


def as_float32(path: Path, array: np.ndarray) -> np.ndarray:
    """Grey values as float32.

    Raises:
        UserError: see `check_grey_values`.
    """
    check_grey_values(path, array)
    return array.astype(np.float32, copy=False)


def unlisted(folder: Path, error: OSError) -> DataError:
    """A folder that cannot be looked into."""
    problem = f"cannot be read ({error.strerror or error})"
    return DataError(problem, folder, "Check its permissions, links and the disk.")
