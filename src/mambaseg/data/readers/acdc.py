"""ACDC (Bernard et al., IEEE TMI 37(11), 2018): the official folders, or h5 files (`acdc_h5`).

    [database/][training/ | testing/]patient001/
        Info.cfg                        ED: 1, ES: 12, Group: DCM, ...
        patient001_frame01.nii.gz       patient001_frame01_gt.nii.gz
        patient001_frame12.nii.gz       patient001_frame12_gt.nii.gz
        patient001_frame12_scribble.nii.gz      where there are scribbles

Labels: 0 background, 1 right ventricle, 2 myocardium, 3 left ventricle.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np

from mambaseg.data.case import Case, Scribble
from mambaseg.data.classes import IGNORED
from mambaseg.data.formats.nifti import read_nifti
from mambaseg.data.readers import acdc_h5
from mambaseg.data.readers.acdc_h5 import UNLABELLED
from mambaseg.data.readers.reader import Found, Problem, reader
from mambaseg.data.splits import LISTED
from mambaseg.data.validation import (
    DataError,
    as_float32,
    as_label,
    check_file,
    check_same_geometry,
    unlisted,
)
from mambaseg.data.volume import Volume
from mambaseg.errors import counted

PATIENT = re.compile(r"patient\d+")
# Anything else is not ours: `_4d` (the whole cine), `_scribble`, macOS's `._` twins.
FRAME = re.compile(r"(patient\d+)_frame(\d+)(_gt)?\.nii(?:\.gz)?")
NAMES = (PATIENT, FRAME, acdc_h5.FILE_NAME, re.compile(r"info\.cfg"))
FOLDERS = ("", "training", "testing", "database/training", "database/testing")
INFO_BYTES = 2**16  # of an Info.cfg that are read; real ones have about 100
IN_PLANE_MM, BETWEEN_SLICES_MM = (0.2, 5.0), (0.5, 20.0)  # ACDC: 0.7 to 1.9, 5 to 10
MYOCARDIUM, LEFT_VENTRICLE = 2, 3
# Of the pixel sides where a left ventricle ends, so many border on myocardium: in ACDC's 200 cases
# at least 98 %, with two of its classes exchanged at most 46 %.
ENCLOSED = 0.75


def _entries(root: Path, folders: Iterable[str]) -> Iterator[Path]:
    places = (root / folder for folder in sorted(set(folders)))
    return chain.from_iterable(place.iterdir() for place in places if place.is_dir())


def _recognises(root: Path) -> bool:
    """Whether anything is named as ACDC names it, also in other letters."""
    names = (path.name.lower() for path in _entries(root, (*FOLDERS, *acdc_h5.FOLDERS)))
    return any(pattern.fullmatch(name) for name in names for pattern in NAMES)


def _remarks(volume: Volume) -> Iterator[str]:
    """Sentences about a left ventricle that is not enclosed, and about an unusual voxel size."""
    share = None if volume.label is None else _enclosed_share(volume.label)
    if share is not None and share < ENCLOSED:
        yield (
            f"only {share:.0%} of the left ventricle's border is on myocardium: are the labels "
            "1 right ventricle, 2 myocardium, 3 left ventricle?"
        )
    limits = (BETWEEN_SLICES_MM, IN_PLANE_MM, IN_PLANE_MM)
    spacing = volume.spacing or ()
    if any(not low <= side <= high for side, (low, high) in zip(spacing, limits, strict=False)):
        shown = " × ".join(f"{side:g}" for side in spacing)
        yield f"unusual voxel size {shown} mm (z, y, x)"


def _enclosed_share(label: np.ndarray) -> float | None:
    """Share of the left ventricle's border, within slices, that is on myocardium."""
    padded = np.pad(label, ((0, 0), (1, 1), (1, 1)))
    ventricle = padded == LEFT_VENTRICLE
    sides = enclosed = 0
    for axis in (1, 2):
        for step in (1, -1):
            beyond = np.roll(padded, step, axis)[ventricle]
            sides += int(np.count_nonzero((beyond != LEFT_VENTRICLE) & (beyond != IGNORED)))
            enclosed += int(np.count_nonzero(beyond == MYOCARDIUM))
    return enclosed / sides if sides else None


@reader(
    example="ACDC (patient001/patient001_frame01.nii.gz or data/patient001_frame01.h5)",
    remedy="Known layouts: official (patient001/patient001_frame01.nii.gz with _gt and Info.cfg, "
    "also under training/ and testing/), SSL4MIS (data/patient001_frame01.h5), WSL4MIS "
    "(ACDC_training_volumes/patient001_frame01.h5). ACDC is free after accepting its terms: "
    "https://humanheart-project.creatis.insa-lyon.fr/database/#collection/637218c173e9f0047faa00fb "
    "(cite Bernard et al., IEEE TMI 2018). Unpack it and point data.root (or ACDC_ROOT) at the "
    "folder that holds training/ and testing/. To try without it: data=phantom.",
    recognises=_recognises,
    split=lambda root: "random",
    remarks=_remarks,
)
def find_cases(root: Path) -> Iterator[Found]:
    """ED and ES of every patient: "patient001_ED", "patient001_ES", ..."""
    folders = sorted(
        (path for path in _entries(root, FOLDERS) if PATIENT.fullmatch(path.name)),
        key=lambda path: (path.name, path),
    )
    files = acdc_h5.volume_files(root)
    if folders and files:
        remedy = f"Point data.root at one of them: {folders[0].parent} or {files[0].parent}."
        raise DataError("holds both NIfTI patient folders and h5 volumes", root, remedy)
    yield from _misnamed(_entries(root, (*FOLDERS, *acdc_h5.FOLDERS)))
    found = list(_official(folders) if folders else acdc_h5.find_volumes(files))
    yield from found
    patients = {one.patient for one in found if isinstance(one, Case)}
    yield from _gaps(patients)


def _misnamed(entries: Iterable[Path]) -> Iterator[DataError]:
    """Errors for what is named like ours but for upper and lower case; it would be overlooked."""
    for path in sorted(entries):
        name = path.name.lower()
        ours = path.with_name("Info.cfg" if name == "info.cfg" else name)
        known = any(pattern.fullmatch(name) for pattern in NAMES)
        # A disk that ignores case opens the file by our name too: then nothing is lost.
        if known and path != ours and not (ours.exists() and ours.samefile(path)):
            remedy = f"Rename it to {ours.name}, or move it out of the data set."
            yield DataError("is not spelt as ACDC spells it", path, remedy)


def _official(folders: Iterable[Path]) -> Iterator[Case | DataError]:
    """The cases of all patients' folders; a problem of one does not hide the others."""
    seen: dict[str, Path] = {}
    for folder in folders:
        if seen.setdefault(folder.name, folder) != folder:
            problem = f"{folder.name} is there twice, also as {seen[folder.name]}"
            yield DataError(problem, folder, "Keep one of the two folders.")
        elif not folder.is_dir():
            target = "leads to nothing" if folder.is_symlink() else "is a file"
            remedy = "Put the patient's folder there, or move this out of the data set."
            yield DataError(f"is named as a patient's folder and {target}", folder, remedy)
        else:
            try:
                yield from _patient(folder)
            except OSError as error:
                yield unlisted(folder, error)


def _patient(folder: Path) -> Iterator[Case | DataError]:
    """ED and ES of one patient; every frame where Info.cfg does not say which these are."""
    patient = folder.name
    images: dict[int, Path] = {}
    labels: dict[int, Path] = {}
    yield from _misnamed(folder.iterdir())
    for path in sorted(folder.iterdir()):
        match = FRAME.fullmatch(path.name)
        if match and match[1] == patient:
            files, frame = labels if match[3] else images, int(match[2])
            if files.setdefault(frame, path) != path:
                problem = f"there are two files for frame {frame}, also {files[frame].name}"
                yield DataError(problem, path, "Keep one of the two files.")
    try:
        phases, group = _read_info(folder / "Info.cfg")
    except DataError as error:
        yield error
        phases, group = {f"frame{frame:02d}": frame for frame in images}, None
    for phase, frame in phases.items():
        image, label = images.get(frame), labels.get(frame)
        if image:
            scribble = image.with_name(re.sub(r"\.nii", "_scribble.nii", image.name, count=1))
            yield Case(
                f"{patient}_{phase}",
                patient,
                phase,
                group,
                image,
                label,
                read_official,
                scribble=Scribble(scribble, UNLABELLED, read_official)
                if scribble.is_file()
                else None,
            )
        else:
            present = ", ".join(f"{number:02d}" for number in sorted(images)) or "none"
            yield DataError(
                f"the file is missing; Info.cfg says that {phase} is frame {frame} "
                f"(frames here: {present})",
                folder / f"{patient}_frame{frame:02d}.nii.gz",
                f"Get {patient} again, or correct {phase} in its Info.cfg.",
            )


def _read_info(path: Path) -> tuple[dict[str, int], str | None]:
    """Frame numbers of ED and ES, and the pathology group, of a file of lines "key: value"."""
    check_file(path)
    with path.open("rb") as file:
        text = file.read(INFO_BYTES).decode("utf-8-sig", errors="replace")
    fields: dict[str, set[str]] = defaultdict(set)
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()].add(value.strip()[:20])
    said = [", ".join(sorted(fields[phase])) for phase in acdc_h5.PHASES]
    if not all(re.fullmatch(r"\d{1,6}", one) for one in said) or int(said[0]) == int(said[1]):
        problem = f"ED and ES are not one frame number each (ED: {said[0]}; ES: {said[1]})"
        raise DataError(problem, path, 'It has lines such as "ED: 1" and "ES: 12".')
    frames = dict(zip(acdc_h5.PHASES, map(int, said), strict=True))
    return frames, min(fields["Group"], default="") or None


def _gaps(patients: set[str]) -> Iterator[Problem]:
    """A warning where patients, who are numbered without gaps, were probably lost."""
    numbers = sorted({int(patient.removeprefix("patient")) for patient in patients})
    gaps = [range(one + 1, other) for one, other in pairwise(numbers) if other > one + 1]
    if gaps:  # a number with a typing error makes a gap of millions: name a few only
        names = ", ".join(f"patient{number:03d}" for number in islice(chain(*gaps), LISTED))
        problem = f"{counted(sum(map(len, gaps)), 'patient')} missing"
        remedy = "Complete the data set; published splits need every patient."
        yield Problem("warning", names, problem, remedy)


def read_official(case: Case) -> Volume:
    """Read a NIfTI image with its label; the geometry is the image's."""
    image = read_nifti(case.image_path)
    label = None
    if case.label_path is not None:
        label_file = read_nifti(case.label_path)
        check_same_geometry(image, label_file, case.image_path, case.label_path)
        label = as_label(label_file.image[0, :, 0], case.label_path)
    return replace(image, image=as_float32(case.image_path, image.image[0]), label=label)
