"""M&Ms: two frames of each cine, by the list of subjects; labels turned round to ACDC's order."""

import shutil

import nibabel
import numpy as np
import pytest
import yaml
from tiny_acdc import pixels, write_nifti

from mambaseg.data.cache import open_cache
from mambaseg.data.check import check_dataset
from mambaseg.data.check.proposal import propose
from mambaseg.data.datamodule import SegmentationDataModule
from mambaseg.data.geometry import Preprocessing
from mambaseg.data.readers.mnms import find_cases
from mambaseg.errors import UserError

PLACES = {"A1": "Training/Labeled", "B2": "Training/Labeled", "C3": "Validation", "D4": "Testing"}
CSV = """,External code,VendorName,Centre,Pathology,ED,ES
0,A1,Siemens,1,HCM,0,2
1,B2,Philips,2,NOR,2,1
2,C3,GE,3,DCM,0,1
3,D4,Canon,4,,1,2
4,E5,Canon,4,NOR,0,1
"""


def frames(seed):
    """A cine of three frames, and labels in the order of M&Ms: 1 LV, 2 MYO, 3 RV; (x, y, z, t)."""
    pairs = [pixels(10 * seed + frame) for frame in range(3)]
    turned = np.uint8([0, 3, 2, 1])
    image, label = (np.stack(one, -1) for one in zip(*pairs, strict=True))
    return image, turned[label]


def write_mnms(place):
    for seed, (name, part) in enumerate(PLACES.items()):
        folder = place / part / name
        folder.mkdir(parents=True)
        image, label = frames(seed)
        write_nifti(folder / f"{name}_sa.nii.gz", image)
        write_nifti(folder / f"{name}_sa_gt.nii.gz", label)
    (place / "Training" / "Unlabeled" / "E5").mkdir(parents=True)
    (place / "211230_M&Ms_Dataset.csv").write_text(CSV)
    return place


@pytest.fixture
def root(tmp_path):
    return write_mnms(tmp_path / "MnMs")


def test_two_frames_of_each_cine_in_the_parts_of_the_challenge(root):
    cases = find_cases(root)
    assert [(case.id, case.part, case.group) for case in cases] == [
        ("A1_ED", "train", "HCM"), ("A1_ES", "train", "HCM"),
        ("B2_ED", "train", "NOR"), ("B2_ES", "train", "NOR"),
        ("C3_ED", "val", "DCM"), ("C3_ES", "val", "DCM"),
        ("D4_ED", "test", None), ("D4_ES", "test", None),
    ]  # fmt: skip
    image, label = frames(1)
    volume = cases[2].read(4)  # B2 at ED, frame 2
    assert np.array_equal(volume.image[:, 0], image[..., 2].T)
    assert np.array_equal(volume.label, label[..., 2].T)
    assert volume.spacing == pytest.approx((10.0, 1.25, 1.5)) and volume.orientation == "LPS"


def test_the_config_turns_the_labels_round_to_those_of_acdc(root, tmp_path):
    from runs import composed

    data = composed("data=mnms", f"data.root={root}", configs=tmp_path).data
    module = SegmentationDataModule(
        name="mnms", find_cases=find_cases, root=root, cache_dir=tmp_path, size=8, num_classes=4,
        class_names=list(data.class_names), split=data.split, batch_size=2, steps=1,
        label_map=dict(data.label_map),
    )  # fmt: skip
    module.load()
    assert data.class_names == ["background", "RV", "MYO", "LV"]
    assert np.array_equal(module.evaluation_data("test")[0]["label"], pixels(31)[1].T)


def test_exchanged_frames_are_another_cache(root, tmp_path):
    how = {"cache_dir": tmp_path / "cache", "num_classes": 4}
    before = open_cache(find_cases(root), Preprocessing("paper", 8), **how)
    (root / "211230_M&Ms_Dataset.csv").write_text(CSV.replace("HCM,0,2", "HCM,2,0"))
    after = open_cache(find_cases(root), Preprocessing("paper", 8), **how)
    for one, other in (("A1_ED", "A1_ES"), ("A1_ES", "A1_ED"), ("B2_ED", "B2_ED")):
        label = before.label(before.position(one))
        assert np.array_equal(label, after.label(after.position(other)))


def test_a_sound_copy_has_no_problems_and_is_recognised(root):
    report = check_dataset(root)
    assert report.problems == () and report.layout.name == "mnms"
    assert (report.patients, report.cases) == (4, 8)
    proposed = yaml.safe_load(propose(report, "mine", memory=(2**30, "a test")))
    assert proposed["label_map"] == {0: 0, 1: 3, 2: 2, 3: 1}
    assert proposed["class_names"] == ["background", "RV", "MYO", "LV"]


def test_no_subject_is_left_out_without_a_word(root, caplog):
    labelled = root / "Training" / "Labeled"
    (labelled / "notes").mkdir()
    (labelled / "A1" / "A1_sa.nii.gz").rename(labelled / "A1" / "A1_SA.nii.gz")
    with pytest.raises(UserError, match=r"A1_sa\.nii\.gz: the image is missing\. Get the subject"):
        find_cases(root)
    (labelled / "A1").rename(root / "A1")
    (root / "Testing" / "D4").rename(root / "D4")
    assert {case.patient for case in find_cases(root)} == {"B2", "C3"}
    assert "A1, D4: 2 subjects of the list without a folder, not used" in caplog.text
    caplog.clear()
    caplog.set_level("INFO")
    (root / "Testing").rmdir()  # a folder of the challenge that is absent on purpose
    find_cases(root)
    assert [one.levelname for one in caplog.records] == ["INFO"]


def test_what_is_missing_or_does_not_fit_is_said(root):
    (root / "Validation" / "C3" / "C3_sa_gt.nii.gz").unlink()
    image = nibabel.load(root / "Testing" / "D4" / "D4_sa.nii.gz")
    label = root / "Testing" / "D4" / "D4_sa_gt.nii.gz"
    nibabel.save(image.slicer[..., :2], label)
    (root / "Training" / "Labeled" / "B2").rename(root / "Training" / "Labeled" / "B9")
    for name in ("sa", "sa_gt"):
        old = root / "Training" / "Labeled" / "B9" / f"B2_{name}.nii.gz"
        old.rename(old.with_name(f"B9_{name}.nii.gz"))
    told = " ".join(f"{one.where} {one.problem}" for one in check_dataset(root).of("error"))
    for said in (
        "C3_sa_gt.nii.gz: the label is missing",
        "D4_sa_gt.nii.gz: has 2 frames; ES is said to be 2",
        "the list of subjects has no frame of B9 for ED and ES",
    ):
        assert said in told
    (root / "211230_M&Ms_Dataset.csv").write_text(CSV.replace("HCM,0,2", "HCM,0,"))
    with pytest.raises(UserError, match="no frame of A1 for ES"):
        find_cases(root)
    (root / "211230_M&Ms_Dataset.csv").write_text(CSV + "5,A1,Siemens,1,HCM,1,2\n")
    with pytest.raises(UserError, match="A1 that ed is 0 and that it is 1"):
        find_cases(root)
    (root / "211230_M&Ms_Dataset.csv").write_text("a,a\n")
    with pytest.raises(UserError, match="is no list of subjects"):
        find_cases(root)
    (root / "211230_M&Ms_Dataset.csv").unlink()
    with pytest.raises(UserError, match=r"list of subjects .* is missing"):
        find_cases(root)


def test_a_subject_that_is_there_twice_is_refused_and_told_by_the_check(root):
    shutil.copytree(root / "Training" / "Labeled" / "A1", root / "Validation" / "A1")
    with pytest.raises(UserError, match="A1_ED is there twice"):
        find_cases(root)
    assert any("is there twice" in one.problem for one in check_dataset(root).of("error"))
