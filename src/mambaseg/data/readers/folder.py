"""2-D images with masks in folders: which belong together.

| layout | images and masks |
|---|---|
| two folders | `images/` and `masks/`: files of one name, or with a suffix as below (Kvasir-SEG) |
| suffix | `a.png` beside `a_mask.png`, `a_mask_1.png` or `a_anno.bmp` (GlaS); |
|  | also in a folder per class (BUSI) |
| folder per image | `a/images/a.png` and all of `a/masks/` (2018 Data Science Bowl) |

In the root, or in its `train/`, `val/` and `test/`; also as `images/train/` and `masks/train/`, or
by names that all begin with `train_`, `val_` or `test_`. No image is opened to find this out.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from mambaseg.data.case import Case, DataError, Volume
from mambaseg.data.files import unlisted
from mambaseg.data.formats.images import PICTURES
from mambaseg.data.patients import parts_of, with_patients
from mambaseg.data.problems import Problem, cases_or_first_problem, counted
from mambaseg.data.readers.masks import NotBinaryError, read_pair
from mambaseg.errors import UserError

IMAGES = ("images", "image", "imgs", "img")
MASKS = ("masks", "mask", "labels", "label", "annotations", "gt")
PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
SUFFIX = re.compile(
    r"(?P<name>.+?)_(?:mask|segmentation|seg|anno|gt|label)(?P<number>_\d+)?", re.IGNORECASE
)
PART_PREFIX = re.compile(r"(train|val|test)[A-Z]?_")  # testA_ and testB_ are GlaS's
LOOKED_AT = 20  # masks that say what all hold
KINDS = ("auto", "binary", "instances", "classes")
EXPECTED = (
    "Expected are images/ and masks/ with files of the same names (docs/own-data.md names the "
    "other layouts), in the folder itself or in its train/, val/ and test/; files end in "
    f"{', '.join(PICTURES)}."
)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pair:
    """An image and the files of its mask; more than one are joined.

    Attributes:
        name: of the image, unique in its folder.
        image: its file.
        masks: files of its mask, none where there is none.
        group: class folder that it lies in.
        part: `train`, `val`, `test` or None.
    """

    name: str
    image: Path
    masks: tuple[Path, ...]
    group: str | None = None
    part: str | None = None

    @property
    def id(self) -> str:
        """Its name after its group and its part, each unless the name begins with it."""
        id_ = self.name
        for before in (self.group, self.part):
            if before and not id_.lower().startswith(before.lower()):
                id_ = f"{before}-{id_}"
        return id_


_Found = _Pair | DataError | str  # the last is a sentence for the log


def find_cases(
    root: Path | str,
    *,
    masks: str = "auto",
    num_classes: int = 2,
    label_map: Mapping[int, int] | None = None,
    channels: int = 3,
    longest_side: int | None = None,
    patient_pattern: str | None = None,
) -> list[Case]:
    """All images with their masks below `root`, sorted by id.

    Args:
        root: the folder.
        masks: what the numbers in a mask are, see `read_pair`; `auto` is `binary` for two classes
            without a label map, else `classes`.
        num_classes: K.
        label_map: `data.label_map`, which maps the numbers of `classes`.
        channels: 1 or 3, of every image.
        longest_side: pixels; larger images are reduced to it when they are read.
        patient_pattern: see `name_patients`; None takes every image for a patient of its own.

    Raises:
        UserError: no such folder or layout, an image without mask, two files for one thing, a
            patient in two parts, an unknown option.
    """
    if masks not in KINDS:
        raise UserError(f"data.masks={masks}: choose one of {', '.join(KINDS)}")
    if masks == "auto":
        masks = "binary" if num_classes == 2 and label_map is None else "classes"
    reader = functools.partial(read_pair, masks=masks, channels=channels, longest_side=longest_side)
    root = Path(root).expanduser()
    cases = cases_or_first_problem(*survey(root, reader), root)
    cases = with_patients(cases, patient_pattern)
    parts_of(cases)
    return cases


def survey(
    root: Path, reader: functools.partial[Volume] | None = None
) -> tuple[list[Case], list[DataError]]:
    """Like `find_cases`, but goes on after a problem and returns them all.

    Args:
        root: the folder.
        reader: `read_pair` with its options; None, for data-check, for those that fit the masks.

    Raises:
        UserError: `root` is no folder, cannot be listed, or holds no images with masks.
    """
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "this folder does not exist"
        raise DataError(problem, root, f"data.root names the folder of the images. {EXPECTED}")
    try:
        found = list(_all_pairs(root))
    except OSError as error:
        raise unlisted(Path(error.filename or root), error) from error
    pairs = [one for one in found if isinstance(one, _Pair)]
    problems = [one for one in found if isinstance(one, DataError)]
    for note in (one for one in found if isinstance(one, str)):
        log.warning(note)
    if not (pairs or problems):
        inside = next((child for child in _subfolders(root) if recognises(child)), None)
        hint = f"Did you mean {inside}? " if inside else ""
        raise DataError("no images with masks here", root, hint + EXPECTED)
    cases: dict[str, Case] = {}
    for pair in pairs:
        if not pair.masks:
            remedy = "Put its mask there, or take the image away (predict.py needs no masks)."
            problems.append(DataError("has no mask", pair.image, remedy))
        elif pair.id in cases:
            problem = f"would be {pair.id}, as {cases[pair.id].image_path} is"
            problems.append(DataError(problem, pair.image, "Rename one of the two."))
        else:
            cases[pair.id] = Case(
                pair.id,
                patient=pair.id,
                phase=None,
                group=pair.group,
                image_path=pair.image,
                label_path=pair.masks[0],
                reader=reader or _reader("binary"),
                part=pair.part,
                more_labels=pair.masks[1:],
                patient_assumed=True,
            )
    ordered = sorted(cases.values(), key=lambda case: case.id)
    if reader is None:
        fitting = _reader(_kind_of(ordered))
        ordered = [replace(case, reader=fitting) for case in ordered]
    return ordered, problems


def _reader(masks: str) -> functools.partial[Volume]:
    return functools.partial(read_pair, masks=masks, channels=3, longest_side=None)


def _kind_of(cases: Sequence[Case]) -> str:
    """What the masks are of cases that are read as binary, by a few of them."""
    for case in _some(cases):
        try:
            case.load()
        except NotBinaryError:
            return "instances" if any(one.more_labels for one in cases) else "classes"
        except DataError:  # which the case is reported with
            continue
    return "binary"


def _some(cases: Sequence[Case]) -> Sequence[Case]:
    return cases[:: max(1, len(cases) // LOOKED_AT)]


def recognises(root: Path) -> bool:
    """Whether images and masks are told apart by the names in a folder.

    Where they lie in folders of any name, most of the root's must hold some: else it is a folder of
    something else, such as of data sets.
    """
    pairs = (one for one in _all_pairs(root) if isinstance(one, _Pair))
    places = {pair.image.relative_to(root).parts[0] for pair in pairs}
    known = {*IMAGES, *chain(*PARTS.values())}
    if any(place.lower() in known or (root / place).is_file() for place in places):
        return True
    return 2 * len(places) > len(_subfolders(root))


def numbers_in_masks(root: Path, cases: Sequence[Case]) -> Iterator[Problem]:
    """What training has to be told of masks that are not black and white; looks at a few."""
    largest = 0
    for case in _some(cases):
        with contextlib.suppress(DataError):  # which the case itself is reported with
            label = case.load().label
            largest = max(largest, 0 if label is None else int(label.max()))
    if largest > 1:
        yield Problem(
            "info",
            "masks",
            f"they hold numbers up to {largest}",
            "Of classes: name these with data.class_names and data.num_classes. Of single objects: "
            "data.masks=instances makes all of them foreground.",
        )


# ---- which files belong together


def _all_pairs(root: Path) -> Iterator[_Found]:
    """Pairs of all parts, or of the root where there are none."""
    parts = {part: _child(root, names) for part, names in PARTS.items()}
    images, masks = _child(root, IMAGES), _child(root, MASKS)
    if any(parts.values()) and not (images and masks):
        for part, folder in parts.items():
            if folder is not None:
                yield from _of_part(folder, part)
    elif images and masks and any(_child(images, names) for names in PARTS.values()):
        for part, names in PARTS.items():
            inside = _child(images, names), _child(masks, names)
            if inside[0] and inside[1]:
                yield from _two_folders(inside[0], inside[1], part=part)
            elif inside[0]:
                yield _unused(inside[0])
    else:
        yield from _in_folder(root)


def _of_part(folder: Path, part: str) -> Iterator[_Found]:
    found = list(_in_folder(folder, part))
    if found:
        yield from found
    else:
        yield _unused(folder)


def _in_folder(folder: Path, part: str | None = None, group: str | None = None) -> Iterator[_Found]:
    """Pairs of one folder by whichever layout it has; nothing where it has none."""
    images, masks = _child(folder, IMAGES), _child(folder, MASKS)
    if images and masks:
        yield from _two_folders(images, masks, part=part, group=group)
        return
    files = _pictures(folder)
    masks_here = [path for path in files if _is_mask_of(path, files)]
    if masks_here:
        named = [PART_PREFIX.match(path.name) for path in files]
        by_name = part is None and all(named)
        rest = [path for path in files if path not in masks_here]
        for pair in _matched(rest, masks_here, part=part, group=group):
            if by_name and isinstance(pair, _Pair):
                yield _Pair(pair.name, pair.image, pair.masks, group, _part_of(pair.name))
            else:
                yield pair
    elif group is None:
        for child in _subfolders(folder):
            yield from _in_folder(child, part, child.name)


def _two_folders(
    images: Path, masks: Path, *, part: str | None, group: str | None = None
) -> Iterator[_Found]:
    """`images/` and `masks/`; where they are of a group, it is one image's, with all its masks."""
    files, of_masks = _pictures(images), _pictures(masks)
    if not files:
        yield DataError("holds no images", images, EXPECTED)
    elif group is None:
        yield from _matched(files, of_masks, part=part, group=group)
    elif len(files) == 1:  # else it is a data set of its own
        yield _Pair(files[0].stem, files[0], tuple(of_masks), part=part)


def _matched(
    images: Sequence[Path], masks: Sequence[Path], *, part: str | None, group: str | None
) -> Iterator[_Found]:
    """Pairs by name: the same, or with a suffix; numbered masks of one image are joined."""
    by_name: dict[str, Path] = {}
    for path in images:
        if path.stem in by_name:
            problem = f"there is {by_name[path.stem].name} too"
            yield DataError(problem, path, "Keep one of the two files.")
        by_name.setdefault(path.stem, path)
    belonging: dict[str, list[Path]] = {name: [] for name in by_name}
    unused = []
    for path in masks:
        match = SUFFIX.fullmatch(path.stem)
        name = path.stem if path.stem in by_name else match["name"] if match else ""
        if name not in by_name:
            unused.append(path)
        elif belonging[name] and not (match and match["number"] and name != path.stem):
            problem = f"there is another mask of {name}, {belonging[name][0].name}"
            yield DataError(problem, path, "Keep one; masks to be joined are numbered (_mask_1).")
        else:
            belonging[name].append(path)
    if unused:
        count = counted(len(unused), "mask")
        yield f"{unused[0].parent}: {count} without an image, not used: {unused[0].name} first"
    for name, image in by_name.items():
        yield _Pair(name, image, tuple(belonging[name]), group, part)


def _is_mask_of(path: Path, files: Sequence[Path]) -> bool:
    """Whether a file is named as the mask of one beside it."""
    match = SUFFIX.fullmatch(path.stem)
    return match is not None and any(other.stem == match["name"] for other in files)


def _part_of(name: str) -> str | None:
    match = PART_PREFIX.match(name)
    return match[1] if match else None


def _pictures(folder: Path) -> list[Path]:
    """What has a picture's ending, sorted so that `a_mask` comes before `a_mask_1`."""
    files = [
        path for path in folder.iterdir()
        if path.name.lower().endswith(PICTURES) and not path.name.startswith(".")
    ]  # fmt: skip
    return sorted(files, key=lambda path: (path.stem, path.name))


def _child(folder: Path, names: Sequence[str]) -> Path | None:
    """The first subfolder of one of these names, in any case."""
    folders = {path.name.lower(): path for path in _subfolders(folder)}
    return next((folders[name] for name in names if name in folders), None)


def _subfolders(folder: Path) -> list[Path]:
    entries = sorted(folder.iterdir())
    return [path for path in entries if path.is_dir() and not path.name.startswith(".")]


def _unused(folder: Path) -> str:
    return f"{folder} holds no images with masks: it is not used (predict.py needs no masks)"
