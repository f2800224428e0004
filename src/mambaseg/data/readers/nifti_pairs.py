"""Volumes with label maps in folders, without a file that describes them.

    images/a.nii.gz     labels/a.nii.gz         or labels/a_seg.nii.gz
    a.nii.gz            a_seg.nii.gz            beside each other, also in folders below
    a/image.nii.gz      a/label.nii.gz          a folder per case

Further places and names: `matching`. Channels are files `a_0000`, `a_0001`, ... or the fourth axis
of one file. NIfTI, MetaImage and NRRD are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mambaseg.data.case import Case
from mambaseg.data.formats.files import META_IMAGE, NIFTI
from mambaseg.data.readers.matching import Matcher
from mambaseg.data.readers.nnunet import read
from mambaseg.data.readers.reader import Found, reader
from mambaseg.data.validation import DataError

MATCHER = Matcher((*NIFTI, *META_IMAGE), channels=True)


@reader(
    example="images/ and labels/ with volumes of the same names, or a.nii.gz beside a_seg.nii.gz",
    remedy="Also in train/, val/ and test/; docs/own-data.md names the other layouts. Files end in "
    f"{', '.join(MATCHER.endings)}.",
    recognises=MATCHER.recognises,
    any_names=True,
    class_names=lambda root: None,
)
def find_cases(root: Path, *, patient_pattern: str | None = None) -> Iterator[Found]:
    """All volumes with their label maps; `patient_pattern` is for `with_patients`."""
    for one in MATCHER.find_cases(root, read, patient_pattern):
        if isinstance(one, Case) and one.more_labels:
            problem = f"is another label map of {one.id}"
            yield DataError(problem, one.more_labels[0], "Join them into one of class numbers.")
        else:
            yield one
