"""Headers and labels as other software leaves them: scaled, rounded, not quite at right angles."""

import gzip
import math
import struct

import nibabel
import numpy as np
import pytest

from mambaseg.data.check import check_dataset
from mambaseg.data.formats.files import read_volume
from mambaseg.data.formats.nifti import read_nifti
from mambaseg.data.readers import nifti_pairs, nnunet
from mambaseg.data.validation import as_label, collected_warnings
from mambaseg.errors import UserError
from mambaseg.inference.folder_scores import score_folders
from tiny_nnunet import LABELS, arrays, write_nnunet, write_volume

ZOOMS = (1.5, 1.25, 8.0)
EVALUATION = {"empty": "strict", "tolerance_mm": 2.0, "keep_largest": False}


def test_labels_within_a_thousandth_of_a_whole_number_are_rounded_and_said(tmp_path, caplog):
    path = tmp_path / "a_seg.nii.gz"
    values = np.array([0.0, 2.00007, 0.9999999, -1e-7])
    assert as_label(values, path).tolist() == [0, 2, 1, 0]
    assert "a_seg.nii.gz: the label holds values -1e-07, 0.9999999, 2.00007, rounded" in caplog.text
    caplog.clear()
    with collected_warnings() as said:
        as_label(values.astype(np.float32), path)
        as_label(np.array([0.0, 1.0]), path)
    assert len(said) == 1 and not caplog.text
    for wrong in (1.0011, 0.5, np.nan, np.inf, -0.01):
        with pytest.raises(UserError, match="the label holds value"):
            as_label(np.array([0.0, wrong]), path)


def scaled(path, slope):
    """The file with whole numbers that its header scales."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[112:120] = struct.pack("<ff", slope, 0.0)
    path.write_bytes(gzip.compress(bytes(content)))


@pytest.fixture
def pairs(tmp_path):
    for number in range(4):
        image, label = arrays(number)
        for kind, array in (("images", image[0]), ("labels", label)):
            (tmp_path / "data" / kind).mkdir(parents=True, exist_ok=True)
            write_volume(tmp_path / "data" / kind / f"c{number}.nii.gz", array, ZOOMS)
    return tmp_path / "data"


def test_scaled_labels_train_score_and_are_said_everywhere(pairs, tmp_path, caplog):
    from runs import own_overrides, trained

    for number in (1, 2):
        scaled(pairs / "labels" / f"c{number}.nii.gz", 1.00004)
    expected = arrays(1)[1].T
    assert np.array_equal(nifti_pairs.find_cases(pairs)[1].read(3).label, expected)
    caplog.clear()
    report = check_dataset(pairs)
    assert [one.where for one in report.of("warning")] == ["c1", "c2"] and report.ok
    assert all("rounded to whole numbers" in one.problem for one in report.of("warning"))
    assert not caplog.text  # said once, in the report
    (configs := tmp_path / "conf").mkdir()
    words = ("data=nifti", f"data.root={pairs}", "data.num_classes=3",
             "data.class_names=[background,cavity,wall]", "data.split=random")  # fmt: skip
    trained(*own_overrides(tmp_path), *words, configs=configs)
    assert "c1.nii.gz: the label holds values 1.00004, 2.00008, rounded" in caplog.text
    assert "(1 more like this)" in caplog.text

    (plain := tmp_path / "plain").mkdir()  # the same labels, whole numbers
    for path in (pairs / "labels").iterdir():
        write_volume(plain / path.name, arrays(int(path.name[1]))[1], ZOOMS)
    folder, _ = score_folders(
        plain, pairs / "labels", class_names=LABELS, evaluation=EVALUATION,
        outputs=tmp_path / "scored",
    )  # fmt: skip
    assert folder.summary["foreground"]["dice"]["mean"] == 1.0


@pytest.mark.parametrize("slope", [0.0, math.nan, math.inf])
def test_a_slope_that_says_nothing_scales_nothing(pairs, slope):
    for kind in ("images", "labels"):
        scaled(pairs / kind / "c0.nii.gz", slope)
    volume = nifti_pairs.find_cases(pairs)[0].read(3)
    image, label = arrays(0)
    assert np.array_equal(volume.image[:, 0], image[0].T)
    assert np.array_equal(volume.label, label.T)
    stored = read_nifti(pairs / "images" / "c0.nii.gz")
    assert np.array_equal(stored.image[0, :, 0], image[0].T)


def test_a_quaternion_that_rounding_made_too_long_is_read(tmp_path):
    turned = np.diag([-1.5, -1.25, 8.0, 1.0])  # half a turn about z: its w is 0
    image = nibabel.Nifti1Image(arrays(0)[0][0], turned)
    image.set_sform(None, 0)
    image.set_qform(turned, 1)
    path = tmp_path / "a.nii"
    nibabel.save(image, path)
    content = bytearray(path.read_bytes())
    content[256:268] = struct.pack("<fff", 0.0, 0.0, 1.0 + 2e-5)
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="w2 should be positive"):
        nibabel.load(path)  # so it was refused as a damaged download
    nifti = read_nifti(path)
    assert np.allclose(nifti.affine, turned, atol=1e-5) and nifti.orientation == "LPS"
    assert nifti.spacing == pytest.approx((8.0, 1.25, 1.5))


@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".nrrd"])
@pytest.mark.parametrize(("skew", "refused"), [(1e-4, False), (5e-3, False), (0.05, True)])
def test_axes_a_little_off_right_angles_work_and_a_sheared_grid_is_refused(
    ending, skew, refused, tmp_path
):
    path, voxels = tmp_path / f"a{ending}", arrays(0)[0][0]
    directions = np.array([[1, skew, 0], [0, 1, 0], [0, 0, 1.0]])
    if ending == ".nii.gz":
        affine = np.eye(4)
        affine[:3, :3] = directions * ZOOMS
        nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    else:
        import SimpleITK

        image = SimpleITK.GetImageFromArray(voxels.T)
        image.SetSpacing(ZOOMS)
        image.SetDirection(directions.ravel())
        SimpleITK.WriteImage(image, str(path))
    if not refused:
        volume = read_volume(path)
        assert np.array_equal(volume.image[:, 0], voxels.T)
        assert volume.spacing == pytest.approx((8.0, 1.25, 1.5), rel=1e-4)
        return
    with pytest.raises(UserError, match=r"sheared|right angles|orthogonal"):
        read_volume(path)


@pytest.mark.parametrize("slope", [0.9999999, 1.0003])
def test_scaled_labels_of_an_nnunet_data_set_are_read(slope, tmp_path):
    root = write_nnunet(tmp_path / "Dataset001_Own")
    scaled(root / "labelsTr" / "case_002.nii.gz", slope)
    assert check_dataset(root).ok
    assert np.array_equal(nnunet.find_cases(root)[2].read(3).label, arrays(2)[1].T)
