"""Images without a reference: which there are under a path, and how each is read."""

from __future__ import annotations

import glob
import itertools
import logging
import re
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mambaseg.data.formats.files import (
    DICOM,
    ENDINGS,
    PICTURES,
    content_digest,
    read_channels,
    without_ending,
)
from mambaseg.data.validation import check_grey_values, not_finite, unlisted
from mambaseg.data.volume import Volume
from mambaseg.errors import UserError
from mambaseg.storage.untrusted import ForeignFileError, printable, read_json, readable

CHANNEL = re.compile(r"(.+)_(\d{4})")
PROBABILITIES = "_probabilities.nii.gz"
OVERLAY = "_overlay.png"
UNCERTAINTY = ("_uncertainty.nii.gz", "_uncertainty.png")  # of a volume, of a picture
DICOM_SEG = "_seg.dcm"
_REFERENCE = re.compile(r"(.+)_(gt|scribble)")  # ACDC's, beside the image
_MARKED = re.compile(r"(.+)_(seg|segmentation|labels?|mask)")  # where the image is there too
_REFERENCES = {"labels", "labelstr", "labelsts", "labelsval", "masks"}  # folders beside images*
KNOWN = (*ENDINGS, *DICOM)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where an image is."""

    name: str  # of its results, relative to their folder, without an ending
    path: Path  # the file, or the folder of a DICOM series
    series: tuple[Path, ...] = ()  # the files of the series; empty for a file
    further: tuple[Path, ...] = ()  # files of the other channels, where each has its own

    @property
    def is_picture(self) -> bool:
        """Whether it is a 2-D picture by its name."""
        return not self.series and self.path.name.lower().endswith(PICTURES)

    def digest(self) -> str:
        """Of the content of its files."""
        return content_digest(self.series or (self.path, *self.further), self.name)

    def read(self, channels: int = 1) -> Volume:
        """Read the image as (T, Z, C, H, W) of its own data type.

        `channels` is how many the network takes: only with 3 may a picture have colours. The image
        may have another number, which the caller checks.

        Raises:
            UserError: it cannot be read, has colours where one channel is asked for, channels on
                different grids, or voxels that are not finite or that float32 cannot tell apart.
        """
        if self.series:
            from mambaseg.data.formats.dicom import read_dicom

            image = read_dicom(self.series)
            check_grey_values(self.path, image.image)
        else:
            image = read_channels((self.path, *self.further), 1 if self.further else channels)
        if image.image.shape[2] == 1 < channels == len(image.image):
            image = image.with_times_as_channels()
        for problem in not_finite(image.image, self.path):
            raise problem
        return image


def find_images(place: str, *, outside: Path) -> list[Source]:
    """The images that a file, folder or pattern stands for, sorted by name.

    A folder is all files below it with a known ending, in folders that are links too, and a folder
    that holds DICOM files, whatever their names, is its series. A pattern (`*`, `?`, `[...]`, `**`)
    is what it matches. Of a folder and a pattern, references and what this program wrote are left
    out, which is logged. Nothing in `outside`, the folder of the results, is an input. `UserError`
    where there is nothing, or two images would have one name.
    """
    path = Path(place).expanduser()
    known = ", ".join(KNOWN)
    if path.is_file():
        if not _is_image(path):
            raise UserError(f"input: {path} is no DICOM file and has none of the endings {known}")
        found = [Source(_name(path, path.parent), path)]
    elif path.is_dir():
        found = list(_below(path))
    elif glob.has_magic(str(path)):
        found = list(_matching(path))
    else:
        raise UserError(f"input: there is no file or folder {path}")
    results = outside.resolve()
    inputs = [source for source in found if not _lies_in(results, source.path)]
    images, notes = (inputs, []) if path.is_file() else _without_labels(inputs)
    if len(inputs) < len(found):
        count = len(found) - len(inputs)
        notes.append(
            f"{count} image(s) are in the folder of the results ({outside}): choose another output="
        )
    if not images:
        why = "".join(f"; {note}" for note in notes)
        raise UserError(f"input: {path} holds no image (known endings: {known}){why}")
    if notes:
        log.info("%s. To predict one of them, give that file as input", "; ".join(notes))
    images.sort(key=lambda source: source.name)
    for one, other in itertools.pairwise(images):
        if one.name == other.name:
            raise UserError(
                f"input: {one.path} and {other.path} would both give {one.name}: predict them "
                "into two folders"
            )
    return images


def _lies_in(folder: Path, path: Path) -> bool:
    """Whether a file, or a link to it, is below a folder."""
    return folder in (*path.resolve().parents, *(path.parent.resolve() / path.name).parents)


def _without_labels(sources: list[Source]) -> tuple[list[Source], list[str]]:
    """The images among files, and what was left out as reference or earlier result."""
    names = {source.name for source in sources}
    folders = {folder for name in names for folder in Path(name.lower()).parents}
    with_images = {folder.parent for folder in folders if folder.name.startswith("images")}
    kinds = defaultdict(list)
    for source in sources:
        kinds["" if source.series else _label_kind(source, names, with_images)].append(source)
    images = kinds.pop("", [])
    notes = []
    for kind, some in sorted(kinds.items()):
        few = ", ".join(source.path.name for source in some[:3]) + ", ..." * (len(some) > 3)
        notes.append(printable(f"left out: {len(some)} {kind}{'s' * (len(some) > 1)} ({few})"))
    return images, notes


def _label_kind(source: Source, names: set[str], with_images: set[Path]) -> str:
    """Which labels a file holds by its name, or by what the .json beside it says; none: empty."""
    match = _MARKED.fullmatch(source.name)
    if source.path.name.endswith((PROBABILITIES, OVERLAY, DICOM_SEG, *UNCERTAINTY)):
        return "earlier result"
    try:
        about = read_json(source.path.with_name(without_ending(source.path.name) + ".json"))
        if isinstance(about, dict) and {"labels", "image", "made_by"} <= about.keys():
            return "earlier result"
    except (OSError, ForeignFileError):
        pass
    folders = Path(source.name.lower()).parents
    if (
        _REFERENCE.fullmatch(source.name)
        or (match and {match[1], f"{match[1]}_0000"} & names)
        or any(one.name in _REFERENCES and one.parent in with_images for one in folders)
    ):
        return "reference"
    return ""


def group_channels(sources: Iterable[Source], channels: int) -> list[Source]:
    """Images whose channels are files of their own, named as nnU-Net names them, as one each.

    `scan_0000` and `scan_0001` are `scan` for networks of several channels. For networks of one,
    `scan_0000` is `scan` where there is no `scan_0001`: then the numbers are no channels, and
    neither are they where one is missing, or where pictures are more or fewer than the channels.
    """
    groups: dict[str, list[Source]] = defaultdict(list)
    sources = sorted(sources, key=lambda source: source.name)
    names = {source.name for source in sources}
    for source in sources:
        match = None if source.series else CHANNEL.fullmatch(source.name)
        groups[match[1] if match and match[1] not in names else ""].append(source)
    found = groups.pop("", [])
    for name, files in groups.items():
        numbers = [f"{name}_{number:04d}" for number in range(len(files))]
        volumes = channels > 1 and not files[0].is_picture
        if numbers == [one.name for one in files] and (len(files) in (1, channels) or volumes):
            further = tuple(source.path for source in files[1:])
            found.append(Source(name, files[0].path, (), further))
        else:
            found += files
    return sorted(found, key=lambda source: source.name)


def pictures_apart(sources: Iterable[Source]) -> list[Source]:
    """Pictures that `group_channels` took for channels of one image as the images that they are.

    For networks that were trained on pictures of one file each: to them frames that are numbered
    like channels, and are as many, are no channels.
    """
    found = []
    for source in sources:
        if source.is_picture and source.further:
            paths = source.path, *source.further
            found += [Source(f"{source.name}_{n:04d}", path) for n, path in enumerate(paths)]
        else:
            found.append(source)
    return found


def _matching(pattern: Path) -> Iterator[Source]:
    """Files by their place below the part of the pattern that is plain; folders as series."""
    plain = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts)
    base = Path(*plain)
    rest = Path(*pattern.parts[len(base.parts) :])
    for match in sorted(base.glob(str(rest))):
        if match.name.startswith(".") and not rest.name.startswith("."):
            continue  # as in a shell; macOS leaves `._scan.nii.gz` beside `scan.nii.gz`
        if _is_image(match):
            yield Source(_name(match, base), match)
        elif match.is_dir():
            yield from _series(match, base, sorted(match.iterdir()))


def _below(base: Path) -> Iterator[Source]:
    """Files and series in a folder and those below it; each once, links to folders last."""
    seen, folders = set(), deque([base])
    while folders:
        folder = folders.popleft()
        try:
            if (place := folder.resolve(strict=True)) in seen:
                continue
            seen.add(place)
            entries = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
        except OSError as error:
            raise unlisted(folder, error) from error
        yield from _series(folder, base, entries)
        for entry in entries:
            if entry.is_dir():
                (folders.append if entry.is_symlink() else folders.appendleft)(entry)
            elif entry.name.lower().endswith(ENDINGS):
                yield Source(_name(entry, base), entry)


def _series(folder: Path, base: Path, entries: list[Path]) -> Iterator[Source]:
    """The DICOM series of a folder; a file that lost its mark may be a slice all the same."""
    files = [
        path
        for path in entries
        if not path.name.lower().endswith(ENDINGS)
        and not path.name.startswith(".")
        and not path.is_dir()
    ]
    marked = {path for path in files if _is_dicom(path)}
    kinds = {_kind(path) for path in marked if path.name != "DICOMDIR"}
    files = [path for path in files if path in marked or _kind(path) in kinds]
    if not files:
        return
    from mambaseg.data.formats.dicom import series_in

    # `.` and `..` are no names for a result
    own = folder.name if folder.name.strip(".") else folder.resolve().name
    name = readable(own if folder == base else folder.relative_to(base).as_posix())
    found = series_in(files)
    for number, series in enumerate(found, start=1):
        yield Source(name if len(found) == 1 else f"{name}_{number}", folder, series)


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
        if not path.is_file():  # a pipe would block
            return False
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _name(path: Path, base: Path) -> str:
    return readable((path.parent.relative_to(base) / without_ending(path.name, KNOWN)).as_posix())
