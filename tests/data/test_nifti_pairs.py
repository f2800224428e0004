"""Volumes with label maps in folders that no file describes; data sets below a folder."""

import shutil

import numpy as np
import pytest
import yaml
from test_patients import find_alike

from mambaseg.app.commands.check import main
from mambaseg.data.check import check_dataset, find_layout
from mambaseg.data.check.proposal import propose
from mambaseg.data.readers import nifti_pairs
from mambaseg.data.readers.dataset_json import read_dataset_json
from mambaseg.errors import UserError
from runs import own_overrides, trained
from tiny_nnunet import arrays, write_nnunet, write_volume
from tiny_pictures import save

ZOOMS = (1.5, 1.25, 8.0)


def write(root, *names, seed=0):
    """Pairs of files of these names (image, label)."""
    for number, (image, label) in enumerate(names, seed):
        voxels, truth = arrays(number)
        for name, content in ((image, voxels[0]), (label, truth)):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_volume(path, content, ZOOMS)
    return root


LAYOUTS = {
    "two folders": [("images/{}.nii.gz", "labels/{}.nii.gz")],
    "two folders, suffix": [("img/{}.nii", "masks/{}_seg.nii.gz")],
    "two folders, a channel number": [("images/{}_0000.nii.gz", "labels/{}.nii.gz")],
    "suffix": [("{}.nii.gz", "{}_seg.nii.gz")],
    "suffix with a dash": [("{}.nii.gz", "{}-label.nii.gz")],
    "suffix in folders": [("{0}/{0}.nii.gz", "{0}/{0}_gt.nii.gz")],
    "folder per case": [("{}/image.nii.gz", "{}/label.nii.gz")],
    "NRRD": [("images/{}.nrrd", "labels/{}.nrrd")],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_find_their_labels_and_give_the_voxels_that_were_written(layout, tmp_path):
    ((image, label),) = LAYOUTS[layout]
    ids = ["a01", "b02", "c03"]
    root = write(tmp_path / "data", *((image.format(id_), label.format(id_)) for id_ in ids))
    assert find_layout(root).name == "nifti"
    cases = nifti_pairs.find_cases(root)
    assert [case.id.rpartition("-")[2] for case in cases] == ids
    for seed, case in enumerate(cases):
        volume, (voxels, truth) = case.read(3, 1), arrays(seed)
        assert np.array_equal(volume.image[:, 0], voxels[0].T)
        assert np.array_equal(volume.label, truth.T)
        assert volume.spacing == pytest.approx((8.0, 1.25, 1.5))
    assert check_dataset(root).problems == ()


def test_parts_channels_and_patients(tmp_path):
    names = [(f"{part}/images/p{n}_{m}.nii.gz", f"{part}/labels/p{n}_{m}.nii.gz")
             for part, numbers in (("train", (1, 2)), ("test", (3,)))
             for n in numbers for m in (1, 2)]  # fmt: skip
    root = write(tmp_path / "parts", *names)
    cases = nifti_pairs.find_cases(root, patient_pattern=r"(p\d)")
    assert {(case.patient, case.part) for case in cases} == {
        ("p1", "train"), ("p2", "train"), ("p3", "test"),
    }  # fmt: skip
    assert find_alike(nifti_pairs.find_cases(root)).patients["train-p1_1"] == "p1"
    report = check_dataset(root)
    config = yaml.safe_load(propose(report, "own", memory=(2**30, "")))
    assert (
        config["defaults"][0] == "nifti"
        and config["split"] == "auto"
        and config["num_classes"] == 3
    )
    assert config["patient_pattern"]

    two = write(
        tmp_path / "two", *((f"images/{n}_0000.nii.gz", f"labels/{n}.nii.gz") for n in "ab")
    )
    for number, name in enumerate("ab"):
        write_volume(two / f"images/{name}_0001.nii.gz", arrays(number, channels=2)[0][1], ZOOMS)
    for number, case in enumerate(nifti_pairs.find_cases(two)):
        image, _ = arrays(number, channels=2)
        assert np.array_equal(case.read(3, 2).image, np.moveaxis(image.T, -1, 1))


def test_what_is_wrong_is_said_for_each_file(tmp_path):
    root = write(tmp_path, ("images/a.nii.gz", "labels/a.nii.gz"), ("images/b.nii.gz", "x.nii.gz"))
    shutil.copy(root / "labels/a.nii.gz", root / "labels/a_seg_1.nii.gz")
    report = check_dataset(root)
    assert {one.problem.partition(": ")[0] for one in report.of("error")} == {
        "images/b.nii.gz", "labels/a_seg_1.nii.gz",
    }  # fmt: skip
    with pytest.raises(UserError, match="no cases of this data set here"):
        nifti_pairs.find_cases(root / "images")


PER_CASE = ("{}/image.nii.gz", "{}/label.nii.gz")
IN_FOLDERS = ("{0}/{0}.nii.gz", "{0}/{0}_seg.nii.gz")
LEFT_OUT = {  # layout, what is done in the folder c02, what is said of it
    "no label": (PER_CASE, lambda c: (c / "label.nii.gz").unlink(), "error",
                 "image.nii.gz: has no mask"),
    "no image": (PER_CASE, lambda c: (c / "image.nii.gz").unlink(), "error",
                 "label.nii.gz: has no image"),
    "another name": (PER_CASE, lambda c: (c / "image.nii.gz").rename(c / "t1.nii.gz"), "error",
                     "label.nii.gz: has no image"),
    "two images": (PER_CASE, lambda c: shutil.copy(c / "image.nii.gz", c / "image.nii"), "error",
                   "there is image.nii too"),
    "no label, by suffix": (IN_FOLDERS, lambda c: (c / "c02_seg.nii.gz").unlink(), "error",
                            "c02.nii.gz: has no mask"),
    "no image, by suffix": (IN_FOLDERS, lambda c: (c / "c02.nii.gz").unlink(), "error",
                            "c02_seg.nii.gz: has no image"),
    "one deeper": (IN_FOLDERS, lambda c: c.rename(c.parent / "x") and (c.parent / "x").rename(
        (c.parent / "deep").mkdir() or c.parent / "deep" / "c02"), "warning", "2 files beside"),
}  # fmt: skip


@pytest.mark.parametrize("what", LEFT_OUT)
def test_no_folder_of_a_case_is_left_out_in_silence(what, tmp_path):
    (image, label), change, level, said = LEFT_OUT[what]
    names = ((image.format(f"c0{number}"), label.format(f"c0{number}")) for number in range(4))
    root = write(tmp_path / "data", *names)
    change(root / "c02")
    report = check_dataset(root)
    assert report.cases == 3
    (found,) = [f"{one.where} {one.problem}" for one in report.of(level)]
    assert said in found


def test_files_beside_the_cases_are_told(tmp_path):
    root = write(tmp_path / "data", ("images/a.nii.gz", "labels/a.nii.gz"),
                 ("images/more/b.nii.gz", "labels/more/b.nii.gz"),
                 ("site2/images/c.nii.gz", "site2/labels/c.nii.gz"),
                 ("d.nii.gz", "d_seg.nii.gz"))  # fmt: skip
    report = check_dataset(root)
    told = sorted(one.where for one in report.of("warning") if "not used" in one.problem)
    assert report.cases == 1 and told == [
        "d.nii.gz, d_seg.nii.gz, images/more/b.nii.gz, labels/more/b.nii.gz",
        "site2/images/c.nii.gz, site2/labels/c.nii.gz",
    ]


@pytest.mark.parametrize("numbers", [(0, 2), (1,), (1, 2)])
def test_channels_are_numbered_without_a_gap(numbers, tmp_path):
    names = [(f"images/a_{number:04d}.nii.gz", "labels/a.nii.gz") for number in (0, 1)]
    names += [(f"images/b_{number:04d}.nii.gz", "labels/b.nii.gz") for number in numbers]
    report = check_dataset(write(tmp_path / "data", *names))
    said = f"has the channels b_{numbers[0]:04d}.nii.gz"
    assert any(said in one.problem for one in report.of("error"))


def test_a_training_runs_on_what_is_proposed(tmp_path):
    names = ((f"c{number}.nii.gz", f"c{number}_seg.nii.gz") for number in range(5))
    root = write(tmp_path / "data", *names)
    assert main([str(root), "--write", str(tmp_path / "conf" / "data" / "own.yaml")]) == 0
    run = trained(*own_overrides(tmp_path), "data=own", configs=tmp_path / "conf")
    assert run.data.counts["train"]["cases"] == 3
    run = trained(*own_overrides(tmp_path), "data=nifti", f"data.root={root}",
                  "data.label_map={0:0,1:1,2:1}")  # fmt: skip
    assert run.folder.record["status"] == "running" or run.folder.summary["cases"] == 1


def test_pictures_in_a_folder_img_are_not_taken_for_btcv(tmp_path):
    for number in range(3):
        save(tmp_path / "img" / f"{number}.png", np.zeros((8, 8), np.uint8))
        save(tmp_path / "label" / f"{number}.png", np.zeros((8, 8), np.uint8))
    assert find_layout(tmp_path).name == "folder"


def test_a_folder_of_data_sets_says_which_lie_below(tmp_path, capsys):
    raw = tmp_path / "nnUNet_raw"
    for number in (1, 2, 3):
        write_nnunet(raw / f"Dataset00{number}_Own")
    assert main([str(raw)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    for words in ("3 data sets", "Dataset001_Own", "Dataset003_Own", "Give the folder of one"):
        assert words.split()[0] in said
    with pytest.raises(UserError, match=r"missing.* below this folder: Dataset001_Own, Dataset00"):
        read_dataset_json(raw)
    (alone,) = check_dataset(raw).of("error")
    assert alone.problem.startswith("3 data sets lie below this folder: Dataset001_Own, ")
    assert f"such as {raw / 'Dataset001_Own'}." in alone.remedy
