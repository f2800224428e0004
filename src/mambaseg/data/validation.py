"""What may be used: regular files of a bounded size, arrays that fit, grey values, labels, places.

A pipe in place of an image would block for ever, a device never ends, and a few bytes of gzip or
HDF5 can claim more voxels than any machine holds. All of this is found before anything is read.
"""

from __future__ import annotations

import contextlib
import logging
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path

import numpy as np

from mambaseg.data.classes import IGNORED
from mambaseg.data.volume import Spacing, Volume
from mambaseg.errors import UserError, counted
from mambaseg.storage.untrusted import readable

AGAIN = "The download or copy was probably cut off: get the file again."
MAX_VOXELS = 2**28  # 512 × 512 × 1024; 1 GiB as float32
MAX_ITEM_BYTES = 8  # float64
MAX_FILE_BYTES = MAX_VOXELS * MAX_ITEM_BYTES + 2**24  # and what comes before the voxels
SPACING_MM = (0.01, 100.0)  # beyond these it is no scan of a body
MAX_COSINE = 0.01  # between two axes of a rectangular grid
LEVELS = 256  # steps of float32's rounding that the grey values of an image must span
ROUNDED = 1e-3  # how far a label's value may be from the whole number that it stands for
_WARNINGS: ContextVar[list[str] | None] = ContextVar("_WARNINGS", default=None)
log = logging.getLogger(__name__)


class DataError(UserError):
    """A file or folder of the data set cannot be used; the parts of the message stay apart.

    `problem` is what is wrong with `path`, without a full stop; `remedy` is one or more sentences.
    """

    def __init__(self, problem: str, path: Path | None = None, remedy: str = "") -> None:
        where = f"{readable(str(path))}: " if path is not None else ""
        super().__init__(f"{where}{problem}. {remedy}" if remedy else f"{where}{problem}")
        self.problem, self.path, self.remedy = problem, path, remedy


def unlisted(path: Path, error: OSError) -> DataError:
    """The error for a file or folder that cannot be read."""
    problem = f"cannot be read ({error.strerror or error})"
    return DataError(problem, path, "Check its permissions, links and the disk.")


def check_file(path: Path) -> None:
    """Raise `UserError` unless `path` is a regular file that opens, neither empty nor huge."""
    problem = ""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            problem = "is a folder" if path.is_dir() else "is a pipe, a socket or a device"
        else:
            path.open("rb").close()
            if status.st_size == 0:
                problem = "is empty"
            elif status.st_size > MAX_FILE_BYTES:
                problem = f"has {status.st_size / 2**30:.1f} GiB, more than is read"
    except FileNotFoundError:
        problem = "is a link to a file that does not exist" if path.is_symlink() else "is missing"
    except OSError as error:
        raise unlisted(path, error) from error
    if problem:
        remedy = f"Put the file itself there, of a cine that of one frame. {AGAIN}"
        raise DataError(f"the file {problem}", path, remedy)


def check_array(
    path: Path,
    shape: Sequence[int],
    dtype: np.dtype,
    name: str = "volume",
    *,
    dimensions: tuple[int, ...] = (3,),
) -> None:
    """Raise `UserError` unless an array that `path` claims to hold is a volume that fits memory.

    No axis may be empty, and the data type must be a real number of at most 64 bits. `name` is
    what the file calls the array, `dimensions` how many axes it may have (4: a volume per time).
    """
    sizes = tuple(int(size) for size in shape)
    remedy = "Use grey-scale or labels of at most 64 bits, or get the file again."
    if len(sizes) not in dimensions:
        remedy = "Save one image per file; of ACDC, use the file of one frame (_frameFF, not _4d)."
        expected = " or ".join(f"{number}-D" for number in dimensions)
        problem = f"the {name} is {len(sizes)}-D (shape {sizes}); expected is {expected}"
    elif min(sizes) < 1:
        problem = f"the {name} is empty (shape {sizes})"
    elif np.prod(sizes, dtype=object) > MAX_VOXELS:
        problem = f"the {name} claims shape {sizes}, more than {MAX_VOXELS} voxels"
    elif dtype.kind not in "biuf" or dtype.itemsize > MAX_ITEM_BYTES:
        problem = f"the {name} has data type {dtype}"
    else:
        return
    raise DataError(problem, path, remedy)


@contextlib.contextmanager
def decoding(path: Path, kind: str, remedy: str = AGAIN) -> Iterator[None]:
    """Turn whatever a library raises over foreign bytes of a `kind` of file into `UserError`."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}"
        raise DataError(f"not a readable {kind} file ({reason})", path, remedy) from error


def check_grey_values(path: Path, array: np.ndarray) -> None:
    """Raise `UserError` where grey values are beyond float32, or too close for its rounding.

    An array that holds NaN or infinity is left for others to reject.
    """
    if not array.size or array.dtype.itemsize < 4 or array.dtype == np.float32:
        return  # exact
    low, high = float(array.min()), float(array.max())
    if not np.isfinite([low, high]).all():
        return
    with np.errstate(over="ignore"):
        step = float(np.spacing(np.float32(max(abs(low), abs(high)))))  # NaN beyond the range
    if not (high - low >= LEVELS * step or (low == high and np.isfinite(step))):
        problem = f"the grey values ({low:g} to {high:g}) cannot be told apart as 32-bit floats"
        raise DataError(
            problem, path, "Rescale them, such as to 0..1000, and save the image again."
        )


def as_float32(path: Path, array: np.ndarray) -> np.ndarray:
    """Grey values as float32, after `check_grey_values`."""
    check_grey_values(path, array)
    return array.astype(np.float32, copy=False)


@contextlib.contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect what reading in this thread remarks on sound files; else it is logged."""
    found: list[str] = []
    token = _WARNINGS.set(found)
    try:
        yield found
    finally:
        _WARNINGS.reset(token)


def as_label(array: np.ndarray, path: Path) -> np.ndarray:
    """Class numbers 0..255 as uint8; `UserError` for NaN, fractions and other values.

    Floats within `ROUNDED` of a whole number are rounded with a warning: a header's scale (2.00007)
    or arithmetic (0.9999999) made them so.
    """
    if array.dtype in (np.uint8, np.bool_):
        return array.astype(np.uint8, copy=False)
    wrong = f"data type {array.dtype}"
    if array.dtype.kind in "iuf":
        with np.errstate(invalid="ignore"):
            whole = np.rint(array) if array.dtype.kind == "f" else array
            off = np.abs(array - whole)  # NaN for NaN and infinity, which are not below the limit
        bad = ~(off <= ROUNDED) | (whole < 0) | (whole > 255)
        if not bad.any():
            if off.any():
                examples = _listed(array[off > 0], digits=7)
                sentence = f"{path.name}: the label holds {examples}, rounded to whole numbers"
                if (found := _WARNINGS.get()) is None:
                    log.warning(sentence)
                else:
                    found.append(sentence)
            return whole.astype(np.uint8)
        wrong = _listed(array[bad])
    remedy = "Labels are whole class numbers: replace the file by the original label map."
    raise DataError(f"the label holds {wrong}", path, remedy)


def _listed(values: np.ndarray | list[int], digits: int = 6) -> str:
    """Distinct values in words: "value 7", "values 4, 5, ..."."""
    distinct = np.unique(np.asarray(values))
    shown = ", ".join(f"{value:.{digits}g}" for value in distinct[:4])
    more = ", ..." if len(distinct) > 4 else ""
    return f"value{'s' if len(distinct) > 1 else ''} {shown}{more}"


def mapped(label: np.ndarray, mapping: Mapping[int, int], path: Path) -> np.ndarray:
    """The classes of a label by `data.label_map`; `UserError` where it does not name a value."""
    if unknown := sorted(set(np.unique(label).tolist()) - mapping.keys()):
        problem = f"the label holds {_listed(unknown)}, not named in data.label_map ({mapping})"
        remedy = "Name every value of the files; what is to be background is mapped to 0."
        raise DataError(problem, path, remedy)
    classes = np.zeros(256, np.uint8)
    classes[list(mapping)] = list(mapping.values())
    return classes[label]


def checked_label_map(
    mapping: Mapping[int, int] | None, num_classes: int
) -> tuple[tuple[int, int], ...] | None:
    """`data.label_map` as a case carries it; `UserError` unless it maps 0..255 to classes."""
    if not isinstance(mapping, Mapping | None):
        raise UserError(f"data.label_map={mapping}: must be a mapping, such as {{0: 0, 255: 1}}")
    for value, index in (mapping or {}).items():
        whole = type(value) is type(index) is int
        if not (whole and 0 <= value < 256 and 0 <= index < num_classes):
            raise UserError(
                f"data.label_map: {value}: {index} does not map a value 0..255 to a class "
                f"0..{num_classes - 1}"
            )
    return None if mapping is None else tuple(sorted(mapping.items()))


def find_problems(
    volume: Volume,
    image: Path,
    label: Path | None,
    num_classes: int | None = None,
    channels: int | None = None,
    partial: bool = False,
) -> Iterator[DataError]:
    """Yield every reason not to use a case, the image first.

    The image is (Z, C, H, W) with `channels` channels (None: any number), not empty and finite; the
    label has its shape. With `num_classes` a label is required and may hold only 0..num_classes-1,
    and IGNORED where it is `partial`.
    """
    pixels = volume.image
    if pixels.ndim != 4 or pixels.size == 0:
        problem = f"the image has shape {pixels.shape}; expected is (z, channel, y, x), not empty"
        yield DataError(problem, image, "Use the file of one frame, or get it again.")
    elif channels is not None and pixels.shape[1] != channels:
        held = counted(pixels.shape[1], "channel")
        problem = f"the image has {held}, the data set has {channels}"
        remedy = "Give every case the same channels, or set data.in_channels to what they have."
        yield DataError(problem, image, remedy)
    yield from not_finite(pixels, image)
    if volume.label is None:
        if num_classes is not None:
            remedy = "Training and scoring need one: put the _gt file beside it, or leave it out."
            yield DataError("the image has no label", image, remedy)
        return
    shape, grid = volume.label.shape, (*pixels.shape[:1], *pixels.shape[2:])
    if shape != grid:
        problem = f"the label has shape {shape} (z, y, x) but the image ({image.name}) has {grid}"
        remedy = "The two files do not belong together: take both from the same download."
        yield DataError(problem, label or image, remedy)
    yield from label_problems(volume.label, label or image, num_classes, partial)


def not_finite(image: np.ndarray, path: Path) -> Iterator[DataError]:
    """NaN or infinity in an image."""
    if count := image.size - int(np.count_nonzero(np.isfinite(image))):
        problem = f"{count} of {image.size} voxels are NaN or infinite"
        yield DataError(problem, path, "Get the file again, or export it again without NaN.")


def label_problems(
    label: np.ndarray, path: Path, num_classes: int | None, partial: bool = False
) -> Iterator[DataError]:
    """Values that are no class of the data set, nor IGNORED in a `partial` label."""
    if partial:
        label = label[label != IGNORED]
    if num_classes is not None and label.size and int(label.max()) >= num_classes:
        values = np.unique(label).tolist()
        wrong = [value for value in values if value >= num_classes]
        share = np.count_nonzero(label >= num_classes) / label.size
        pairs = [f"{value}: {value if value < num_classes else '?'}" for value in values[:6]]
        more = ", ..." if len(values) > 6 else ""
        allowed = f"allowed are 0..{num_classes - 1}"
        problem = f"the label holds {_listed(wrong)} (in {share:.2%} of it); {allowed}"
        yield DataError(
            problem,
            path,
            "Replace the file by the original, or map its labels to the data set's classes, every "
            f"value of all files: 'data.label_map={{{', '.join(pairs)}{more}}}'.",
        )


def voxel_size(path: Path, sides: Sequence[float]) -> Spacing:
    """A voxel size (z, y, x) in mm; `UserError` where it cannot be that of a scan."""
    low, high = SPACING_MM
    z, y, x = (float(side) for side in sides)
    if not all(low <= side <= high for side in (z, y, x)):  # also for NaN
        problem = f"the voxel size is ({x:g}, {y:g}, {z:g}) mm (x, y, z), not {low:g} to {high:g}"
        remedy = "Write the scanner's voxel size into the header, or export the file again."
        raise DataError(problem, path, remedy)
    return z, y, x


def check_affine(path: Path, affine: np.ndarray, sides: Sequence[float]) -> None:
    """Raise `UserError` unless an affine is that of a rectangular grid with this voxel size.

    It must be finite, its axes at most 0.5 degrees off right angles and within 1 % of `sides`.
    It is 4x4, voxel (x, y, z) to any unit; `sides` are those of a voxel (x, y, z) in that unit, NaN
    where there is no distance.
    """
    axes = affine[:3, :3]
    lengths = np.linalg.norm(axes, axis=0)
    problem = ""
    if not (np.isfinite(affine).all() and lengths.all()):
        problem = f"the header's affine is singular or not finite ({axes.tolist()})"
    elif (cosine := np.abs((axes / lengths).T @ (axes / lengths) - np.eye(3)).max()) > MAX_COSINE:
        off = np.degrees(np.arcsin(min(1.0, cosine)))
        problem = f"the header's axes are {off:.2g} degrees off right angles: sheared voxels"
    elif (np.abs(lengths / sides - 1) > 0.01).any():  # False for NaN
        given, shown = (", ".join(f"{x:g}" for x in some) for some in (sides, lengths))
        problem = f"the header contradicts itself: voxels of ({given}) (x, y, z), and ({shown})"
    if problem:
        remedy = "Export the file again with the true voxel size and a valid orientation."
        raise DataError(problem, path, f"{remedy} Resample sheared voxels.")


def check_same_geometry(image: Volume, other: Volume, image_path: Path, path: Path) -> None:
    """Raise `UserError` unless a label or further channel at `path` lies where its image lies.

    Axes are the same, voxel sizes and directions within 1 %, first voxels within half a voxel.
    Voxels are paired by index. A header that was never filled in says nothing.
    """
    if image.spacing is None or other.spacing is None:
        return
    same = image.orientation == other.orientation
    same = same and np.allclose(image.spacing, other.spacing, rtol=0.01)
    if same and image.affine is not None and other.affine is not None:
        between = np.linalg.solve(image.affine, other.affine)  # voxels to voxels
        same = np.abs(between - np.eye(4))[:3, :3].max() <= 0.01
        same = same and np.abs(between[:3, 3]).max() <= 0.5
    if not same:
        raise DataError(
            f"has {other.place} but the image ({image_path.name}) has {image.place}",
            path,
            "Bring both files to the same axes and the same place. If only the header is wrong, "
            "copy the image's into the file.",
        )


def require_classes(
    voxels: Sequence[Sequence[int]], names: Sequence[str], where: str, path: Path, *, every: bool
) -> None:
    """`DataError` unless cases have foreground, and with `every` each of its classes.

    `voxels` are counts per case and class, background first; `where` names the cases in words.
    """
    classes = range(1, len(names))
    missing = [k for k in classes if not any(one[k] for one in voxels)]
    if len(missing) == len(classes):
        problem = f"{where} holds no foreground at all: every label is background"
    elif every and missing:
        absent = ", ".join(f"{k} ({names[k]})" for k in missing)
        problem = f"class {absent} occurs in no label of {where}, so it cannot be learnt"
    else:
        return
    remedy = (
        "Look at the label files of these patients, choose another data.split or more patients "
        "(data.labelled), or leave the class out of data.class_names and data.num_classes."
    )
    raise DataError(problem, path, remedy)
