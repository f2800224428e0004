"""Splits by patient: the published ones as published, and a seeded one of ours.

| name | train / validation / test | source |
|---|---|---|
| ssl4mis | 70 / 10 / 20 of 1..100 | SSL4MIS lists; used by Mamba-UNet |
| transunet | 70 / 10 / 20 of 1..100 | lists of MT-UNet, nnFormer and MSVM-UNet |
| nnunet | 80 / 20 / the same 20 of 1..100, 5 folds | nnU-Net v2, `Dataset027_ACDC.py` |
| wsl4mis | 80 / 20 / the same 20 of 1..100, 5 folds | WSL4MIS; a fold = a pathology group |
| official | 90 / 10 / 50: 1..100 without every tenth / every tenth / 101..150 | the challenge |
| random | about 70 / 10 / 20 % of whatever is there | ours |
| given | as its own files or its publication say | the data set |
| auto | given where the data set names more than a part for training, else random | |
| test | everybody is tested: an external cohort, for evaluation alone | ours |

Numbers of different splits are not comparable; a split's name and hash belong in every table.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mambaseg.errors import UserError

PARTS = ("train", "val", "test")
Groups = Sequence[Sequence[str]]

LISTED = 5  # patients that a message names
# In ACDC itself: identical images at ED and ES, labels that differ slightly.
DUPLICATES = (("patient074", "patient076"),)
FRACTIONS = (0.1, 0.2)  # of validation and test in the random split

SSL4MIS_VAL = (2, 19, 28, 30, 39, 45, 78, 82, 85, 87)
SSL4MIS_TEST = (1, 7, 8, 11, 13, 22, 24, 33, 52, 59, 64, 65, 66, 68, 75, 80, 81, 83, 84, 93)
TRANSUNET_VAL = (19, 21, 29, 33, 41, 50, 61, 71, 76, 80)
TRANSUNET_TEST = (2, 3, 8, 9, 12, 14, 17, 24, 42, 48, 49, 53, 55, 64, 67, 79, 81, 88, 92, 95)


@dataclass(frozen=True)
class Split:
    """Who trains, who validates and who is tested.

    Attributes:
        name: the split, with its fold or seed: "ssl4mis", "nnunet-fold0", "random-seed0".
        train: patients the weights are fitted to.
        val: patients the checkpoint is chosen by.
        test: patients the reported scores are from.
        note: what a reader of the scores must know about the split.

    Raises:
        UserError: a part is empty beside others than the test part, or a patient is in two parts.
            Only a published split whose validation part *is* its test part is let through,
            and its note says so.
    """

    name: str
    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    note: str

    def __post_init__(self) -> None:
        parts = {"train": set(self.train), "val": set(self.val), "test": set(self.test)}
        needed = PARTS if self.train or self.val else ("test",)
        empty = [part for part in needed if not parts[part]]
        if empty:
            raise UserError(f"split {self.name}: nobody is in {' and '.join(empty)}")
        for one, other in (("train", "test"), ("train", "val"), ("val", "test")):
            both = parts[one] & parts[other]
            as_published = self._validates_on_test and parts["val"] == parts["test"]
            if both and not ((one, other) == ("val", "test") and as_published):
                raise UserError(
                    f"split {self.name}: {listed(both)} in both {one} and {other}. A patient "
                    "belongs in one part only."
                )

    def require_training(self) -> None:
        """Make sure that somebody trains; a split with a test part alone is for evaluation.

        Raises:
            UserError: nobody does.
        """
        if not self.train:
            raise UserError(
                f"split {self.name}: nobody trains in it ({len(self.test)} are tested). Use it "
                "with src/evaluate.py; to train on these data use data.split=random."
            )

    @property
    def _validates_on_test(self) -> bool:
        return self.name.partition("-")[0] in ("nnunet", "wsl4mis", "given")

    @property
    def hash(self) -> str:
        """12 hex digits that depend on who is in which part, and on nothing else."""
        parts = {"train": sorted(self.train), "val": sorted(self.val), "test": sorted(self.test)}
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class _Published:
    """A split of ACDC's patients 1..`last`.

    Attributes:
        note: what a reader must know about it.
        parts: fold -> the numbers of validation and test; the others train.
        folds: of a cross-validation, whose validation part is its test part.
    """

    note: str
    parts: Callable[[int], tuple[Iterable[int], Iterable[int]]]
    folds: int = 1
    last: int = 100


def _nnunet(fold: int) -> tuple[Iterable[int], Iterable[int]]:
    order = np.arange(1, 101)
    # The published order: numpy's legacy generator, whose stream is frozen for good.
    np.random.RandomState(1234).shuffle(order)
    test = order[fold::5].tolist()
    return test, test


PUBLISHED = {
    "ssl4mis": _Published(
        "As published by SSL4MIS and used by Mamba-UNet: 70/10/20 patients; the test set is uneven "
        "over pathologies (DCM 5, HCM 3, MINF 2, NOR 6, RV 4).",
        lambda fold: (SSL4MIS_VAL, SSL4MIS_TEST),
    ),
    "transunet": _Published(
        "As published with MT-UNet, nnFormer and MSVM-UNet: 70/10/20 patients; the test set is "
        "uneven over pathologies (DCM 7, HCM 1, MINF 5, NOR 3, RV 4).",
        lambda fold: (TRANSUNET_VAL, TRANSUNET_TEST),
    ),
    "nnunet": _Published(
        "As published by nnU-Net v2 (Dataset027_ACDC): 80/20 patients.", _nnunet, folds=5
    ),
    "wsl4mis": _Published(
        "As published by WSL4MIS: 80/20 patients; the 20 are one pathology group, which the "
        "network never saw in training.",
        lambda fold: (range(20 * fold + 1, 20 * fold + 21), range(20 * fold + 1, 20 * fold + 21)),
        folds=5,
    ),
    "official": _Published(
        "The challenge's 100 training and 50 test patients. It names no validation set: every "
        "tenth training patient is our choice, two of each pathology.",
        lambda fold: (range(10, 101, 10), range(101, 151)),
        last=150,
    ),
}


def known_duplicates(patients: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Groups of ACDC patients with identical images, as far as they are among `patients`."""
    present = set(patients)
    return tuple(group for group in DUPLICATES if present.issuperset(group))


def make_split(
    name: str,
    patients: Iterable[str],
    *,
    fold: int = 0,
    seed: int = 0,
    duplicates: Groups = (),
    given: Mapping[str, str] | None = None,
    given_fold: int | None = None,
    unit: str = "patient",
    alike: Mapping[str, str] | None = None,
) -> Split:
    """The split `name` of `patients`.

    Args:
        name: see the table at the top of this file.
        patients: ids of those at hand ("patient001"). A published split needs all of its own and
            leaves out any others.
        fold: 0..4 for nnunet and wsl4mis (their folds 1..5), 0 for the others; of a given split
            `given_fold`.
        seed: of the random split; published splits do not depend on it.
        duplicates: groups of patients with the same images, beyond the known ones. The random
            split keeps a group together; a published one stays as it is, and its note tells.
        given: patient -> `train`, `val` or `test`, where the data set itself says so; patients that
            it does not name are left out.
        given_fold: that these parts are of; None where the data set has no folds.
        unit: what is in one part: `patient`, or `case` where it is not known whose a case is.
        alike: case -> the patient that its name suggests, where nobody said whose it is; the note
            tells of those that the split tears apart.

    Raises:
        UserError: unknown name or fold, patients of a published split that are not there, too few
            patients for a random one.
    """
    present = sorted(set(patients))
    groups = tuple(dict.fromkeys((*known_duplicates(present), *map(tuple, duplicates))))
    given = given or {}
    if name == "auto":
        name = "given" if {"val", "test"} & set(given.values()) else "random"
    if name not in (*PUBLISHED, "given", "random", "test"):
        names = ", ".join([*PUBLISHED, "random", "given", "auto", "test"])
        raise UserError(f"unknown split {name!r}: data.split is one of {names}")
    folds = range(PUBLISHED[name].folds) if name in PUBLISHED else [0]
    if name == "given":
        folds = [given_fold or 0]
    if fold not in folds:
        allowed = f"0..{folds[-1]}" if len(folds) > 1 else "0: it has no folds"
        raise UserError(f"split {name} has no fold {fold}: data.fold must be {allowed}")
    if name == "given":
        split = _given_split(given, given_fold)
    elif name == "random":
        split = _random_split(present, seed, groups, unit)
    elif name == "test":
        note = f"Not a published split: all {len(present)} {unit}s are tested; none of them "
        split = Split(name, (), (), tuple(present), note + "trains or validates.")
    else:
        split = _published_split(name, present, fold)
    return replace(split, note=" ".join([split.note, *_torn_apart(split, groups, alike or {})]))


def _published_split(name: str, present: Sequence[str], fold: int) -> Split:
    published = PUBLISHED[name]
    val, test = (tuple(f"patient{n:03d}" for n in sorted(part)) for part in published.parts(fold))
    everybody = [f"patient{n:03d}" for n in range(1, published.last + 1)]
    missing = set(everybody).difference(present)
    if missing:
        raise UserError(
            f"split {name} needs {len(everybody)} ACDC patients; missing are {listed(missing)}: "
            f"not in the folder ({len(present)} patients). Complete the data set, or use "
            "data.split=random, which takes the patients that are there."
        )
    train = tuple(patient for patient in everybody if patient not in {*val, *test})
    if published.folds == 1:
        return Split(name, train, val, test, published.note)
    note = f"fold {fold} of 0..{published.folds - 1}. {published.note}"
    note += " Validation = test: scores are optimistic."
    return Split(f"{name}-fold{fold}", train, val, test, note)


def _given_split(given: Mapping[str, str], fold: int | None) -> Split:
    """The parts that the data set names; a missing validation or test set is the other one."""
    train, val, test = (
        tuple(sorted(patient for patient, its in given.items() if its == part)) for part in PARTS
    )
    if not (val or test):
        raise UserError(
            "split given: the data set does not say who trains and who is tested. Use "
            "data.split=random, or add the files that say so (docs/own-data.md); data.split=test "
            "tests everybody, in src/evaluate.py."
        )
    note = (
        "As published for the data set, or as its own files say; in nnU-Net's layout without a "
        "file of splits, as nnU-Net draws it."
    )
    if not train:
        note += " Nobody trains or validates in it."
        val, test = (), test or val
    elif not (val and test):
        val = test = val or test
        note += " Validation = test: scores are optimistic."
    return Split("given" if fold is None else f"given-fold{fold}", train, val, test, note)


def _random_split(patients: list[str], seed: int, duplicates: Groups, unit: str) -> Split:
    """70/10/20 % of patients, duplicates in one part.

    The order is that of a hash of seed and patient, so it depends on no library's generator, and
    not on the order or the presence of other patients.
    """
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


def _torn_apart(split: Split, groups: Groups, alike: Mapping[str, str]) -> list[str]:
    """Sentences on who should be in one part of a split and is not.

    Args:
        split: the split.
        groups: patients with the same images.
        alike: case -> the patient that its name suggests.
    """
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


def listed(patients: Iterable[str], total: int | None = None) -> str:
    """Patients in words, the first few by name; `total` where not all of them are given."""
    ordered = sorted(patients)
    further = (len(ordered) if total is None else total) - LISTED
    more = f" and {further} more" if further > 0 else ""
    return f"{', '.join(ordered[:LISTED])}{more}"
