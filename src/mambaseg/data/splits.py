"""Splits by patient: the published ones as published, and a seeded one of ours.

| name | train / validation / test | source |
|---|---|---|
| ssl4mis | 70 / 10 / 20 of 1..100 | SSL4MIS lists; used by Mamba-UNet |
| transunet | 70 / 10 / 20 of 1..100 | lists of MT-UNet, nnFormer and MSVM-UNet |
| nnunet | 80 / 20 / the same 20 of 1..100, 5 folds | nnU-Net v2, `Dataset027_ACDC.py` |
| wsl4mis | 80 / 20 / the same 20 of 1..100, 5 folds | WSL4MIS; a fold = a pathology group |
| wsl4mis_val | 72 / 8 / 20 of 1..100, 5 folds | ours: WSL4MIS with a validation set of its own |
| official | 90 / 10 / 50: 1..100 without every tenth / every tenth / 101..150 | the challenge |
| random | about 70 / 10 / 20 % of whatever is there | ours |
| given | as its own files or its publication say | the data set |
| auto | given where the data set names more than a part for training, else random | |
| kfold | everybody is tested once over the folds; 10 % validate, the rest train | ours |
| test | everybody is tested: an external cohort, for evaluation alone | ours |

Numbers of different splits are not comparable; a split's name and hash belong in every table.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mambaseg.errors import UserError

PARTS = ("train", "val", "test")
Groups = Sequence[Sequence[str]]
Facts = Mapping[str, Mapping[str, str]]

LISTED = 5  # patients that a message names
FRACTIONS = (0.1, 0.2)  # of validation and test in the random split

PUBLISHED: dict[str, Any] = json.loads(
    Path(__file__).with_name("published_splits.json").read_text(encoding="utf-8")
)
"""Of ACDC's patients 1..`patients`: the numbers of validation and test for each fold; the others
train. A fold without `val` validates by its test set. `labelled` has published lists of training
patients with labels, by their number."""


@dataclass(frozen=True)
class Split:
    """Who trains, who validates and who is tested.

    Raises:
        UserError: A set is empty beside others than the test set, or a patient is in two sets.
            Only a published split that validates by its test set is let through; its note tells.
    """

    name: str  # with its fold or seed: "ssl4mis", "nnunet-fold0", "random-seed0"
    train: tuple[str, ...]  # patients the weights are fitted to
    val: tuple[str, ...]  # patients the checkpoint is chosen by
    test: tuple[str, ...]  # patients the reported scores are from
    note: str  # what a reader of the scores must know about the split

    def __post_init__(self) -> None:
        parts = {"train": set(self.train), "val": set(self.val), "test": set(self.test)}
        needed = PARTS if self.train or self.val else ("test",)
        if empty := [part for part in needed if not parts[part]]:
            raise UserError(
                f"split {self.name}: nobody is in {' and '.join(empty)}. Choose another "
                "data.split, or add patients"
            )
        for one, other in (("train", "test"), ("train", "val"), ("val", "test")):
            both = parts[one] & parts[other]
            published = self.name.partition("-")[0] in ("nnunet", "wsl4mis", "given")
            if both and not (one == "val" and published and parts["val"] == parts["test"]):
                raise UserError(
                    f"split {self.name}: {listed(both)} in both {one} and {other}. A patient "
                    "belongs in one part only."
                )

    def require_training(self) -> None:
        """Raise `UserError` unless somebody trains: a test set alone is for evaluation."""
        if not self.train:
            raise UserError(
                f"split {self.name}: it has no training patients (all {len(self.test)} are "
                "tested). Use it with mambaseg evaluate; to train on these data use "
                "data.split=random."
            )

    @property
    def hash(self) -> str:
        """12 hex digits that depend on who is in which part, and on nothing else."""
        parts = {"train": sorted(self.train), "val": sorted(self.val), "test": sorted(self.test)}
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def make_split(
    name: str,  # see the table at the top of this file
    patients: Iterable[str],  # ids of those at hand ("patient001")
    *,
    fold: int = 0,  # 0..4 for nnunet and wsl4mis[_val] (their folds 1..5), `given_fold` for given
    seed: int = 0,  # of the random split
    duplicates: Groups = (),  # patients with the same images
    given: Mapping[str, str] | None = None,  # patient -> set, where the data set says so
    given_fold: int | None = None,  # that `given` is of; None where the data set has no folds
    unit: str = "patient",  # or `case` where it is not known whose a case is
    alike: Mapping[str, str] | None = None,  # case -> the patient that its name suggests
    count: int = 5,  # folds of kfold
    by: str | None = None,  # of kfold: a fact of `facts`, each of whose values is a fold
    facts: Facts | None = None,  # patient -> what is known of them, such as their pathology
) -> Split:
    """The split `name` of `patients`.

    A published split needs all of its own patients and leaves out any others. Duplicates stay
    together in the random split; of a published one the note tells, as of those `alike` that it
    tears apart. Patients whom `given` does not name are left out.

    Raises:
        UserError: unknown name or fold, absent patients of a published split, or too few.
    """
    present = sorted(set(patients))
    given = given or {}
    if name == "auto":
        name = "given" if {"val", "test"} & set(given.values()) else "random"
    if name not in (*PUBLISHED, "given", "random", "kfold", "test"):
        names = ", ".join([*PUBLISHED, "random", "kfold", "given", "auto", "test"])
        raise UserError(f"unknown split {name!r}: data.split is one of {names}")
    if by is not None and name != "kfold":
        raise UserError(f"data.split_by={by}: is for data.split=kfold, and the split is {name}")
    folds: Sequence[int] = [0 if name != "given" or given_fold is None else given_fold]
    if name in PUBLISHED:
        folds = range(len(PUBLISHED[name]["folds"]))
    if name == "kfold":
        units = _units(present, duplicates) if by is None else [[one] for one in present]
        parts = _folds(units, seed, count, by, facts or {}, unit)
        folds = range(len(parts))
    if fold not in folds:
        allowed = f"0..{folds[-1]}" if len(folds) > 1 else "0: it has no folds"
        raise UserError(f"split {name} has no fold {fold}: data.fold must be {allowed}")
    if name == "given":
        split = _given_split(given, given_fold, unit)
    elif name == "random":
        split = _random_split(present, seed, duplicates, unit)
    elif name == "kfold":
        split = _fold_split(parts, fold, seed, by, facts or {}, unit)
        together = _of_one_value(duplicates, by, facts or {}) if by else ()
        if _torn_apart(split, together, {}):
            parts = _folds(_units(present, together), seed, count, by, facts or {}, unit)
            split = _fold_split(parts, fold, seed, by, facts or {}, unit)
    elif name == "test":
        note = f"Not a published split: all {len(present)} {unit}s are tested; none of them "
        split = Split(name, (), (), tuple(present), note + "trains or validates.")
    else:
        split = _published_split(name, present, fold)
    return replace(split, note=" ".join([split.note, *_torn_apart(split, duplicates, alike or {})]))


def _published_split(name: str, present: Sequence[str], fold: int) -> Split:
    published = PUBLISHED[name]
    numbers, count = published["folds"][fold], len(published["folds"])
    everybody, val, test = (
        tuple(f"patient{number:03d}" for number in part)
        for part in (
            range(1, published["patients"] + 1),
            numbers.get("val", numbers["test"]),
            numbers["test"],
        )
    )
    missing = set(everybody).difference(present)
    if missing:
        raise UserError(
            f"split {name} needs {len(everybody)} ACDC patients; missing are {listed(missing)}: "
            f"not in the folder ({len(present)} patients). Complete the data set, or use "
            "data.split=random, which takes the patients that are there."
        )
    train = tuple(patient for patient in everybody if patient not in {*val, *test})
    note = published["note"]
    if count > 1:
        name, note = f"{name}-fold{fold}", f"fold {fold} of 0..{count - 1}. {note}"
    if "val" not in numbers:
        note += " Validation = test: scores are optimistic."
    return Split(name, train, val, test, note)


def _given_split(given: Mapping[str, str], fold: int | None, unit: str) -> Split:
    """The parts that the data set names; a missing validation or test set is the other one."""
    train, val, test = (
        tuple(sorted(patient for patient, its in given.items() if its == part)) for part in PARTS
    )
    if not (val or test):
        raise UserError(
            "split given: the data set does not say who trains and who is tested. Use "
            "data.split=random, or add the files that say so (docs/own-data.md); data.split=test "
            "tests everybody, in mambaseg evaluate."
        )
    note = "As published for the data set, or as its own files say."
    if fold is not None:
        note = f"Of splits_final.json, or where there is none, drawn by {unit} as nnU-Net does."
    if not train:
        note += " Nobody trains or validates in it."
        val, test = (), test or val
    elif not (val and test):
        val = test = val or test
        note += " Validation = test: scores are optimistic."
    return Split("given" if fold is None else f"given-fold{fold}", train, val, test, note)


def _random_split(patients: list[str], seed: int, duplicates: Groups, unit: str) -> Split:
    """70/10/20 % of patients by a hash of seed and patient, duplicates in one set."""
    units = _units(patients, duplicates)
    kept = [listed(unit) for unit in units if len(unit) > 1]
    if len(units) < 3:
        raise UserError(
            f"split random needs 3 or more distinct {unit}s for train, val and test; there are "
            f"{len(units)}. Point data.root at a folder with more."
        )
    units.sort(key=lambda unit: hashlib.sha256(f"{seed}:{unit[0]}".encode()).digest())
    val_count, test_count = (max(1, round(f * len(patients))) for f in FRACTIONS)
    test = _take(units, test_count, leave=2)
    val = _take(units, val_count, leave=1)
    train = [patient for unit in units for patient in unit]
    sizes = f"{len(train)}/{len(val)}/{len(test)}"
    note = f"Not a published split: drawn by {unit} with seed {seed}; {sizes} {unit}s."
    if kept:
        note += f" Same images, kept in one part: {'; '.join(kept)}."
    train, val, test = sorted(train), sorted(val), sorted(test)
    return Split(f"random-seed{seed}", tuple(train), tuple(val), tuple(test), note)


def _folds(
    units: list[list[str]], seed: int, count: int, by: str | None, facts: Facts, unit: str
) -> list[list[list[str]]]:
    """Units of patients as folds: those of one value of a fact, or as many as are wanted.

    Where all patients have a known pathology, each fold has about as many of each.
    """
    ordered = _in_order(units, seed, by or "pathology", facts)
    if by is None:
        if not 2 <= count <= len(ordered):
            raise UserError(
                f"data.folds={count}: 2 to {len(ordered)} are possible, as many as there are "
                f"distinct {unit}s"
            )
        return [ordered[start::count] for start in range(count)]
    if unknown := [one for group in units for one in group if by not in facts.get(one, {})]:
        known = sorted({key for values in facts.values() for key in values})
        raise UserError(
            f"data.split_by={by}: not known of {listed(unknown)}. Known of some: "
            f"{', '.join(known) or 'nothing'}. A table patients.csv in data.root can say it: a "
            f"column `patient` and a column `{by}`."
        )
    values = sorted({facts[one[0]][by] for one in ordered})
    if len(values) < 2:
        raise UserError(
            f"data.split_by={by}: all patients have {values[0]}, so none can be left out"
        )
    return [[one for one in ordered if facts[one[0]][by] == value] for value in values]


def _fold_split(
    folds: list[list[list[str]]], fold: int, seed: int, by: str | None, facts: Facts, unit: str
) -> Split:
    """One fold is tested; a tenth of everybody, from all others, chooses the checkpoint."""
    others = [one for number, part in enumerate(folds) if number != fold for one in part]
    rest = _in_order(others, seed, by or "pathology", facts)
    number = min(max(1, round(FRACTIONS[0] * sum(map(len, folds)))), len(rest) - 1)
    chosen = {place * len(rest) // number for place in range(number)} if number > 0 else set()
    test, val, train = (
        tuple(sorted(patient for one in units for patient in one))
        for units in (
            folds[fold],
            [one for place, one in enumerate(rest) if place in chosen],
            [one for place, one in enumerate(rest) if place not in chosen],
        )
    )
    name, what = f"kfold{len(folds)}-seed{seed}", f"drawn by {unit} with seed {seed}"
    if by is not None:
        value = facts[test[0]][by]
        name, what = f"kfold-{by}-seed{seed}", f"{by} {value} is tested and in no other part"
    elif all("pathology" in facts.get(one, {}) for one in (*train, *val, *test)):
        what += ", as many of each pathology in each fold as can be"
    note = f"Not a published split: fold {fold} of 0..{len(folds) - 1}, {what}; "
    note += f"{len(train)}/{len(val)}/{len(test)} {unit}s."
    return Split(f"{name}-fold{fold}", train, val, test, note)


def _in_order(units: list[list[str]], seed: int, fact: str, facts: Facts) -> list[list[str]]:
    """Units by a fact of their first patient, and within each value by a hash of seed and patient.

    Where somebody's is not known, by the hash alone.
    """
    known = all(fact in facts.get(unit[0], {}) for unit in units)

    def key(unit: list[str]) -> tuple[str, bytes]:
        value = facts[unit[0]][fact] if known else ""
        return value, hashlib.sha256(f"{seed}:{unit[0]}".encode()).digest()

    return sorted(units, key=key)


def _take(units: list[list[str]], count: int, *, leave: int) -> list[str]:
    """Take whole units from the front until `count` patients are together; leave some."""
    taken: list[str] = []
    while len(taken) < count and len(units) > leave:
        taken += units.pop(0)
    return taken


def _units(patients: list[str], duplicates: Groups) -> list[list[str]]:
    """Sorted patients as lists of those that must stay together; groups that meet are joined."""
    unit_of = {patient: [patient] for patient in patients}
    for group in duplicates:
        units = [unit_of[patient] for patient in group if patient in unit_of]
        joined = sorted({patient for unit in units for patient in unit})
        for patient in joined:
            unit_of[patient] = joined
    return [unit for patient, unit in unit_of.items() if patient == unit[0]]


def _of_one_value(groups: Groups, fact: str, facts: Facts) -> list[list[str]]:
    """Groups of patients as those within them of whom a fact is the same."""
    members: dict[tuple[int, str | None], list[str]] = defaultdict(list)
    for number, group in enumerate(groups):
        for patient in group:
            members[number, facts.get(patient, {}).get(fact)].append(patient)
    return list(members.values())


def _torn_apart(split: Split, groups: Groups, alike: Mapping[str, str]) -> list[str]:
    """Sentences on who should be in one set of a split and is not."""
    parts = {"val": split.val, "test": split.test, "train": split.train}  # val may be test
    part_of = {patient: part for part, patients in parts.items() for patient in patients}
    sentences = []
    for group in groups:
        places = {patient: part_of[patient] for patient in group if patient in part_of}
        if len(set(places.values())) > 1:
            told = ", ".join(f"{patient} in {part}" for patient, part in places.items())
            sentences.append(f"The same images are in different parts: {told}.")
    found: dict[str, set[str]] = defaultdict(set)
    for case, part in part_of.items():
        found[alike.get(case, case)].add(part)
    if torn := [patient for patient, places in found.items() if len(places) > 1]:
        sentences.append(
            f"The names suggest several cases per patient, of which {listed(torn)} would be in "
            "more than one part: then scores are too high, and data.patient_pattern has to say who "
            "the patients are (docs/own-data.md)."
        )
    return sentences


def listed(patients: Iterable[str], *, limit: int = LISTED) -> str:
    """Patients in words, the first few by name."""
    ordered = sorted(patients)
    further = len(ordered) - limit
    more = f" and {further:,} more" if further > 0 else ""
    return f"{', '.join(ordered[:limit])}{more}"
