"""Images without a reference: which there are under a path, and how each is read."""

from __future__ import annotations

import glob
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mambaseg.data.case import DataError
from mambaseg.data.formats.image import Image
from mambaseg.data.formats.nifti import read_frames
from mambaseg.errors import UserError

NIFTI = (".nii.gz", ".nii")
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
META_IMAGE = (".mha", ".mhd", ".nrrd")
DICOM = (".dcm", ".ima")
CHANNEL = re.compile(r"(.+)_(\d{4})")
KNOWN = (*NIFTI, *PICTURES, *META_IMAGE, *DICOM)


@dataclass(frozen=True)
class Source:
    """Where an image is.

    Attributes:
        name: of its results, relative to their folder, without an ending.
        path: the file, or the folder of a DICOM series.
        series: identity of the series in that folder; empty for a file.
        further: files of the other channels, where each has its own.
    """

    name: str
    path: Path
    series: str = ""
    further: tuple[Path, ...] = ()

    @property
    def is_picture(self) -> bool:
        """Whether it is a 2-D picture by its name."""
        return not self.series and self.path.name.lower().endswith(PICTURES)

    def read(self, channels: int = 1) -> Image:
        """Read the image.

        Args:
            channels: how many are asked for; it decides what becomes of a picture's colours. The
                image may have another number: that is for the caller to look at.

        Raises:
            UserError: it cannot be read, has colours where one channel is asked for, or voxels
                that are not finite.
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
        return image

    def _read(self, channels: int) -> Image:
        if self.series:
            from mambaseg.data.formats.itk import read_series

            return read_series(self.path, self.series)
        name = self.path.name.lower()
        if name.endswith(PICTURES):
            from mambaseg.data.formats.pictures import read_picture

            return read_picture(self.path, channels)
        if name.endswith((*META_IMAGE, *DICOM)):
            from mambaseg.data.formats.itk import read_file

            return read_file(self.path)
        read = read_frames(self.path)
        return Image(read.array[:, :, None], read.spacing, read.geometry)


def find_images(place: str, *, outside: Path) -> list[Source]:
    """The images that a path stands for, sorted by name.

    A file is itself. A folder is all files below it with a known ending, and a folder that holds
    DICOM files is its series. A pattern (`*`, `?`, `[...]`, `**`) is what it matches.

    Args:
        place: file, folder or pattern.
        outside: nothing in this folder is an input: it takes the results.

    Raises:
        UserError: there is nothing, or two images would have one name.
    """
    path = Path(place).expanduser()
    if path.is_file():
        if not path.name.lower().endswith(KNOWN):
            raise UserError(f"input: {path} has none of the endings {', '.join(KNOWN)}")
        found = [Source(_stem(path), path)]
    elif path.is_dir():
        found = list(_in_folder(path, path))
    elif glob.has_magic(str(path)):
        found = list(_matching(path))
    else:
        raise UserError(f"input: there is no file or folder {path}")
    results = outside.resolve()
    found = [source for source in found if results not in source.path.resolve().parents]
    if not found:
        raise UserError(f"input: {path} holds no image (known endings: {', '.join(KNOWN)})")
    found.sort(key=lambda source: source.name)
    for one, other in itertools.pairwise(found):
        if one.name == other.name:
            raise UserError(
                f"input: {one.path} and {other.path} would both give {one.name}: predict them "
                "into two folders"
            )
    return found


def group_channels(sources: Iterable[Source], channels: int) -> list[Source]:
    """Images whose channels are files of their own, named as nnU-Net names them, as one each.

    `scan_0000` and `scan_0001` are `scan` for networks of several channels. For networks of one,
    `scan_0000` is `scan` where there is no `scan_0001`: then the numbers are no channels.
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
        (number, first), *others = sorted(files, key=lambda one: one[0])
        if channels > 1 or (number == 0 and not others):
            found.append(Source(name, first.path, "", tuple(one.path for _, one in others)))
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
        if match.is_file() and match.name.lower().endswith(KNOWN):
            yield Source(_relative(match, base), match)
        elif match.is_dir():
            yield from _series(match, base)


def _in_folder(folder: Path, base: Path) -> Iterator[Source]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"input: {folder} cannot be read ({error.strerror or error})") from error
    yield from _series(folder, base)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from _in_folder(entry, base)
        elif entry.name.lower().endswith((*NIFTI, *PICTURES, *META_IMAGE)) and entry.is_file():
            yield Source(_relative(entry, base), entry)


def _series(folder: Path, base: Path) -> Iterator[Source]:
    if not any(map(_is_dicom, folder.iterdir())):
        return
    from mambaseg.data.formats.itk import series_in

    name = folder.name if folder == base else folder.relative_to(base).as_posix()
    found = series_in(folder)
    for number, series in enumerate(found, start=1):
        yield Source(name if len(found) == 1 else f"{name}_{number}", folder, series)


def _is_dicom(path: Path) -> bool:
    """By its ending, or for a name without one by the mark that DICOM files bear at byte 128."""
    if path.suffix.lower() in DICOM:
        return path.is_file()
    if path.suffix or not path.is_file():
        return False
    try:
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _relative(path: Path, base: Path) -> str:
    return (path.parent.relative_to(base) / _stem(path)).as_posix()


def _stem(path: Path) -> str:
    return without_ending(path.name, KNOWN)


def without_ending(name: str, endings: Iterable[str]) -> str:
    """A file's name without its ending, of those given the first that fits."""
    for ending in endings:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name
