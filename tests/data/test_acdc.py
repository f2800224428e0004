import gzip
import re
import shutil

import h5py
import nibabel as nib
import numpy as np
import pytest
from tiny_acdc import pixels, write_h5, write_nifti, write_patient

from mambaseg.data.readers.acdc import find_cases
from mambaseg.data.readers.acdc_h5 import training_group
from mambaseg.errors import UserError


@pytest.fixture
def patient(tmp_path):
    """The folder of a sound patient001; its parent is the root."""
    return write_patient(tmp_path / "patient001")


# ---- the official layout


def test_the_official_layout_gives_two_cases_per_patient_sorted_by_id(tmp_path):
    write_patient(tmp_path / "patient002", ed=4, es=11, group="HCM")
    write_patient(tmp_path / "patient001")
    cases = find_cases(tmp_path)
    assert [case.id for case in cases] == [
        *("patient001_ED", "patient001_ES", "patient002_ED", "patient002_ES")
    ]
    assert [case.phase for case in cases] == ["ED", "ES", "ED", "ES"]
    assert [case.group for case in cases] == ["DCM", "DCM", "HCM", "HCM"]
    assert cases[2].image_path.name == "patient002_frame04.nii.gz"
    assert cases[3].label_path.name == "patient002_frame11_gt.nii.gz"


@pytest.mark.parametrize("above", ["", "database"])
def test_patients_are_found_under_training_and_testing(tmp_path, above):
    write_patient(tmp_path / above / "training" / "patient001")
    write_patient(tmp_path / above / "testing" / "patient101")
    assert {case.patient for case in find_cases(tmp_path)} == {"patient001", "patient101"}


def test_arrays_are_z_y_x_and_geometry_travels_with_them(patient):
    image, label = pixels(0)
    volume = find_cases(patient.parent)[0].read(4)
    assert volume.image.dtype == np.float32
    assert volume.label.dtype == np.uint8
    assert volume.image.shape == (3, 1, 5, 6)
    for x, y, z in [(0, 0, 0), (5, 4, 2), (1, 3, 2), (4, 0, 1)]:
        assert volume.image[z, 0, y, x] == image[x, y, z]
        assert volume.label[z, y, x] == label[x, y, z]
    assert volume.spacing == (10.0, 1.25, 1.5)
    assert volume.orientation == "LPS"
    assert np.allclose(np.diag(volume.affine), [-1.5, -1.25, 10.0, 1.0])


def test_ed_and_es_follow_info_cfg_and_not_the_order_of_files(tmp_path):
    write_patient(tmp_path / "patient001", ed=9, es=2)
    cases = find_cases(tmp_path)
    assert [case.image_path.name[-14:] for case in cases] == ["frame09.nii.gz", "frame02.nii.gz"]
    assert np.array_equal(cases[0].read().image[:, 0], pixels(0)[0].T)


def test_a_stray_file_of_another_patient_is_left_alone(patient):
    shutil.copy(patient / "patient001_frame12.nii.gz", patient / "patient099_frame01.nii.gz")
    assert find_cases(patient.parent)[0].image_path.name == "patient001_frame01.nii.gz"


def test_the_slope_of_the_header_is_applied(patient):
    path = patient / "patient001_frame01.nii.gz"
    image = nib.Nifti1Image(pixels(0)[0], nib.load(path).affine)
    image.header.set_slope_inter(1.0, 0.0)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[112:120] = np.array([0.5, 3.0], "<f4").tobytes()  # scl_slope, scl_inter
    path.write_bytes(gzip.compress(bytes(content)))
    volume = find_cases(patient.parent)[0].read()
    assert np.array_equal(volume.image[:, 0], pixels(0)[0].T * 0.5 + 3.0)


@pytest.mark.parametrize(
    ("zooms", "unit", "spacing"),
    [
        ((1.0, 1.0, 1.0), "unknown", None),
        ((1.0, 1.0, 1.0), "mm", (1.0, 1.0, 1.0)),
        ((1.5, 1.0, 8.0), "unknown", (8.0, 1.0, 1.5)),
        ((0.0015, 0.001, 0.008), "meter", (8.0, 1.0, 1.5)),
        ((1500.0, 1000.0, 8000.0), "micron", (8.0, 1.0, 1.5)),
    ],
)
def test_spacing_is_unknown_only_without_a_unit_and_with_zooms_of_one(
    tmp_path, zooms, unit, spacing
):
    write_patient(tmp_path / "patient001", zooms=zooms, unit=unit)
    volume = find_cases(tmp_path)[0].read()
    assert volume.spacing == (None if spacing is None else pytest.approx(spacing))
    assert volume.orientation == (None if spacing is None else "LPS")


def test_unpacked_files_are_read_as_well(patient):
    for path in list(patient.glob("patient001_frame??.nii.gz")):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert np.array_equal(find_cases(patient.parent)[0].read().image[:, 0], pixels(0)[0].T)


def test_finding_cases_opens_no_image(patient):
    for path in patient.glob("*.nii.gz"):
        path.write_bytes(b"")
    assert len(find_cases(patient.parent)) == 2


def test_a_patient_without_labels_is_found_and_reading_says_so_where_one_is_needed(patient):
    (patient / "patient001_frame01_gt.nii.gz").unlink()
    case = find_cases(patient.parent)[0]
    assert case.label_path is None
    assert case.read().label is None
    with pytest.raises(UserError, match=r"patient001_frame01\.nii\.gz: the image has no label"):
        case.read(4)


# ---- a folder that cannot be used


def test_a_folder_without_patients_says_where_it_looked_and_what_to_do(tmp_path):
    with pytest.raises(UserError) as caught:
        find_cases(tmp_path)
    message = str(caught.value)
    for part in (str(tmp_path), "official", "SSL4MIS", "WSL4MIS", "humanheart", "data=phantom"):
        assert part in message
    assert "Did you mean" not in message


def test_a_folder_one_level_too_high_is_told_the_right_one(tmp_path):
    write_patient(tmp_path / "ACDC" / "training" / "patient001")
    with pytest.raises(UserError, match=re.escape(f"Did you mean {tmp_path / 'ACDC'}? ")):
        find_cases(tmp_path)


def test_a_folder_that_does_not_exist_or_is_a_file_says_so(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        find_cases(tmp_path / "nowhere")
    (tmp_path / "acdc.zip").touch()
    with pytest.raises(UserError, match="not a folder"):
        find_cases(tmp_path / "acdc.zip")


def test_two_layouts_in_one_folder_are_an_error(patient):
    write_h5(patient.parent / "data" / "patient001_frame01.h5", 0)
    with pytest.raises(UserError, match="both NIfTI patient folders and h5"):
        find_cases(patient.parent)


def test_a_patient_in_training_and_testing_is_an_error(tmp_path):
    write_patient(tmp_path / "training" / "patient001")
    write_patient(tmp_path / "testing" / "patient001")
    with pytest.raises(UserError, match="patient001 is there twice"):
        find_cases(tmp_path)


def test_a_missing_frame_is_named(patient):
    (patient / "patient001_frame12.nii.gz").unlink()
    with pytest.raises(
        UserError, match=r"patient001_frame12\.nii\.gz: .*missing.*ES is frame 12.*here: 01"
    ):
        find_cases(patient.parent)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "the file is missing"),
        ("ES: 12\n", "not one frame number each"),
        ("ED: one\nES: 12\n", r"\(ED: one; ES: 12"),
        ("ED: 1\nES: 1\n", "not one frame number each"),
        ("\x00\x01", "not one frame number each"),
    ],
)
def test_an_unusable_info_cfg_is_an_error(patient, text, told):
    if text is None:
        (patient / "Info.cfg").unlink()
    else:
        (patient / "Info.cfg").write_text(text)
    with pytest.raises(UserError, match=rf"Info\.cfg: .*{told}"):
        find_cases(patient.parent)


def test_the_first_problem_says_how_many_more_there_are(tmp_path):
    for number in (1, 2, 3):
        (write_patient(tmp_path / f"patient00{number}") / "Info.cfg").unlink()
    with pytest.raises(UserError, match=r"patient001.*2 more like this: mambaseg check"):
        find_cases(tmp_path)


# ---- files that cannot be used


@pytest.mark.parametrize("kept", [0, 1, 30, 0.5, -4])
def test_a_truncated_gzip_is_an_error_wherever_it_was_cut(patient, kept):
    path = patient / "patient001_frame01.nii.gz"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: .*get the file again"):
        find_cases(patient.parent)[0].read()


def test_a_truncated_file_inside_sound_gzip_is_an_error(patient):
    path = patient / "patient001_frame01_gt.nii.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-10]))
    with pytest.raises(UserError, match=r"frame01_gt\.nii\.gz: not a readable NIfTI file"):
        find_cases(patient.parent)[0].read()


def test_a_flipped_bit_is_an_error(patient):
    path = patient / "patient001_frame01.nii.gz"
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # in the check sum: the data unpack, and are not what was packed
    path.write_bytes(content)
    with pytest.raises(UserError, match="truncated or damaged gzip"):
        find_cases(patient.parent)[0].read()


def test_a_file_that_is_no_nifti_is_an_error(patient):
    (patient / "patient001_frame01.nii.gz").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(UserError, match="not a readable NIfTI file"):
        find_cases(patient.parent)[0].read()


def test_a_file_that_vanished_is_an_error(patient):
    case = find_cases(patient.parent)[0]
    case.image_path.unlink()
    with pytest.raises(UserError, match="missing"):
        case.read()


def test_a_whole_cine_in_place_of_a_frame_is_an_error(patient):
    path = patient / "patient001_frame01.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((6, 5, 3, 2), np.int16), np.eye(4)), path)
    with pytest.raises(UserError, match=r"frame01\.nii\.gz: .*4-D"):
        find_cases(patient.parent)[0].read()


def test_nan_in_an_image_is_an_error(patient):
    image = pixels(0)[0].astype(np.float32)
    image[0, 0, 0] = np.nan
    write_nifti(patient / "patient001_frame01.nii.gz", image)
    with pytest.raises(UserError, match=r"frame01\.nii\.gz: .*1 of 90 voxels are NaN"):
        find_cases(patient.parent)[0].read()


@pytest.mark.parametrize(
    ("value", "dtype", "told"),
    [(7, np.uint8, "value 7"), (-1, np.int16, "value -1"), (1.5, np.float32, "value 1.5")],
)
def test_a_label_that_is_no_class_is_an_error(patient, value, dtype, told):
    label = pixels(0)[1].astype(dtype)
    label[2, 2, 2] = value
    write_nifti(patient / "patient001_frame01_gt.nii.gz", label)
    with pytest.raises(UserError, match=rf"frame01_gt\.nii\.gz: .*{told}"):
        find_cases(patient.parent)[0].read(4)


def test_image_and_label_of_different_shape_are_an_error(patient):
    write_nifti(patient / "patient001_frame01_gt.nii.gz", np.zeros((5, 6, 3), np.uint8))
    with pytest.raises(UserError, match=r"frame01_gt\.nii\.gz: .*\(3, 6, 5\).*\(3, 5, 6\)"):
        find_cases(patient.parent)[0].read()


def test_a_colour_image_is_an_error(patient):
    colour = np.zeros((6, 5, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(colour, np.eye(4)), patient / "patient001_frame01.nii.gz")
    with pytest.raises(UserError, match="data type"):
        find_cases(patient.parent)[0].read()


# ---- h5


@pytest.mark.parametrize("frames", [("01", "02"), ("01", "12"), ("04", "11"), ("9", "10")])
@pytest.mark.parametrize("folder", ["data", "ACDC_training_volumes", ""])
def test_h5_frames_are_ed_and_es_by_rank(tmp_path, folder, frames):
    for seed, frame in enumerate(frames):
        write_h5(tmp_path / folder / f"patient041_frame{frame}.h5", seed)
    write_h5(tmp_path / folder / "slices" / "patient041_frame01_slice_0.h5", 9)
    (tmp_path / folder / "._patient041_frame01.h5").write_bytes(b"Mac OS X")
    (tmp_path / "test.list").write_text("patient041_frame01\n")
    cases = find_cases(tmp_path)
    assert [(case.id, case.group) for case in cases] == [
        ("patient041_ED", "MINF"),
        ("patient041_ES", "MINF"),
    ]
    for seed, case in enumerate(cases):
        volume = case.read(4)
        assert np.array_equal(volume.image[:, 0], (pixels(seed)[0].T / 1000).astype(np.float32))
        assert np.array_equal(volume.label, pixels(seed)[1].T)
        assert (volume.spacing, volume.affine, volume.orientation) == (None, None, None)
        assert len(case.sources()) == 1


@pytest.mark.parametrize(
    ("number", "group"),
    [(0, None), (1, "DCM"), (20, "DCM"), (21, "HCM"), (80, "NOR"), (100, "RV"), (101, None)],
)
def test_groups_of_h5_patients_go_by_twenty_and_are_unknown_beyond_100(number, group):
    assert training_group(f"patient{number:03d}") == group


def test_an_h5_patient_with_one_frame_is_an_error(tmp_path):
    write_h5(tmp_path / "data" / "patient001_frame01.h5", 0)
    with pytest.raises(UserError, match=r"two frames.*found 1: patient001_frame01\.h5"):
        find_cases(tmp_path)


def test_a_damaged_h5_file_is_an_error(tmp_path):
    paths = [tmp_path / "data" / f"patient001_frame0{frame}.h5" for frame in (1, 2)]
    for path in paths:
        write_h5(path, 0)
    paths[0].write_bytes(paths[0].read_bytes()[:-200])
    with h5py.File(paths[1], "a") as file:
        del file["label"]
    ed, es = find_cases(tmp_path)
    with pytest.raises(UserError, match=r"frame01\.h5: not a readable h5 file"):
        ed.read()
    with pytest.raises(UserError, match=r"frame02\.h5: .*'label' is no array.*keys: image"):
        es.read()
    paths[0].unlink()
    with pytest.raises(UserError, match="missing"):
        ed.read()


def test_paths_with_spaces_equal_signs_and_unicode_work(tmp_path):
    root = tmp_path / "Herz = Ärzte [1]"
    write_patient(root / "patient001")
    shutil.move(root / "patient001" / "Info.cfg", root / "x")
    (root / "patient001" / "Info.cfg").write_bytes(
        b"\xef\xbb\xbf" + (root / "x").read_bytes().replace(b"\n", b"\r\n")
    )
    assert find_cases(str(root))[0].read(4).image.shape == (3, 1, 5, 6)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_patient(tmp_path / "acdc" / "patient001")
    assert len(find_cases("~/acdc")) == 2


# ---- the real thing


@pytest.mark.acdc
def test_real_acdc_has_200_cases_in_five_equal_groups(acdc_root):
    cases = [case for case in find_cases(acdc_root) if case.patient <= "patient100"]
    assert len(cases) == 200
    groups = [case.group for case in cases]
    assert {group: groups.count(group) for group in groups} == dict.fromkeys(
        ("DCM", "HCM", "MINF", "NOR", "RV"), 40
    )
    late = next(case for case in cases if case.id == "patient090_ED")
    assert "frame04" in late.image_path.name
    volume = late.read(4)
    assert volume.image.ndim == 4
    assert set(np.unique(volume.label)) == {0, 1, 2, 3}


@pytest.mark.acdc
def test_the_left_ventricle_of_real_acdc_is_larger_at_ed(acdc_root):
    cases = {case.id: case for case in find_cases(acdc_root)}
    for patient in ("patient001", "patient050", "patient090"):
        ed, es = (
            int((cases[f"{patient}_{phase}"].read(4).label == 3).sum()) for phase in ("ED", "ES")
        )
        assert ed > es
