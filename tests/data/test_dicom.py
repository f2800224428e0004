"""DICOM: every pixel where and as pydicom alone says, or one message that names the file."""

import os
import shutil

import numpy as np
import pytest

from data import tiny_dicom
from data.tiny_dicom import (
    AXIAL,
    ENHANCED_CT,
    SAGITTAL,
    affine_of,
    assert_same_voxels,
    voxels,
    write_enhanced,
    write_series,
)  # fmt: skip
from mambaseg.data.formats.images import find_images
from mambaseg.errors import UserError

pydicom = pytest.importorskip("pydicom")
OBLIQUE = (np.cos(0.4), np.sin(0.4), 0, -np.sin(0.4) * 0.6, np.cos(0.4) * 0.6, 0.8)


def found(place, tmp_path):
    return find_images(str(place), outside=tmp_path / "results")


def read(folder, tmp_path):
    (source,) = found(folder, tmp_path)
    return source.read()


def moved(heights):
    return lambda k: (-10, -20, heights[k])


@pytest.mark.parametrize("axes", [AXIAL, SAGITTAL, (1, 0, 0, 0, 0, -1), OBLIQUE])
@pytest.mark.parametrize("step", [8.0, -8.0, 0.625])
def test_every_pixel_lies_where_its_header_says(tmp_path, axes, step):
    at = np.array([-10.0, -20.0, 5.0]), np.cross(axes[:3], axes[3:]) * step
    folder = write_series(tmp_path / "s", axes=axes, at=lambda k: at[0] + k * at[1])
    image = read(folder, tmp_path)
    assert_same_voxels(image, folder)
    assert image.spacing == pytest.approx((abs(step), 1.5, 1.25)) and image.image.dtype == np.int16


def test_the_order_of_names_and_numbers_does_not_matter(tmp_path):
    order = [3, 0, 4, 1, 2]

    def number(k, file):
        file.InstanceNumber = 9 - order[k]

    folder = write_series(tmp_path / "s", name=lambda k, file: f"{order[k]}.dcm", edit=number)
    image = read(folder, tmp_path)
    assert_same_voxels(image, folder)
    assert np.array_equal(image.image[0, :, 0], voxels(5))


@pytest.mark.parametrize(
    "name", ["{uid}", "CT.{uid}", "IM.{k:04d}", "I{k}", "IM{k}.DCM", "MR{k}.IMA", "scan{k}.dicom"]
)
def test_files_are_found_whatever_their_names(tmp_path, name):
    folder = write_series(
        tmp_path / "s", name=lambda k, file: name.format(k=k, uid=file.SOPInstanceUID)
    )
    assert_same_voxels(read(folder, tmp_path), folder)
    one = next(folder.iterdir())
    assert found(one, tmp_path)[0].read().image.shape == (1, 1, 1, 9, 7)
    assert len(found(folder / "*", tmp_path)) == 5


@pytest.mark.parametrize("name", ["IM{k:04d}.dcm", "I{k}", "{uid}", "IM.{k:04d}"])
@pytest.mark.parametrize("which", [0, 2, 4])
@pytest.mark.parametrize("harm", ["empty", "cut", "few pixels", "garbled", "broken link"])
def test_no_slice_is_left_out_for_being_damaged(tmp_path, which, harm, name):
    paths = []
    write_series(tmp_path / "s", name=lambda k, file: paths.append(
        name.format(k=k, uid=file.SOPInstanceUID)) or paths[-1])  # fmt: skip
    path = tmp_path / "s" / paths[which]
    content = path.read_bytes()
    if harm == "broken link":
        path.unlink()
        path.symlink_to("nowhere")
    else:
        path.write_bytes({
            "empty": b"", "cut": content[:700], "few pixels": content[:-20],
            "garbled": np.random.default_rng(0).bytes(len(content)),
        }[harm])  # fmt: skip
    with pytest.raises(UserError, match=path.name):
        read(tmp_path / "s", tmp_path)


def test_a_damaged_file_stops_every_series_beside_it(tmp_path):
    write_series(tmp_path / "s")
    write_series(tmp_path / "s", name=lambda k, file: f"other{k}.dcm", seed=1)
    (tmp_path / "s" / "z.dcm").write_bytes(b"")
    sources = found(tmp_path / "s", tmp_path)
    assert len(sources) == 2
    for source in sources:
        with pytest.raises(UserError, match=r"z\.dcm"):
            source.read()


def test_what_is_no_image_is_left_out(tmp_path):
    folder = write_series(tmp_path / "s")
    (folder / "._IM0000.dcm").write_bytes(b"\0\5\x16\7")
    (folder / "report.txt").write_text("fine")
    (folder / "Thumbs.db").write_bytes(b"x" * 200)

    def report(k, file):
        file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
        del file.Rows, file.Columns, file.PixelData

    write_series(folder, 1, edit=report, name=lambda k, file: "sr.dcm")
    image = read(folder, tmp_path)
    assert np.array_equal(image.image[0, :, 0], voxels(5))


def test_folders_that_are_links_are_searched_once(tmp_path):
    folder = write_series(tmp_path / "elsewhere" / "s")
    scans = tmp_path / "scans"
    write_series(scans / "a", seed=1)
    (scans / "b").symlink_to(folder, target_is_directory=True)
    (scans / "again").symlink_to(scans / "a", target_is_directory=True)
    (scans / "a" / "up").symlink_to(scans, target_is_directory=True)
    sources = found(scans, tmp_path)
    assert [source.name for source in sources] == ["a", "b"]
    assert np.array_equal(sources[1].read().image[0, :, 0], voxels(5))


def test_phases_at_one_position_are_a_cine(tmp_path):
    def phase(k, file):
        file.TriggerTime = 40 * (7 - k)

    folder = write_series(tmp_path / "s", 8, at=lambda k: (1, 2, 3), edit=phase)
    image = read(folder, tmp_path)
    assert image.spacing == (8.0, 1.5, 1.25)  # as thick as the header says
    assert np.array_equal(image.image[:, 0, 0], voxels(8)[::-1])
    assert_same_voxels(image, folder)


@pytest.mark.parametrize("by", ["TriggerTime", "TemporalPositionIdentifier"])
def test_phases_at_several_positions_are_a_cine(tmp_path, by):
    folder = write_series(
        tmp_path / "s", 12, at=lambda k: (0, 0, 8 * (k % 4)),
        edit=lambda k, file: setattr(file, by, 10 * (k // 4)),
    )  # fmt: skip
    image = read(folder, tmp_path)
    assert np.array_equal(image.image[:, :, 0], voxels(12).reshape(3, 4, 9, 7))
    assert_same_voxels(image, folder)


def test_times_that_cannot_be_told_apart_are_refused(tmp_path):
    write_series(tmp_path / "s", 8, at=lambda k: (1, 2, 3))
    with pytest.raises(UserError, match=r"IM0000.dcm lies at the position of IM0001.dcm"):
        read(tmp_path / "s", tmp_path)
    write_series(tmp_path / "copy")
    shutil.copy(tmp_path / "copy/IM0003.dcm", tmp_path / "copy/IM0003 (1).dcm")
    with pytest.raises(UserError, match=r"IM0003 \(1\).dcm.*if it is a copy"):
        read(tmp_path / "copy", tmp_path)


def test_a_phase_that_is_missing_at_one_position_is_refused(tmp_path):
    def phases(k, file):
        file.TemporalPositionIdentifier = k // 3 + (k == 8)  # the last position has 0, 1, 3

    write_series(tmp_path / "s", 9, at=lambda k: (0, 0, 8 * (k % 3)), edit=phases)
    with pytest.raises(UserError, match="TemporalPositionIdentifier"):
        read(tmp_path / "s", tmp_path)
    (tmp_path / "s/IM0008.dcm").unlink()
    with pytest.raises(UserError, match=r"the 3 times at the position .* the 2 at"):
        read(tmp_path / "s", tmp_path)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (lambda k: (0, 8 * k * np.tan(0.35), 8 * k), "IM0001.dcm.*tilted gantry"),
        (lambda k: (0, 8 * k * np.tan(0.03), 8 * k), "tilted gantry"),  # 1.7 degrees
        (lambda k: (0.3 * (k == 2), 0, 8 * k), "IM0002.dcm.*tilted gantry"),
        (moved([0, 8, 16, 32, 40]), "no regular grid: IM000.* lies"),
        (moved([0, 8, 16.2, 24, 32]), "IM0002.dcm lies 0.2 mm off"),
    ],
)
def test_slices_that_are_no_grid_are_refused(tmp_path, at, message):
    write_series(tmp_path / "s", at=at)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "s", tmp_path)


def test_spacing_that_drifts_is_refused(tmp_path):
    """Neighbours differ by less than 1 %, the middle is 1.3 mm off."""
    heights = np.cumsum(5 * (1 + np.linspace(-0.01, 0.01, 100)))
    write_series(tmp_path / "s", 100, at=moved(heights), size=(2, 2))
    with pytest.raises(UserError, match=r"no regular grid.*lies"):
        read(tmp_path / "s", tmp_path)


def test_positions_that_are_rounded_are_a_grid(tmp_path):
    folder = write_series(tmp_path / "s", 9, at=lambda k: (0, 0, round(0.625 * k, 1)))
    assert_same_voxels(read(folder, tmp_path), folder, tolerance=0.06)


@pytest.mark.parametrize(
    ("tag", "value", "message"),
    [
        ("ImageOrientationPatient", SAGITTAL, "orientation or pixel size"),
        ("ImageOrientationPatient", (1, 0, 0, 0, 0.9998, 0.02), None),
        ("PixelSpacing", [3, 2.5], "orientation or pixel size"),
        ("PixelSpacing", [1.5, 1.3], "orientation or pixel size"),
        ("ImageOrientationPatient", (1, 0, 0, 1, 0, 0), "ImageOrientationPatient"),
        ("ImageOrientationPatient", (1, 0, 0), "not a readable DICOM"),
        ("PixelSpacing", [1.5], "not a readable DICOM"),
        ("RescaleSlope", 0, "RescaleSlope is 0"),
        ("PixelSpacing", [0, 0], "PixelSpacing is"),
        ("ImageOrientationPatient", (0, 0, 0, 0, 0, 0), "ImageOrientationPatient is"),
        ("PixelSpacing", None, "has no PixelSpacing"),
        ("ImagePositionPatient", None, "has no ImagePositionPatient"),
        ("ImageOrientationPatient", None, "has no ImageOrientationPatient"),
        ("ImageType", ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"], "mosaic"),
        ("PhotometricInterpretation", "PALETTE COLOR", "colours"),
        ("Columns", 6, "has 9 x 6 pixels"),
    ],
)
def test_one_header_that_differs_is_named(tmp_path, tag, value, message):
    def edit(k, file):
        if k == 3:
            setattr(file, tag, list(value) if isinstance(value, tuple) else value)

    write_series(tmp_path / "s", edit=edit)
    with pytest.raises(UserError, match=message or "orientation") as caught:
        read(tmp_path / "s", tmp_path)
    assert "IM0003.dcm" in str(caught.value)


def test_no_voxel_size_is_made_up(tmp_path):
    write_series(tmp_path / "a", 1)
    assert read(tmp_path / "a", tmp_path).spacing == (8.0, 1.5, 1.25)

    def no_thickness(k, file):
        file.SliceThickness = None

    write_series(tmp_path / "b", 1, edit=no_thickness)
    image = read(tmp_path / "b", tmp_path)
    assert image.spacing is None and image.header["xyzt_units"] == 0
    assert_same_voxels(image, tmp_path / "b")

    def x_ray(k, file):
        del file.ImagePositionPatient, file.ImageOrientationPatient, file.PixelSpacing

    write_series(tmp_path / "c", 1, edit=x_ray)
    image = read(tmp_path / "c", tmp_path)
    assert image.spacing is None and image.header["xyzt_units"] == 0


@pytest.mark.parametrize("slopes", [[1, 0.25, 0.25, 0.25, 0.25], [0.5, 1, 2, 4, 0.125]])
def test_every_slice_has_its_own_slope(tmp_path, slopes):
    def rescale(k, file):
        file.RescaleSlope, file.RescaleIntercept = slopes[k], -1024 if k else 0

    folder = write_series(tmp_path / "s", edit=rescale)
    assert_same_voxels(read(folder, tmp_path), folder)
    folder = write_enhanced(tmp_path / "e", [0, 8, 16, 24, 32], slopes=slopes)
    assert_same_voxels(read(folder, tmp_path), folder)


@pytest.mark.parametrize("signed", [0, 1])
@pytest.mark.parametrize("bits", [12, 16])
def test_pixels_of_few_bits_with_and_without_sign(tmp_path, bits, signed):
    values = np.arange(-30, 33).reshape(1, 9, 7) * (1 if signed else 60) + (0 if signed else 1800)

    def store(k, file):
        file.BitsStored, file.HighBit, file.PixelRepresentation = bits, bits - 1, signed
        file.PixelData = (values & (2**bits - 1)).astype("<u2").tobytes()

    write_series(tmp_path / "s", 1, edit=store)
    assert np.array_equal(read(tmp_path / "s", tmp_path).image[0, 0], values)

    def inverse(k, file):
        store(k, file)
        file.PhotometricInterpretation = "MONOCHROME1"

    write_series(tmp_path / "m", 1, edit=inverse)
    brightest = -1 if signed else 2**bits - 1
    assert np.array_equal(read(tmp_path / "m", tmp_path).image[0, 0], brightest - values)


@pytest.mark.parametrize("kind", [tiny_dicom.ENHANCED_MR, ENHANCED_CT])
@pytest.mark.parametrize(
    "heights", [[0, 8, 16, 24], [24, 16, 8, 0], [0, 16, 8, 24]], ids=["up", "down", "shuffled"]
)
def test_frames_of_one_file_are_sorted_by_position(tmp_path, heights, kind):
    folder = write_enhanced(tmp_path / "s", heights, kind=kind)
    image = read(folder, tmp_path)
    assert image.spacing == (8.0, 1.5, 1.25)
    assert_same_voxels(image, folder)
    assert_same_voxels(found(folder / "all.dcm", tmp_path)[0].read(), folder)


@pytest.mark.parametrize("slices_first", [True, False])
def test_frames_of_several_times_are_a_cine(tmp_path, slices_first):
    folder = write_enhanced(tmp_path / "s", [0, 8, 16], times=4, slices_first=slices_first)
    image = read(folder, tmp_path)
    stored = voxels(12).reshape((4, 3, 9, 7) if slices_first else (3, 4, 9, 7))
    expected = stored if slices_first else stored.swapaxes(0, 1)
    assert np.array_equal(image.image[:, :, 0], expected)
    assert_same_voxels(image, folder)


def test_frames_that_are_no_grid_are_refused(tmp_path):
    write_enhanced(tmp_path / "a", [0, 8, 24, 32])
    with pytest.raises(UserError, match=r"frame 2 of all.dcm lies .* mm off"):
        read(tmp_path / "a", tmp_path)

    def fewer(file):
        file.PerFrameFunctionalGroupsSequence = file.PerFrameFunctionalGroupsSequence[:-1]

    write_enhanced(tmp_path / "b", [0, 8, 16], edit=fewer)
    with pytest.raises(UserError, match="lists 2 frames and promises 3"):
        read(tmp_path / "b", tmp_path)

    def promise_less(file):
        file.PerFrameFunctionalGroupsSequence = file.PerFrameFunctionalGroupsSequence[:-1]
        file.NumberOfFrames = 2

    write_enhanced(tmp_path / "c", [0, 8, 16], edit=promise_less)
    with pytest.raises(UserError, match="more frames than the 2 that it promises"):
        read(tmp_path / "c", tmp_path)

    def placeless(file):
        del file.PerFrameFunctionalGroupsSequence, file.SharedFunctionalGroupsSequence

    write_enhanced(tmp_path / "d", [0, 8, 16], edit=placeless)
    with pytest.raises(UserError, match="has no ImagePositionPatient"):
        read(tmp_path / "d", tmp_path)

    def ultrasound(file):
        placeless(file)
        file.FrameIncrementPointer, file.FrameTime = 0x00181063, 33

    write_enhanced(tmp_path / "e", [0, 8, 16], edit=ultrasound)
    image = read(tmp_path / "e", tmp_path)
    assert np.array_equal(image.image[:, 0, 0], voxels(3)) and image.spacing is None


def test_two_series_and_a_localiser_in_one_folder(tmp_path):
    write_series(tmp_path / "s")
    write_series(tmp_path / "s", seed=1, name=lambda k, file: f"b{k}.dcm")
    write_series(
        tmp_path / "s", 3, axes=SAGITTAL, seed=2, size=(5, 5), name=lambda k, file: f"loc{k}.dcm"
    )
    images = [source.read().image[0, :, 0] for source in found(tmp_path / "s", tmp_path)]
    expected = [voxels(5), voxels(5, seed=1), voxels(3, (5, 5), seed=2)]
    assert sorted(map(np.ndarray.tobytes, images)) == sorted(map(np.ndarray.tobytes, expected))


def test_a_localiser_in_the_same_series_is_refused(tmp_path):
    uid = pydicom.uid.generate_uid()
    write_series(tmp_path / "s", series=uid)
    write_series(tmp_path / "s", 1, series=uid, axes=SAGITTAL, name=lambda k, file: "loc.dcm")
    with pytest.raises(UserError, match=r"orientation or pixel size|at the position of"):
        read(tmp_path / "s", tmp_path)


@pytest.mark.parametrize(
    "syntax",
    [
        "ImplicitVRLittleEndian",
        "ExplicitVRBigEndian",
        "DeflatedExplicitVRLittleEndian",
        "RLELossless",
        "JPEGLSLossless",
    ],
)
def test_transfer_syntaxes(tmp_path, syntax):
    folder = write_series(tmp_path / "s", size=(40, 33))
    uid = getattr(pydicom.uid, syntax)
    for path in folder.iterdir():
        file = pydicom.dcmread(path)
        if uid.is_compressed and not uid.is_deflated:
            file.compress(uid, generate_instance_uid=False)
        else:
            file.file_meta.TransferSyntaxUID = uid
            if syntax == "ExplicitVRBigEndian":
                file.PixelData = np.frombuffer(file.PixelData, "<i2").astype(">i2").tobytes()
        pydicom.dcmwrite(path, file, little_endian=uid.is_little_endian,
                         implicit_vr=uid.is_implicit_VR, force_encoding=True)  # fmt: skip
    image = read(folder, tmp_path)
    assert np.array_equal(image.image[0, :, 0], voxels(5, (40, 33)))


def test_files_of_pydicom(tmp_path):
    """One slice in nine encodings; 12-bit JPEG against ITK."""
    sitk = pytest.importorskip("SimpleITK")
    names = ["", "_RLE", "_bigendian", "_expb", "_implicit", "_jp2klossless",
             "_jpeg_ls_lossless", "_padded"]  # fmt: skip
    paths = [
        pydicom.data.get_testdata_file(f"MR_small{name}.dcm", download=False) for name in names
    ]
    images = [found(path, tmp_path)[0].read() for path in paths]
    for image in images:
        assert np.array_equal(image.image[0, 0, 0], pydicom.dcmread(paths[0]).pixel_array)
        assert image.spacing == (0.8, 0.3125, 0.3125)
    for name in ("JPEG-lossy", "JPEG2000", "JPEGLSNearLossless_16", "CT_small", "693_J2KI"):
        path = pydicom.data.get_testdata_file(f"{name}.dcm", download=False)
        expected = sitk.GetArrayFromImage(sitk.ReadImage(path))
        assert np.array_equal(found(path, tmp_path)[0].read().image[0, :, 0], expected)
    for name in ("MR_truncated", "SC_rgb_rle", "examples_palette", "rtplan", "no_meta"):
        path = pydicom.data.get_testdata_file(f"{name}.dcm", download=False)
        with pytest.raises(UserError, match=name):
            found(path, tmp_path)[0].read()


@pytest.mark.parametrize("slope", [1, 0.5])
def test_lossless_jpeg(tmp_path, slope):
    """Written by ITK; pydicom cannot read it on its own."""
    sitk = pytest.importorskip("SimpleITK")
    writer = sitk.ImageFileWriter()
    folder = tmp_path / "s"
    folder.mkdir()
    values = voxels(3, (20, 24)).astype(np.uint16)
    for k, plane in enumerate(values):
        image = sitk.GetImageFromArray(plane)
        tags = {"0008|0060": "MR", "0020|000e": "1.2.3", "0020|0032": f"0\\0\\{8 * k}",
                "0020|0037": "1\\0\\0\\0\\1\\0", "0028|0030": "1.5\\1.25"}  # fmt: skip
        for key, value in tags.items():
            image.SetMetaData(key, value)
        writer.KeepOriginalImageUIDOn()
        writer.UseCompressionOn()
        writer.SetCompressor("JPEG")
        writer.SetFileName(str(folder / f"{k}.dcm"))
        writer.Execute(image)
    for path in folder.iterdir():
        file = pydicom.dcmread(path)
        assert file.file_meta.TransferSyntaxUID in (pydicom.uid.JPEGLosslessSV1,
                                                    pydicom.uid.JPEGLossless)  # fmt: skip
        file.RescaleSlope, file.RescaleIntercept = slope, 0
        file.save_as(path)
    assert np.array_equal(read(folder, tmp_path).image[0, :, 0], values * slope)
    path = sorted(folder.iterdir())[1]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 300])
    with pytest.raises(UserError, match=path.name):
        read(folder, tmp_path)


def test_a_compression_that_is_not_read_is_named(tmp_path):
    def compress(k, file):
        file.file_meta.TransferSyntaxUID = pydicom.uid.HTJ2KLossless
        file.PixelData = pydicom.encaps.encapsulate([b"x" * 40])

    write_series(tmp_path / "s", edit=compress)
    with pytest.raises(UserError, match=r"IM0000.dcm: .*High-Throughput JPEG 2000.*Decompress"):
        read(tmp_path / "s", tmp_path)


def test_a_pipe_blocks_nothing(tmp_path):
    write_series(tmp_path / "s")
    os.mkfifo(tmp_path / "s" / "pipe")
    assert read(tmp_path / "s", tmp_path).image.shape == (1, 5, 1, 9, 7)


def test_slices_are_sorted_along_their_normal(tmp_path):
    write_series(tmp_path / "s", axes=OBLIQUE, step=-8.0)
    axes = affine_of(read(tmp_path / "s", tmp_path).header)[:3, :3]
    assert np.linalg.det(axes) > 0


@pytest.mark.parametrize("place", [".", "./", "..", "**"])
def test_a_series_in_the_current_folder_has_the_folders_name(place, tmp_path, monkeypatch):
    folder = write_series(tmp_path / "scan", 3)
    inside = folder / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside if place == ".." else folder)
    (source,) = found(place, tmp_path)
    assert source.name == "scan"


def test_a_link_to_a_series_gives_its_own_name(tmp_path):
    write_series(tmp_path / "1.2.840", 3)
    (tmp_path / "heart").symlink_to("1.2.840")
    (source,) = found(tmp_path / "heart", tmp_path)
    assert source.name == "heart"
