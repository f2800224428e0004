"""Synapse multi-organ CT (BTCV, Landman et al. 2015, syn3193805): which cases a folder holds.

Two layouts, recognised by looking at the folder; no image is opened for it.

TransUNet's archive: clipped to [-125, 275] HU and scaled to [0, 1], eight organs, slices for
training and volumes for testing. Voxel sizes were not kept.

    train_npz/case0005_slice000.npz     `image` and `label`, both (512, 512)
    test_vol_h5/case0001.npy.h5         `image` and `label`, both (Z, 512, 512)

The challenge's own files, in HU, with thirteen organs:

    [RawData/][Training/]img/img0001.nii.gz
    [RawData/][Training/]label/label0001.nii.gz

Who is tested is the same in both: the twelve cases of Chen et al. 2021 (TransUNet, section 4.1).
There is no validation part in it; published scores chose their checkpoint by the test cases.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from mambaseg.data.case import Case
from mambaseg.data.formats.volume import Volume
from mambaseg.data.problems import cases_or_first_problem
from mambaseg.data.readers.acdc import read_official
from mambaseg.data.readers.acdc_h5 import read_h5
from mambaseg.data.validation import DataError, as_float32, as_label, check_file, unlisted
from mambaseg.storage.untrusted import ForeignFileError, read_arrays

TEST = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)
SLICE = re.compile(r"case(\d{4})_slice(\d{3,})\.npz")
VOLUME = re.compile(r"case(\d{4})\.npy\.h5")
IMAGE = re.compile(r"img(\d{4})\.nii(?:\.gz)?")
SLICES, VOLUMES = "train_npz", "test_vol_h5"
RAW = ("", "Training", "RawData/Training")

# of the archive's labels 0..8, in the order that most of its users report
CLASSES = (
    "background", "aorta", "gallbladder", "left_kidney", "right_kidney",
    "liver", "pancreas", "spleen", "stomach",
)  # fmt: skip
# of the challenge's labels 0..13
ORGANS = (
    "background", "spleen", "right_kidney", "left_kidney", "gallbladder", "esophagus", "liver",
    "stomach", "aorta", "inferior_vena_cava", "portal_and_splenic_vein", "pancreas",
    "right_adrenal_gland", "left_adrenal_gland",
)  # fmt: skip

HOW_TO_GET = (
    "Known layouts: TransUNet's archive (train_npz/case0005_slice000.npz and "
    "test_vol_h5/case0001.npy.h5), and the challenge's own (img/img0001.nii.gz and "
    "label/label0001.nii.gz, data=btcv), free after registration: "
    "https://www.synapse.org/Synapse:syn3193805."
)
_PAIRED = "Take image and label from the same download."


def recognises(root: Path) -> bool:
    """Whether `root` looks like TransUNet's archive."""
    return (root / SLICES).is_dir() or (root / VOLUMES).is_dir()


def find_cases(root: Path | str) -> list[Case]:
    """All cases of TransUNet's archive, sorted by id.

    Raises:
        UserError: there are none, or a case lacks a slice.
    """
    return cases_or_first_problem(*survey(root), Path(root).expanduser())


def survey(root: Path | str) -> tuple[list[Case], list[DataError]]:
    """Like `find_cases`, but goes on after a case with a problem and returns them all."""
    return _surveyed(root, _survey_archive)


def recognises_btcv(root: Path) -> bool:
    """Whether `root` looks like the challenge's own files: a folder img/ alone may be anybody's."""
    folder = _raw_folder(root)
    return folder is not None and any(IMAGE.fullmatch(path.name) for path in _files(folder / "img"))


def find_btcv(root: Path | str) -> list[Case]:
    """All cases of the challenge's own files that have a label, sorted by id.

    Raises:
        UserError: there are none, or an image lacks its label.
    """
    return cases_or_first_problem(*survey_btcv(root), Path(root).expanduser())


def survey_btcv(root: Path | str) -> tuple[list[Case], list[DataError]]:
    """Like `find_btcv`, but goes on after a case with a problem and returns them all."""
    return _surveyed(root, _survey_raw)


def read_slices(case: Case) -> Volume:
    """Read a training case of the archive: its slices, one file each, as a volume.

    Raises:
        UserError: a slice is missing or damaged, or is not like the others.
    """
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for path in case.sources():
        check_file(path)
        try:
            arrays = read_arrays(path, ("image", "label"), _is_slice)
        except ForeignFileError as error:
            raise DataError(f"is no slice of the archive ({error})", path, _PAIRED) from error
        if missing := {"image", "label"} - arrays.keys():
            raise DataError(f"holds no {' and no '.join(sorted(missing))}", path, _PAIRED)
        shapes = {array.shape for array in (*arrays.values(), *images[:1])}
        if len(shapes) > 1:
            shown = " and ".join(map(str, sorted(shapes)))
            raise DataError(f"slices and labels of {case.id} have shapes {shown}", path, _PAIRED)
        images.append(arrays["image"])
        labels.append(as_label(arrays["label"], path))
    return Volume(as_float32(case.image_path, np.stack(images))[:, None], np.stack(labels))


def organ_remarks(class_names: Iterable[str], voxels: Mapping[str, float]) -> list[str]:
    """What the sizes of the classes say against their names.

    The archive was made in more than one order of classes. In any abdomen the liver is the largest
    of the eight organs and the gallbladder the smallest.

    Args:
        class_names: in the order of the labels.
        voxels: class -> median number of voxels in a case; background is not looked at.
    """
    sizes = {name: voxels[name] for name in list(class_names)[1:] if voxels.get(name)}
    remarks = []
    for organ, extreme, words in (("liver", max, "largest"), ("gallbladder", min, "smallest")):
        if organ in sizes and (found := extreme(sizes, key=lambda name: sizes[name])) != organ:
            remarks.append(
                f"{found} is the {words} of the classes, in an abdomen it is the {organ}: is "
                "data.class_names in the order of the labels? (conf/data/synapse.yaml)"
            )
    return remarks


def _surveyed(
    root: Path | str, survey_in: Callable[[Path], tuple[list[Case], list[DataError]]]
) -> tuple[list[Case], list[DataError]]:
    root = Path(root).expanduser()
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "this folder does not exist"
        raise DataError(problem, root, HOW_TO_GET)
    try:
        cases, problems = survey_in(root)
    except OSError as error:
        raise unlisted(Path(error.filename or root), error) from error
    if not cases and not problems:
        raise DataError("no Synapse cases here", root, HOW_TO_GET)
    return sorted(cases, key=lambda case: case.id), problems


def _survey_archive(root: Path) -> tuple[list[Case], list[DataError]]:
    slices: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in _files(root / SLICES):
        if match := SLICE.fullmatch(path.name):
            slices[f"case{match[1]}"][int(match[2])] = path
    cases, problems = [], []
    for name, files in sorted(slices.items()):
        paths = [files[number] for number in sorted(files)]
        if missing := sorted(set(range(max(files) + 1)) - files.keys()):
            remedy = "Get the archive again."
            problem = f"{name} lacks slice {missing[0]:03d}; the last is {max(files):03d}"
            problems.append(DataError(problem, paths[0].parent, remedy))
            continue
        cases.append(
            Case(
                name,
                name,
                None,
                None,
                paths[0],
                paths[0],
                read_slices,
                more_images=tuple(paths[1:]),
                part="train",
            )
        )
    for path in _files(root / VOLUMES):
        if match := VOLUME.fullmatch(path.name):
            name = f"case{match[1]}"
            if name in slices:
                problem, remedy = f"{name} is in {SLICES} too", "A case belongs in one part."
                problems.append(DataError(problem, path, remedy))
            else:
                cases.append(Case(name, name, None, None, path, path, read_h5, part="test"))
    return cases, problems


def _survey_raw(root: Path) -> tuple[list[Case], list[DataError]]:
    folder = _raw_folder(root)
    cases, problems = [], []
    for path in _files(folder / "img") if folder else []:
        if not (match := IMAGE.fullmatch(path.name)):
            continue
        label = path.parents[1] / "label" / path.name.replace("img", "label", 1)
        if label.is_file():
            name, part = f"img{match[1]}", "test" if int(match[1]) in TEST else "train"
            cases.append(Case(name, name, None, None, path, label, read_official, part=part))
        else:
            problem = f"the label of {path.name} is missing"
            problems.append(DataError(problem, label, "Get the labels of the training part."))
    return cases, problems


def _raw_folder(root: Path) -> Path | None:
    places = (root / place for place in RAW)
    return next((place for place in places if (place / "img").is_dir()), None)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _is_slice(name: str, array: np.ndarray) -> bool:
    return array.ndim == 2 and array.size > 0 and array.dtype.kind in "biuf"
