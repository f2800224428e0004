"""The layouts of a data set that are known, for what has to work with any of them.

A layout is recognised by names alone; no image is opened for it. A new one is a module with its
reader and a line in `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mambaseg.data.case import Case
from mambaseg.data.formats.volume import Volume
from mambaseg.data.plausibility import cardiac_remarks
from mambaseg.data.problems import Problem
from mambaseg.data.readers import (
    acdc,
    acdc_check,
    folder,
    mnms,
    nifti_pairs,
    nnunet,
    promise12,
    synapse,
)  # fmt: skip
from mambaseg.data.splits import listed
from mambaseg.data.validation import DataError, unlisted


def _no_names(root: Path) -> tuple[str, ...] | None:
    return None


def _patients_of(root: Path, cases: Sequence[Case]) -> set[str]:
    return {case.patient for case in cases}


def _nothing(*_: object) -> tuple[()]:
    return ()


@dataclass(frozen=True)
class Layout:
    """A layout, and what data-check needs beyond what it does with every one.

    Attributes:
        name: its leaf in conf/data.
        example: what such a folder holds, for messages.
        recognises: whether a folder that exists is meant to be one; looks at names only, and is
            generous: a damaged one is recognised too.
        survey: cases, and what is wrong with the rest; raises a `UserError` when the whole folder
            is unusable.
        class_names: of the classes 0..K-1, where layout or folder tell them; raises a `UserError`
            when the file that should is unusable.
        split: `data.split` that fits without further words.
        slicing: `data.slicing` of its leaf.
        names_patients: whether its leaf has `patient_pattern`: files alone tell no patients.
        patients: everybody who is there, usable or not.
        further_cases: what is to be read beyond the cases.
        problems: of the folder as a whole.
        remarks: sentences about a volume with that many classes.
    """

    name: str
    example: str
    recognises: Callable[[Path], bool]
    survey: Callable[[Path], tuple[list[Case], list[DataError]]]
    class_names: Callable[[Path], tuple[str, ...] | None] = _no_names
    split: Callable[[Path], str] = lambda root: "random"
    slicing: str = "stored"
    names_patients: bool = False
    patients: Callable[[Path, Sequence[Case]], set[str]] = _patients_of
    further_cases: Callable[[Path, Sequence[Case]], Sequence[Case]] = _nothing
    problems: Callable[[Path, Sequence[Case]], Iterable[Problem]] = _nothing
    remarks: Callable[[Volume, int], Iterable[str]] = _nothing


ACDC = Layout(
    name="acdc",
    example="ACDC (patient001/patient001_frame01.nii.gz or data/patient001_frame01.h5)",
    recognises=acdc_check.recognises,
    survey=acdc.survey,
    class_names=lambda root: ("background", "RV", "MYO", "LV"),
    patients=acdc_check.patients,
    further_cases=acdc_check.without_phase,
    problems=acdc_check.folder_problems,
    remarks=cardiac_remarks,
)
SYNAPSE = Layout(
    name="synapse",
    example="Synapse as TransUNet has it (train_npz/ and test_vol_h5/)",
    recognises=synapse.recognises,
    survey=synapse.survey,
    class_names=lambda root: synapse.CLASSES,
    split=lambda root: "given",
)
BTCV = Layout(
    name="btcv",
    example="BTCV (img/img0001.nii.gz and label/label0001.nii.gz)",
    recognises=synapse.recognises_btcv,
    survey=synapse.survey_btcv,
    class_names=lambda root: synapse.ORGANS,
    split=lambda root: "given",
)
PROMISE12 = Layout(
    name="promise12",
    example="PROMISE12 (Case00.mhd and Case00_segmentation.mhd, or data/Case00.h5)",
    recognises=promise12.recognises,
    survey=promise12.survey,
    class_names=lambda root: ("background", "prostate"),
    split=lambda root: "given",
)
NNUNET = Layout(
    name="nnunet",
    example="nnU-Net and MSD (dataset.json, imagesTr/ and labelsTr/)",
    recognises=nnunet.recognises,
    survey=nnunet.survey,
    class_names=nnunet.class_names,
    split=nnunet.split_of,
    slicing="spacing",
    names_patients=True,
    problems=nnunet.folder_problems,
)
FOLDER = Layout(
    name="folder",
    example="images/ and masks/ with pictures of the same names",
    recognises=folder.recognises,
    survey=folder.survey,
    split=lambda root: "auto",
    names_patients=True,
    problems=folder.numbers_in_masks,
)
VOLUMES = Layout(
    name="nifti",
    example="images/ and labels/ with volumes of the same names, or a.nii.gz and a_seg.nii.gz",
    recognises=nifti_pairs.recognises,
    survey=nifti_pairs.survey,
    split=lambda root: "auto",
    slicing="spacing",
    names_patients=True,
)
MNMS = Layout(
    name="mnms",
    example="M&Ms (Training/Labeled/A0S9V9/A0S9V9_sa.nii.gz)",
    recognises=mnms.recognises,
    survey=mnms.survey,
    class_names=lambda root: mnms.CLASSES,
    split=lambda root: "given",
)
# the first that recognises a folder is taken
LAYOUTS: tuple[Layout, ...] = (NNUNET, MNMS, ACDC, SYNAPSE, BTCV, PROMISE12, FOLDER, VOLUMES)


def find_layout(root: Path) -> Layout:
    """The layout of a folder.

    Raises:
        UserError: there is no such folder, it cannot be listed, or no layout is recognised.
    """
    try:
        if not root.is_dir():
            problem = "is not a folder" if root.exists() else "this folder does not exist"
            raise DataError(problem, root, "Give the folder of the data set (as data.root).")
        found = _recognised(root)
        if found is not None:
            return found
        inside = [child for child in sorted(root.iterdir()) if child.is_dir()]
        below = [child for child in inside if _recognised(child)]
    except OSError as error:
        raise unlisted(Path(error.filename or root), error) from error
    if len(below) > 1:
        names = listed(child.name for child in below)
        problem = f"{len(below)} data sets lie below this folder: {names}"
        raise DataError(problem, root, f"Give the folder of one, such as {below[0]}.")
    hint = f"Did you mean {below[0]}? " if below else ""
    known = "; ".join(layout.example for layout in LAYOUTS)
    raise DataError("no layout of a data set is recognised here", root, f"{hint}Known: {known}.")


def _recognised(root: Path) -> Layout | None:
    return next((layout for layout in LAYOUTS if layout.recognises(root)), None)


def layout_named(name: str) -> Layout:
    """The layout with that name.

    Raises:
        UserError: there is none.
    """
    for layout in LAYOUTS:
        if layout.name == name:
            return layout
    names = ", ".join(layout.name for layout in LAYOUTS)
    raise DataError(f"unknown layout {name!r}: choose one of {names}")
