"""Volumes with label maps in folders, without a file that describes them.

    images/a.nii.gz     labels/a.nii.gz         or labels/a_seg.nii.gz
    a.nii.gz            a_seg.nii.gz            beside each other, also in folders below
    a/image.nii.gz      a/label.nii.gz          a folder per case

Further places and names: `matching`. Channels are files `a_0000`, `a_0001`, ... or the fourth axis
of one file. NIfTI, MetaImage and NRRD are read.
"""

from __future__ import annotations

import logging
from pathlib import Path

from mambaseg.data.case import Case
from mambaseg.data.formats.files import META_IMAGE, NIFTI
from mambaseg.data.patients import parts_of, with_patients
from mambaseg.data.problems import cases_or_first_problem
from mambaseg.data.readers.matching import Matcher, Pair
from mambaseg.data.readers.nnunet import read
from mambaseg.data.validation import DataError

ENDINGS = (*NIFTI, *META_IMAGE)
EXPECTED = (
    "Expected are images/ and labels/ with files of the same names, or a.nii.gz beside "
    "a_seg.nii.gz (docs/own-data.md names the other layouts), in the folder itself or in its "
    f"train/, val/ and test/; files end in {', '.join(ENDINGS)}."
)
log = logging.getLogger(__name__)


def find_cases(root: Path | str, *, patient_pattern: str | None = None) -> list[Case]:
    """All volumes with their label maps below `root`, sorted by id.

    Args:
        root: the folder.
        patient_pattern: see `name_patients`; None takes every case for a patient of its own.

    Raises:
        UserError: no such folder or layout, an image without a label, two files for one thing, a
            patient in two parts.
    """
    root = Path(root).expanduser()
    cases = with_patients(cases_or_first_problem(*survey(root), root), patient_pattern)
    parts_of(cases)
    return cases


def survey(root: Path) -> tuple[list[Case], list[DataError]]:
    """Like `find_cases`, but goes on after a problem and returns them all.

    Raises:
        UserError: `root` is no folder, cannot be listed, or holds no images with labels.
    """
    cases, problems, notes = _matcher().cases(root, _case)
    for note in notes:
        log.warning(note)
    return cases, problems


def recognises(root: Path) -> bool:
    """Whether volumes and label maps are told apart by the names in a folder; see `Matcher`."""
    return _matcher().recognises(root)


def _matcher() -> Matcher:
    return Matcher(ENDINGS, EXPECTED, channels=True)


def _case(pair: Pair) -> Case:
    if len(pair.labels) > 1:
        problem = f"is one of {len(pair.labels)} label maps of {pair.id}"
        raise DataError(problem, pair.labels[1], "Join them into one file of class numbers.")
    return Case(
        pair.id, pair.id, None, None, pair.image, pair.labels[0], read, pair.channels,
        part=pair.part, patient_assumed=True,
    )  # fmt: skip
