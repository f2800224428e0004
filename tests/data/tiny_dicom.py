"""Small DICOM series and multi-frame files, and where pydicom alone says that their pixels lie."""

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

ENHANCED_MR, ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.4.1", "1.2.840.10008.5.1.4.1.1.2.1"
AXIAL, SAGITTAL = (1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1)
SIZE = (9, 7)  # rows, columns
PIXEL = (1.5, 1.25)  # mm from row to row, from column to column


def voxels(count, size=SIZE, seed=0):
    """(count, rows, columns) int16."""
    return np.random.default_rng(seed).integers(0, 900, (count, *size)).astype(np.int16)


def write_series(
    folder, count=5, *, axes=AXIAL, step=8.0, at=None, edit=None, name=None, series=None, seed=0,
    size=SIZE,
):  # fmt: skip
    """One file per slice.

    Args:
        at: (3,) mm of slice k, by default k steps along the normal.
        edit: called with k and the data set before it is written.
        name: of file k.
    """
    folder.mkdir(parents=True, exist_ok=True)
    normal = np.cross(axes[:3], axes[3:])
    uid, study, frame = series or generate_uid(), generate_uid(), generate_uid()
    for k, pixels in enumerate(voxels(count, size, seed)):
        file = _file(MRImageStorage, uid, study, frame)
        file.InstanceNumber = k + 1
        position = np.array([-10.0, -20.0, 5.0]) + normal * step * k if at is None else at(k)
        file.ImagePositionPatient = [f"{x:.8g}" for x in position]
        file.ImageOrientationPatient = [f"{x:.8g}" for x in axes]
        file.PixelSpacing, file.SliceThickness = list(PIXEL), step
        _fill(file, pixels)
        if edit:
            edit(k, file)
        file.save_as(folder / (name(k, file) if name else f"IM{k:04d}.dcm"))
    return folder


def write_enhanced(
    folder, heights, *, times=1, slices_first=True, slopes=None, kind=ENHANCED_MR, edit=None
):
    """One file of frames `heights` mm along the normal, at each of the times."""
    folder.mkdir(parents=True, exist_ok=True)
    file = _file(kind, generate_uid(), generate_uid(), generate_uid())
    shared = Dataset()
    shared.PixelMeasuresSequence = [Dataset()]
    shared.PixelMeasuresSequence[0].PixelSpacing = list(PIXEL)
    shared.PixelMeasuresSequence[0].SliceThickness = 6
    shared.PlaneOrientationSequence = [Dataset()]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = list(AXIAL)
    file.SharedFunctionalGroupsSequence = [shared]
    order = [(t, k) for t in range(times) for k in range(len(heights))]
    order = order if slices_first else sorted(order, key=lambda pair: pair[1])
    groups = []
    for t, k in order:
        one = Dataset()
        one.PlanePositionSequence = [Dataset()]
        one.PlanePositionSequence[0].ImagePositionPatient = [-10, -20, heights[k]]
        one.FrameContentSequence = [Dataset()]
        one.FrameContentSequence[0].TemporalPositionIndex = t + 1
        one.FrameContentSequence[0].DimensionIndexValues = [1, k + 1, t + 1]
        if slopes:
            one.PixelValueTransformationSequence = [Dataset()]
            one.PixelValueTransformationSequence[0].RescaleSlope = slopes[k]
            one.PixelValueTransformationSequence[0].RescaleIntercept = 0
        groups.append(one)
    file.PerFrameFunctionalGroupsSequence = groups
    file.NumberOfFrames = len(groups)
    _fill(file, voxels(len(groups)))
    if edit:
        edit(file)
    file.save_as(folder / "all.dcm")
    return folder


def _file(kind, series, study, frame):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = kind, generate_uid()
    file = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
    file.Modality, file.PatientID, file.PatientName = "MR", "p7", "Doe^Jane"
    file.StudyInstanceUID, file.SeriesInstanceUID, file.FrameOfReferenceUID = study, series, frame
    file.StudyID, file.SeriesNumber = "1", 1
    return file


def _fill(file, pixels):
    file.Rows, file.Columns = pixels.shape[-2:]
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated = file.BitsStored = 16
    file.HighBit, file.PixelRepresentation = 15, 1
    file.PixelData = pixels.astype("<i2").tobytes()
    file["PixelData"].VR = "OW"


def planes(folder):
    """Each frame below a folder: pixels (H, W), position, orientation and (row, column) size."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        file = pydicom.dcmread(path)
        pixels = file.pixel_array.reshape(-1, file.Rows, file.Columns).astype(float)
        if "PerFrameFunctionalGroupsSequence" not in file:
            slope, intercept = file.get("RescaleSlope", 1), file.get("RescaleIntercept", 0)
            place = file.ImagePositionPatient, file.ImageOrientationPatient, file.PixelSpacing
            yield pixels[0] * float(slope) + float(intercept), *place
            continue
        shared = file.SharedFunctionalGroupsSequence[0]
        for plane, frame in zip(pixels, file.PerFrameFunctionalGroupsSequence, strict=True):
            slope = 1
            if "PixelValueTransformationSequence" in frame:
                slope = frame.PixelValueTransformationSequence[0].RescaleSlope
            yield (
                plane * float(slope),
                frame.PlanePositionSequence[0].ImagePositionPatient,
                shared.PlaneOrientationSequence[0].ImageOrientationPatient,
                shared.PixelMeasuresSequence[0].PixelSpacing,
            )


def affine_of(geometry):
    """The 4x4 affine of `Image.header`, in DICOM's axes."""
    affine = np.eye(4)
    affine[:3] = [geometry[row] for row in ("srow_x", "srow_y", "srow_z")]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def assert_same_voxels(image, folder, *, tolerance=0.01):
    """Every pixel that pydicom reads lies in the image where its header says, with its value."""
    affine = affine_of(image.header)
    left = [list(at) for at in np.ndindex(*image.image.shape[:2])]
    for pixels, position, axes, size in planes(folder):
        o, (height, width), p = np.array(axes, float), map(float, size), np.array(position, float)
        rows, columns = np.indices(pixels.shape)
        world = (
            p
            + columns[..., None] * o[:3] * width
            + rows[..., None] * o[3:] * height
        )  # fmt: skip
        index = np.einsum("ij,hwj->hwi", np.linalg.inv(affine[:3, :3]), world - affine[:3, 3])
        near = np.rint(index).astype(int)
        off = np.einsum("ij,hwj->hwi", affine[:3, :3], index - near)
        assert np.abs(off).max() <= tolerance
        x, y, z = np.moveaxis(near, -1, 0)
        times = [t for t, at in left if at == z[0, 0] and np.allclose(
            image.image[t, z, 0, y, x], pixels, rtol=1e-6, atol=0)]  # fmt: skip
        assert times, f"no frame at slice {z[0, 0]} has these pixels"
        left.remove([times[0], z[0, 0]])
    assert not left
