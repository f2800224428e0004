"""Who trains and who validates in a data set of nnU-Net.

A fold of `splits_final.json` says it. Without the file it is the fold that nnU-Net draws itself
(v2, `generate_crossval_split`): the sorted ids, shuffled with a fixed seed, in five parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mambaseg.data.readers.dataset_json import read_plain
from mambaseg.data.splits import listed
from mambaseg.data.validation import DataError

NAME = "splits_final.json"
FOLDS, SEED = 5, 12345  # nnU-Net's


def splits_file(root: Path) -> Path | None:
    """Find `splits_final.json` in the data set's folder or in nnU-Net's preprocessed one beside it.

    That is nnUNet_preprocessed/<name> where the data set is nnUNet_raw/<name>.
    """
    there = root.absolute()
    places = [root / NAME]
    for above in list(there.parents)[1:3]:  # v1 has one folder more: nnUNet_raw_data
        places.append(above / "nnUNet_preprocessed" / there.name / NAME)
    return next((place for place in places if place.is_file()), None)


def parts_of_fold(root: Path, fold: int, patients: Mapping[str, str]) -> dict[str, str]:
    """Say which training cases train and which validate.

    Args:
        root: Folder of the data set.
        fold: Which of the cross-validation.
        patients: Case -> patient, of the training cases.

    Returns:
        Case -> `train` or `val`, without cases that a file of splits does not name.

    Raises:
        UserError: There is no such fold, the file cannot be used, or the fold names a case that is
            not there or one that is in both parts.
    """
    path = splits_file(root)
    if path is None:
        return _drawn(fold, patients)
    remedy = 'It is a list of folds like {"train": ["case1", ...], "val": ["case2", ...]}.'
    folds = read_plain(path, list, remedy)
    if folds and fold not in range(len(folds)):
        raise DataError(f"has no fold {fold}", path, f"data.fold is one of 0..{len(folds) - 1}.")
    one = folds[fold] if folds and isinstance(folds[fold], dict) else {}
    parts = [one.get("train"), one.get("val")]
    lists = [cases for cases in parts if isinstance(cases, list)]
    if len(lists) < 2 or not all(isinstance(case, str) for cases in lists for case in cases):
        raise DataError(f"fold {fold} does not list who is in train and val", path, remedy)
    train, val = lists
    if absent := {*train, *val} - set(patients):
        problem = f"fold {fold} names {listed(absent)}, without a label in labelsTr"
        raise DataError(problem, path, "Add the files, or use the splits made for them.")
    if both := set(train) & set(val):
        raise DataError(f"fold {fold} has {listed(both)} in train and val", path, remedy)
    return dict.fromkeys(train, "train") | dict.fromkeys(val, "val")


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
