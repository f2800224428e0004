import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml
from tiny_acdc import pixels, write_h5, write_nifti, write_patient

from mambaseg.app.commands.check import main
from mambaseg.data.check import check_dataset
from mambaseg.data.check.layouts import Layout, known_layouts
from mambaseg.data.check.proposal import propose
from mambaseg.data.readers.acdc import find_cases
from mambaseg.data.readers.reader import Reader
from tiny_nnunet import write_nnunet


@pytest.fixture
def root(tmp_path):
    """Three sound patients."""
    for number in (1, 2, 3):
        write_patient(tmp_path / f"patient00{number}", seed=number)
    return tmp_path


def told(report, level):
    """The problems of one level as "where: problem" lines."""
    return [f"{one.where}: {one.problem}" for one in report.of(level)]


def test_a_sound_data_set_has_no_problems(root, capsys):
    report = check_dataset(root)
    assert report.problems == ()
    assert (report.patients, report.cases, report.ok) == (3, 6, True)
    assert main([str(root)]) == 0
    out = capsys.readouterr().out
    assert f"6 cases of 3 patients in {root}: 0 errors, 0 warnings" in out


def test_all_problems_are_listed_and_not_only_the_first(root, capsys):
    ed = root / "patient001" / "patient001_frame01.nii.gz"
    ed.write_bytes(ed.read_bytes()[:100])
    label = pixels(101)[1]
    label[0, 0, 0] = 7
    write_nifti(root / "patient001" / "patient001_frame12_gt.nii.gz", label)
    image = pixels(200)[0].astype(np.float32)
    image[0] = np.nan
    write_nifti(root / "patient002" / "patient002_frame01.nii.gz", image)
    write_nifti(root / "patient002" / "patient002_frame12_gt.nii.gz", np.zeros((6, 5, 2), np.uint8))
    (root / "patient003" / "patient003_frame01_gt.nii.gz").unlink()
    (root / "patient003" / "patient003_frame12.nii.gz").unlink()
    report = check_dataset(root)
    errors = "\n".join(told(report, "error"))
    for line in (
        "patient001_ED: patient001/patient001_frame01.nii.gz: truncated",
        "patient001_ES: patient001/patient001_frame12_gt.nii.gz: the label holds value 7",
        "patient002_ED: patient002/patient002_frame01.nii.gz: 15 of 90 voxels",
        "patient002_ES: patient002/patient002_frame12_gt.nii.gz: the label has",
        "patient003_ED: patient003/patient003_frame01.nii.gz: the image has no label",
        "patient003_frame12.nii.gz: patient003/patient003_frame12.nii.gz: the file is missing",
    ):
        assert line in errors
    assert len(report.of("error")) == 6
    assert all(one.remedy for one in report.problems)
    assert main([str(root)]) == 1
    assert "6 errors, 0 warnings" in capsys.readouterr().out


def test_an_unreadable_image_does_not_hide_an_unreadable_label(root):
    for name in ("patient001_frame01.nii.gz", "patient001_frame01_gt.nii.gz"):
        (root / "patient001" / name).write_bytes(b"")
    errors = told(check_dataset(root), "error")
    assert [line.split(": ")[1] for line in errors] == [
        "patient001/patient001_frame01.nii.gz",
        "patient001/patient001_frame01_gt.nii.gz",
    ]


def test_identical_images_are_one_warning_for_the_pair(root, capsys):
    write_patient(root / "patient004", seed=2, group="NOR")
    report = check_dataset(root)
    assert told(report, "warning") == ["patient002, patient004: identical images (ED, ES)"]
    assert report.ok
    assert main([str(root)]) == 0
    assert "0 errors, 1 warning\n" in capsys.readouterr().out


def test_images_of_equal_bytes_and_other_shape_are_not_identical(root):
    image = pixels(100)[0]
    turned = image.T.reshape(3, 6, 5).T  # the same bytes as read, (z, y, x)
    write_nifti(root / "patient002" / "patient002_frame01.nii.gz", turned)
    write_nifti(
        root / "patient002" / "patient002_frame01_gt.nii.gz", np.ones(turned.shape, np.uint8)
    )
    assert check_dataset(root).problems == ()


def test_one_image_for_both_phases_is_a_warning(root):
    write_nifti(root / "patient002" / "patient002_frame12.nii.gz", pixels(200)[0])
    assert told(check_dataset(root), "warning") == ["patient002: ED and ES are the same image"]


def test_files_without_content_are_warnings(root):
    zeros = np.zeros((6, 5, 3), np.uint8)
    write_nifti(root / "patient001" / "patient001_frame01.nii.gz", zeros)
    write_nifti(root / "patient003" / "patient003_frame12_gt.nii.gz", zeros)
    assert told(check_dataset(root), "warning") == [
        "patient001_ED: the image is constant (0 everywhere)",
        "patient003_ES: the label is background everywhere",
    ]


def test_a_gap_in_the_numbering_is_a_warning(root):
    write_patient(root / "patient006", seed=6)
    assert told(check_dataset(root), "warning") == ["patient004, patient005: 2 patients missing"]


def test_unknown_spacing_is_information_and_no_warning(tmp_path):
    header = {"zooms": (1.0, 1.0, 1.0), "unit": "unknown"}
    write_patient(tmp_path / "patient001", seed=1, **header)
    report = check_dataset(tmp_path)
    assert told(report, "info") == ["all: voxel size unknown in 2 of 2 cases"]
    assert len(report.problems) == 1
    write_patient(tmp_path / "patient002", seed=2)
    assert told(check_dataset(tmp_path), "info") == [
        "patient001_ED, patient001_ES: voxel size unknown in 2 of 4 cases"
    ]


def test_a_patient_in_training_and_testing_is_an_error(tmp_path):
    write_patient(tmp_path / "training" / "patient001", seed=1)
    write_patient(tmp_path / "testing" / "patient001", seed=1)
    (line,) = told(check_dataset(tmp_path), "error")
    assert line.startswith("patient001: training/patient001: patient001 is there twice")


def test_a_missing_h5_frame_is_an_error_and_the_rest_is_still_checked(tmp_path):
    for number, frames in ((1, (1,)), (2, (1, 2))):
        for frame in frames:
            path = tmp_path / "data" / f"patient00{number}_frame0{frame}.h5"
            write_h5(path, 10 * number + frame)
    path.write_bytes(b"no h5")
    report = check_dataset(tmp_path)
    assert [line.split(":")[0] for line in told(report, "error")] == [
        "patient001_frame01.h5",
        "patient002_ES",
    ]


def test_a_folder_without_patients_is_one_error(tmp_path):
    report = check_dataset(tmp_path)
    assert told(report, "error") == [f"{tmp_path}: no layout of a data set is recognised here"]
    assert not report.ok


def test_a_folder_one_level_too_high_is_told_where_the_data_are(tmp_path):
    root = tmp_path / "ACDC"
    write_patient(root / "patient001", seed=1)
    (one,) = check_dataset(tmp_path).of("error")
    assert f"Did you mean {root}? " in one.remedy


def test_a_layout_can_be_named_where_it_is_not_recognised(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "999")
    assert main([str(tmp_path), "--layout", "acdc"]) == 1
    assert "no cases of this data set here" in capsys.readouterr().out
    assert main([str(tmp_path), "--layout", "ACDC"]) == 1
    assert "choose one of acdc, " in capsys.readouterr().out


def test_every_layout_says_itself_what_its_labels_are(root):
    layouts = known_layouts()
    for layout in layouts.values():
        assert layout.config.get("class_names") and layout.config.get("num_classes"), layout.name
    unnamed = Layout("own", layouts["acdc"].reader, {"label_map": {0: 0, 1: 2, 2: 1, 3: 3}})
    proposed = yaml.safe_load(propose(check_dataset(root, layout=unnamed), "mine"))
    assert proposed["label_map"] == unnamed.config["label_map"]


def test_what_only_acdc_has_is_not_asked_of_other_layouts(root):
    """Labels that are no heart, classes that nobody named."""
    write_patient(root / "patient004", seed=6, zooms=(9.0, 9.0, 30.0))
    label = pixels(0)[1]
    label[0, 0, 0] = 7
    write_nifti(root / "patient001" / "patient001_frame01_gt.nii.gz", label)
    assert not check_dataset(root).ok
    other = Layout("other", Reader(find_cases.scan), {})
    assert check_dataset(root, layout=other).problems == ()
    problems = check_dataset(root, num_classes=4, layout=other).problems
    assert [one.level for one in problems] == ["error"]


def test_other_numbers_of_classes_can_be_asked_for(root):
    assert len(check_dataset(root, num_classes=3).of("error")) == 6
    assert main([str(root), "--num-classes", "3"]) == 1


@pytest.mark.parametrize(("words", "said"), [
    (["--num-classes", "0"], "--num-classes 0: 2 or more"),
    (["--config-dir", "absent"], "--config-dir absent: there is no such folder"),
])  # fmt: skip
def test_an_option_that_cannot_be_is_refused_although_the_data_are_sound(words, said, root, capsys):
    assert main([str(root), *words]) == 1
    assert said in capsys.readouterr().out


def test_a_folder_typed_as_an_override_is_told_how_it_is_typed(root, capsys):
    assert main([f"root={root}"]) == 1
    assert f"type the folder alone: mambaseg check {root}" in capsys.readouterr().out


def test_the_module_runs_as_a_command(tmp_path):
    root = tmp_path / "no [red]markup[/] = ü"
    (write_patient(root / "patient001", seed=1) / "Info.cfg").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "mambaseg", "check", str(root)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "PYTHONIOENCODING": "utf-8"},
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "patient001/Info.cfg" in done.stdout
    assert f"2 cases of 1 patient in {root}: 1 error, 0 warnings" in done.stdout
    assert done.stderr == ""


@pytest.mark.acdc
def test_real_acdc_passes_with_the_one_known_warning(acdc_root):
    report = check_dataset(acdc_root)
    assert report.ok
    assert told(report, "warning") == ["patient074, patient076: identical images (ED, ES)"]


def test_an_image_of_two_values_is_a_warning(root):
    image = pixels(100)[0] > 500
    write_nifti(root / "patient001" / "patient001_frame01.nii.gz", image.astype(np.uint8))
    (told_,) = told(check_dataset(root), "warning")
    assert told_ == "patient001_ED: the image holds two values only (0 and 1)"


def test_what_no_training_would_take_of_the_whole_is_an_error(tmp_path):
    """A class without a voxel; a table of something else."""
    root = write_nnunet(tmp_path / "nnunet")
    assert check_dataset(root).ok
    about = json.loads((root / "dataset.json").read_text())
    about["labels"]["extra"] = 3
    (root / "dataset.json").write_text(json.dumps(about))
    (error,) = told(check_dataset(root), "error")
    assert "class 3 (extra) occurs in no label of the data set" in error
    del about["labels"]["extra"]
    (root / "dataset.json").write_text(json.dumps(about))
    (root / "patients.csv").write_text("id,age\nP1,40\n")
    (error,) = told(check_dataset(root), "error")
    assert "patients.csv" in error and "has the columns id, age" in error
