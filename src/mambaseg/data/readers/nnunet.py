"""Data sets in the layout of nnU-Net v2, nnU-Net v1 and the Medical Segmentation Decathlon (MSD).

    Dataset027_ACDC/
        dataset.json                what channels and labels are (`dataset_json`)
        imagesTr/case1_0000.nii.gz  a file per channel: _0000, _0001, ...
        labelsTr/case1.nii.gz
        imagesTs/  labelsTs/        the test part, as far as it has labels
        splits_final.json           who trains and validates (`nnunet_folds`)

MSD has one file per case, imagesTr/case1.nii.gz, with the channels as its fourth dimension.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from mambaseg.data.case import Case
from mambaseg.data.formats.files import PICTURES, read_label, read_volume
from mambaseg.data.formats.images import CHANNEL
from mambaseg.data.formats.volume import Volume
from mambaseg.data.patients import with_patients
from mambaseg.data.problems import Problem, cases_or_first_problem
from mambaseg.data.readers.dataset_json import NAME, DatasetJson, read_dataset_json
from mambaseg.data.readers.nnunet_folds import parts_of_fold, splits_file
from mambaseg.data.validation import DataError, as_float32, as_label, check_same_geometry, unlisted
from mambaseg.storage.untrusted import readable

WHOLE = -1  # in place of a channel's number: one file with all channels
Files = dict[str, dict[int, Path]]  # case -> channel -> file
log = logging.getLogger(__name__)


def recognises(root: Path) -> bool:
    """Whether `root` is meant to be such a data set, by its names."""
    return (root / NAME).exists() or ((root / "imagesTr").is_dir() and (root / "labelsTr").is_dir())


def class_names(root: Path) -> tuple[str, ...]:
    """What dataset.json calls the labels 0, 1, ..."""
    return read_dataset_json(root).class_names


def split_of(root: Path) -> str:
    """`given` where the data set says who trains or who is tested, else `random`."""
    root = Path(root).expanduser()
    tested = root / "labelsTs"
    with_labels = tested.is_dir() and any(not p.name.startswith(".") for p in tested.iterdir())
    return "given" if with_labels or splits_file(root) else "random"


def find_cases(
    root: Path | str, *, fold: int = 0, patient_pattern: str | None = None
) -> list[Case]:
    """All labelled cases, sorted by id; their part is that of a fold.

    Args:
        root: folder of the data set.
        fold: of splits_final.json, or of nnU-Net's own draw.
        patient_pattern: regular expression that finds the patient in a case's id, by its first
            group or as a whole; None takes every case for a patient of its own.

    Raises:
        UserError: dataset.json or a list of splits is unusable, a file is missing.
    """
    root = Path(root).expanduser()
    cases, problems = survey(root, fold=fold, patient_pattern=patient_pattern)
    found = cases_or_first_problem(cases, problems, root)
    if splits_file(root) is None and any(case.part == "test" for case in found):
        log.info("no splits_final.json: train and val are nnU-Net's own draw, fold %d", fold)
    return found


def survey(
    root: Path | str, *, fold: int = 0, patient_pattern: str | None = None
) -> tuple[list[Case], list[DataError]]:
    """Like `find_cases`, but goes on after a case with a problem and returns them all."""
    root = Path(root).expanduser()
    about = read_dataset_json(root)
    try:
        training, problems = _pairs(root, about, "Tr")
        testing, wrong = _pairs(root, about, "Ts")
    except OSError as error:
        raise unlisted(Path(error.filename or root), error) from error
    problems += wrong
    if not (training or testing or problems):
        raise DataError(
            f"no images with labels are here (ending {about.ending})",
            root,
            "Needed are imagesTr/<case>_0000 and labelsTr/<case>, or MSD's imagesTr/<case>; "
            "dataset.json says the ending.",
        )
    for case in [case for case in testing if case in training]:
        problem = f"{case} is in labelsTr and in labelsTs"
        problems.append(DataError(problem, testing.pop(case).label_path, "Keep one of the two."))
    found = {
        case.id: case
        for case in with_patients([*training.values(), *testing.values()], patient_pattern)
    }
    patients = {id_: case.patient for id_, case in found.items()}
    parts, wrong = parts_of_fold(root, fold, {case: patients[case] for case in training})
    problems += wrong
    tested = {patients[case] for case in testing}
    for case in training:
        if patients[case] in tested:
            problem = f"{case} is for training, but {patients[case]} is tested too (labelsTs)"
            remedy = "A patient belongs in one part: take the case out of one of them."
            problems.append(DataError(problem, training[case].label_path, remedy))
    parts |= dict.fromkeys(testing, "test")
    cases = [replace(found[case], part=parts.get(case), fold=fold) for case in sorted(found)]
    return cases, problems


def _pairs(root: Path, about: DatasetJson, part: str) -> tuple[dict[str, Case], list[DataError]]:
    """Labelled cases of imagesTr or imagesTs; a test image need not have a label."""
    labels = dict(_files(root / f"labels{part}", about.ending))
    images = _by_case(root / f"images{part}", about.ending, labels)
    cases: dict[str, Case] = {}
    problems: list[DataError] = []
    for case, label in labels.items():
        try:
            first, *others = _channels(root / f"images{part}", case, images.get(case, {}), about)
        except DataError as error:
            problems.append(error)
            continue
        asked = 1 if others else len(about.channels)
        reader = partial(read, channels=asked) if first.name.lower().endswith(PICTURES) else read
        cases[case] = Case(
            case, case, None, None, first, label, reader, tuple(others),
            value_names=about.value_names,
        )  # fmt: skip
    if part == "Tr":
        for case in sorted(set(images) - set(labels)):
            path = root / "labelsTr" / f"{case}{about.ending}"
            remedy = f"Put it there, or take the image ({case}) out of imagesTr."
            problems.append(DataError("the label is missing", path, remedy))
    return cases, problems


def _files(folder: Path, ending: str) -> Iterator[tuple[str, Path]]:
    """Names without the ending, and files; macOS's `._` twins and other hidden files left out."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.endswith(ending) and not path.name.startswith("."):
            yield readable(path.name[: -len(ending)]), path


def _by_case(folder: Path, ending: str, labels: Mapping[str, Path]) -> Files:
    """Images by case and channel. `case_0001` is a case where a label has that very name."""
    found: Files = defaultdict(dict)
    for stem, path in _files(folder, ending):
        match = None if stem in labels else CHANNEL.fullmatch(stem)
        case, channel = (match[1], int(match[2])) if match else (stem, WHOLE)
        found[case][channel] = path
    return found


def _channels(folder: Path, case: str, files: dict[int, Path], about: DatasetJson) -> list[Path]:
    """The files of a case in the order of its channels.

    Raises:
        UserError: one is missing, or there are more than dataset.json names.
    """
    names, ending = about.channels, about.ending
    if set(files) == {WHOLE}:
        return [files[WHOLE]]
    if WHOLE in files:
        problem = f"{case} is there as one file and as a file per channel"
        raise DataError(problem, files[WHOLE], "Keep one of the two.")
    if set(files) == {0} and len(names) > 1 and ending in PICTURES:
        return [files[0]]  # a colour picture is one file
    for number, name in enumerate(names):
        if number not in files:
            path = folder / f"{case}_{number:04d}{ending}"
            remedy = f"dataset.json names {len(names)} channels: get the file, or correct it."
            raise DataError(f"the image is missing (channel {name})", path, remedy)
    if len(files) > len(names):
        remedy = f"dataset.json names {len(names)}: correct channel_names, or move the file out."
        raise DataError(f"{case} has {len(files)} channels", files[max(files)], remedy)
    return [files[number] for number in range(len(names))]


def read(case: Case, *, channels: int = 1) -> Volume:
    """Read a case: all files of its channels, and its label. Geometry is the first channel's.

    Args:
        case: which.
        channels: in each file, of pictures: 3 is colour.

    Raises:
        UserError: a file is missing or damaged, channels or label do not fit each other.
    """
    paths = (case.image_path, *case.more_images)
    image, *others = (read_volume(path, channels) for path in paths)
    for path, one in zip(case.more_images, others, strict=True):
        if one.image.shape != image.image.shape:
            problem = f"the channel has shape {one.image.shape}, the first one {image.image.shape}"
            raise DataError(f"{problem} (z, channel, y, x)", path, "Resample it onto the first.")
        check_same_geometry(image, one, case.image_path, path)
    grey = [as_float32(path, one.image) for path, one in zip(paths, (image, *others), strict=True)]
    array = np.concatenate(grey, axis=1)
    label = None
    if case.label_path is not None:
        file = read_label(case.label_path)
        if len(file.image) != 1:
            problem = f"the label has {len(file.image)} channels"
            raise DataError(problem, case.label_path, "A label has one number per voxel.")
        check_same_geometry(image, file, case.image_path, case.label_path)
        label = as_label(file.image[0, :, 0], case.label_path)
    return replace(image, image=array, label=label)


# ---- what data-check adds -----------------------------------------------------------------------


def folder_problems(root: Path, cases: Sequence[Case]) -> Iterator[Problem]:
    """A number of cases unlike dataset.json's, a list of splits that is not read."""
    about = read_dataset_json(root)
    trained = [case for case in cases if case.part != "test"]
    if about.count is not None and about.count != len(trained):
        problem = f"numTraining is {about.count}, usable training cases are {len(trained)}"
        yield Problem("warning", NAME, problem, "Complete the data set, or correct the number.")
    if splits_file(root) is None and any(root.glob("splits_final.pkl")):
        problem = "it is a pickle, which can run code: it is not read"
        yield Problem("warning", "splits_final.pkl", problem, "Save it as splits_final.json.")
