"""Whose a case is: names that look like several cases of one patient, and what is said of them."""

import logging
import re
import shlex
from itertools import product
from pathlib import Path

import pytest
from fake_cases import find_fakes, write_cases
from hydra.core.override_parser.overrides_parser import OverridesParser
from test_datamodule import module_on

from mambaseg.data.case import Case
from mambaseg.data.check import check_dataset
from mambaseg.data.check.proposal import propose
from mambaseg.data.datamodule import SegmentationDataModule
from mambaseg.data.patients import find_alike, with_patient
from mambaseg.data.readers import folder, nnunet
from mambaseg.data.splits import make_split
from mambaseg.errors import UserError
from tiny_nnunet import LABELS, write_nnunet
from tiny_pictures import write_busi

NUMBERS = range(1, 5)


def cases_named(ids):
    cases = [Case(id_, id_, None, None, Path(id_), None, find_fakes) for id_ in ids]
    return [with_patient(case, None) for case in cases]


def names(form, *further):
    """`form` with a patient's number and what else differs."""
    return [form.format(*values) for values in product(NUMBERS, *further)]


@pytest.mark.parametrize(
    "ids",
    [
        names("patient{:03d}_frame{:02d}", (1, 12)),
        names("p{:02d}_s{}", (1, 2, 3)),
        names("P{:02d}-{}", ("ED", "ES")),
        names("{:02d}.{}", (1, 2)),
        names("{:02d} {}", (1, 2)),
        names("p{:02d}s{}", (1, 2)),
        names("{:02d}{}", "ab"),
        names("set_{:02d}{}", "ab"),
        names("ED_patient{:02d}") + names("ES_patient{:02d}"),
        names("frame1_p{:02d}") + names("frame2_p{:02d}"),
        names("pat{}_visit{}_slice{}", (1, 2), (1, 2)),
        names("sub-{:02d}_ses-{}_T1w", (1, 2)),
        names("center1_p{}_s{}", (1, 2)),
        names("2024_{:03d}_{}", (1, 2)),
        names("病例{:02d}_{}", (1, 2)),
        ["smith_1", "smith_2", "jones_1", "jones_2", "brown_1", "brown_2"],
        ["p1_a", "p2_a", "p3_a", "p4_a", "p4_b"],
        ["train-p1_1", "test-p1_2", "train-p2_1", "train-p3_1", "test-p4_1"],
        ["video1_1", "video1_2", "video2_1", "video2_2"],
    ],
    ids=lambda ids: ids[0],
)
def test_names_of_several_cases_of_a_patient_are_seen(ids):
    alike = find_alike(cases_named(ids))
    of = {int(number) for number in re.findall(r"\d+", " ".join(alike.patients.values()))}
    expected = 4 if of - {1} else 3
    if "smith_1" in ids:
        expected = 3
    if "video1_1" in ids:
        expected = 2
    assert len(set(alike.patients.values())) == expected
    assert {alike.patients[example] for example in alike.examples} == {
        alike.patients[alike.examples[0]]
    }
    # what is printed survives the shell, then Hydra's grammar, and finds the same patients
    (word,) = shlex.split(alike.override)
    pattern = OverridesParser.create().parse_override(word).value()
    told = [with_patient(case, pattern) for case in cases_named(ids)]
    assert {case.id: case.patient for case in told} == alike.patients
    assert find_alike(told) is None  # somebody has said it


@pytest.mark.parametrize(
    "ids",
    [
        names("case_{:03d}"),
        names("BRATS_{:03d}"),
        names("ISIC_{:07d}_downsampled"),
        [str(number) for number in range(30)],
        [f"{kind}_{number}" for kind in ("HGG", "LGG") for number in range(9)],
        [f"{part}_{number}" for part in ("train", "testA", "testB") for number in range(9)],
        [f"benign ({number})" for number in range(40)]
        + [f"malignant ({number})" for number in range(20)]
        + [f"normal ({number})" for number in range(10)],
        ["cju0qkwl35piu0993l0dewei2", "cju1qkwl35piu0993l0dewei", "cju1zkwl35piu0993l0de9ab"],
        [],
    ],
    ids=lambda ids: ids[0] if ids else "none",
)
def test_names_of_one_case_per_patient_are_left_alone(ids):
    assert find_alike(cases_named(ids)) is None


def test_a_split_says_whether_it_is_by_patient_or_by_case(tmp_path, caplog):
    """Two frames per patient: without a pattern everybody who is tested may train too."""
    ids = names("patient{:03d}_frame{:02d}", (1, 12))
    root = write_nnunet(tmp_path / "data", ids=ids)

    def loaded(pattern, split="random"):
        module = SegmentationDataModule(
            name="own",
            find_cases=lambda place: nnunet.find_cases(place, patient_pattern=pattern),
            root=root, cache_dir=tmp_path / "cache", size=16, class_names=LABELS, num_classes=3,
            split=split, batch_size=2, steps=1, slicing="spacing",
        )  # fmt: skip
        with caplog.at_level(logging.INFO):
            module.load()
        return module

    by_case = loaded(None).split
    assert by_case.note.startswith("Not a published split: drawn by case with seed 0; 5/1/2 cases.")
    assert "The names suggest several cases per patient, of which patient00" in by_case.note
    assert "train: 5 cases" in caplog.text and "patients" not in caplog.text
    assert find_alike(nnunet.find_cases(root)).override in caplog.text
    caplog.clear()
    by_patient = loaded(r"^(patient\d+)").split
    assert by_patient.note == "Not a published split: drawn by patient with seed 0; 2/1/1 patients."
    assert "train: 2 patients, 4 cases" in caplog.text and "begin" not in caplog.text
    given = loaded(None, "given").split  # nnU-Net's own draw, by case as well
    assert "The names suggest several cases per patient" in given.note


def test_a_split_that_tears_no_patient_apart_only_says_that_it_is_by_case():
    alike = {"a1": "a", "a2": "a", "b1": "b", "b2": "b"}
    given = {"a1": "train", "a2": "train", "b1": "test", "b2": "test"}
    assert "suggest" not in make_split("given", given, given=given, alike=alike).note
    assert "of which a would be" in make_split("given", given, given={**given, "a2": "test"},
                                               alike=alike).note  # fmt: skip


def test_a_case_that_is_there_twice_or_a_patient_in_two_parts_is_refused_for_any_reader(tmp_path):
    write_cases(tmp_path / "data", patients=4)
    found = find_fakes(tmp_path / "data")
    with pytest.raises(UserError, match="is there twice"):
        module_on(tmp_path / "data", find_cases=lambda root: [*found, found[0]]).load()
    from dataclasses import replace

    two = [replace(case, part="train" if case.phase == "ED" else "test") for case in found]
    with pytest.raises(UserError, match="is in test and in train"):
        module_on(tmp_path / "data", find_cases=lambda root: two, split="given").load()


def test_data_check_proposes_the_pattern_for_every_layout_without_patients(tmp_path):
    ids = names("p{:02d}_{}", (1, 2))
    root = write_nnunet(tmp_path / "nnunet", ids=ids)
    report = check_dataset(root)
    (warning,) = report.of("warning")
    assert "p01_1, p01_2" in warning.problem and """'data.patient_pattern="^(""" in warning.remedy
    assert "8 cases in" in report.summary
    assert "patient_pattern: ^([^_]+)  # " in propose(report, "own", memory=(2**30, ""))
    assert "patient_pattern" not in propose(
        check_dataset(write_nnunet(tmp_path / "single")), "own", memory=(2**30, "")
    )
    pictures = write_busi(tmp_path / "pictures")
    assert all(case.patient_assumed for case in folder.find_cases(pictures))
