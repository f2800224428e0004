"""Label maps as DICOM segmentation objects, through highdicom; the only file that imports it."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mambaseg.data.case import DataError
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


def require() -> None:
    """Raise `UserError` unless it is."""
    if not available():
        raise UserError(
            "DICOM segmentations are written with highdicom: pip install -e '.[images]', or "
            "dicom_seg=false"
        )


def to_dicom_seg(
    files: Sequence[Path],
    labels: npt.NDArray[np.uint8],
    *,
    slice_mm: float,
    class_names: Sequence[str],
    algorithm: str,
) -> bytes:
    """The content of a DICOM SEG file whose frames lie on the slices of a series.

    Patient, study and frame of reference are the series's, as DICOM demands; the segments are
    binary, and a slice without a class has no frame of it.

    Args:
        files: the series, one file per slice, in the order of the labels.
        labels: (Z, H, W), 0 is no segment.
        slice_mm: from slice to slice by their positions; also the thickness where none is said.
        class_names: of the labels 0..K-1.
        algorithm: name of what made them.

    Raises:
        UserError: highdicom is not installed, or the series lacks what a segmentation refers to.
    """
    require()
    import highdicom
    from pydicom.uid import ExplicitVRLittleEndian

    headers = [_header(path) for path in files]
    for header in headers:
        # of one slice nothing is known; of several the positions count: some writers put the gap
        # there. DICOM has 16 characters for a number.
        if len(files) > 1:
            header.SpacingBetweenSlices = round(slice_mm, 6)
        if header.get("SliceThickness") is None:
            header.SliceThickness = round(slice_mm, 6)
    release = version("mambaseg")
    described = highdicom.AlgorithmIdentificationSequence(
        name=algorithm[:64], family=_code("123110", "Artificial Intelligence", "DCM"),
        version=release,
    )  # fmt: skip
    try:
        segmentation = highdicom.seg.Segmentation(
            source_images=headers,
            pixel_array=labels,
            segmentation_type="BINARY",
            segment_descriptions=[
                _segment(number, name, described)
                for number, name in enumerate(class_names[1:], start=1)
            ],
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
        raise DataError(
            f"the series lacks what a DICOM segmentation refers to ({error})", files[0].parent,
            _WITHOUT,
        ) from error  # fmt: skip
    stream = io.BytesIO()
    segmentation.save_as(stream)
    return stream.getvalue()


def _header(path: Path) -> Any:
    """A file's header, in which what may be empty is there."""
    import pydicom

    try:
        header = pydicom.dcmread(path, stop_before_pixels=True)
    except Exception as error:  # foreign bytes make pydicom raise nearly anything
        problem = f"cannot be read by pydicom ({type(error).__name__}: {error})"
        raise DataError(problem, path, _WITHOUT) from error
    if "FrameOfReferenceUID" not in header:
        raise DataError("has no frame of reference (0020,0052)", path, _WITHOUT)
    for name in _TYPE_2:
        if name not in header:
            setattr(header, name, "")
    return header


def _segment(number: int, name: str, algorithm: Any) -> Any:
    import highdicom

    known = name in _ANATOMY
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=_code(*(_STRUCTURE if known else _TISSUE)),
        segmented_property_type=_code(*_ANATOMY.get(name, _TISSUE)),
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=algorithm,
    )


def _code(value: str, meaning: str, scheme: str = "SCT") -> Any:
    import highdicom

    return highdicom.sr.CodedConcept(value=value, scheme_designator=scheme, meaning=meaning)
