"""Which label map of a folder belongs to which reference, and whose they are."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mambaseg.data.case import Case
from mambaseg.data.formats.files import NIFTI, read_label, without_ending
from mambaseg.data.formats.images import OVERLAY, PROBABILITIES, UNCERTAINTY
from mambaseg.data.patients import find_alike, with_patient
from mambaseg.data.splits import listed
from mambaseg.data.volume import Volume
from mambaseg.errors import UserError
from mambaseg.storage.untrusted import readable

_PICTURES = (".png", ".tif", ".tiff", ".bmp")  # JPEG blurs numbers
LABELS = (*NIFTI, *_PICTURES)
_REFERENCE = "_gt"  # of ACDC's references, whose images lie beside them
_PHASE = re.compile(r"(?P<patient>.+)_(?P<phase>ED|ES|frame\d+)")
log = logging.getLogger(__name__)


class Pair(NamedTuple):
    """A prediction and its reference."""

    case: Case  # `id` is the prediction's place in its folder, without an ending
    prediction: Path
    reference: Path


def find_pairs(
    predictions: Path, references: Path, patient_pattern: str | None = None
) -> list[Pair]:
    """Pairs by the place in the two folders, endings aside; sorted.

    Where names in the folder of references end in `_gt`, only those are references. The pattern
    is as `data.patient_pattern`; without one a warning says where names look like several label
    maps of one patient.

    Raises:
        UserError: a folder is missing or empty, a file has no partner, or the pattern finds no
            patient in a name.
    """
    predicted = _label_maps(predictions, "predictions")
    expected = _label_maps(references, "references")
    marked = {name: path for name, path in expected.items() if name.endswith(_REFERENCE)}
    if marked:
        expected = {name.removesuffix(_REFERENCE): path for name, path in marked.items()}
    for there, here, place in (
        (predicted, expected, references),
        (expected, predicted, predictions),
    ):
        if alone := there.keys() - here.keys():
            raise UserError(
                f"{place} holds no partner of {len(alone)} label map(s) of the other folder "
                f"({listed(alone)}). Every prediction needs a reference of the same name, and "
                "every reference a prediction."
            )
    cases = {name: _case(name, predicted[name]) for name in sorted(predicted)}
    if patient_pattern is not None:
        cases = {name: with_patient(case, patient_pattern) for name, case in cases.items()}
    elif alike := find_alike(_patients(cases.values())):
        log.warning(
            "%s. If a patient has several label maps, add 'patient_pattern=\"%s\"'",
            alike.problem, alike.pattern,
        )  # fmt: skip
    pairs = [Pair(case, predicted[name], expected[name]) for name, case in cases.items()]
    if same := [pair.case.id for pair in pairs if pair.prediction.samefile(pair.reference)]:
        raise UserError(
            f"{predictions} and {references} hold the same files ({listed(same)}): a label map "
            "agrees with itself. Name the folder of each."
        )
    return pairs


def _case(name: str, path: Path) -> Case:
    """What a name tells of a label map: `p1_ED` and `p1_frame01` are of `p1`, ED is a phase."""
    match = _PHASE.fullmatch(name)
    patient, phase = (match["patient"], match["phase"]) if match else (name, None)
    phase = phase if phase in ("ED", "ES") else None
    return Case(name, patient, phase, None, path, path, _read, patient_assumed=True)


def _patients(cases: Iterable[Case]) -> list[Case]:
    """A case per patient, under their name: that ED and ES are of one is known."""
    return list({case.patient: replace(case, id=case.patient) for case in cases}.values())


def _read(case: Case) -> Volume:
    return read_label(case.image_path)


def _label_maps(folder: Path, role: str) -> dict[str, Path]:
    """Name -> NIfTI file or picture, of all below a folder."""
    if not folder.is_dir():
        raise UserError(f"{role}: there is no folder {folder}")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.name.lower()
        beside = (PROBABILITIES, OVERLAY, *UNCERTAINTY)
        hidden = path.name.startswith(".") or name.endswith(beside)
        if hidden or not name.endswith(LABELS):
            continue
        place = path.parent.relative_to(folder) / without_ending(path.name, LABELS)
        name = readable(place.as_posix())
        if other := found.get(name):
            raise UserError(f"{role}: {path} is there twice, also as {other.name}")
        found[name] = path
    if not found:
        raise UserError(f"{role}: {folder} holds no label map ({', '.join(LABELS)})")
    return found
