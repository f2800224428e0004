"""DICOM segmentations, read back by pydicom and highdicom and held against NIfTI and sources."""

import json
import logging

import nibabel
import numpy as np
import pytest

from data import tiny_dicom
from data.test_itk import oblique, write_series
from data.tiny_dicom import write_enhanced
from mambaseg.app.ensemble import restore_predictor
from mambaseg.data.formats.images import find_images
from mambaseg.errors import UserError
from tiny_checkpoints import CLASSES, write_checkpoint

pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom")

FRAME = "1.2.826.0.1.3680043.2.1125.7"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "tiny.ckpt")


def write_whole_series(folder, image, *, leave_out=(), empty=()):
    """A series with what a scanner writes, its files in an order that is not the slices'."""
    write_series(folder, image)
    for path in folder.glob("*.dcm"):
        slice_ = pydicom.dcmread(path)
        slice_.SOPClassUID = slice_.file_meta.MediaStorageSOPClassUID = pydicom.uid.MRImageStorage
        slice_.FrameOfReferenceUID, slice_.SeriesNumber = FRAME, 3
        slice_.PatientID, slice_.PatientName, slice_.StudyID = "p7", "Doe^Jane", "s1"
        for name in leave_out:
            delattr(slice_, name)
        for name in empty:
            setattr(slice_, name, "")
        slice_.save_as(path)
    return folder


def predict(checkpoint, place, output, **options):
    predictor = restore_predictor([checkpoint], device="cpu", **options)
    return predictor.predict(find_images(str(place), outside=output), output)


def test_every_voxel_and_place_is_that_of_the_series(checkpoint, tmp_path):
    folder = write_whole_series(tmp_path / "series", oblique((19, 22, 4)))
    outcome = predict(checkpoint, folder, tmp_path / "out")
    assert outcome.done == ["series"] and not outcome.failed
    nifti = nibabel.load(tmp_path / "out" / "series.nii.gz")
    labels = np.asarray(nifti.dataobj).T  # (Z, H, W)
    assert set(np.unique(labels)) == {0, 1, 2, 3}
    seg = pydicom.dcmread(tmp_path / "out" / "series_seg.dcm")
    sources = {str(s.SOPInstanceUID): s for s in map(pydicom.dcmread, folder.glob("*.dcm"))}
    one = next(iter(sources.values()))
    for name in ("FrameOfReferenceUID", "StudyInstanceUID", "PatientID", "PatientName"):
        assert seg[name].value == one[name].value
    assert seg.SeriesInstanceUID != one.SeriesInstanceUID and seg.Modality == "SEG"
    assert [segment.SegmentLabel for segment in seg.SegmentSequence] == CLASSES[1:]

    # frame by frame, with pydicom alone: where it lies, what it shows, what it refers to
    to_lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ nifti.affine
    heights = [np.linalg.inv(to_lps) @ [*s.ImagePositionPatient, 1.0] for s in sources.values()]
    slices = {uid: round(height[2]) for uid, height in zip(sources, heights, strict=True)}
    shared, seen = seg.SharedFunctionalGroupsSequence[0], np.zeros_like(labels)
    axes = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    np.testing.assert_allclose(axes, one.ImageOrientationPatient, atol=1e-6)
    measures = shared.PixelMeasuresSequence[0]
    np.testing.assert_allclose(measures.PixelSpacing, one.PixelSpacing)
    assert float(measures.SpacingBetweenSlices) == pytest.approx(nifti.header.get_zooms()[2])
    pixels = seg.pixel_array
    for plane, frame in zip(pixels, seg.PerFrameFunctionalGroupsSequence, strict=True):
        position = frame.PlanePositionSequence[0].ImagePositionPatient
        refers = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        np.testing.assert_allclose(position, sources[refers].ImagePositionPatient, atol=1e-4)
        np.testing.assert_allclose(position, (to_lps @ [0, 0, slices[refers], 1])[:3], atol=1e-3)
        number = frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        assert not seen[slices[refers]][plane > 0].any()
        seen[slices[refers]][plane > 0] = number
    assert np.array_equal(seen, labels)

    # and by the source's identity, as a viewer asks for it
    read = highdicom.seg.segread(tmp_path / "out" / "series_seg.dcm")
    order = sorted(slices, key=slices.__getitem__)
    combined = read.get_pixels_by_source_instance(order, combine_segments=True)
    assert np.array_equal(combined, labels)


def test_a_series_without_any_label_has_an_empty_segmentation(checkpoint, tmp_path):
    from mambaseg.data.formats.dicom_seg import to_dicom_seg

    folder = write_whole_series(tmp_path / "series", oblique())
    files = sorted(folder.glob("*.dcm"))
    content = to_dicom_seg(
        files, np.zeros((1, 4, 12, 9), np.uint8), class_names=CLASSES, algorithm="unet"
    )
    (tmp_path / "seg.dcm").write_bytes(content)
    assert not pydicom.dcmread(tmp_path / "seg.dcm").pixel_array.any()


def test_finished_ones_are_skipped_and_missing_ones_made_where_they_are_demanded(
    checkpoint, tmp_path
):
    folder, out = write_whole_series(tmp_path / "series", oblique()), tmp_path / "out"
    predict(checkpoint, folder, out, dicom_seg=False)
    assert not list(out.glob("*.dcm"))
    assert predict(checkpoint, folder, out).skipped
    assert predict(checkpoint, folder, out, dicom_seg=True).done and list(out.glob("*_seg.dcm"))
    assert predict(checkpoint, folder, out, dicom_seg=True).skipped


@pytest.mark.parametrize("how", ["leave_out", "empty"])
def test_headers_that_say_too_little(checkpoint, tmp_path, caplog, how):
    folder, out = tmp_path / "series", tmp_path / "out"
    write_whole_series(folder, oblique(), **{how: ["FrameOfReferenceUID", "PatientID"]})
    assert predict(checkpoint, folder, out).done and not list(out.glob("*.dcm"))
    assert "no series_seg.dcm" in caplog.text and "frame of reference" in caplog.text
    failed = predict(checkpoint, folder, tmp_path / "again", dicom_seg=True).failed
    assert "no frame of reference" in failed["series"] and "dicom_seg=false" in failed["series"]
    assert json.loads((tmp_path / "again/series.json").read_text())["unfinished"]
    other = write_whole_series(tmp_path / "other", oblique(), leave_out=["PatientID", "StudyID"])
    assert predict(checkpoint, other, out, dicom_seg=True).done == ["other"]


@pytest.mark.parametrize("heights", [[0, 8, 16, 24], [24, 16, 8, 0], [0, 16, 8, 24]])
def test_frames_of_one_file_in_any_order(checkpoint, tmp_path, heights, caplog, recwarn):
    folder = write_enhanced(tmp_path / "scan", heights)
    with caplog.at_level(logging.INFO):
        predict(checkpoint, folder, tmp_path / "out", dicom_seg=True)
    assert not [record for record in caplog.records if record.name.startswith("highdicom")]
    assert not recwarn.list
    nifti = nibabel.load(tmp_path / "out/scan.nii.gz")
    labels = np.asarray(nifti.dataobj)
    seg = pydicom.dcmread(tmp_path / "out/scan_seg.dcm")
    seen = np.zeros_like(labels)
    to_voxel = np.linalg.inv(nifti.affine) @ np.diag([-1.0, -1.0, 1.0, 1.0])
    for plane, frame in zip(seg.pixel_array, seg.PerFrameFunctionalGroupsSequence, strict=True):
        position = frame.PlanePositionSequence[0].ImagePositionPatient
        place = to_voxel @ [*map(float, position), 1.0]
        np.testing.assert_allclose(place[:3], [0, 0, round(place[2])], atol=1e-3)
        number = frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        seen[:, :, round(place[2])][plane.T > 0] = number
    assert labels.any() and np.array_equal(seen, labels)


def test_of_one_slice_no_distance_is_made_up(checkpoint, tmp_path):
    series = tiny_dicom.write_series(tmp_path / "scans" / "b", 1)
    predict(checkpoint, tmp_path / "scans", tmp_path / "out")
    seg = pydicom.dcmread(tmp_path / "out" / "b_seg.dcm")
    measures = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert "SpacingBetweenSlices" not in measures and measures.SliceThickness == 8
    assert nibabel.load(tmp_path / "out" / f"{series.name}.nii.gz").header.get_zooms()[2] == 8


def test_a_cine_has_none(checkpoint, tmp_path, caplog):
    folder = write_enhanced(tmp_path / "scan", [0, 8, 16], times=2)
    assert predict(checkpoint, folder, tmp_path / "out").done
    assert nibabel.load(tmp_path / "out/scan.nii.gz").shape == (7, 9, 3, 2)
    assert "no scan_seg.dcm" in caplog.text and "several times" in caplog.text
    failed = predict(checkpoint, folder, tmp_path / "again", dicom_seg=True).failed
    assert "several times" in failed["scan"] and "dicom_seg=false" in failed["scan"]


def test_without_a_series_a_demanded_segmentation_is_refused(checkpoint, tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((7, 9, 3)), np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(UserError, match=r"^dicom_seg=true: no input is a DICOM series"):
        predict(checkpoint, tmp_path / "a.nii.gz", tmp_path / "out", dicom_seg=True)
    assert not (tmp_path / "out").exists()


def test_without_the_package(checkpoint, tmp_path, monkeypatch):
    folder = write_whole_series(tmp_path / "series", oblique())
    monkeypatch.setattr("mambaseg.data.formats.dicom_seg.available", lambda: False)
    assert predict(checkpoint, folder, tmp_path / "out").done
    assert not list((tmp_path / "out").glob("*.dcm"))
    with pytest.raises(UserError, match=r"pip install 'mambaseg\[images\]'"):
        predict(checkpoint, folder, tmp_path / "out", dicom_seg=True)
