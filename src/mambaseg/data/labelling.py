"""Whose labels a training reads, and which kind of labels these are."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Literal

from mambaseg.data.case import Case
from mambaseg.data.splits import PUBLISHED, Split, listed
from mambaseg.data.validation import DataError
from mambaseg.errors import UserError

Labels = Literal["dense", "scribble"]


def labelled_patients(
    split: Split, wanted: float | Sequence[str] | None, *, settled: bool = True
) -> tuple[str, ...]:
    """The training patients whose labels are read; all of them for None.

    Until a split is `settled`, those whom it validates or tests may still come to train.

    `wanted` is a number of patients, a share below 1 of them, or their ids. A published split may
    have published lists of patients (3 and 7 for ACDC's `ssl4mis`); any other number takes patients
    in the order of a hash of their ids, so that a smaller number's patients are among a larger's.

    Raises:
        UserError: more patients than train, none, or an id that does not train.
    """
    train = split.train
    if wanted is None:
        return train
    if isinstance(wanted, str | bool) or (isinstance(wanted, float) and not isfinite(wanted)):
        raise UserError(f"data.labelled={wanted}: give a number, a share or a list of patients")
    if not isinstance(wanted, int | float):
        named = {*map(str, wanted)}
        if not named:
            raise UserError("data.labelled=[]: name at least one patient, or give null for all")
        known = train if settled else (*train, *split.val, *split.test)
        if strangers := sorted(named.difference(known)):
            raise UserError(
                f"data.labelled: {listed(strangers)} not in the training set, which has "
                f"{listed(sorted(train))}"
            )
        return tuple(patient for patient in train if patient in named)
    count = wanted if isinstance(wanted, int) else round(wanted * len(train))
    if not 1 <= count <= len(train):
        raise UserError(
            f"data.labelled={wanted}: {count} patients, and {len(train)} train; give a number from "
            f"1 to {len(train)}, or a share such as 0.1"
        )
    if published := published_list(split.name, count):
        return published
    ranked = sorted(train, key=lambda patient: hashlib.sha256(patient.encode()).digest())
    return tuple(sorted(ranked[:count]))


def published_list(name: str, count: int) -> tuple[str, ...]:
    """The published patients with labels of a published split; empty where there are none."""
    numbers = PUBLISHED.get(name, {}).get("labelled", {}).get(str(count), ())
    return tuple(f"patient{number:03d}" for number in sorted(numbers))


def supervision_note(
    split: Split, labelled: Sequence[str], labels: Labels, further: int = 0
) -> str:
    """Sentences on what the training reads; empty where it reads all dense labels alone.

    `further` counts the images that have no labels at all.
    """
    sentences = []
    if len(labelled) < len(split.train):
        published = published_list(split.name, len(labelled)) == tuple(labelled)
        how = "as published" if published else "not a published list"
        sentences.append(
            f"Labels of {len(labelled)} of {len(split.train)} training patients are read ({how}): "
            f"{listed(labelled)}."
        )
    if further:
        sentences.append(f"{further} further images without labels train.")
    if labels == "scribble":
        sentences.append("Training reads scribbles; validation and test read dense labels.")
    return " ".join(sentences)


def open_note(voxels: Sequence[tuple[int, int]]) -> str:
    """A sentence on cases to be scored, given voxels without a label and all; empty where none."""
    left = [unlabelled / whole for unlabelled, whole in voxels if unlabelled]
    if not left:
        return ""
    return (
        f"In {len(left)} of {len(voxels)} validation and test cases {sum(left) / len(left):.1%} of "
        "the voxels have no label: scores leave them out."
    )


def for_training(case: Case, labelled: Collection[str], labels: Labels) -> Case:
    """A training case with the label that may be read; `UserError` where it has no scribble."""
    if case.patient not in labelled:
        return replace(case, label_path=None, more_labels=(), labelled=False)
    return with_labels(case, labels)


def with_labels(case: Case, labels: Labels) -> Case:
    """The case with its labels of a kind; `UserError` where it has no scribble."""
    if labels == "dense":
        return case
    if case.scribble is None:
        remedy = (
            "Get the data set's scribbles (docs/methods.md); labels of your own that leave pixels "
            "open are read with data.ignore_label=<the value of those pixels>."
        )
        raise DataError("has no scribble, and data.labels=scribble", case.image_path, remedy)
    path, ignore, reader = case.scribble
    return replace(case, label_path=path, ignore=ignore, reader=reader)


def checked_ignore(
    ignore: int | None, num_classes: int, label_map: Mapping[int, int] | None
) -> int | None:
    """`data.ignore_label`; `UserError` where it is a value that stands for a class."""
    if ignore is None:
        return None
    classes = label_map if label_map is not None else range(num_classes)
    if not 0 <= ignore <= 255 or ignore in classes:
        raise UserError(
            f"data.ignore_label={ignore}: it must be a value 0..255 of the label files that stands "
            "for no class"
        )
    return ignore
