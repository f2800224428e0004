"""data.split=kfold: every patient is tested once."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from mambaseg.data.patients import facts_of, split_cases
from mambaseg.data.readers import folder
from mambaseg.data.readers.acdc import find_cases
from mambaseg.data.splits import make_split
from mambaseg.data.validation import DataError
from mambaseg.errors import UserError
from runs import UNET, composed, entered, small_overrides
from tiny_pictures import save

PEOPLE = [f"p{number:02d}" for number in range(23)]
FACTS = {
    one: {"pathology": "ABC"[place % 3], "vendor": "GPS"[place // 10]}
    for place, one in enumerate(PEOPLE)
}


def folds(**options):
    by = options.get("by")
    count = len({FACTS[one][by] for one in PEOPLE}) if by else options.get("count", 5)
    options = {"facts": FACTS, **options}
    return [make_split("kfold", PEOPLE, fold=fold, **options) for fold in range(count)]


@pytest.mark.parametrize("options", [{}, {"count": 3, "seed": 7}, {"facts": None}, {"count": 23}])
def test_everybody_is_tested_once_and_never_by_a_network_that_saw_them(options):
    splits = folds(**options)
    assert Counter(p for one in splits for p in one.test) == dict.fromkeys(PEOPLE, 1)
    for number, one in enumerate(splits):
        assert sorted((*one.train, *one.val, *one.test)) == PEOPLE
        assert len(one.val) == 2 and one.name.endswith(f"-fold{number}")
    sizes = [len(one.test) for one in splits]
    assert max(sizes) - min(sizes) <= 1
    assert [one.hash for one in folds(**options)] == [one.hash for one in splits]
    other = {**options, "seed": 8}
    assert {one.hash for one in folds(**other)} != {one.hash for one in splits} or len(splits) == 23


def test_each_fold_has_about_as_many_of_each_pathology():
    for one in folds():
        counts = Counter(FACTS[p]["pathology"] for p in one.test)
        assert max(counts.values()) - min(counts.values()) <= 1 and len(counts) == 3
        assert "as many of each pathology" in one.note


def test_duplicates_stay_together():
    for one in folds(duplicates=[("p03", "p11", "p20")]):
        parts = {part for part in ("train", "val", "test") for p in ("p03", "p11", "p20")
                 if p in getattr(one, part)}  # fmt: skip
        assert len(parts) == 1


def test_duplicates_of_one_value_stay_together_where_values_are_the_folds():
    alike = [("p00", "p05"), ("p01", "p02", "p13")]  # p13 is of another vendor
    assert any(FACTS[a]["vendor"] != FACTS[b]["vendor"] for a, *_, b in alike)
    torn = 0
    for seed in range(20):
        plain = folds(by="vendor", seed=seed)
        for one, other in zip(plain, folds(by="vendor", seed=seed, duplicates=alike), strict=True):
            pairs = [{"p00", "p05"}, {"p01", "p02"}]
            torn += (apart := any(len({*one.val} & pair) == 1 for pair in pairs))
            assert (one.hash == other.hash) == (not apart)  # the others stay as they were
            parts = [{*getattr(other, part)} for part in ("train", "val", "test")]
            for pair in (("p00", "p05"), ("p01", "p02")):
                assert any({*pair} <= one for one in parts)
            assert ("p13 in" in other.note) == (sum(bool(one & {*alike[1]}) for one in parts) > 1)
    assert torn


def test_one_group_is_left_out():
    splits = folds(by="vendor")
    assert [{FACTS[p]["vendor"] for p in one.test} for one in splits] == [{"G"}, {"P"}, {"S"}]
    assert splits[1].name == "kfold-vendor-seed0-fold1" and "vendor P is tested" in splits[1].note
    for one in splits:
        assert not {FACTS[p]["vendor"] for p in one.test} & {
            FACTS[p]["vendor"] for p in (*one.train, *one.val)
        }


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"data\.folds=24: 2 to 23"):
        folds(count=24)
    with pytest.raises(UserError, match=r"no fold 5: data\.fold must be 0\.\.4"):
        make_split("kfold", PEOPLE, fold=5)
    with pytest.raises(UserError, match=r"split_by=vendor: is for data\.split=kfold"):
        make_split("random", PEOPLE, by="vendor")
    with pytest.raises(UserError, match=r"not known of p00, .*Known of some: pathology, vendor"):
        make_split("kfold", PEOPLE, by="centre", facts=FACTS)
    with pytest.raises(UserError, match="all patients have X"):
        make_split("kfold", PEOPLE, by="v", facts={one: {"v": "X"} for one in PEOPLE})


def test_facts_come_from_files_and_from_a_table(phantom_root, tmp_path, caplog):
    cases = find_cases(phantom_root)
    facts = facts_of(cases, tmp_path)
    assert {one["pathology"] for one in facts.values()} == {"NOR", "MINF", "DCM", "HCM", "RV"}
    table = tmp_path / "patients.csv"
    table.write_text("patient,centre\npatient001,Dijon\npatient999,Lyon\n", encoding="utf-8")
    facts = facts_of(cases, tmp_path)
    assert facts["patient001"]["centre"] == "Dijon" and "patient999" not in facts
    assert "rows of no patient here: patient999" in caplog.text
    table.write_text(table.read_text(), encoding="utf-8-sig")  # as Excel writes it
    assert facts_of(cases, tmp_path) == facts
    table.write_text("patient,centre\n" + 2 * "patient001,Dijon\n" + "patient001,Lyon\n")
    with pytest.raises(DataError, match="patient001 that centre is Dijon and that it is Lyon"):
        facts_of(cases, tmp_path)
    table.write_text("patient,centre\n001,Dijon\n002,Lyon\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"names no patient .*001, 002.*patient001"):
        facts_of(cases, tmp_path)
    table.write_text("id,centre\npatient001,Dijon\n", encoding="utf-8")
    with pytest.raises(DataError, match="column `patient`"):
        facts_of(cases, tmp_path)


def test_a_folder_per_patient_is_no_pathology(phantom_root, tmp_path):
    cases = [replace(case, group=case.patient) for case in find_cases(phantom_root)]
    assert not any(facts_of(cases, tmp_path).values())
    splits = [split_cases("kfold", cases, tmp_path, seed=seed, count=2) for seed in range(4)]
    assert len({one.hash for one in splits}) > 1 and "pathology" not in splits[0].note


def test_a_patient_of_two_groups_is_in_none_that_is_left_out(tmp_path):
    for number, kinds in enumerate(("bm", "b", "m", "b", "m", "b")):
        for kind in kinds:
            for name in (f"p{number}{kind}_1", f"p{number}{kind}_2"):
                save(tmp_path / kind / f"{name}.png", np.zeros((8, 8), np.uint8))
                save(tmp_path / kind / f"{name}_mask.png", np.zeros((8, 8), np.uint8))
    cases = folder.find_cases(tmp_path, num_classes=2, patient_pattern=r"(p\d+)")
    with pytest.raises(DataError, match=r"split_by=pathology: p0 has b and m, .*csv"):
        split_cases("kfold", cases, tmp_path, by="pathology")
    assert "pathology" not in facts_of(cases, tmp_path)["p0"]
    drawn = split_cases("kfold", cases, tmp_path, count=2)
    assert "as many of each pathology" not in drawn.note
    rows = "".join(f"p{number},{'ab'[number % 2]}\n" for number in range(6))
    (tmp_path / "patients.csv").write_text(f"patient,pathology\n{rows}")
    assert split_cases("kfold", cases, tmp_path, by="pathology").test == ("p0", "p2", "p4")


def test_a_sweep_trains_all_folds_which_are_pooled_and_predict_together(phantom_root, tmp_path):
    from mambaseg.app.ensemble import chosen_runs, restore_predictor
    from mambaseg.reporting.collect import collect

    words = [*small_overrides(phantom_root, tmp_path), *UNET, "logger=csv", "trainer=cpu",
             "data.steps=2", "name=cv", "data.split=kfold", "data.folds=2"]  # fmt: skip
    assert entered("train.py", "-m", *words, "data.fold=0,1") == 0
    (comparison,), _, problems = collect(tmp_path / "cv")
    (entry,) = comparison.entries
    assert entry.folds == 2 and not problems
    tested = Counter((row["case"], row["class"]) for row in entry.by_seed[1337])
    assert len({case for case, _ in tested}) == 16 and set(tested.values()) == {1}
    cfg = composed(f"ensemble=[{tmp_path}/cv/*]", "input=x", script="predict")
    runs = chosen_runs(cfg)
    assert len(runs) == 2 and len(restore_predictor(runs, device="cpu").members) == 2


def test_folds_with_few_labels_are_pooled_and_compared_with_all_labels(phantom_root, tmp_path):
    from mambaseg.reporting.collect import collect, group

    words = [*small_overrides(phantom_root, tmp_path), *UNET, "logger=csv", "trainer=cpu",
             "data.steps=1", "data.val_every=1", "name=few", "data.split=kfold", "data.folds=2",
             "data.fold=0,1", "data.labelled=2,null"]  # fmt: skip
    assert entered("train.py", "-m", *words) == 0
    (comparison,), _, problems = collect(tmp_path / "few")
    assert [entry.folds for entry in comparison.entries] == [2, 2] and not problems
    (first, *others) = [run for entry in comparison.entries for run in entry.runs]
    data = {**first.record["data"], "scored": "labels that have changed since"}
    first = replace(first, record={**first.record, "data": data})
    assert len({comparison.title for comparison in group([first, *others])}) == 2


def test_each_pathology_validates():
    people = [f"p{number:02d}" for number in range(30)]
    facts = {one: {"pathology": "ABC"[place % 3]} for place, one in enumerate(people)}
    for fold in range(5):
        one = make_split("kfold", people, fold=fold, facts=facts)
        assert Counter(facts[p]["pathology"] for p in one.val) == {"A": 1, "B": 1, "C": 1}
