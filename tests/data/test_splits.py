import hashlib
import json
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mambaseg.data.splits import Split, make_split
from mambaseg.errors import UserError

ACDC = [f"patient{number:03d}" for number in range(1, 151)]
TRAINING = ACDC[:100]
FOLDED = [(name, fold) for name in ("nnunet", "wsl4mis") for fold in range(5)]
OWN = [("wsl4mis_val", fold) for fold in range(5)]
PUBLISHED = [("ssl4mis", 0), ("transunet", 0), ("official", 0), *FOLDED, *OWN]


def numbers(patients):
    return [int(patient[-3:]) for patient in patients]


def groups(patients):
    """How many of DCM, HCM, MINF, NOR, RV: runs of twenty among patients 1..100."""
    counts = Counter((number - 1) // 20 for number in numbers(patients))
    return [counts[group] for group in range(5)]


def test_ssl4mis_is_the_published_one():
    split = make_split("ssl4mis", TRAINING)
    assert numbers(split.val) == [2, 19, 28, 30, 39, 45, 78, 82, 85, 87]
    assert numbers(split.test) == [
        *(1, 7, 8, 11, 13, 22, 24, 33, 52, 59, 64, 65, 66, 68, 75, 80, 81, 83, 84, 93)
    ]
    assert len(split.train) == 70
    assert groups(split.train) == [13, 14, 17, 13, 13]
    assert groups(split.val) == [2, 3, 1, 1, 3]
    assert groups(split.test) == [5, 3, 2, 6, 4]
    assert {"patient074", "patient076"} <= set(split.train)


def test_transunet_is_the_published_one():
    split = make_split("transunet", TRAINING)
    assert numbers(split.val) == [19, 21, 29, 33, 41, 50, 61, 71, 76, 80]
    assert numbers(split.test) == [
        *(2, 3, 8, 9, 12, 14, 17, 24, 42, 48, 49, 53, 55, 64, 67, 79, 81, 88, 92, 95)
    ]
    assert len(split.train) == 70
    assert groups(split.test) == [7, 1, 5, 3, 4]
    shared = set(split.test) & set(make_split("ssl4mis", TRAINING).test)
    assert numbers(sorted(shared)) == [8, 24, 64, 81]


def test_nnunet_folds_are_the_published_shuffle():
    # numpy.random.RandomState(1234).shuffle over the sorted array of ids, then [fold::5].
    expected = [
        [5, 7, 10, 20, 22, 27, 32, 34, 41, 46, 47, 51, 53, 59, 68, 69, 73, 75, 77, 88],
        [3, 14, 19, 21, 24, 36, 37, 45, 52, 54, 60, 61, 63, 65, 86, 91, 93, 97, 98, 100],
        [2, 4, 6, 8, 9, 11, 15, 26, 28, 30, 35, 39, 50, 64, 67, 71, 74, 82, 90, 92],
        [1, 16, 18, 38, 40, 42, 44, 55, 56, 62, 66, 72, 80, 81, 84, 85, 87, 89, 94, 95],
        [12, 13, 17, 23, 25, 29, 31, 33, 43, 48, 49, 57, 58, 70, 76, 78, 79, 83, 96, 99],
    ]
    splits = [make_split("nnunet", TRAINING, fold=fold) for fold in range(5)]
    assert [numbers(split.test) for split in splits] == expected


@pytest.mark.parametrize(
    ("name", "folds", "leaks"),
    [
        ("ssl4mis", 1, {}),
        ("transunet", 1, {0: "patient074 in train, patient076 in val"}),
        ("nnunet", 5, {2: "patient074 in test, patient076 in train",
                       4: "patient074 in train, patient076 in test"}),
        ("wsl4mis", 5, {}),
    ],
)  # fmt: skip
def test_published_splits_tell_where_they_tear_acdcs_own_duplicates_apart(name, folds, leaks):
    for fold in range(folds):
        split = make_split(name, TRAINING, fold=fold, duplicates=[("patient074", "patient076")])
        assert ("same images" in split.note) == (fold in leaks)
        assert leaks.get(fold, "") in split.note
        assert "same images" not in make_split(name, TRAINING, fold=fold).note


@pytest.mark.parametrize("fold", range(5))
def test_a_wsl4mis_fold_tests_on_one_pathology_group(fold):
    split = make_split("wsl4mis", TRAINING, fold=fold)
    assert numbers(split.test) == list(range(20 * fold + 1, 20 * fold + 21))
    assert groups(split.test)[fold] == 20


@pytest.mark.parametrize(("name", "fold"), OWN)
def test_wsl4mis_has_a_variant_that_does_not_validate_by_its_test_set(name, fold):
    """Of each other pathology the two patients that a hash of their names draws."""
    split = make_split(name, TRAINING, fold=fold)
    assert split.test == make_split("wsl4mis", TRAINING, fold=fold).test
    drawn = [
        sorted(group, key=lambda patient: hashlib.sha256(patient.encode()).digest())[:2]
        for group in (TRAINING[start : start + 20] for start in range(0, 100, 20))
    ]
    assert sorted(split.val) == sorted(p for k, pair in enumerate(drawn) if k != fold for p in pair)
    assert len(split.train) == 72 and split.name == f"{name}-fold{fold}"
    assert "Not a published split" in split.note


def test_official_tests_on_the_fifty_and_validates_on_two_of_each_group():
    split = make_split("official", ACDC)
    assert numbers(split.test) == list(range(101, 151))
    assert numbers(split.val) == list(range(10, 101, 10))
    assert groups(split.val) == [2, 2, 2, 2, 2]
    assert groups(split.train) == [18, 18, 18, 18, 18]
    assert len(split.train) == 90


@pytest.mark.parametrize(("name", "fold"), FOLDED)
def test_folded_splits_validate_on_test_and_say_so(name, fold):
    split = make_split(name, TRAINING, fold=fold)
    assert split.val == split.test
    assert split.name == f"{name}-fold{fold}"
    assert "Validation = test" in split.note
    assert f"fold {fold}" in split.note


@pytest.mark.parametrize("name", ["nnunet", "wsl4mis"])
def test_the_five_folds_test_on_every_patient_once(name):
    tested = [p for fold in range(5) for p in make_split(name, TRAINING, fold=fold).test]
    assert sorted(tested) == TRAINING


@pytest.mark.parametrize("name", ["ssl4mis", "transunet", "official"])
def test_the_other_published_splits_keep_validation_and_test_apart(name):
    split = make_split(name, ACDC)
    assert not set(split.val) & set(split.test)
    assert "Validation = test" not in split.note


@pytest.mark.parametrize(("name", "fold"), PUBLISHED)
def test_published_splits_cover_their_patients_and_never_train_on_test(name, fold):
    split = make_split(name, ACDC, fold=fold)
    assert not set(split.train) & ({*split.val, *split.test})
    everybody = ACDC if name == "official" else TRAINING
    assert sorted({*split.train, *split.val, *split.test}) == everybody
    for part in (split.train, split.val, split.test):
        assert list(part) == sorted(set(part))


@pytest.mark.parametrize(("name", "fold"), PUBLISHED)
def test_published_splits_depend_on_no_seed_order_or_further_patient(name, fold):
    split = make_split(name, ACDC, fold=fold)
    other = make_split(name, [*reversed(ACDC), "patient777"], fold=fold, seed=5)
    assert split == other


def test_all_splits_have_different_names_and_hashes():
    splits = [make_split(name, ACDC, fold=fold) for name, fold in PUBLISHED]
    splits += [make_split("random", ACDC, seed=seed) for seed in range(3)]
    assert len({split.name for split in splits}) == len(splits)
    assert len({split.hash for split in splits}) == len(splits)


def test_the_hash_is_that_of_the_parts_alone():
    split = Split("mine", ("b", "a"), ("c",), ("d",), "note")
    text = '{"test":["d"],"train":["a","b"],"val":["c"]}'
    assert json.loads(text)["train"] == ["a", "b"]
    assert split.hash == hashlib.sha256(text.encode()).hexdigest()[:12]
    assert split.hash == Split("yours", ("a", "b"), ("c",), ("d",), "").hash
    assert split.hash != Split("mine", ("b", "a"), ("d",), ("c",), "note").hash


def test_the_hash_of_ssl4mis_stays_what_it_is():
    assert make_split("ssl4mis", TRAINING).hash == "b659192258a6"


@pytest.mark.parametrize(("name", "fold"), PUBLISHED)
def test_a_published_split_names_absent_patients_and_the_way_out(name, fold):
    with pytest.raises(UserError, match=r"patient007.*data\.split=random"):
        make_split(name, [p for p in ACDC if p != "patient007"], fold=fold)


def test_many_absent_patients_are_counted():
    with pytest.raises(UserError, match=r"patient101, .* and 45 more.*100 patients"):
        make_split("official", TRAINING)


def test_an_unknown_split_lists_the_known_ones():
    with pytest.raises(UserError, match=r"'ssl5mis'.*ssl4mis.*nnunet.*random"):
        make_split("ssl5mis", ACDC)


@pytest.mark.parametrize(
    ("name", "fold"), [("nnunet", 5), ("wsl4mis", -1), ("ssl4mis", 1), ("random", 1)]
)
def test_a_fold_that_is_not_there_is_an_error(name, fold):
    with pytest.raises(UserError, match=f"{name} has no fold {fold}"):
        make_split(name, ACDC, fold=fold)


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        (("a", "b"), ("c",), ("a",)),
        (("a", "b"), ("b",), ("c",)),
        (("a",), ("b", "c"), ("b",)),
        (("a",), ("b",), ("b",)),
        ((), ("b",), ("c",)),
        (("a",), ("b",), ()),
    ],
)
@pytest.mark.parametrize("name", ["mine", "random-seed0"])
def test_a_split_of_ours_with_a_patient_in_two_parts_or_an_empty_part_is_an_error(
    name, train, val, test
):
    with pytest.raises(UserError, match=name):
        Split(name, train, val, test, "")


def test_a_published_split_that_validates_on_test_may_not_train_on_it():
    with pytest.raises(UserError, match="a in both train and test"):
        Split("nnunet-fold0", ("a", "b"), ("a", "c"), ("a", "c"), "")
    with pytest.raises(UserError, match="c in both val and test"):
        Split("nnunet-fold0", ("a", "b"), ("c", "d"), ("c",), "")


def test_duplicates_of_the_caller_are_told_of_in_published_splits():
    split = make_split("ssl4mis", TRAINING, duplicates=[("patient001", "patient003")])
    assert "patient001 in test, patient003 in train" in split.note


# ---- random

patient_sets = st.sets(st.integers(1, 300), min_size=3, max_size=120).map(
    lambda chosen: [f"patient{number:03d}" for number in sorted(chosen)]
)


@given(patients=patient_sets, seed=st.integers(0, 1000), data=st.data())
def test_a_random_split_is_disjoint_covers_and_keeps_duplicates_together(patients, seed, data):
    member = st.sampled_from(patients)
    duplicates = data.draw(st.lists(st.lists(member, min_size=2, max_size=3), max_size=3))
    try:
        split = make_split("random", patients, seed=seed, duplicates=duplicates)
    except UserError as error:
        assert re.search(r"3 or more distinct patients", str(error))
        assert len(patients) - len({p for group in duplicates for p in group}) < 3
        return
    parts = [set(split.train), set(split.val), set(split.test)]
    assert all(parts)
    assert sum(map(len, parts)) == len(patients)
    assert set.union(*parts) == set(patients)
    for group in duplicates:
        assert sum(bool(part & set(group)) for part in parts) == 1


@given(patients=patient_sets, seed=st.integers(0, 1000), data=st.data())
def test_a_random_split_is_a_function_of_patients_and_seed(patients, seed, data):
    shuffled = data.draw(st.permutations(patients))
    assert make_split("random", patients, seed=seed) == make_split("random", shuffled, seed=seed)


@given(
    chosen=st.sampled_from(PUBLISHED),
    absent=st.sets(st.sampled_from(ACDC), max_size=3),
    more=st.sets(st.integers(151, 400), max_size=5),
    group=st.lists(st.sampled_from(ACDC), min_size=2, max_size=3, unique=True),
)
def test_a_published_split_is_the_published_one_or_an_error(chosen, absent, more, group):
    name, fold = chosen
    published = make_split(name, ACDC, fold=fold)
    needed = {*published.train, *published.val, *published.test}
    patients = [*(p for p in ACDC if p not in absent), *(f"patient{number}" for number in more)]
    if absent & needed:
        with pytest.raises(UserError, match="missing are"):
            make_split(name, patients, fold=fold)
        return
    split = make_split(name, patients, fold=fold, duplicates=[group])
    assert (split.train, split.val, split.test) == (published.train, published.val, published.test)
    assert split.hash == published.hash
    parts = [{p for p in group if p in part} for part in (split.train, split.test, split.val)]
    torn = bool(parts[0]) + bool(parts[1] | (parts[2] if split.val == split.test else set()))
    torn += bool(parts[2]) and split.val != split.test
    assert ("same images" in split.note) == (torn > 1)


@given(count=st.integers(10, 300), seed=st.integers(0, 100))
def test_a_random_split_is_70_10_20_within_a_patient(count, seed):
    patients = [f"p{number}" for number in range(count)]
    split = make_split("random", patients, seed=seed)
    assert abs(len(split.val) - 0.1 * count) <= 0.5
    assert abs(len(split.test) - 0.2 * count) <= 0.5


def test_chains_of_duplicates_stay_together():
    patients = [f"p{number}" for number in range(20)]
    chain = [("p0", "p1"), ("p2", "p3"), ("p1", "p2")]
    for seed in range(20):
        split = make_split("random", patients, seed=seed, duplicates=chain)
        parts = (split.train, split.val, split.test)
        assert sum(any(p in part for p in ("p0", "p1", "p2", "p3")) for part in parts) == 1
        assert "p0, p1, p2, p3" in split.note


@pytest.mark.parametrize("count", [12, 20])
def test_no_part_is_empty_however_large_a_group_of_duplicates_is(count):
    patients = [f"p{number}" for number in range(count)]
    for seed in range(20):
        split = make_split("random", patients, seed=seed, duplicates=[patients[2:]])
        assert sorted(map(len, (split.train, split.val, split.test))) == [1, 1, count - 2]


def test_every_patient_gets_to_test_under_some_seed():
    patients = [f"p{number}" for number in range(10)]
    tested = {p for seed in range(50) for p in make_split("random", patients, seed=seed).test}
    assert tested == set(patients)


def test_too_few_patients_for_a_random_split_are_an_error():
    with pytest.raises(UserError, match=r"3 or more.*there are 2"):
        make_split("random", ["a", "b"])
    with pytest.raises(UserError, match=r"3 or more.*there are 2"):
        make_split("random", ["a", "b", "c"], duplicates=[("a", "b")])


# ---- parts that the data set names


def test_a_given_split_is_what_the_data_set_says():
    parts = {"a": "train", "b": "train", "c": "val", "d": "test"}
    split = make_split("given", [*parts, "unnamed"], given=parts)
    assert (split.train, split.val, split.test) == (("a", "b"), ("c",), ("d",))
    assert split.name == "given" and "optimistic" not in split.note
    assert make_split("given", parts, given=parts, fold=2, given_fold=2).name == "given-fold2"


@pytest.mark.parametrize("name", ["given", "auto", "random", "test", "ssl4mis"])
def test_a_fold_of_a_split_that_has_none_is_refused(name):
    """`data.fold=0,1,2` would be three runs on the same patients, under three names."""
    given = {f"patient{n:03d}": "test" if n < 9 else "train" for n in range(1, 101)}
    assert make_split(name, given, given=given).name.partition("-")[0] in (name, "given")
    with pytest.raises(UserError, match=r"has no fold 2: data.fold must be 0: it has no folds"):
        make_split(name, given, given=given, fold=2)


def test_a_cohort_that_is_all_test_can_be_scored_but_not_trained_on():
    for name in ("given", "auto", "test"):
        split = make_split(name, "ab", given={} if name == "test" else {"a": "test", "b": "test"})
        assert (split.train, split.val, split.test) == ((), (), ("a", "b"))
        with pytest.raises(
            UserError, match=r"no training patients \(all 2 are tested\).*g evaluate"
        ):
            split.require_training()
        assert "trains or validates" in split.note and len(split.hash) == 12
    assert make_split("given", "ab", given={"a": "val", "b": "test"}).test == ("b",)
    assert make_split("given", "ab", given={"a": "val", "b": "val"}).test == ("a", "b")
    assert make_split("auto", "abc", given=dict.fromkeys("abc", "train")).name == "random-seed0"
    make_split("random", "abc").require_training()


@pytest.mark.parametrize("named", ["val", "test"])
def test_a_part_that_the_data_set_lacks_is_the_other_one_and_told(named):
    split = make_split("given", "abc", given={"a": "train", "b": "train", "c": named})
    assert split.val == split.test == ("c",)
    assert "Validation = test: scores are optimistic" in split.note


@pytest.mark.parametrize("given", [None, {}, {"a": "train"}])
def test_a_data_set_that_names_no_parts_is_a_clear_error(given):
    with pytest.raises(UserError, match=r"data\.split=random"):
        make_split("given", "ab", given=given)


def test_duplicates_that_a_given_split_tears_apart_are_told():
    split = make_split("given", "ab", given={"a": "train", "b": "test"}, duplicates=[("a", "b")])
    assert "a in train, b in test" in split.note
