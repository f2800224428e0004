"""Which images and labels in folders belong together, by their names alone.

| layout | images and labels |
|---|---|
| two folders | `images/` and `masks/`: files of one name, or with a suffix as below |
| suffix | `a.png` beside `a_mask.png`, `a_mask_1.png` or `a_anno.bmp`; also in folders below |
| folder per image | `a/images/a.png` and all of `a/masks/`; `a/image.nii.gz` and `a/label.nii.gz` |

In the root, or in its `train/`, `val/` and `test/`; also as `images/train/` and `masks/train/`, or
by names that all begin with `train_`, `val_` or `test_`. Every folder is listed once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from mambaseg.data.case import Case
from mambaseg.data.formats.files import without_ending
from mambaseg.data.formats.images import CHANNEL
from mambaseg.data.problems import counted
from mambaseg.data.validation import DataError, unlisted
from mambaseg.storage.untrusted import readable

IMAGES = ("images", "image", "imgs", "img", "volumes", "volume", "scans", "scan")
MASKS = (
    "masks", "mask", "labels", "label", "annotations", "gt", "segmentations", "segmentation", "seg",
)  # fmt: skip
PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
SUFFIX = re.compile(
    r"(?P<name>.+?)[_-](?:mask|segmentation|seg|anno|gt|label)s?(?P<number>_\d+)?", re.IGNORECASE
)
PART_PREFIX = re.compile(r"(train|val|test)[A-Z]?_")  # testA_ and testB_ are GlaS's


@dataclass(frozen=True)
class Pair:
    """An image and the files of its label.

    Attributes:
        name: of the image, unique in its folder.
        image: its file, or that of its first channel.
        labels: files of its label, none where there is none.
        group: folder that it lies in, where the folders have any names.
        part: `train`, `val`, `test` or None.
        channels: files of the further channels.
    """

    name: str
    image: Path
    labels: tuple[Path, ...]
    group: str | None = None
    part: str | None = None
    channels: tuple[Path, ...] = ()

    @property
    def id(self) -> str:
        """Its name after its group and its part, each unless the name begins with it."""
        id_ = self.name
        for before in (self.group, self.part):
            if before and not id_.lower().startswith(before.lower()):
                id_ = f"{before}-{id_}"
        return readable(id_)


Found = Pair | DataError | str  # the last is a sentence for the log


class Matcher:
    """Finds the pairs of a folder.

    Args:
        endings: of the files that are looked at.
        expected: what such a folder should look like, for messages.
        channels: whether files named `a_0000` and `a_0001` are channels of one image.
    """

    def __init__(self, endings: tuple[str, ...], expected: str, *, channels: bool = False) -> None:
        self.endings, self.expected, self.channels = endings, expected, channels
        self._listed: dict[Path, tuple[list[Path], list[Path]]] = {}

    def recognises(self, root: Path) -> bool:
        """Whether images and labels are told apart by the names in a folder.

        Where they lie in folders of any name, most of the root's must hold some: else it is a
        folder of something else, such as of data sets.
        """
        pairs = (one for one in self._all(root) if isinstance(one, Pair))
        places = {pair.image.relative_to(root).parts for pair in pairs}
        known = {*IMAGES, *chain(*PARTS.values())}
        if any(len(parts) == 1 or parts[0].lower() in known for parts in places):
            return True
        return 2 * len({parts[0] for parts in places}) > len(self._folders(root))

    def cases(
        self, root: Path, make: Callable[[Pair], Case]
    ) -> tuple[list[Case], list[DataError], list[str]]:
        """Cases sorted by id, what is wrong with the rest, and sentences for the log.

        Raises:
            UserError: `root` is no folder, cannot be listed, or holds no images with labels.
        """
        if not root.is_dir():
            problem = "is not a folder" if root.exists() else "this folder does not exist"
            raise DataError(
                problem, root, f"data.root names the folder of the images. {self.expected}"
            )
        try:
            found = list(self._all(root))
        except OSError as error:
            raise unlisted(Path(error.filename or root), error) from error
        problems = [one for one in found if isinstance(one, DataError)]
        pairs = [one for one in found if isinstance(one, Pair)]
        if not (pairs or problems):
            inside = next((child for child in self._folders(root) if self.recognises(child)), None)
            hint = f"Did you mean {inside}? " if inside else ""
            raise DataError("no images with masks here", root, hint + self.expected)
        cases: dict[str, Case] = {}
        for pair in pairs:
            if not pair.labels:
                remedy = "Put its mask there, or take the image away (predict.py needs no masks)."
                problems.append(DataError("has no mask", pair.image, remedy))
            elif pair.id in cases:
                problem = f"would be {pair.id}, as {cases[pair.id].image_path} is"
                problems.append(DataError(problem, pair.image, "Rename one of the two."))
            else:
                try:
                    cases[pair.id] = make(pair)
                except DataError as error:
                    problems.append(error)
        notes = [one for one in found if isinstance(one, str)]
        return sorted(cases.values(), key=lambda case: case.id), problems, notes

    def _all(self, root: Path) -> Iterator[Found]:
        """Pairs of all parts, or of the root where there are none."""
        parts = {part: self._child(root, names) for part, names in PARTS.items()}
        images, masks = self._child(root, IMAGES), self._child(root, MASKS)
        if any(parts.values()) and not (images and masks):
            for part, folder in parts.items():
                if folder is not None:
                    yield from self._of_part(folder, part)
        elif images and masks and any(self._child(images, names) for names in PARTS.values()):
            for part, names in PARTS.items():
                inside = self._child(images, names), self._child(masks, names)
                if inside[0] and inside[1]:
                    yield from self._two_folders(inside[0], inside[1], part=part)
                elif inside[0]:
                    yield _unused(inside[0])
        else:
            yield from self._in_folder(root)

    def _of_part(self, folder: Path, part: str) -> Iterator[Found]:
        found = list(self._in_folder(folder, part))
        if found:
            yield from found
        else:
            yield _unused(folder)

    def _in_folder(
        self, folder: Path, part: str | None = None, group: str | None = None
    ) -> Iterator[Found]:
        """Pairs of one folder by whichever layout it has; nothing where it has none."""
        images, masks = self._child(folder, IMAGES), self._child(folder, MASKS)
        if images and masks:
            yield from self._two_folders(images, masks, part=part, group=group)
            return
        files = self._files(folder)
        stems = {self._stem(path) for path in files}
        masks_here = {
            path for path in files
            if (match := SUFFIX.fullmatch(self._stem(path))) and match["name"] in stems
        }  # fmt: skip
        if masks_here:
            named = [PART_PREFIX.match(path.name) for path in files]
            by_name = part is None and all(named)
            rest = [path for path in files if path not in masks_here]
            labels = [path for path in files if path in masks_here]
            for pair in self._matched(rest, labels, part=part, group=group):
                if by_name and isinstance(pair, Pair):
                    yield replace(pair, part=_part_of(pair.name))
                else:
                    yield pair
        elif group is None:
            for child in self._folders(folder):
                yield from self._in_folder(child, part, child.name)
        else:
            yield from self._image_and_label(files, group, part)

    def _image_and_label(
        self, files: Sequence[Path], group: str, part: str | None
    ) -> Iterator[Found]:
        """The only image of a folder, `image.nii.gz` beside `label.nii.gz`, named as the folder."""
        images = [path for path in files if self._stem(path).lower() in IMAGES]
        labels = tuple(path for path in files if self._stem(path).lower() in MASKS)
        if len(images) == 1 and labels:
            yield Pair(group, images[0], labels, part=part)

    def _two_folders(
        self, images: Path, masks: Path, *, part: str | None, group: str | None = None
    ) -> Iterator[Found]:
        """`images/` and `masks/`; where they are of a group, it is one image's, with its masks."""
        files, of_masks = self._files(images), self._files(masks)
        if not files:
            yield DataError("holds no images", images, self.expected)
        elif group is None:
            yield from self._matched(files, of_masks, part=part, group=group)
        elif len(files) == 1:  # else it is a data set of its own
            yield Pair(self._stem(files[0]), files[0], tuple(of_masks), part=part)

    def _matched(
        self, images: Sequence[Path], masks: Sequence[Path], *, part: str | None, group: str | None
    ) -> Iterator[Found]:
        """Pairs by name: the same, or with a suffix; numbered masks of one image are joined."""
        by_name, channels, problems = self._named(images, {self._stem(path) for path in masks})
        yield from problems
        belonging: dict[str, list[Path]] = {name: [] for name in by_name}
        unused = []
        for path in masks:
            stem = self._stem(path)
            match = SUFFIX.fullmatch(stem)
            name = stem if stem in by_name else match["name"] if match else ""
            if name not in by_name:
                unused.append(path)
            elif belonging[name] and not (match and match["number"] and name != stem):
                problem = f"there is another mask of {name}, {belonging[name][0].name}"
                remedy = "Keep one; masks to be joined are numbered (_mask_1)."
                yield DataError(problem, path, remedy)
            else:
                belonging[name].append(path)
        if unused:
            count = counted(len(unused), "mask")
            yield f"{unused[0].parent}: {count} without an image, not used: {unused[0].name} first"
        for name, image in by_name.items():
            further = tuple(channels.get(name, ()))
            yield Pair(name, image, tuple(belonging[name]), group, part, further)

    def _named(
        self, images: Sequence[Path], masks: set[str]
    ) -> tuple[dict[str, Path], dict[str, list[Path]], list[DataError]]:
        """Images by name, their further channels, and files that are two for one name.

        `a_0000` and `a_0001` are the channels of `a` where the mask is called `a`, as nnU-Net names
        them.
        """
        names = masks | {match["name"] for mask in masks if (match := SUFFIX.fullmatch(mask))}
        by_name: dict[str, Path] = {}
        channels: dict[str, list[Path]] = {}
        problems = []
        for path in images:
            stem = self._stem(path)
            match = None if stem in names else CHANNEL.fullmatch(stem)
            if match and match[1] in names and self.channels:
                if match[1] in by_name:
                    channels.setdefault(match[1], []).append(path)
                by_name.setdefault(match[1], path)
                continue
            if stem in by_name:
                problem = f"there is {by_name[stem].name} too"
                problems.append(DataError(problem, path, "Keep one of the two files."))
            by_name.setdefault(stem, path)
        return by_name, channels, problems

    # ---- folders, each listed once

    def _files(self, folder: Path) -> list[Path]:
        """What has one of the endings, sorted so that `a_mask` comes before `a_mask_1`."""
        files, _ = self._listing(folder)
        return sorted(files, key=lambda path: (self._stem(path), path.name))

    def _folders(self, folder: Path) -> list[Path]:
        return self._listing(folder)[1]

    def _child(self, folder: Path, names: Sequence[str]) -> Path | None:
        """The first subfolder of one of these names, in any case."""
        folders = {path.name.lower(): path for path in self._folders(folder)}
        return next((folders[name] for name in names if name in folders), None)

    def _listing(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """Files with one of the endings, and folders; hidden ones left out."""
        if folder not in self._listed:
            with os.scandir(folder) as entries:
                found = sorted((entry.name, entry.is_dir()) for entry in entries)
            shown = [(folder / name, is_dir) for name, is_dir in found if not name.startswith(".")]
            files = [path for path, _ in shown if path.name.lower().endswith(self.endings)]
            self._listed[folder] = files, [path for path, is_dir in shown if is_dir]
        return self._listed[folder]

    def _stem(self, path: Path) -> str:
        return without_ending(path.name, self.endings)


def _part_of(name: str) -> str | None:
    match = PART_PREFIX.match(name)
    return match[1] if match else None


def _unused(folder: Path) -> str:
    return f"{folder} holds no images with masks: it is not used (predict.py needs no masks)"
