"""2-D images with masks in folders; which belong together is found by `matching`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mambaseg.data.case import Case
from mambaseg.data.formats.files import PICTURES
from mambaseg.data.readers.masks import NotBinaryError, read_pair
from mambaseg.data.readers.matching import Matcher
from mambaseg.data.readers.reader import Found, Problem, reader
from mambaseg.data.validation import DataError
from mambaseg.errors import UserError

MATCHER = Matcher(PICTURES)
LOOKED_AT = 20  # masks that say what all hold
KINDS = ("auto", "binary", "instances", "classes")


@reader(
    example="images/ and masks/ with pictures of the same names, or a.png beside a_mask.png",
    remedy="Also in train/, val/ and test/; docs/own-data.md names the other layouts. Files end in "
    f"{', '.join(PICTURES)}.",
    recognises=MATCHER.recognises,
    any_names=True,
    class_names=lambda root: None,
)
def find_cases(
    root: Path,
    *,
    masks: str = "auto",
    num_classes: int | None = None,
    label_map: Mapping[int, int] | None = None,
    channels: int = 3,
    longest_side: int | None = None,
    patient_pattern: str | None = None,
) -> Iterator[Found]:
    """All images with their masks.

    Args:
        root: The folder.
        masks: What the numbers in a mask are, see `read_pair`; `auto` is `binary` for two classes
            without a label map, else `classes`, and where nobody knows the classes what some masks
            look like.
        num_classes: K, None where nobody knows.
        label_map: `data.label_map`, which maps the numbers of `classes`.
        channels: 1 or 3, of every image.
        longest_side: Pixels; larger images are reduced to it when they are read.
        patient_pattern: See `with_patient`.

    Raises:
        UserError: An unknown kind of masks.
    """
    if masks not in KINDS:
        raise UserError(f"data.masks={masks}: choose one of {', '.join(KINDS)}")
    unknown = masks == "auto" and num_classes is None
    if masks == "auto":
        binary = (num_classes or 2) == 2 and label_map is None
        masks = "binary" if binary else "classes"
    read = functools.partial(read_pair, channels=channels, longest_side=longest_side)

    found = list(MATCHER.find_cases(root, functools.partial(read, masks=masks), patient_pattern))
    cases = [one for one in found if isinstance(one, Case)]
    error = _not_binary(cases[:: max(1, len(cases) // LOOKED_AT)]) if unknown else None
    if error:
        masks = "instances" if any(case.more_labels for case in cases) else "classes"
        read = functools.partial(read, masks=masks)
        found = [replace(one, reader=read) if isinstance(one, Case) else one for one in found]
        yield Problem("info", "masks", error.problem, error.remedy)
    yield from found


def _not_binary(cases: Sequence[Case]) -> NotBinaryError | None:
    """Why the masks of some cases, read as black and white, are not; the first reason."""
    for case in cases:
        try:
            case.load()
        except NotBinaryError as error:
            return error
        except DataError:  # which the case is reported with
            continue
    return None
