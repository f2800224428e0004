"""2-D images with masks in folders; which belong together is found by `matching`."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mambaseg.data.case import Case
from mambaseg.data.formats.files import PICTURES
from mambaseg.data.formats.volume import Volume
from mambaseg.data.patients import parts_of, with_patients
from mambaseg.data.problems import Problem, cases_or_first_problem
from mambaseg.data.readers.masks import NotBinaryError, read_pair
from mambaseg.data.readers.matching import Matcher, Pair
from mambaseg.data.validation import DataError
from mambaseg.errors import UserError

LOOKED_AT = 20  # masks that say what all hold
KINDS = ("auto", "binary", "instances", "classes")
EXPECTED = (
    "Expected are images/ and masks/ with files of the same names (docs/own-data.md names the "
    "other layouts), in the folder itself or in its train/, val/ and test/; files end in "
    f"{', '.join(PICTURES)}."
)
log = logging.getLogger(__name__)


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

    def make(pair: Pair) -> Case:
        return Case(
            pair.id,
            patient=pair.id,
            phase=None,
            group=pair.group,
            image_path=pair.image,
            label_path=pair.labels[0],
            reader=reader or _reader("binary"),
            part=pair.part,
            more_labels=pair.labels[1:],
            patient_assumed=True,
        )

    ordered, problems, notes = _matcher().cases(root, make)
    for note in notes:
        log.warning(note)
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
    """Whether images and masks are told apart by the names in a folder; see `Matcher`."""
    return _matcher().recognises(root)


def _matcher() -> Matcher:
    return Matcher(PICTURES, EXPECTED)


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
