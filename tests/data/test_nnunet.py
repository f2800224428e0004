"""nnU-Net v2, nnU-Net v1 and MSD: which cases there are, what they hold, who is in which part."""

import json
import re
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import yaml
from hydra.utils import instantiate
from PIL import Image as Pillow

from mambaseg.data.check import check_dataset
from mambaseg.data.check.proposal import propose
from mambaseg.data.datamodule import SegmentationDataModule
from mambaseg.data.patients import split_cases
from mambaseg.data.readers.dataset_json import read_dataset_json
from mambaseg.data.readers.nnunet import find_cases, split_of
from mambaseg.errors import UserError
from runs import composed, own_overrides, trained
from tiny_nnunet import LABELS, arrays, write_nnunet, write_volume

SPLITS = [
    {"train": ["case_000", "case_001", "case_002"], "val": ["case_003", "case_004"]},
    {"train": ["case_002", "case_003", "case_004"], "val": ["case_000"]},
]


def parts(cases):
    return {case.id: case.part for case in cases}


@pytest.mark.parametrize(
    ("words", "channels"),
    [
        ({}, 1),
        ({"channels": 2}, 2),
        ({"channels": 2, "ending": ".nii"}, 2),
        ({"channels": 2, "ending": ".mha"}, 2),
        ({"ending": ".nrrd"}, 1),
        ({"version": 1, "whole": True}, 1),
        ({"version": 1, "whole": True, "channels": 3}, 3),
        ({"version": 1, "channels": 2}, 2),
        ({"ids": ["a_0001", "a_0002", "b_0001"], "whole": True, "version": 1}, 1),
    ],
)
def test_every_layout_gives_the_voxels_that_were_written(tmp_path, words, channels):
    root = write_nnunet(tmp_path / "Dataset001_Tiny", **words)
    about = read_dataset_json(root)
    assert about.class_names == LABELS and len(about.channels) == channels
    for seed, case in enumerate(find_cases(root)):
        volume = case.read(3, channels)
        image, label = arrays(seed, channels=channels)
        assert np.array_equal(volume.image, np.moveaxis(image.T, -1, 1))
        assert np.array_equal(volume.label, label.T)
        assert volume.spacing == pytest.approx((8.0, 1.25, 1.5))
        assert len(case.sources()) == (2 if words.get("whole") else channels + 1)


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_pictures_are_cases_of_one_slice(tmp_path, ending):
    (case, *_) = find_cases(write_nnunet(tmp_path, ending=ending, channels=2))
    volume = case.read(3, 2)
    image, label = arrays(0, channels=2, shape=(20, 18, 1))
    assert volume.image.shape == (1, 2, 18, 20) and volume.spacing is None
    assert np.array_equal(volume.image[0, 1], np.clip(image[1, :, :, 0].T / 4, 0, 255).astype("u1"))
    assert np.array_equal(volume.label[0], label[:, :, 0].T)


# ---- who is in which part -----------------------------------------------------------------------


def test_a_fold_is_that_of_the_file_with_the_test_part_where_it_has_labels(tmp_path):
    root = write_nnunet(tmp_path / "a", tests=2, splits=SPLITS)
    assert split_of(root) == "given"
    assert parts(find_cases(root)) == {
        "case_000": "train", "case_001": "train", "case_002": "train", "case_003": "val",
        "case_004": "val", "test_000": "test", "test_001": "test",
    }  # fmt: skip
    of_fold_1 = parts(find_cases(root, fold=1))
    assert of_fold_1["case_000"] == "val" and of_fold_1["case_001"] is None
    with pytest.raises(UserError, match=r"splits_final.json: has no fold 2\. .*0\.\.1"):
        find_cases(root, fold=2)


@pytest.mark.parametrize("above", ["", "nnUNet_raw_data"])
def test_the_file_is_also_found_in_the_preprocessed_folder(tmp_path, above):
    root = write_nnunet(tmp_path / "nnUNet_raw" / above / "Dataset001_Tiny")
    assert split_of(root) == "random"
    place = tmp_path / "nnUNet_preprocessed" / "Dataset001_Tiny" / "splits_final.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps(SPLITS))
    assert split_of(root) == "given" and parts(find_cases(root))["case_004"] == "val"


def test_without_the_file_a_fold_is_the_one_that_nnunet_draws(tmp_path):
    """Numbers from scikit-learn 1.7: KFold(5, shuffle=True, random_state=12345) of 12 cases."""
    root = write_nnunet(tmp_path, cases=12)
    drawn = [[0, 3, 8], [7, 10, 11], [6, 9], [1, 4], [2, 5]]
    for fold, numbers in enumerate(drawn):
        val = [id_ for id_, part in parts(find_cases(root, fold=fold)).items() if part == "val"]
        assert val == [f"case_{number:03d}" for number in numbers]
    with pytest.raises(UserError, match=r"data\.fold is one of 0\.\.4"):
        find_cases(root, fold=5)


def test_cases_that_no_list_of_the_fold_names_are_told(tmp_path, caplog):
    root = write_nnunet(tmp_path, cases=7, tests=1, splits=SPLITS)
    said = "case_005, case_006: 2 cases in no part of fold 0 of splits_final.json, not used"
    find_cases(root)
    assert said in caplog.text
    (warning,) = check_dataset(root).of("warning")
    assert said == f"{warning.where}: {warning.problem}"
    caplog.clear()
    find_cases(root, fold=1)
    assert "case_001, case_005, case_006: 3 cases in no part of fold 1" in caplog.text
    caplog.clear()
    find_cases(root, split="kfold")
    assert "no part" not in caplog.text


@pytest.mark.parametrize("pattern", [None, r"^(patient\d|test_\d+)"])
def test_a_fold_that_would_be_empty_is_refused(pattern, tmp_path):
    ids = [f"patient{number}_{case}" for number in range(3) for case in range(1 + bool(pattern))]
    root = write_nnunet(tmp_path, ids=ids, tests=2)
    for fold in range(3):
        assert "val" in parts(find_cases(root, fold=fold, patient_pattern=pattern)).values()
    for fold in (3, 4):
        with pytest.raises(UserError, match=rf"fold {fold} of the 5 .* empty: there are 3 to draw"):
            find_cases(root, fold=fold, patient_pattern=pattern)
    assert check_dataset(root).ok


def test_cases_of_a_patient_stay_together_when_the_pattern_names_them(tmp_path):
    ids = [f"patient{number:03d}_{phase}" for number in range(6) for phase in ("ED", "ES")]
    root = write_nnunet(tmp_path, ids=ids)
    assert len({case.patient for case in find_cases(root)}) == 12
    (warning,) = check_dataset(root).of("warning")
    assert "patient000_ED, patient000_ES" in warning.problem
    cases = find_cases(root, patient_pattern=r"^(patient\d+)_")
    assert [case.patient for case in cases[:3]] == ["patient000", "patient000", "patient001"]
    assert all(a.part == b.part for a, b in zip(cases[::2], cases[1::2], strict=True))
    for pattern, message in (("(", "is no pattern"), ("x(.)", "finds no patient in patient000_ED")):
        with pytest.raises(UserError, match=message):
            find_cases(root, patient_pattern=pattern)
    splits = [{"train": [i for i in ids if i != "patient003_ES"], "val": ["patient003_ES"]}]
    (root / "splits_final.json").write_text(json.dumps(splits))
    assert find_cases(root)
    with pytest.raises(UserError, match="patient003 is in val and in train"):
        find_cases(root, patient_pattern=r"^(patient\d+)_")


def test_a_case_that_trains_with_its_patient_is_not_called_unused(tmp_path, caplog):
    splits = [{"train": ["p0_a", "p1_a"], "val": ["p2_a", "p2_b"]}]
    root = write_nnunet(tmp_path, ids=["p0_a", "p0_b", "p1_a", "p2_a", "p2_b", "p3_a"],
                        splits=splits)  # fmt: skip
    cases = find_cases(root, patient_pattern=r"^(p\d)")
    assert split_cases("given", cases, root).train == ("p0", "p1")  # p0_b too
    assert "p3_a: 1 case in no part of fold 0" in caplog.text and "p0_b" not in caplog.text


def test_cases_of_another_ending_are_told(tmp_path, caplog):
    root = write_nnunet(tmp_path, cases=3, tests=1)
    for place in ("images", "labels"):
        for case in ("Tr/case_000", "Ts/test_000"):
            (path,) = (root / f"{place}{case[:2]}").glob(f"{case[3:]}*")
            path.rename(path.with_name(path.name.removesuffix(".gz")))
    assert [case.id for case in find_cases(root)] == ["case_001", "case_002"]
    for part, name in (("Tr", "case_000"), ("Ts", "test_000")):
        assert f"labels{part}: 1 file of another ending than .nii.gz, not used: {name}.nii" in (
            caplog.text
        )
    assert "imagesTr: 1 file of another ending than .nii.gz, not used: case_000_0000.nii" in (
        caplog.text
    )


def test_a_patient_who_is_tested_does_not_train(tmp_path):
    root = write_nnunet(tmp_path, tests=2, ids=["a_1", "a_2", "b_1", "b_2", "test_7"])
    assert find_cases(root)
    with pytest.raises(UserError, match="test is in train and in test"):
        find_cases(root, patient_pattern="^([a-z]+)_")


def test_the_data_module_trains_on_a_fold(tmp_path):
    root = write_nnunet(tmp_path / "data", channels=2, splits=SPLITS)
    module = SegmentationDataModule(
        name="nnunet", find_cases=find_cases, root=root, cache_dir=tmp_path / "cache", size=16,
        class_names=LABELS, num_classes=3, in_channels=2, split="given", batch_size=2, steps=1,
        slicing="spacing",
    )  # fmt: skip
    module.load()
    assert module.split.name == "given-fold0" and "Validation = test" in module.split.note
    assert module.split.test == ("case_003", "case_004")
    assert module.evaluation_data("test")[0]["image"].shape == (4, 2, 18, 20)


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "whole": [1, 3], "core": 3},
        {"background": 0, "a": 2},
        {"background": 0, "a": 0},
        {"background": False, "a": True},
        {"0": "background", "1": "a", "01": "b"},
        ["background", "a"],
        {"a": 0, " a ": 1},
        {"a": 0, "${oc.env:HOME}": 1},
        {"background": 0},
    ],
    ids=str,
)
def test_labels_that_are_no_classes_are_refused_with_the_way_out(tmp_path, labels):
    root = write_nnunet(tmp_path, labels=labels)
    with pytest.raises(UserError, match=r"labels is .*data\.class_names=\[background") as raised:
        _ = read_dataset_json(root).class_names
    assert str(root / "dataset.json") in str(raised.value)
    assert len(find_cases(root)) == 5  # with classes that somebody names it can be used
    assert not check_dataset(root).ok


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"channel_names": {"1": "T1"}}, r'does not number .*: it is {"1": "T1"}'),
        ({"channel_names": {"T1": "0"}}, r'it is {"T1": "0"}\. .*must be like'),
        ({"channel_names": {"0": "a", "1": "b", "3": "c"}}, "does not number the channels"),
        ({"channel_names": ["T1"]}, r'it is \["T1"\]'),
        ({"channel_names": None}, "it is null"),
        ({"channel_names": {}}, "does not number the channels"),
        ({"channel_names": {str(n): "T" for n in range(65)}}, "at most 64 channels"),
        ({"file_ending": ".dcm"}, r"file_ending is '\.dcm', which is not read"),
        ({"file_ending": ["x"]}, "which is not read"),
        ({"file_ending": ".nii"}, "dataset.json says the ending"),
        ({"dataset": {"a": {}}}, "lists its files under 'dataset'"),
    ],
)
def test_what_else_dataset_json_may_not_say(tmp_path, about, message):
    root = write_nnunet(tmp_path, **about)
    with pytest.raises(UserError, match=message):
        find_cases(root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "no JSON"),
        (b"[]", "holds no dict"),
        (b"[" * 100_000, "is not usable"),
        (b" " * (9 << 20), "larger than"),
        (b"\xff", "UTF-8"),
        (None, "the file is missing"),
    ],
)
def test_a_hostile_or_missing_dataset_json_is_one_message(tmp_path, content, message):
    root = write_nnunet(tmp_path)
    (root / "dataset.json").unlink()
    if content is not None:
        (root / "dataset.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        find_cases(root)
    assert str(root / "dataset.json") in str(raised.value)
    (problem,) = check_dataset(root).problems
    assert problem.level == "error" and problem.remedy


def test_without_channels_the_key_of_either_version_is_named(tmp_path):
    root = write_nnunet(tmp_path, version=1)
    about = json.loads((root / "dataset.json").read_text())
    assert len(find_cases(root)) == 5 and "modality" in about
    (root / "dataset.json").write_text(json.dumps(about | {"modality": {"MRI": 0}}))
    with pytest.raises(UserError, match=r"modality\) does not number"):
        find_cases(root)
    del about["modality"]
    (root / "dataset.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="does not number the channels"):
        find_cases(root)
    (problem,) = check_dataset(root).of("error")
    assert problem.problem.startswith("dataset.json: channel_names")


def test_files_that_are_missing_or_too_many_are_all_listed(tmp_path):
    root = write_nnunet(tmp_path, cases=6, channels=2, tests=1, numTraining=7)
    (root / "imagesTr" / "case_000_0001.nii.gz").unlink()
    (root / "labelsTr" / "case_001.nii.gz").unlink()
    path = root / "imagesTr" / "case_002_0000.nii.gz"
    path.with_name("case_002_0002.nii.gz").write_bytes(path.read_bytes())
    path.with_name("case_003.nii.gz").write_bytes(path.read_bytes())
    test = root / "labelsTs" / "test_000.nii.gz"
    test.with_name("case_005.nii.gz").write_bytes(test.read_bytes())
    for channel in range(2):
        name = f"imagesTs/case_005_000{channel}.nii.gz"
        (root / name).write_bytes(path.read_bytes())
    cases, problems, _ = find_cases.survey(root)
    assert [case.id for case in cases] == ["case_004", "case_005", "test_000"]
    told = [f"{p.path.relative_to(root)}: {p.problem}" for p in problems]
    for line, held in zip(
        told,
        (
            r"imagesTr/case_000: .* there is case_000_0000\.nii\.gz ",
            r"imagesTr/case_002: .*_0000.nii.gz, case_002_0001\.nii\.gz, case_002_0002\.nii\.gz ",
            r"imagesTr/case_003: .* there is case_003\.nii\.gz, case_003_0000",
        ),
        strict=False,
    ):
        assert re.match(held, line)
    assert told[3:] == [
        "labelsTr/case_001.nii.gz: the label is missing",
        "labelsTs/case_005.nii.gz: case_005 is in labelsTr and in labelsTs",
    ]
    with pytest.raises(UserError, match=r"4 more like this: mambaseg check"):
        find_cases(root)
    report = check_dataset(root)
    assert len(report.of("error")) == 5
    assert any("numTraining is 7" in one.problem for one in report.of("warning"))


def test_channels_and_labels_that_do_not_fit_are_errors(tmp_path):
    root = write_nnunet(tmp_path, channels=2)
    image, label = arrays(0, channels=2)
    turned = nibabel.load(root / "imagesTr" / "case_000_0001.nii.gz")
    flip = np.diag([-1.0, 1.0, 1.0, 1.0])
    nibabel.save(
        nibabel.Nifti1Image(image[1], flip @ turned.affine), root / "imagesTr/case_000_0001.nii.gz"
    )
    write_volume(root / "imagesTr/case_001_0001.nii.gz", image[1][:-1], (1.5, 1.25, 8.0))
    write_volume(root / "labelsTr/case_002.nii.gz", label, (1.5, 1.25, 5.0))
    write_volume(root / "labelsTr/case_003.nii.gz", image[0], (1.5, 1.25, 8.0))
    write_volume(root / "labelsTr/case_004.nii.gz", np.stack([label] * 2, -1), (1.5, 1.25, 8.0))
    told = {one.where: one.problem for one in check_dataset(root).of("error")}
    for case, said in {
        "case_000": "has axes",
        "case_001": "the channel has shape",
        "case_002": "voxel size (5.0",
        "case_003": "the label holds value",
        "case_004": "the label has 2 channels",
    }.items():
        assert said in told[case]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([{"train": ["case_000"], "val": ["gone"]}], "fold 0 names gone, without a label"),
        ([{"train": ["case_000"]}], "does not list who is in train and val"),
        ([{"train": [1], "val": []}], "does not list who is in train and val"),
        ({"train": []}, "holds no list"),
        ([], "does not list who is in train and val"),
        ([{"train": ["case_000"], "val": ["case_000"]}], "in train and val"),
    ],
)
def test_splits_that_cannot_be_used_are_refused(tmp_path, splits, message):
    root = write_nnunet(tmp_path, splits=splits)
    with pytest.raises(UserError, match=message) as raised:
        find_cases(root)
    assert "splits_final.json" in str(raised.value)
    assert len(find_cases(root, split="kfold")) == 5  # which does not take them


def test_kfold_has_folds_that_the_data_set_does_not(tmp_path):
    root = write_nnunet(tmp_path / "data", splits=SPLITS)
    cfg = composed("data=nnunet", f"data.root={root}", "data.split=kfold", "data.fold=3")
    reader = instantiate(cfg.data.find_cases)
    assert {case.part for case in reader(root)} == {None}


def test_a_whole_file_of_other_channels_than_dataset_json_names_is_an_error(tmp_path):
    root = write_nnunet(tmp_path, cases=2, channels=3, whole=True, version=1)
    about = json.loads((root / "dataset.json").read_text())
    about["modality"] = {"0": "T1", "1": "T2"}
    (root / "dataset.json").write_text(json.dumps(about))
    errors = check_dataset(root).of("error")
    assert [one.where for one in errors] == ["case_000", "case_001"]
    assert all("has 3 channels, the data set has 2" in one.problem for one in errors)


def test_a_pickle_of_splits_is_not_read_and_said(tmp_path):
    root = write_nnunet(tmp_path)
    (root / "splits_final.pkl").write_bytes(b"")
    (problem,) = check_dataset(root).problems
    assert (problem.where, problem.level) == ("splits_final.pkl", "warning")


def test_a_sound_data_set_of_every_kind_has_no_problems(tmp_path):
    for number, words in enumerate(
        ({}, {"channels": 2, "tests": 2}, {"version": 1, "whole": True}, {"splits": SPLITS})
    ):
        report = check_dataset(write_nnunet(tmp_path / str(number), **words))
        assert report.problems == () and report.layout.name == "nnunet"


def test_a_colour_picture_is_one_file_with_three_channels(tmp_path):
    root = write_nnunet(tmp_path, ending=".png", channel_names={"0": "R", "1": "G", "2": "B"})
    colours = np.random.default_rng(0).integers(0, 255, (18, 20, 3), np.uint8)
    Pillow.fromarray(colours).save(root / "imagesTr" / "case_000_0000.png")
    coloured, grey, *_ = find_cases(root)
    assert np.array_equal(coloured.read(3, 3).image[0], colours.transpose(2, 0, 1))
    image = grey.read(3, 3).image[0]  # as prediction takes it
    assert image.shape == (3, 18, 20) and (image == image[0]).all()


@pytest.mark.parametrize("axis", [0, 2])
def test_a_flat_image_may_have_any_voxel_size_across(tmp_path, axis):
    """nnU-Net v1's 2-D sets: one slice, stored along either end, 999 mm thick."""
    root, zooms = write_nnunet(tmp_path, cases=3), [1.0, 1.0, 1.0]
    zooms[axis] = 999.0
    image, label = arrays(0)
    for folder, array in (("imagesTr/case_000_0000", image[0]), ("labelsTr/case_000", label)):
        write_volume(root / f"{folder}.nii.gz", np.moveaxis(array[:, :, :1], 2, axis), zooms)
    case = replace(find_cases(root)[0], slicing="spacing")
    volume = case.read(3)
    assert np.array_equal(volume.image[0, 0], image[0, :, :, 0].T)
    assert np.array_equal(volume.label[0], label[:, :, 0].T)
    zooms[1] = 999.0
    write_volume(root / "imagesTr/case_000_0000.nii.gz", image[0], zooms)
    with pytest.raises(UserError, match="voxel size"):
        case.read(3)


# ---- regions ------------------------------------------------------------------------------------

REGIONS = {"background": 0, "ring and cavity": [1, 2], "cavity": [1]}


@pytest.mark.parametrize(
    ("order", "names"),
    [
        ([2, 1], ("background", "cavity", "rest of ring and cavity")),
        (None, ("background", "label 1", "label 2")),
    ],
)
def test_regions_name_the_classes_that_they_are_made_of(order, names, tmp_path):
    about = {"regions_class_order": order} if order else {}
    found = read_dataset_json(write_nnunet(tmp_path, labels=REGIONS, **about))
    assert found.class_names == names
    assert found.regions == {"ring and cavity": [1, 2], "cavity": [1]}


@pytest.mark.parametrize("own", [[1, 3], [], [1, "2"], [0.5]])
def test_regions_of_values_that_are_no_labels_are_refused(own, tmp_path):
    labels = {"background": 0, "all": own}
    with pytest.raises(UserError, match="does not give each of the values"):
        _ = read_dataset_json(write_nnunet(tmp_path, labels=labels)).class_names


def test_a_data_set_of_regions_is_checked_trained_and_scored_by_them(tmp_path):
    about = {"labels": {**REGIONS, "ignore": 3}, "regions_class_order": [2, 1]}
    root = write_nnunet(tmp_path / "Dataset001_Tiny", **about)
    proposed = propose(check_dataset(root), "own", memory=(2**33, "8 GiB"))
    own = yaml.safe_load(proposed)
    assert own["regions"] == {"ring and cavity": [1, 2], "cavity": [1]}
    assert own["class_names"] == ["background", "cavity", "rest of ring and cavity"]
    assert "#   ring and cavity: " in proposed
    run = trained(*own_overrides(tmp_path), "data=nnunet", f"data.root={root}")
    assert list(run.folder.summary["classes"]) == ["background", "ring and cavity", "cavity"]
    assert run.task.class_names == tuple(own["class_names"])
    assert run.data.partial
