"""Data sets in the layout of nnU-Net v2, nnU-Net v1 and the Medical Segmentation Decathlon (MSD).

    Dataset027_ACDC/
        dataset.json                what channels and labels are (`dataset_json`)
        imagesTr/case1_0000.nii.gz  a file per channel: _0000, _0001, ...
        labelsTr/case1.nii.gz
        imagesTs/  labelsTs/        the test part, as far as it has labels
        splits_final.json           who trains and validates

MSD has one file per case, imagesTr/case1.nii.gz, with the channels as its fourth dimension.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from mambaseg.data.case import Case
from mambaseg.data.formats.files import ENDINGS, PICTURES, read_label, read_volume
from mambaseg.data.formats.images import CHANNEL
from mambaseg.data.patients import with_patient
from mambaseg.data.readers.dataset_json import NAME, DatasetJson, read_dataset_json, read_plain
from mambaseg.data.readers.reader import Found, Problem, named, reader
from mambaseg.data.splits import listed
from mambaseg.data.validation import DataError, as_float32, as_label, check_same_geometry
from mambaseg.data.volume import Volume
from mambaseg.errors import counted
from mambaseg.storage.untrusted import readable

SPLITS = "splits_final.json"
FOLDS, SEED = 5, 12345  # nnU-Net's
WHOLE = -1  # in place of a channel's number: one file with all channels
log = logging.getLogger(__name__)


def split_of(root: Path) -> str:
    """`given` where the data set says who trains or who is tested, else `random`."""
    tested = any(_files(root / "labelsTs", ""))
    return "given" if tested or splits_file(root) else "random"


@reader(
    example="nnU-Net and MSD (dataset.json, imagesTr/ and labelsTr/)",
    remedy="The images are imagesTr/<case>_0000, or MSD's imagesTr/<case>; the labels are "
    "labelsTr/<case>; dataset.json says the ending.",
    recognises=lambda root: (
        (root / NAME).exists() or ((root / "imagesTr").is_dir() and (root / "labelsTr").is_dir())
    ),
    class_names=lambda root: read_dataset_json(root).class_names,
    ignore_label=lambda root: read_dataset_json(root).ignore,
    regions=lambda root: read_dataset_json(root).regions,
    channels=lambda root: len(read_dataset_json(root).channels),
    split=split_of,
)
def find_cases(
    root: Path, *, fold: int = 0, patient_pattern: str | None = None, split: str = "given"
) -> Iterator[Found]:
    """All labelled cases; their part is that of a fold of splits_final.json or nnU-Net's draw.

    A `split` that does not take these parts (`kfold`, `random`, `test`) is not refused for them.
    """
    about = read_dataset_json(root)
    found = [*_labelled(root, about, "Tr"), *_labelled(root, about, "Ts")]
    yield from (one for one in found if isinstance(one, DataError))
    for folder in ("imagesTr", "labelsTr", "labelsTs"):
        yield from _of_other_endings(root / folder, about.ending)
    cases = [with_patient(one, patient_pattern) for one in found if isinstance(one, Case)]
    training = {case.id: case.patient for case in cases if case.part is None}
    parts: dict[str, str] = {}
    if split in ("given", "auto"):
        try:
            parts = _parts_of_fold(root, fold, training)
        except DataError as error:
            yield error
    for case in cases:
        if case.part == "test" and case.id in training:
            problem = f"{case.id} is in labelsTr and in labelsTs"
            yield DataError(problem, case.label_path, "Keep one of the two.")
        else:
            yield replace(case, part=case.part or parts.get(case.id), fold=fold)
    named_patients = {training[case] for case in parts}  # all cases of a patient are in their part
    left = [case for case, patient in training.items() if patient not in named_patients]
    if parts and left:
        problem = f"{counted(len(left), 'case')} in no part of fold {fold} of {SPLITS}, not used"
        remedy = f"Add to {SPLITS} what is to be used, or choose data.split=random or kfold."
        yield Problem("warning", listed(left), problem, remedy)
    if about.count not in (None, len(training)):
        problem = f"numTraining is {about.count}, usable training cases are {len(training)}"
        yield Problem("warning", NAME, problem, "Complete the data set, or correct the number.")
    if splits_file(root) is None:
        if any(root.glob("splits_final.pkl")):
            problem = "it is a pickle, which can run code: it is not read"
            yield Problem("warning", "splits_final.pkl", problem, "Save it as splits_final.json.")
        if len(cases) > len(training):
            log.info("no splits_final.json: train and val are nnU-Net's own draw, fold %d", fold)


def _labelled(root: Path, about: DatasetJson, part: str) -> Iterator[Case | DataError]:
    """Labelled cases of imagesTr or imagesTs; a test image need not have a label."""
    folder = root / f"images{part}"
    labels = dict(_files(root / f"labels{part}", about.ending))
    images: dict[str, dict[int, Path]] = defaultdict(dict)  # case -> channel -> file
    for stem, path in _files(folder, about.ending):
        # `case_0001` is a case where a label has that very name
        match = None if stem in labels else CHANNEL.fullmatch(stem)
        case, channel = (match[1], int(match[2])) if match else (stem, WHOLE)
        images[case][channel] = path
    for case, label in labels.items():
        try:
            first, *others = _channels(folder, case, images[case], about)
        except DataError as error:
            yield error
            continue
        picture = first.name.lower().endswith(PICTURES)
        reading = partial(read, channels=1 if others else len(about.channels)) if picture else read
        yield Case(
            case,
            case,
            phase=None,
            group=None,
            image_path=first,
            label_path=label,
            reader=reading,
            more_images=tuple(others),
            part="test" if part == "Ts" else None,
            value_names=tuple(about.value_names.items()),
        )
    for case in sorted(set(images) - set(labels)) if part == "Tr" else ():
        path = root / "labelsTr" / f"{case}{about.ending}"
        remedy = f"Put it there, or take the image ({case}) out of imagesTr."
        yield DataError("the label is missing", path, remedy)


def _of_other_endings(folder: Path, ending: str) -> Iterator[Problem]:
    """A warning of images or labels that dataset.json's ending leaves out."""
    known = re.compile(f".+({'|'.join(map(re.escape, ENDINGS))})", re.DOTALL | re.IGNORECASE)
    left = [path.name for _, path in named(folder, known) if not path.name.endswith(ending)]
    if left:
        problem = f"{counted(len(left), 'file')} of another ending than {ending}, not used"
        remedy = f"Convert them: all files of a data set have the ending that {NAME} names."
        yield Problem("warning", folder.name, f"{problem}: {listed(map(readable, left))}", remedy)


def _files(folder: Path, ending: str) -> Iterator[tuple[str, Path]]:
    """Names without the ending, and files; macOS's `._` twins and other hidden files left out."""
    for match, path in named(folder, re.compile(f"(.+){re.escape(ending)}", re.DOTALL)):
        yield readable(match[1]), path


def _channels(folder: Path, case: str, files: dict[int, Path], about: DatasetJson) -> list[Path]:
    """The files of a case in the order of its channels, if they are those of dataset.json."""
    ordered = [files[number] for number in sorted(files)]
    whole = set(files) == {WHOLE} or (set(files) == {0} and about.ending in PICTURES)
    if not whole and sorted(files) != list(range(len(about.channels))):
        found = ", ".join(path.name for path in ordered) or "none"
        raise DataError(
            f"{len(about.channels)} files are needed, a channel each, or one with all; there is "
            f"{found} (channels: {', '.join(about.channels)})",
            folder / case,
            "dataset.json names the channels: correct it, get the file, or move one out.",
        )
    return ordered


def read(case: Case, *, channels: int = 1) -> Volume:
    """Read a case: all files of its channels, and its label. Geometry is the first channel's.

    `channels` is how many each file has, of pictures: 3 is colour.
    """
    image = read_volume(case.image_path, *case.more_images, channels=channels)
    array = as_float32(case.image_path, image.image)
    label = None
    if case.label_path is not None:
        file = read_label(case.label_path)
        if len(file.image) != 1:
            problem = f"the label has {len(file.image)} channels"
            raise DataError(problem, case.label_path, "A label has one number per voxel.")
        check_same_geometry(image, file, case.image_path, case.label_path)
        label = as_label(file.image[0, :, 0], case.label_path)
    return replace(image, image=array, label=label)


def splits_file(root: Path) -> Path | None:
    """Find splits_final.json in nnUNet_raw/<name>, or in nnUNet_preprocessed/<name> beside it."""
    there = root.absolute()
    places = [root / SPLITS]
    for above in list(there.parents)[1:3]:  # v1 has one folder more: nnUNet_raw_data
        places.append(above / "nnUNet_preprocessed" / there.name / SPLITS)
    return next((place for place in places if place.is_file()), None)


def _parts_of_fold(root: Path, fold: int, patients: Mapping[str, str]) -> dict[str, str]:
    """Case -> `train` or `val` in a fold of the training cases (case -> patient)."""
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
    """nnU-Net's own draw (v2, `generate_crossval_split`); of patients, as far as they are known."""
    ids = sorted(set(patients.values()))
    if fold not in range(FOLDS):
        raise DataError(f"there is no fold {fold}: data.fold is one of 0..{FOLDS - 1}")
    if ids and fold >= len(ids):  # it would be empty, and the test set would choose the checkpoint
        raise DataError(
            f"fold {fold} of the {FOLDS} that nnU-Net draws is empty: there are {len(ids)} to draw",
            remedy=f"Choose data.fold below {len(ids)}, or data.split=kfold with data.folds.",
        )
    order = np.arange(len(ids))
    # numpy's legacy generator, whose stream is frozen for good
    np.random.RandomState(SEED).shuffle(order)
    val = {ids[place] for place in np.array_split(order, FOLDS)[fold]}
    return {case: "val" if patient in val else "train" for case, patient in patients.items()}
