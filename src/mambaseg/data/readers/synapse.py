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
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from mambaseg.data.case import Case
from mambaseg.data.readers.acdc import read_official
from mambaseg.data.readers.acdc_h5 import read_h5
from mambaseg.data.readers.reader import Found, named, reader
from mambaseg.data.validation import DataError, as_float32, as_label, check_file
from mambaseg.data.volume import Volume
from mambaseg.storage.untrusted import ForeignFileError, read_arrays

TEST = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)
SLICE = re.compile(r"case(\d{4})_slice(\d{3,})\.npz")
VOLUME = re.compile(r"case(\d{4})\.npy\.h5")
IMAGE = re.compile(r"img(\d{4})\.nii(?:\.gz)?")
LABEL = re.compile(r"label(\d{4})\.nii(?:\.gz)?")
SLICES, VOLUMES = "train_npz", "test_vol_h5"
RAW = ("", "Training", "RawData/Training")
_PAIRED = "Take image and label from the same download."
_REMEDY = "The challenge's files (data=btcv) are free: https://www.synapse.org/Synapse:syn3193805"


@reader(
    example="Synapse as TransUNet has it (train_npz/case0005_slice000.npz and "
    "test_vol_h5/case0001.npy.h5)",
    remedy=_REMEDY,
    recognises=lambda root: (root / SLICES).is_dir() or (root / VOLUMES).is_dir(),
)
def find_cases(root: Path) -> Iterator[Found]:
    """All cases of TransUNet's archive."""
    slices: dict[str, dict[int, Path]] = defaultdict(dict)
    for match, path in named(root / SLICES, SLICE):
        slices[f"case{match[1]}"][int(match[2])] = path
    for name, files in slices.items():
        first, *others = (files[number] for number in sorted(files))
        if missing := sorted(set(range(max(files) + 1)) - files.keys()):
            problem = f"{name} lacks slice {missing[0]:03d}; the last is {max(files):03d}"
            yield DataError(problem, first.parent, "Get the archive again.")
        else:
            yield Case(
                name, name, None, None, first, first, read_slices, tuple(others), part="train"
            )
    for match, path in named(root / VOLUMES, VOLUME):
        name = f"case{match[1]}"
        if name in slices:
            yield DataError(f"{name} is in {SLICES} too", path, "A case belongs in one part.")
        else:
            yield Case(name, name, None, None, path, path, read_h5, part="test")


def _images(root: Path) -> Iterator[tuple[re.Match[str], Path]]:
    """Images of the challenge; a folder img/ alone may be anybody's."""
    for place in RAW:
        yield from named(root / place / "img", IMAGE)


@reader(
    example="BTCV (img/img0001.nii.gz and label/label0001.nii.gz)",
    remedy=_REMEDY,
    recognises=lambda root: any(_images(root)),
)
def find_btcv(root: Path) -> Iterator[Found]:
    """All cases of the challenge's own files; an image needs its label, and a label its image."""
    with_image = set()
    for match, path in _images(root):
        with_image.add((path.parents[1], match[1]))
        label = path.parents[1] / "label" / path.name.replace("img", "label", 1)
        if label.is_file():
            name, part = f"img{match[1]}", "test" if int(match[1]) in TEST else "train"
            yield Case(name, name, None, None, path, label, read_official, part=part)
        else:
            problem = f"the label of {path.name} is missing"
            yield DataError(problem, label, "Get the labels of the training part.")
    for place in RAW:
        for match, path in named(root / place / "label", LABEL):
            if (root / place, match[1]) not in with_image:
                remedy = "Get the images of the training part, or take the label out."
                yield DataError(f"img{match[1]}, the image of this label, is missing", path, remedy)


def read_slices(case: Case) -> Volume:
    """Read a training case of the archive: its slices, one file each, as a volume."""
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    names = ("image",) if case.label_path is None else ("image", "label")
    for path in case.sources():
        check_file(path)
        try:
            arrays = read_arrays(path, names, _is_slice)
        except ForeignFileError as error:
            raise DataError(f"is no slice of the archive ({error})", path, _PAIRED) from error
        if missing := {*names} - arrays.keys():
            raise DataError(f"holds no {' and no '.join(sorted(missing))}", path, _PAIRED)
        shapes = {array.shape for array in (*arrays.values(), *images[:1])}
        if len(shapes) > 1:
            shown = " and ".join(map(str, sorted(shapes)))
            raise DataError(f"slices and labels of {case.id} have shapes {shown}", path, _PAIRED)
        images.append(arrays["image"])
        labels += [as_label(arrays[name], path) for name in names[1:]]
    image = as_float32(case.image_path, np.stack(images))[:, None]
    return Volume(image, np.stack(labels) if labels else None)


def organ_remarks(class_names: Iterable[str], voxels: Mapping[str, float]) -> list[str]:
    """Say where the sizes of the classes contradict their names, in the order of the labels.

    The archive was made in more than one order of classes. In any abdomen the liver is the largest
    of the eight organs and the gallbladder the smallest. `voxels` is class -> median number of
    voxels in a case; background is not looked at.
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


def _is_slice(name: str, array: np.ndarray) -> bool:
    return array.ndim == 2 and array.size > 0 and array.dtype.kind in "biuf"
