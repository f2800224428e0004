"""Images without a reference: which there are under a path, and how each is read."""

from __future__ import annotations

import glob
import itertools
import logging
import re
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mambaseg.data.case import DataError
from mambaseg.data.files import check_grey_values
from mambaseg.data.fingerprint import content_digest
from mambaseg.data.formats.image import Image
from mambaseg.data.formats.nifti import read_frames
from mambaseg.errors import UserError
from mambaseg.storage.untrusted import ForeignFileError, printable, read_json, readable

NIFTI = (".nii.gz", ".nii")
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
META_IMAGE = (".mha", ".mhd", ".nrrd")
DICOM = (".dcm", ".ima")
CHANNEL = re.compile(r"(.+)_(\d{4})")
PROBABILITIES = "_probabilities.nii.gz"
OVERLAY = "_overlay.png"
DICOM_SEG = "_seg.dcm"
_REFERENCE = re.compile(r"(.+)_(gt|scribble)")  # ACDC's, beside the image
_MARKED = re.compile(r"(.+)_(seg|segmentation|labels?|mask)")  # where the image is there too
_REFERENCES = {"labels", "labelstr", "labelsts", "labelsval", "masks"}  # folders beside images*
log = logging.getLogger(__name__)
WITHOUT_SERIES = (*NIFTI, *PICTURES, *META_IMAGE)  # whose files are images on their own
KNOWN = (*WITHOUT_SERIES, *DICOM)


@dataclass(frozen=True)
class Source:
    """Where an image is.

    Attributes:
        name: of its results, relative to their folder, without an ending.
        path: the file, or the folder of a DICOM series.
        series: the files of the series in that folder; empty for a file.
        further: files of the other channels, where each has its own.
    """

    name: str
    path: Path
    series: tuple[Path, ...] = ()
    further: tuple[Path, ...] = ()

    @property
    def is_picture(self) -> bool:
        """Whether it is a 2-D picture by its name."""
        return not self.series and self.path.name.lower().endswith(PICTURES)

    def digest(self) -> str:
        """Of the content of its files.

        Raises:
            UserError: one of them cannot be read.
        """
        return content_digest(self.series or (self.path, *self.further), self.name)

    def read(self, channels: int = 1) -> Image:
        """Read the image.

        Args:
            channels: how many are asked for; it decides what becomes of a picture's colours. The
                image may have another number: that is for the caller to look at.

        Raises:
            UserError: it cannot be read, has colours where one channel is asked for, or voxels
                that are not finite or that float32 cannot tell apart.
        """
        image = self._read(1 if self.further else channels)
        for path in self.further:
            image = _joined(image, replace(self, path=path, further=()).read(), path)
        if image.frames.shape[2] == 1 < channels == len(image.frames):
            image = _fourth_axis_as_channels(image)
        finite = np.isfinite(image.frames)
        if not finite.all():
            count = image.frames.size - int(np.count_nonzero(finite))
            raise DataError(
                f"{count} of {image.frames.size} voxels are NaN or infinite",
                self.path,
                "Export the image again without them.",
            )
        check_grey_values(self.path, image.frames)
        return image

    def _read(self, channels: int) -> Image:
        if self.series:
            from mambaseg.data.formats.dicom import read_dicom

            return read_dicom(self.series)
        name = self.path.name.lower()
        if name.endswith(PICTURES):
            from mambaseg.data.formats.pictures import read_picture

            return read_picture(self.path, channels)
        if name.endswith(META_IMAGE):
            from mambaseg.data.formats.itk import read_file

            return read_file(self.path)
        if name.endswith(NIFTI):
            read = read_frames(self.path)
            return Image(read.array[:, :, None], read.spacing, read.geometry)
        from mambaseg.data.formats.dicom import read_dicom

        return read_dicom((self.path,))


def find_images(place: str, *, outside: Path) -> list[Source]:
    """The images that a path stands for, sorted by name.

    A file is itself. A folder is all files below it with a known ending, in folders that are links
    too, and a folder that holds DICOM files, whatever their names, is its series. A pattern (`*`,
    `?`, `[...]`, `**`) is what it matches. Of a folder and a pattern, references and what this
    program wrote are left out, which is logged.

    Args:
        place: file, folder or pattern.
        outside: nothing in this folder is an input: it takes the results.

    Raises:
        UserError: there is nothing, or two images would have one name.
    """
    path = Path(place).expanduser()
    if path.is_file():
        if not _is_image(path):
            raise UserError(
                f"input: {path} is no DICOM file and has none of the endings {', '.join(KNOWN)}"
            )
        found = [Source(readable(_stem(path)), path)]
    elif path.is_dir():
        found = list(_below(path))
    elif glob.has_magic(str(path)):
        found = list(_matching(path))
    else:
        raise UserError(f"input: there is no file or folder {path}")
    results = outside.resolve()
    inside = {source for source in found if results in source.path.resolve().parents}
    found = [source for source in found if source not in inside]
    left_out = "" if path.is_file() else _leave_out(found)
    if not found:
        why = f"; {left_out}" if left_out else ""
        if inside:
            why += f"; {len(inside)} image(s) are in the folder of the results ({outside})"
        raise UserError(f"input: {path} holds no image (known endings: {', '.join(KNOWN)}){why}")
    if left_out:
        log.info("%s. A file that is named alone is predicted", left_out)
    found.sort(key=lambda source: source.name)
    for one, other in itertools.pairwise(found):
        if one.name == other.name:
            raise UserError(
                f"input: {one.path} and {other.path} would both give {one.name}: predict them "
                "into two folders"
            )
    return found


def _leave_out(sources: list[Source]) -> str:
    """Removes what is no image to predict from a list; returns a sentence about it."""
    names = {source.name for source in sources}
    split = [name.lower().split("/") for name in names]
    with_images = {
        "/".join(parts[:depth])
        for parts in split
        for depth, folder in enumerate(parts[:-1])
        if folder.startswith("images")
    }
    kinds: dict[str, list[Source]] = {"reference": [], "earlier result": []}
    for source in sources:
        if source.series:
            continue
        if _is_result(source):
            kinds["earlier result"].append(source)
        elif _is_reference(source.name, names, with_images):
            kinds["reference"].append(source)
    gone = {source for some in kinds.values() for source in some}
    sources[:] = [source for source in sources if source not in gone]
    told = []
    for kind, some in kinds.items():
        if some:
            few = ", ".join(source.path.name for source in some[:3]) + ", ..." * (len(some) > 3)
            told.append(f"{len(some)} {kind}{'s' * (len(some) > 1)} ({few})")
    return printable("left out: " + " and ".join(told)) if told else ""


def _is_reference(name: str, names: set[str], with_images: set[str]) -> bool:
    """Whether a name among others is that of labels; some folders have a folder of images."""
    if _REFERENCE.fullmatch(name):
        return True
    if (match := _MARKED.fullmatch(name)) and {match[1], f"{match[1]}_0000"} & names:
        return True
    *folders, _ = name.lower().split("/")
    return any(
        folder in _REFERENCES and "/".join(folders[:depth]) in with_images
        for depth, folder in enumerate(folders)
    )


def _is_result(source: Source) -> bool:
    """Whether `predict.py` wrote it: by its name, or by what the .json beside it says."""
    name = source.path.name
    if name.endswith((PROBABILITIES, OVERLAY, DICOM_SEG)):
        return True
    beside = source.path.with_name(without_ending(name, KNOWN) + ".json")
    try:
        about = read_json(beside)
    except (OSError, ForeignFileError):
        return False
    return isinstance(about, dict) and {"labels", "image", "made_by"} <= about.keys()


def group_channels(sources: Iterable[Source], channels: int) -> list[Source]:
    """Images whose channels are files of their own, named as nnU-Net names them, as one each.

    `scan_0000` and `scan_0001` are `scan` for networks of several channels. For networks of one,
    `scan_0000` is `scan` where there is no `scan_0001`: then the numbers are no channels, and
    neither are they where one is missing, or where pictures are more or fewer than the channels.
    """
    groups: dict[str, list[tuple[int, Source]]] = defaultdict(list)
    found = []
    names = {source.name for source in sources}
    for source in sources:
        match = None if source.series else CHANNEL.fullmatch(source.name)
        if match and match[1] not in names:
            groups[match[1]].append((int(match[2]), source))
        else:
            found.append(source)
    for name, files in groups.items():
        files.sort(key=lambda one: one[0])
        (_, first), *others = files
        numbered = [number for number, _ in files] == list(range(len(files)))
        if numbered and (len(files) in (1, channels) or (channels > 1 and not first.is_picture)):
            found.append(Source(name, first.path, (), tuple(one.path for _, one in others)))
        else:
            found += [source for _, source in files]
    return sorted(found, key=lambda source: source.name)


def _joined(image: Image, other: Image, path: Path) -> Image:
    """An image with the channels of another file."""
    rows = [(image.geometry[row], other.geometry[row]) for row in ("srow_x", "srow_y", "srow_z")]
    same = all(np.allclose(one, two, atol=0.01) for one, two in rows)  # mm
    if other.frames.shape != image.frames[:, :, :1].shape or not same:
        raise DataError(
            "the channel does not lie on the grid of the first one",
            path,
            "Resample it onto the first channel, as for training.",
        )
    return replace(image, frames=np.concatenate([image.frames, other.frames], axis=2))


def _fourth_axis_as_channels(image: Image) -> Image:
    """A 4-D file of as many volumes as the networks take channels, as the MSD has them."""
    geometry = {name: value.copy() for name, value in image.geometry.items()}
    geometry["dim"][0], geometry["dim"][4] = 3, 1
    return replace(image, frames=image.frames.swapaxes(0, 2), geometry=geometry)


def _matching(pattern: Path) -> Iterator[Source]:
    """Files by their place below the part of the pattern that is plain; folders as series."""
    plain = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts)
    base = Path(*plain)
    rest = Path(*pattern.parts[len(base.parts) :])
    for match in sorted(base.glob(str(rest))):
        if match.name.startswith(".") and not rest.name.startswith("."):
            continue  # as in a shell; macOS leaves `._scan.nii.gz` beside `scan.nii.gz`
        if _is_image(match):
            yield Source(_relative(match, base), match)
        elif match.is_dir():
            yield from _series(match, base)


def _below(base: Path) -> Iterator[Source]:
    """Files and series in a folder and those below it; each once, links to folders last."""
    seen, folders = set(), deque([base])
    while folders:
        folder = folders.popleft()
        try:
            if (place := folder.resolve(strict=True)) in seen:
                continue
            seen.add(place)
            entries = sorted(folder.iterdir())
        except OSError as error:
            raise UserError(
                f"input: {folder} cannot be read ({error.strerror or error})"
            ) from error
        yield from _series(folder, base)
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                (folders.append if entry.is_symlink() else folders.appendleft)(entry)
            elif entry.name.lower().endswith(WITHOUT_SERIES):
                yield Source(_relative(entry, base), entry)


def _series(folder: Path, base: Path) -> Iterator[Source]:
    files = _dicom_files(folder)
    if not files:
        return
    from mambaseg.data.formats.dicom import series_in

    name = folder.name if folder == base else folder.relative_to(base).as_posix()
    found = series_in(files)
    for number, series in enumerate(found, start=1):
        name = readable(name)
        yield Source(name if len(found) == 1 else f"{name}_{number}", folder, series)


def _dicom_files(folder: Path) -> list[Path]:
    """Files with an ending or the mark of DICOM, and those that are named like these.

    A file that lost its content has no mark, and may be a slice all the same.
    """
    files = [
        path
        for path in sorted(folder.iterdir())
        if not path.name.lower().endswith(WITHOUT_SERIES)
        and not path.name.startswith(".")
        and not path.is_dir()
    ]
    marked = {path for path in files if _is_dicom(path)}
    kinds = {_kind(path) for path in marked if path.name != "DICOMDIR"}
    return [path for path in files if path in marked or _kind(path) in kinds]


def _kind(path: Path) -> str:
    """The ending; none where there are numbers, as in the identities that name many files."""
    suffix = path.suffix.lower()
    return "" if suffix[1:].isdigit() else suffix


def _is_image(path: Path) -> bool:
    """Whether a path is a file that can be read as an image, by its ending or its mark."""
    return path.is_file() and (path.name.lower().endswith(KNOWN) or _is_dicom(path))


def _is_dicom(path: Path) -> bool:
    """By its ending, or else by the mark that DICOM files bear at byte 128."""
    if path.suffix.lower() in DICOM:
        return True
    try:
        if not path.is_file():
            return False
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _relative(path: Path, base: Path) -> str:
    return readable((path.parent.relative_to(base) / _stem(path)).as_posix())


def _stem(path: Path) -> str:
    return without_ending(path.name, KNOWN)


def without_ending(name: str, endings: Iterable[str]) -> str:
    """A file's name without its ending, of those given the first that fits."""
    for ending in endings:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name
