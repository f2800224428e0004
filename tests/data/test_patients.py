"""Whose a case is: names that look like several cases of one patient, and what is said of them."""

import logging
import re
import shlex
from dataclasses import replace
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
from mambaseg.data.patients import find_alike, parts_of, split_cases, with_patient
from mambaseg.data.readers import folder, nifti_pairs, nnunet
from mambaseg.data.readers.matching import Matcher
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
    assert "drawn by case as nnU-Net does" in given.note


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
    two = [replace(case, part="train" if case.phase == "ED" else "test") for case in found]
    with pytest.raises(UserError, match="is in test and in train"):
        module_on(tmp_path / "data", find_cases=lambda root: two, split="given").load()
    loud = [replace(case, id=case.id.upper(), patient=case.patient.upper()) for case in found]
    with pytest.raises(UserError, match=r"would count as two patients.*capital and small letters"):
        module_on(tmp_path / "data", find_cases=lambda root: [*found, *loud]).load()
    unknown = [replace(case, patient=case.id, patient_assumed=True) for case in [*found, *loud]]
    assert parts_of(unknown) == {}  # where no name of a patient is known, names say nothing


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


# ---- names that get a part or a folder before them


def put(root, *names, masks="_mask"):
    """Empty files of images with a mask beside each; nobody reads them."""
    for name in names:
        for path in (root / name, (root / name).with_stem(f"{Path(name).stem}{masks}")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


def patients_of(root, pattern):
    """Case -> patient."""
    found = Matcher((".png",)).find_cases(root, find_fakes, pattern)
    return {case.id: case.patient for case in found}


def people(form, *further):
    """{} is each of `NUMBERS`, then each of what follows."""
    return [f"{name}.png" for name in names(form, *further)]


@pytest.mark.parametrize(
    ("find_cases", "ending"), [(folder.find_cases, "png"), (nifti_pairs.find_cases, "nii")]
)
@pytest.mark.parametrize("places", ["{0}/{1}", "{1}/{0}"])
def test_a_patient_of_two_parts_is_refused_by_the_name_that_both_have(
    find_cases, ending, places, tmp_path
):
    for part, stem in (("train", "p01_v1"), ("train", "p02_v1"), ("test", "p01_v2")):
        for kind in ("images", "masks"):
            path = tmp_path / places.format(part, kind) / f"{stem}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    with pytest.raises(UserError, match=r"p01 is in (train and in test|test and in train)\."):
        find_cases(tmp_path, patient_pattern="^([^_]+)")
    assert len(find_cases(tmp_path, patient_pattern=".+")) == 3  # every case a patient


def test_a_patient_of_two_parts_that_are_said_by_names_is_refused(tmp_path):
    put(tmp_path, "train_p01_1.png", "train_p02_1.png", "test_p01_2.png")
    with pytest.raises(UserError, match="p01 is in train and in test"):
        folder.find_cases(tmp_path, patient_pattern="^([^_]+)")


def test_a_patient_of_two_class_folders_is_one(tmp_path):
    root = put(tmp_path, *(f"{kind}/p{number:02d}_{image}{kind[0]}.png"
                           for kind in ("benign", "malignant") for number in range(1, 7)
                           for image in (1, 2)))  # fmt: skip
    cases = folder.find_cases(root, num_classes=2)
    alike = find_alike(cases)
    expected = {case.id: case.id.partition("-")[2][:3] for case in cases}
    assert len(set(expected.values())) == 6 and alike.patients == expected
    for pattern in (alike.pattern, "^([^_]+)", r"(p\d+)", "^([^_-]+)"):
        cases = folder.find_cases(root, num_classes=2, patient_pattern=pattern)
        assert {case.id: case.patient for case in cases} == expected
        for seed in range(5):
            split = split_cases("random", cases, root, seed=seed)
            assert not set(split.test) & {*split.train, *split.val}


SEVERAL = {
    "called as before where that joins the same": (
        ["train/p{}_{}"], [(1, 2)], "^([^_]+)", "train-p{}",
    ),
    "a pattern for names after a part": (
        ["train/p{}_{}", "test/9p{}_{}"], [(1, 2)], "^(?:train|test)-9?([^_]+)", "p{}",
    ),
    "a pattern for names after a folder": (
        ["benign/p{}-x_{}", "malignant/p{}-x_{}"], [(1, 2)], "^[^-]+-([^_]+)", "p{}-x",
    ),
    "a pattern that asks for the folder": (
        ["benign/p{}_{}", "malignant/p{}_{}"], [(1, 2)], "^([a-z]+-p.)_", "{kind}-p{}",
    ),
    "folders are patients": (["p{}/visit_{}"], [(1, 2)], "^([^-]+)", "p{}"),
    "folders of parts are patients": (["train/p{}/visit{}"], [(1, 2)], "^([^-]+)", "p{}"),
    "folders are patients, each of many files": (
        ["p{}/{}"], [range(10, 22)], "^([^-]+)", "p{}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SEVERAL)
def test_what_patterns_find_beside_names(what, tmp_path):
    forms, further, pattern, expected = SEVERAL[what]
    files = [name for form in forms for name in people(form, *further)]
    put(tmp_path, *files)
    found = patients_of(tmp_path, pattern)
    assert len(found) == len(files)
    for case, patient in found.items():
        number = next(n for n in re.findall(r"\d", case.replace("9", "")) if int(n) in NUMBERS)
        assert patient == expected.format(number, kind=case.partition("-")[0])


def test_the_folder_of_a_patient_is_proposed_and_that_of_a_kind_is_not(tmp_path):
    def alike(place, *found):
        root = put(tmp_path / place, *found)
        return find_alike(list(Matcher((".png",)).find_cases(root, find_fakes, None)))

    assert alike("a", *people("p{}/visit{}", (1, 2))).pattern == "^([^-]+)"
    assert alike("b", *people("p{}/visit{}_{}", (1, 2), (1, 2))).pattern == "^([^_-]+)"
    assert alike("c", *(f"{who}/visit{n}.png" for who in ("smith", "jones", "brown", "white")
                        for n in (1, 2))).pattern == "^([^-]+)"  # fmt: skip
    kinds = ("aa", "bb", "cc", "dd")
    assert alike("d", *(f"{kind}/{n}.png" for kind in kinds for n in range(9))) is None
