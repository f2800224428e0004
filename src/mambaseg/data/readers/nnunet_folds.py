"""Who trains, validates and is tested in a data set of nnU-Net.

A fold of `splits_final.json` says who trains and validates. Without the file it is the fold that
nnU-Net draws itself (v2, `generate_crossval_split`): the sorted ids, shuffled with a fixed seed, in
five parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mambaseg.data.validation import DataError
from mambaseg.storage.untrusted import ForeignFileError, read_json

NAME = "splits_final.json"
FOLDS, SEED = 5, 12345  # nnU-Net's


def splits_file(root: Path) -> Path | None:
    """`splits_final.json` in the data set's folder, or in nnU-Net's preprocessed folder beside it.

    That is nnUNet_preprocessed/<name> where the data set is nnUNet_raw/<name>.
    """
    there = root.absolute()
    places = [root / NAME]
    for above in list(there.parents)[1:3]:  # v1 has one folder more: nnUNet_raw_data
        places.append(above / "nnUNet_preprocessed" / there.name / NAME)
    return next((place for place in places if place.is_file()), None)


def parts_of_fold(
    root: Path, fold: int, patients: Mapping[str, str]
) -> tuple[dict[str, str], list[DataError]]:
    """Which training cases train and which validate.

    Args:
        root: folder of the data set.
        fold: which of the cross-validation.
        patients: case -> patient, of the training cases.

    Returns:
        Case -> `train` or `val`, without cases that a file of splits does not name; what is wrong.

    Raises:
        UserError: there is no such fold, or the file cannot be used.
    """
    path = splits_file(root)
    if path is None:
        return _drawn(fold, patients), []
    parts = _read_fold(path, fold)
    absent = sorted({case for cases in parts.values() for case in cases} - set(patients))
    problems = []
    if absent:
        problem = f"fold {fold} names {_listed(absent)}, without a label in labelsTr"
        problems.append(DataError(problem, path, "Add the files, or use the splits made for them."))
    found: dict[str, str] = {}
    owner: dict[str, str] = {}
    for part, cases in parts.items():
        for case in cases:
            if case not in patients:
                continue
            found[case] = part
            if owner.setdefault(patients[case], part) != part:
                problem = f"fold {fold} has {patients[case]} ({case}) in train and val"
                remedy = "A patient belongs in one part: correct it, or use data.split=random."
                problems.append(DataError(problem, path, remedy))
    return found, problems


def _read_fold(path: Path, fold: int) -> dict[str, list[str]]:
    remedy = 'It is a list of folds like {"train": ["case1", ...], "val": ["case2", ...]}.'
    try:
        content: Any = read_json(path)
    except ForeignFileError as error:
        raise DataError(f"is not usable: {error}", path, remedy) from error
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
        raise DataError(problem, path, "Check its permissions, links and the disk.") from error
    if not isinstance(content, list) or not content:
        raise DataError("holds no list of folds", path, remedy)
    if fold not in range(len(content)):
        raise DataError(f"has no fold {fold}", path, f"data.fold is one of 0..{len(content) - 1}.")
    one = content[fold]
    parts = {part: one.get(part) if isinstance(one, dict) else None for part in ("train", "val")}
    for cases in parts.values():
        if not isinstance(cases, list) or not all(isinstance(case, str) for case in cases):
            raise DataError(f"fold {fold} does not list who is in train and val", path, remedy)
    return parts  # type: ignore[return-value]  # checked above


def _drawn(fold: int, patients: Mapping[str, str]) -> dict[str, str]:
    """nnU-Net's own draw; of patients, where several cases belong to one."""
    ids = sorted(set(patients.values()))
    if fold not in range(FOLDS):
        raise DataError(f"there is no fold {fold}: data.fold is one of 0..{FOLDS - 1}")
    order = np.arange(len(ids))
    # numpy's legacy generator, whose stream is frozen for good
    np.random.RandomState(SEED).shuffle(order)
    val = {ids[place] for place in np.array_split(order, FOLDS)[fold]}
    return {case: "val" if patient in val else "train" for case, patient in patients.items()}


def _listed(cases: Sequence[str]) -> str:
    more = f" and {len(cases) - 5} more" if len(cases) > 5 else ""
    return f"{', '.join(cases[:5])}{more}"
