"""Names of classes: each once, and the same ones in the same order wherever two sides meet."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from mambaseg.errors import UserError

Structures = dict[str, tuple[int, ...]]
"""What is scored, by name: the labels 1, 2, ... of each; those of regions overlap."""

IGNORED = 255
"""In label arrays: nothing is known of this pixel, so nothing is learnt, scored or drawn of it."""
UNLABELLED = "no label"  # its name in legends
# read as text by Hydra without quotes
_PLAIN = re.compile(r"(?!(?:null|true|false|nan|inf)$)[a-z_][\w +-]*", re.IGNORECASE)
_SIDE = re.compile(r"left|right|(?<![^\W_])[lr](?![^\W_])")


def check_class_names(names: Sequence[str], what: str) -> None:
    """Raise `UserError` unless every class of `what`, background first, has a name of its own."""
    known = [_same(name) for name in names]
    twice = sorted({name for name, same in zip(names, known, strict=True) if known.count(same) > 1})
    if twice or not all(known):
        problem = f"{', '.join(twice)} is there more than once" if twice else "a name is empty"
        raise UserError(
            f"{what}={list(names)}: {problem}. Scores go by the names: give every class its own"
        )


def structures_of(class_names: Sequence[str], regions: Any = None) -> Structures:
    """What is scored on data of these classes, background first: each of them, or `regions`.

    Regions are name -> labels, such as `{"whole": [1, 2, 3], "core": [2, 3]}`, or one label.

    Raises:
        UserError: regions are something else, have one name, or hold no label of a class.
    """
    if regions is None:
        return {str(name): (label,) for label, name in enumerate(class_names) if label}
    last = len(class_names) - 1
    what = f"data.regions={regions}: "
    example = "give each region its labels, such as data.regions={whole: [1, 2], core: [2]}"
    if not isinstance(regions, Mapping) or not regions:
        raise UserError(what + example)
    found: Structures = {}
    for name, given in regions.items():
        labels = list(given) if isinstance(given, (list, tuple)) else [given]
        whole = all(type(label) is int and 0 < label <= last for label in labels)
        if not labels or not whole or len(set(labels)) < len(labels):
            raise UserError(
                f"{what}{name!r} must be labels from 1 to {last}, each once (the classes of "
                f"data.class_names after the background); {example}"
            )
        found[str(name)] = tuple(sorted(labels))
    check_class_names([class_names[0], *found], "data.regions with the background")
    return found


def require_same_classes(
    network: Sequence[str],
    data: Sequence[str],
    *,
    label_map: Mapping[int, int] | None,
    checkpoint: str,
) -> None:
    """Raise `UserError` unless class k of a network is class k of the data it is scored on.

    Background comes first; its name and upper and lower case do not matter. Where only the order
    differs, the message has the overrides that bring the labels into the network's order.
    """
    ours, theirs = [[_same(name) for name in names[1:]] for names in (network, data)]
    if ours == theirs:
        return
    said = f"checkpoint: {checkpoint} knows the classes {list(network)}, the data have {list(data)}"
    if sorted(ours) != sorted(theirs):
        remedy = "Score it on data that have its classes"
        if len(ours) == len(theirs):
            remedy += (
                ". If only the names differ and each label means the same, say so: "
                f"{_names(network)}"
            )
        raise UserError(f"{said}. {remedy}")
    moved = {0: 0, **{k + 1: ours.index(name) + 1 for k, name in enumerate(theirs)}}
    values = label_map or {k: k for k in moved}
    mapping = {value: moved[k] for value, k in values.items()}
    raise UserError(
        f"{said}: the same ones in another order, so the scores would be exchanged. Bring the "
        f"labels into the network's order: {_names(network)} {_mapping(mapping)}"
    )


def require_named_values(
    named: Mapping[int, str], classes: Sequence[str], *, label_map: Mapping[int, int] | None
) -> None:
    """Raise `UserError` where a value that the data set names becomes a class of another's name.

    `named` is value in the label files -> name; `classes` and `label_map` are those of `data`. The
    message has the mapping by name.
    """
    places = {_same(name): index for index, name in enumerate(classes)}
    wanted = {value: places.get(_same(name)) for value, name in named.items()}
    for value, index in wanted.items():
        given = label_map.get(value) if label_map else value
        if index in (None, given) or given is None or given >= len(classes):
            continue
        by_name = {**(label_map or {}), **{value: place or 0 for value, place in wanted.items()}}
        raise UserError(
            f"the data set calls label {value} {named[value]!r}, but data.class_names="
            f"{list(classes)} and data.label_map={label_map and dict(label_map)} make it "
            f"{classes[given]!r}: the scores would be exchanged. Leave both out, or map by name: "
            f"{_mapping(by_name)}"
        )


def sides_of_one(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of names that differ by left and right only: `left kidney`, `right kidney`."""
    found: dict[str, list[str]] = {}
    for name in names:
        if (neutral := _SIDE.sub("*", name.casefold())) != name.casefold():
            found.setdefault(neutral, []).append(name)
    return [(pair[0], pair[1]) for pair in found.values() if len(pair) == 2]


def _same(name: str) -> str:
    return " ".join(str(name).split()).casefold()


def _override(key: str, value: str) -> str:
    """For a shell."""
    return shlex.quote(f"data.{key}={value}")


def _names(names: Sequence[str]) -> str:
    """The override of the names, in Hydra's grammar."""
    quoted = (
        name if _PLAIN.fullmatch(name) else '"' + re.sub(r'(["\\])', r"\\\1", name) + '"'
        for name in names
    )
    return _override("class_names", f"[{','.join(quoted)}]")


def _mapping(mapping: Mapping[int, int]) -> str:
    """The override of a label map."""
    pairs = ",".join(f"{value}:{index}" for value, index in sorted(mapping.items()))
    return _override("label_map", f"{{{pairs}}}")
