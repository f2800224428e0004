"""Label maps as DICOM segmentation objects, through highdicom; the only file that imports it."""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mambaseg.data.formats.dicom import stack
from mambaseg.data.validation import DataError
from mambaseg.errors import UserError

# What names of classes mean in SNOMED CT: (code, meaning). Others are called tissue, the most
# general type that CID 7150 has; their names are the segments' labels all the same.
_ANATOMY = {
    "LV": ("87878005", "Left ventricle"),
    "RV": ("53085002", "Right ventricle"),
    "MYO": ("49848007", "Myocardium of left ventricle"),
}
_STRUCTURE, _TISSUE = ("91723000", "Anatomical Structure"), ("85756007", "Tissue")
_TYPE_2 = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
    "StudyDate", "StudyTime",
)  # fmt: skip
_WITHOUT = "dicom_seg=false writes the NIfTI label map alone."


def available() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("highdicom") is not None


def require_series(sources: Iterable[Sequence[Path]]) -> None:
    """Raise `UserError` where none can be written of any of the `sources`, or at all.

    Each has the files of its series, none if it is another image.
    """
    if not any(sources):
        raise UserError(
            "dicom_seg=true: no input is a DICOM series. Leave dicom_seg=auto, or give a folder of "
            "DICOM files"
        )
    if not available():
        raise UserError(
            "DICOM segmentations are written with highdicom: pip install 'mambaseg[images]', or "
            "dicom_seg=false"
        )


def to_dicom_seg(
    files: Sequence[Path],
    labels: npt.NDArray[np.uint8],
    *,
    class_names: Sequence[str],
    algorithm: str,
) -> bytes:
    """The content of a DICOM SEG file whose frames lie on the slices of a series.

    Patient, study and frame of reference are the series's, as DICOM demands; the segments are
    binary, and a slice without a class has no frame of it. Labels (T, Z, H, W) are as `read_dicom`
    has the frames, 0 is no segment; `algorithm` is the name of what made them.

    Raises:
        UserError: the series has several times, or lacks what a segmentation refers to.
    """
    import highdicom
    from pydicom.uid import ExplicitVRLittleEndian

    logging.getLogger("highdicom").setLevel(logging.WARNING)  # it tells of every step
    headers, labels = _sources(files, labels)
    release = version("mambaseg")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names and numbers that the series brings along
            segmentation = highdicom.seg.Segmentation(
                source_images=headers,
                pixel_array=labels,
                segmentation_type="BINARY",
                segment_descriptions=_segments(class_names, algorithm[:64], release),
                series_instance_uid=highdicom.UID(),
                series_number=int(headers[0].get("SeriesNumber") or 0) + 1000,
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                manufacturer="mambaseg",
                manufacturer_model_name=algorithm[:64],
                software_versions=release,
                device_serial_number="none",
                transfer_syntax_uid=ExplicitVRLittleEndian,
                omit_empty_frames=bool(labels.any()),
                content_label="SEGMENTATION",
                series_description="Automatic segmentation, for research only",
            )
    except (AttributeError, ValueError, TypeError) as error:  # what foreign headers may lack
        problem = f"the series lacks what a DICOM segmentation refers to ({error})"
        raise DataError(problem, files[0].parent, _WITHOUT) from error
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    if len(labels) == 1 and "PixelMeasuresSequence" in shared:  # 1 mm apart, says highdicom
        shared.PixelMeasuresSequence[0].pop("SpacingBetweenSlices", None)
    stream = io.BytesIO()
    segmentation.save_as(stream)
    return stream.getvalue()


def _sources(
    files: Sequence[Path], labels: npt.NDArray[np.uint8]
) -> tuple[list[Any], npt.NDArray[np.uint8]]:
    """Headers in which what may be empty is there, and labels (frames, H, W) in their order."""
    times, _, spacing = stack(files)
    frames = times[0]
    headers = [frame.header for frame in frames]
    problem = ""
    if len(times) > 1:
        problem = "the series holds several times: a segmentation has one"
    elif len(frames) > 1 and len(files) == 1:  # labels in the order of the file
        labels = labels[:, np.argsort([frame.number for frame in frames])]
        headers = headers[:1]
    elif len(frames) != len(files):
        problem = "the series has several files of several frames"
    if not all(header.get("FrameOfReferenceUID") for header in headers):  # some leave it empty
        problem = "the series has no frame of reference (0020,0052)"
    if problem:
        raise DataError(problem, files[0].parent, _WITHOUT)
    for header in headers:
        for name in _TYPE_2:
            if name not in header:
                setattr(header, name, "")
        # of one slice nothing is known; of several the positions count: some writers put the gap
        # there. DICOM has 16 characters for a number.
        if len(headers) > 1 and spacing:
            header.SpacingBetweenSlices = round(spacing[0], 6)
        if header.get("SliceThickness") is None and spacing:
            header.SliceThickness = round(spacing[0], 6)
    return headers, labels[0]


def _segments(class_names: Sequence[str], algorithm: str, release: str) -> list[Any]:
    """A description of each class but the background."""
    import highdicom

    family = _code("123110", "Artificial Intelligence", "DCM")
    return [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=_code(*(_STRUCTURE if name in _ANATOMY else _TISSUE)),
            segmented_property_type=_code(*_ANATOMY.get(name, _TISSUE)),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=highdicom.AlgorithmIdentificationSequence(
                algorithm, family, release
            ),
        )
        for number, name in enumerate(class_names[1:], start=1)
    ]


def _code(value: str, meaning: str, scheme: str = "SCT") -> Any:
    import highdicom

    return highdicom.sr.CodedConcept(value=value, scheme_designator=scheme, meaning=meaning)
