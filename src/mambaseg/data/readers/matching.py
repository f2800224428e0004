"""Which images and labels in folders belong together, by their names alone.

| layout | images and labels |
|---|---|
| two folders | `images/` and `masks/`: files of one name, or with a suffix as below |
| suffix | `a.png` beside `a_mask.png`, `a_mask_1.png` or `a_anno.bmp`; also in folders below |
| folder per image | `a/images/a.png` and all of `a/masks/`; `a/image.nii.gz` and `a/label.nii.gz` |

In the root, or in its `train/`, `val/` and `test/`; also as `images/train/` and `masks/train/`, or
by names that all begin with `train_`, `val_` or `test_`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mambaseg.data.case import Case
from mambaseg.data.formats.files import without_ending
from mambaseg.data.formats.images import CHANNEL
from mambaseg.data.patients import with_patients
from mambaseg.data.readers.reader import Found, Problem
from mambaseg.data.splits import listed
from mambaseg.data.validation import DataError
from mambaseg.data.volume import Volume
from mambaseg.errors import counted
from mambaseg.storage.untrusted import readable

KINDS = {
    **dict.fromkeys(("images", "image", "imgs", "img"), "image"),
    **dict.fromkeys(("volumes", "volume", "scans", "scan"), "image"),
    **dict.fromkeys(("masks", "mask", "labels", "label", "annotations", "gt"), "mask"),
    **dict.fromkeys(("segmentations", "segmentation", "seg"), "mask"),
}
PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SUFFIX = re.compile(
    r"(?P<name>.+?)[_-](?:mask|segmentation|seg|anno|gt|label)s?(?P<number>_\d+)?", re.IGNORECASE
)
_NO_MASK = "Put its mask there, or take the image away (prediction needs no masks)."
_NO_IMAGE = "Put its image there, or take the mask away."
_TWICE = "Keep one of the two files."
PART_PREFIX = re.compile(r"(train|val|test)[A-Z]?_")  # testA_ and testB_ are GlaS's
_UNSEEN = "unseen"
Read = Callable[[Case], Volume]


@dataclass
class _Place:
    """Files of one part and group: in folders for images, in folders for masks, in neither."""

    read: Read
    part: str | None = None
    group: str | None = None
    image: list[Path] = field(default_factory=list)
    mask: list[Path] = field(default_factory=list)
    loose: list[Path] = field(default_factory=list)

    @property
    def files(self) -> list[Path]:
        """All of them."""
        return [*self.image, *self.mask, *self.loose]

    def case(self, name: str, images: Sequence[Path], labels: Sequence[Path]) -> Case:
        """A case under its name after its group and its part, each unless the name begins so.

        A number begins so only as a whole: 10 in the folder 1 does not.
        """
        bare = readable(name)
        for before in (self.group, self.part):
            rest = name[len(before or "") :]
            within = rest[:1].isdigit() and (before or "")[-1:].isdigit()
            if before and (within or not name.lower().startswith(before.lower())):
                name = f"{before}-{name}"
        return Case(
            readable(name),
            readable(name),
            phase=None,
            group=self.group,
            image_path=images[0],
            label_path=labels[0] if labels else None,
            reader=self.read,
            more_images=tuple(images[1:]),
            more_labels=tuple(labels[1:]),
            part=self.part,
            name=bare,
        )


def _unread(case: Case) -> Volume:
    raise AssertionError(f"{case.id} is looked for, not read")


@dataclass(frozen=True)
class Matcher:
    """Finds images with their labels."""

    endings: tuple[str, ...]  # of the files that are looked at
    channels: bool = False  # whether `a_0000` and `a_0001` are channels of one image `a`

    def recognises(self, root: Path) -> bool:
        """Whether images and labels are told apart by the names in a folder.

        Where they lie in folders of any name, most of the root's must hold some: else it is a
        folder of something else, such as of data sets.
        """
        cases = (one for one in self._find(root, _unread) if isinstance(one, Case))
        places = {case.image_path.relative_to(root).parts[:-1] for case in cases}
        if any(not parts or parts[0].lower() in {*KINDS, *PARTS} for parts in places):
            return True
        folders = sum(entry.is_dir() for entry in os.scandir(root) if entry.name[0] != ".")
        return 2 * len({parts[0] for parts in places}) > folders

    def find_cases(self, root: Path, read: Read, patient_pattern: str | None) -> Iterator[Found]:
        """A case of every image, and what is wrong with the rest; see `with_patients`."""
        images: dict[str, Path] = {}
        cases = []
        for one in self._find(root, read):
            if not isinstance(one, Case):
                yield one
            elif one.label_path is None:
                yield DataError("has no mask", one.image_path, _NO_MASK)
            elif images.setdefault(one.id, one.image_path) != one.image_path:
                problem = f"would be {one.id}, as {images[one.id]} is"
                yield DataError(problem, one.image_path, "Rename one of the two.")
            else:
                cases.append(one)
        yield from with_patients(cases, patient_pattern)

    def _find(self, root: Path, read: Read) -> Iterator[Found]:
        """Cases, and what is wrong with the rest; an image may lack its label."""
        places: dict[tuple[str | None, str | None], _Place] = {}
        unseen = []  # files in folders of which no layout has some
        for path, kind, part, group in self._walk(root):
            if kind == _UNSEEN:
                unseen.append(path)
                continue
            place = places.setdefault((part, group), _Place(read, part, group))
            getattr(place, kind or "loose").append(path)
        found = list(self._in_places(root, read, places))
        yield from found
        if not any(isinstance(one, Case) for one in found):
            return
        known = {path for one in found for path in _files_of(one)}
        walked = places.values()
        with_cases = {one.part for one in walked if one.group and not known.isdisjoint(one.files)}
        for one in walked:
            if one.group and known.isdisjoint(one.files):
                yield self._left_out(root, one, alone=one.part not in with_cases)
            elif one.part is None or not known.isdisjoint(one.files):
                for files in (one.image, one.mask, one.loose):
                    unseen += files if known.isdisjoint(files) else []
        if unseen:
            yield _unused(root, unseen)

    def _left_out(self, root: Path, place: _Place, *, alone: bool) -> Found:
        """What is wrong with a folder without a case, where others are cases unless `alone`."""
        group, loose = str(place.group).lower(), place.loose
        masks = place.mask + [p for p in loose if self._kind(p) == "mask" or self._base(p)]
        named = {path for path in loose if path.name.lower().startswith(group)}
        images = [*place.image, *(p for p in loose if self._kind(p) == "image" or p in named)]
        images = [path for path in images if path not in masks]
        if not alone and images and not masks:
            return DataError("has no mask", images[0], _NO_MASK)
        if not alone and masks and not images:
            return DataError("has no image", masks[0], _NO_IMAGE)
        if masks and len(images) == 2 and len({*map(self._stem, images)}) == 1:
            return DataError(f"there is {images[0].name} too", images[1], _TWICE)
        return _unused(root, place.files)

    def _in_places(
        self, root: Path, read: Read, places: Mapping[tuple[str | None, str | None], _Place]
    ) -> Iterator[Found]:
        """Cases of all parts, or of the root where there are none or it has cases of its own."""
        parts = [part for part in ("train", "val", "test") if part in {its for its, _ in places}]
        top = places.get((None, None))
        beside = parts if top and top.image and top.mask else []
        for other in beside:
            cases = self._in_place(places.get((other, None), _Place(read, other)))
            if count := sum(isinstance(one, Case) and one.label_path is not None for one in cases):
                problem = f"{counted(count, 'image')} with masks, not used: others lie in no part"
                remedy = "Put the others into train/, or take them away: then the parts are used."
                yield Problem("warning", other, problem, remedy)
        for part in parts if parts and not beside else [None]:
            place = places.get((part, None), _Place(read, part))
            groups = [one for (its, group), one in places.items() if its == part and group]
            found = list(self._in_place(place))
            found = found or [case for one in groups for case in self._in_place(one)]
            yield from found
            if place.mask and not found:
                remedy = "Put the images into images/ beside it."
                yield DataError("holds masks without images", place.mask[0].parent, remedy)
            elif part and not found:
                problem = f"{root.name}/{part} holds no images with masks: it is not used"
                yield Problem("warning", part, problem, "Prediction needs no masks.")

    def _walk(
        self,
        folder: Path,
        kind: str | None = None,
        part: str | None = None,
        group: str | None = None,
    ) -> Iterator[tuple[Path, str | None, str | None, str | None]]:
        """Files with their kind, part and group by the folders that they are in."""
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries)
        for name, is_dir in found:
            path, lower = folder / name, name.lower()
            if name.startswith("."):
                continue
            if not is_dir:
                if lower.endswith(self.endings):
                    yield path, kind, part, group
            elif lower in PARTS and not (part or group):
                yield from self._walk(path, kind, PARTS[lower])
            elif lower in KINDS and not kind:
                yield from self._walk(path, KINDS[lower], part, group)
            elif not (kind or group):
                yield from self._walk(path, None, part, name)
            else:
                with contextlib.suppress(OSError):  # it is not used
                    names = sorted(path.iterdir())
                    yield from (
                        (file, _UNSEEN, part, group)
                        for file in names
                        if file.name.lower().endswith(self.endings) and file.name[0] != "."
                    )

    def _in_place(self, place: _Place) -> Iterator[Found]:
        """Cases by whichever layout a place has; nothing where it has none."""
        stems = {self._stem(path) for path in place.loose}
        masks = {path for path in place.loose if self._base(path) in stems}
        if masks and not (place.image and place.mask):
            images = [path for path in place.loose if path not in masks]
            by_name = not place.part and all(PART_PREFIX.match(path.name) for path in images)
            for one in self._matched(place, images, masks):
                if by_name and isinstance(one, Case):
                    part = re.split("[A-Z_]", one.image_path.name)[0]
                    yield replace(one, part=part, name=PART_PREFIX.sub("", one.name))
                else:
                    yield one
        elif place.group:
            images = [*place.image, *(p for p in place.loose if self._kind(p) == "image")]
            labels = [*place.mask, *(p for p in place.loose if self._kind(p) == "mask")]
            if len(images) == 1 and labels:  # else it is a data set of its own
                name = self._stem(images[0])
                name = place.group if name.lower() in KINDS else name
                alone = replace(place, group=None)
                yield alone.case(name, images, self._sorted(labels))
        elif place.image and place.mask:
            yield from self._matched(place, place.image, place.mask)

    def _matched(
        self, place: _Place, images: Iterable[Path], masks: Iterable[Path]
    ) -> Iterator[Found]:
        """Cases by name: the same, or with a suffix; numbered masks of one image are joined."""
        named = {name for path in masks for name in (self._stem(path), self._base(path))}
        files: dict[str, list[Path]] = {}  # name -> image and further channels
        for path in self._sorted(images):
            name = self._stem(path)
            match = CHANNEL.fullmatch(name) if self.channels and name not in named else None
            if match and match[1] in named:
                files.setdefault(match[1], []).append(path)
            elif files.setdefault(name, [path]) != [path]:
                problem = f"there is {files[name][0].name} too"
                yield DataError(problem, path, _TWICE)
        for name, channels in files.items():
            numbers = [f"{name}_{number:04d}" for number in range(len(channels))]
            if self._stem(channels[0]) != name and [*map(self._stem, channels)] != numbers:
                problem = f"has the channels {', '.join(path.name for path in channels)}"
                remedy = "Number them 0000, 0001, ... without a gap: get the file, or rename them."
                yield DataError(problem, channels[0].with_name(name), remedy)
        labels: dict[str, list[Path]] = defaultdict(list)
        unused = []
        for path in self._sorted(masks):
            stem = self._stem(path)
            match = None if stem in files else SUFFIX.fullmatch(stem)
            name = match["name"] if match else stem
            if name not in files:
                unused.append(readable(path.name))
            elif labels[name] and not (match and match["number"]):
                problem = f"there is another mask of {name}, {labels[name][0].name}"
                yield DataError(
                    problem, path, "Keep one; masks to be joined are numbered (_mask_1)."
                )
            else:
                labels[name].append(path)
        if unused:
            problem = f"{counted(len(unused), 'mask')} without an image, not used"
            yield Problem("warning", listed(unused), problem, "Take them away, or add the images.")
        for name, found in files.items():
            yield place.case(name, found, labels[name])

    def _sorted(self, paths: Iterable[Path]) -> list[Path]:
        """With `a_mask` before `a_mask_1`."""
        return sorted(paths, key=lambda path: (self._stem(path), path.name))

    def _stem(self, path: Path) -> str:
        return without_ending(path.name, self.endings)

    def _kind(self, path: Path) -> str | None:
        """What a file such as `image.png` is called after."""
        return KINDS.get(self._stem(path).lower())

    def _base(self, path: Path) -> str | None:
        """The image's name in that of a mask."""
        match = SUFFIX.fullmatch(self._stem(path))
        return match["name"] if match else None


def _files_of(one: Found) -> list[Path]:
    """The files of a case, or the one that an error names."""
    if isinstance(one, Case):
        label = [one.label_path] if one.label_path else []
        return [one.image_path, *one.more_images, *label, *one.more_labels]
    return [one.path] if isinstance(one, DataError) and one.path else []


def _unused(root: Path, files: Sequence[Path]) -> Problem:
    named = listed([readable(path.relative_to(root).as_posix()) for path in files])
    problem = f"{counted(len(files), 'file')} beside the cases, not used"
    return Problem("warning", named, problem, "Put them where the others are, or take them away.")
