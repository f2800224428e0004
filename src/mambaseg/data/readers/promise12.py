"""PROMISE12 (Litjens et al., Medical Image Analysis 18(2), 2014): which cases a folder holds.

T2-weighted prostate MR, 50 labelled cases, two classes. Layouts, recognised by their names:

    [folders/]Case00.mhd + .raw     [folders/]Case00_segmentation.mhd + .raw    the challenge's own
    [data/]Case00.h5                `image` and `label`, both (Z, H, W)         SSL4MIS's

The split is that of the lists which the Mamba-UNet repository has for it: 35 / 5 / 10 cases.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from mambaseg.data.case import Case
from mambaseg.data.formats.volume import Volume
from mambaseg.data.problems import cases_or_first_problem
from mambaseg.data.readers.acdc_h5 import read_h5
from mambaseg.data.validation import DataError, as_float32, as_label, unlisted

VAL = (2, 7, 22, 31, 46)
TEST = (5, 9, 16, 30, 34, 36, 38, 43, 45, 49)
NAME = re.compile(r"(Case(\d\d))(_segmentation)?\.(mhd|h5)")
MAX_SHIFT_MM = 0.01  # between the grids of an image and its label
DEPTH = 2  # folders below the root: the old site had TrainingData_Part1 to _Part3

HOW_TO_GET = (
    "Known layouts: the challenge's own (Case00.mhd with Case00.raw and Case00_segmentation.mhd, "
    "in the folder or below it) and h5 volumes (data/Case00.h5). https://promise12.grand-challenge.org"
)


def recognises(root: Path) -> bool:
    """Whether `root` holds PROMISE12, by the names of its files."""
    return any(NAME.fullmatch(path.name) for path in _files(root))


def find_cases(root: Path | str) -> list[Case]:
    """All labelled cases below `root`, sorted by id.

    Raises:
        UserError: there are none, a case is there twice, or an image lacks its label.
    """
    return cases_or_first_problem(*survey(root), Path(root).expanduser())


def survey(root: Path | str) -> tuple[list[Case], list[DataError]]:
    """Like `find_cases`, but goes on after a case with a problem and returns them all."""
    root = Path(root).expanduser()
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "this folder does not exist"
        raise DataError(problem, root, HOW_TO_GET)
    found: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    try:
        for path in _files(root):
            if match := NAME.fullmatch(path.name):
                found[match[1]]["label" if match[3] else match[4]].append(path)
    except OSError as error:
        raise unlisted(Path(error.filename or root), error) from error
    if not found:
        raise DataError("no PROMISE12 cases here", root, HOW_TO_GET)
    cases: list[Case] = []
    problems: list[DataError] = []
    for name, files in sorted(found.items()):
        try:
            cases.append(_case(name, files))
        except DataError as error:
            problems.append(error)
    return cases, problems


def _case(name: str, files: dict[str, list[Path]]) -> Case:
    number = int(name.removeprefix("Case"))
    part = "test" if number in TEST else "val" if number in VAL else "train"
    images = [*files["mhd"], *files["h5"]]
    if not images:
        raise DataError(f"there is no {name}.mhd beside it", files["label"][0], "Add the image.")
    for paths in (images, files["label"]):
        if len(paths) > 1:
            problem = f"{name} is there twice, also as {paths[0]}"
            raise DataError(problem, paths[1], "Keep one of the two.")
    image = images[0]
    if image.suffix == ".h5":
        return Case(name, name, None, None, image, image, read_h5, part=part)
    if not files["label"]:
        remedy = "Only the training part of the challenge has labels: leave the others out."
        raise DataError(f"the label {name}_segmentation.mhd is missing", image, remedy)
    label = files["label"][0]
    return Case(
        name, name, None, None, image, label, read_mhd,
        more_images=_voxels(image), more_labels=_voxels(label), part=part,
    )  # fmt: skip


def _voxels(header: Path) -> tuple[Path, ...]:
    """The voxels beside a header, as a rule under this name."""
    path = header.with_suffix(".raw")
    return (path,) if path.is_file() else ()


def read_mhd(case: Case) -> Volume:
    """Read a case of the challenge's own files.

    Raises:
        UserError: a file is missing or damaged, or image and label lie on different grids.
    """
    from mambaseg.data.formats.itk import read_itk

    image = read_itk(case.image_path)
    array = as_float32(case.image_path, image.image[0])
    if case.label_path is None:
        return Volume(array, None, image.spacing)
    label = read_itk(case.label_path)
    for one in (image, label):
        if len(one.image) > 1:
            raise DataError("is a series of volumes", case.image_path, "Use one volume per case.")
    assert image.affine is not None and label.affine is not None  # an ITK image has one
    if not np.allclose(image.affine, label.affine, atol=MAX_SHIFT_MM):
        raise DataError(
            f"the label of {case.id} lies on another grid than the image ({case.image_path.name})",
            case.label_path,
            "Take image and label from the same download.",
        )
    return Volume(array, as_label(label.image[0, :, 0], case.label_path), image.spacing)


def _files(root: Path) -> list[Path]:
    """Files in `root` and the folders below it, not deeper than `DEPTH`; hidden ones left out."""
    files: list[Path] = []
    folders = [root] if root.is_dir() else []
    for _ in range(DEPTH + 1):
        entries = [
            path
            for folder in folders
            for path in sorted(folder.iterdir())
            if not path.name.startswith(".")
        ]
        files += [path for path in entries if not path.is_dir()]
        folders = [path for path in entries if path.is_dir()]
    return sorted(files)
