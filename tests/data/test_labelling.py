"""Which labels are read: none of unlabelled cases, scribbles, and pixels without a label."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import yaml
from test_datamodule import as_rank, assert_same, joined, module_on, training_batches
from test_mnms import write_mnms
from test_nifti_pairs import write as write_pairs
from test_public_sets import write_archive
from tiny_acdc import pixels, write_h5, write_nifti, write_patient

from mambaseg.app.commands.check import main
from mambaseg.data.batches import TwoStreams
from mambaseg.data.case import Case
from mambaseg.data.check import check_dataset
from mambaseg.data.check.proposal import propose
from mambaseg.data.classes import IGNORED
from mambaseg.data.labelling import for_training, labelled_patients
from mambaseg.data.readers import acdc, folder, mnms, nifti_pairs, nnunet, promise12, synapse
from mambaseg.data.readers.dataset_json import read_dataset_json
from mambaseg.data.splits import Split
from mambaseg.data.validation import as_label
from mambaseg.data.volume import Volume
from mambaseg.errors import UserError
from runs import composed
from tiny_nnunet import arrays, write_nnunet, write_volume
from tiny_pictures import blob, save
from tiny_pictures import mask as white

h5py = pytest.importorskip("h5py")


@pytest.fixture
def root(tmp_path):
    from fake_cases import write_cases

    write_cases(tmp_path / "data", patients=10)
    return tmp_path / "data"


# ---- labels that must not be read


def write_pictures(root, *, mask=None):
    for seed in range(3):
        picture, inside = blob(seed)
        save(root / "images" / f"{seed}.png", picture)
        save(root / "masks" / f"{seed}.png", (mask or white)(inside))
    return root


def write_h5_patients(root, patients=1):
    for number in range(1, patients + 1):
        for frame in (1, 2):
            name = f"patient{number:03d}_frame{frame:02d}.h5"
            write_h5(root / "ACDC_training_volumes" / name, seed=10 * number + frame)
    return root


LAYOUTS = {
    "official": (lambda root: write_patient(root / "patient001").parent, acdc.find_cases),
    "h5": (write_h5_patients, acdc.find_cases),
    "archive": (partial(write_archive, test=()), synapse.find_cases),
    "promise": (
        lambda root: write_h5(root / "data" / "Case00.h5", 0) or root,
        promise12.find_cases,
    ),
    "mnms": (write_mnms, mnms.find_cases),
    "nnunet": (write_nnunet, nnunet.find_cases),
    "nifti": (lambda root: write_pairs(root, ("a.nii.gz", "a_seg.nii.gz")), nifti_pairs.find_cases),
    "pictures": (write_pictures, folder.find_cases),
}


def poison(case: Case) -> None:
    """Damages the label of a case, and nothing else of it."""
    if case.label_path != case.image_path:
        case.label_path.write_bytes(b"poison")
    elif case.label_path.suffix == ".h5":
        with h5py.File(case.label_path, "a") as file:
            del file["label"]
            file["label"] = "poison"
    else:
        for path in case.sources():
            with np.load(path) as content:
                image = content["image"]
            np.savez(path, image=image)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_case_whose_label_must_not_be_read_does_not_need_one(layout, tmp_path):
    write, find_cases = LAYOUTS[layout]
    case = find_cases(write(tmp_path / "data"))[0]
    whole = case.read(9).image
    poison(case)
    with pytest.raises(UserError):
        case.read(9)
    unlabelled = for_training(case, [], "dense")
    read = unlabelled.read(9)
    assert np.array_equal(read.image, whole) and (read.label == IGNORED).all()
    separate = case.label_path != case.image_path
    assert (case.label_path in unlabelled.sources()) != separate


# ---- who is read how, where image and label are one file


def labels_in(module, patient):
    """The values of a patient's labels as the cache has them."""
    entries = enumerate(module.cache.entries)
    numbers = [number for number, one in entries if one.case.startswith(patient)]
    return {int(value) for number in numbers for value in np.unique(module.cache.label(number))}


def test_one_cache_folder_keeps_apart_whose_labels_are_hidden(tmp_path):
    root = write_h5_patients(tmp_path / "data", patients=4)
    train = module_loaded(root, find_cases=acdc.find_cases).split.train
    surveyed = []
    for chosen, hidden in (train, train[::-1]):
        module = module_loaded(root, find_cases=acdc.find_cases, labelled=[chosen])
        assert IGNORED not in labels_in(module, chosen)
        assert labels_in(module, hidden) == {IGNORED}
        surveyed.append({one.case[:10] for one in module.survey(greys=True) if one.greys})
    assert surveyed == [{train[0]}, {train[1]}]


def test_an_empty_list_of_labelled_patients_is_refused(root):
    with pytest.raises(UserError, match=r"data\.labelled=\[\]: name at least one patient"):
        module_loaded(root, labelled=[])


def test_one_cache_folder_keeps_apart_who_is_read_by_scribbles(tmp_path):
    root = write_h5_patients(tmp_path / "data", patients=4)
    for path in root.rglob("*.h5"):
        with h5py.File(path, "a") as file:
            file["scribble"] = scribbled(file["label"][:].T).T
    for fold in (0, 1):
        how = {"split": "kfold", "folds": 2, "fold": fold, "labels": "scribble"}
        module = module_loaded(root, find_cases=acdc.find_cases, **how)
        patients = {case.patient for part in module.cases.values() for case in part}
        by_scribble = {one for one in patients if IGNORED in labels_in(module, one)}
        assert by_scribble == {*module.split.train}


# ---- batches of two halves


def test_two_ranks_and_micro_batches_give_together_the_two_halves(root):
    options = {"labelled": 3, "unlabelled": True, "batch_size": 8, "oversample": 0.5}

    def ordered(batch):
        order = np.argsort(batch["position"].numpy())
        return {
            key: value[order] if hasattr(value, "numpy")
            else [value[place] for place in order] if isinstance(value, list) else value
            for key, value in batch.items()
        }  # fmt: skip

    alone = training_batches(module_on(root, **options))
    assert [batch["labelled"] for batch in alone] == [4] * 6
    known = {case.id for case in module_loaded(root, **options).cases["train"] if case.labelled}
    for batch in alone:
        assert {*batch["case"][:4]} <= known and not {*batch["case"][4:]} & known
        assert {*batch["label"][4:].unique().tolist()} <= {0, IGNORED}  # 0: beyond the image
        assert (batch["label"][:4] != IGNORED).all()
    ranks = [training_batches(as_rank(module_on(root, **options), rank, 2)) for rank in (0, 1)]
    together = [ordered(joined(parts)) for parts in zip(*ranks, strict=True)]
    assert_same(together, [ordered(batch) for batch in alone])
    later = as_rank(module_on(root, **options), 0, 1, step=4).train_dataloader()
    assert [batch["case"] for batch in later] == [batch["case"] for batch in alone[4:]]


def module_loaded(root, **options):
    module = module_on(root, **options)
    module.load()
    return module


# ---- pixels without a label


def write_partial(root, *, labels=None, ignored=3):
    """nnU-Net's layout, in which a part of every label is open."""
    names = {"background": 0, "cavity": 1, "wall": 2, "ignore": ignored}
    write_nnunet(root, labels=labels or names)
    for path in root.glob("labelsTr/*.nii.gz"):
        if not path.name.startswith("."):
            truth = arrays(int(path.name[5:8]))[1]
            truth[:5] = ignored
            write_volume(path, truth, (1.5, 1.25, 8.0))
    return root


def test_the_ignore_label_of_nnunet_is_taken_from_its_file(tmp_path):
    root = write_partial(tmp_path / "Dataset001_Open")
    cfg = composed("data=nnunet", f"data.root={root}")
    assert cfg.data.ignore_label == 3 and list(cfg.data.class_names)[1:] == ["cavity", "wall"]
    report = check_dataset(root)
    assert report.ok and "5 of 5 cases are labelled in part: 25.0% of" in report.supervision
    proposed = propose(report, "mine", memory=(2**30, "a test"))
    assert "num_classes: 3" in proposed and "\nignore_label:" not in proposed
    module = module_on(
        root, find_cases=nnunet.find_cases, class_names=["background", "cavity", "wall"],
        num_classes=3, ignore_label=3, slicing="spacing",
    )  # fmt: skip
    labels = {int(v) for batch in training_batches(module) for v in batch["label"].unique()}
    assert labels == {0, 1, 2, IGNORED}
    assert "In 2 of 2 validation and test cases 25.0% of the voxels" in module.split.note


@pytest.mark.parametrize(
    ("labels", "ignore"),
    [
        ({"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, 3),
        ({"0": "background", "1": "a", "2": "ignore"}, 2),
        ({"background": 0, "a": 1}, None),
    ],
)
def test_an_ignore_label_beside_regions_and_of_earlier_versions(labels, ignore, tmp_path):
    assert read_dataset_json(write_nnunet(tmp_path, labels=labels)).ignore == ignore


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "ignore": 1, "a": 2},
        {"background": 0, "ignore": "x"},
        {"background": 0, "a": 1, "ignore": 256},
    ],
)
def test_an_ignore_label_that_is_not_the_last_value_is_refused(labels, tmp_path):
    with pytest.raises(UserError, match=r"dataset\.json.*'ignore' is not the last value"):
        read_dataset_json(write_nnunet(tmp_path, labels=labels))


def test_masks_may_leave_pixels_open(tmp_path, capsys):
    def void(inside):
        mask = inside.astype(np.uint8)
        mask[:8] = 255  # 0, 1 and 255: read as black and white, 255 would be the foreground
        return mask

    root = write_pictures(tmp_path / "data", mask=void)
    words = ["data=folder", f"data.root={root}", "data.ignore_label=255"]
    cfg = composed(*words)
    options = {key: value for key, value in cfg.data.find_cases.items() if key[0] != "_"}
    case = replace(folder.find_cases(root, **options)[0], ignore=255)
    label, inside = case.read(2).label[0], blob(0)[1]
    assert (label[:8] == IGNORED).all() and np.array_equal(label[8:], inside[8:])
    with pytest.raises(UserError, match="read as binary have no such value"):
        folder.find_cases(root, masks="binary", ignore_label=255)
    assert "# Does 255 mark pixels without a label?" in propose(
        check_dataset(root), "mine", memory=(2**30, "a test")
    )
    assert main([str(root), "--ignore-label", "255", "--sheet", str(tmp_path / "s.png")]) == 0
    said = capsys.readouterr().out
    assert "3 of 3 cases are labelled in part" in said
    proposed = yaml.safe_load(said[said.index("defaults:") :].partition("\nContact")[0])
    assert proposed["ignore_label"] == 255 and proposed["num_classes"] == 2


def read_values(case, values):
    label = np.zeros((1, 4, 4), np.uint8)
    label[0, 0] = values
    return Volume(np.ones((1, 1, 4, 4), np.float32), as_label(label, case.image_path))


@pytest.mark.parametrize(
    ("mapping", "message"),
    [(None, "holds value 255 beside data.ignore_label=9"), ({0: 0, 1: 1, 2: 0}, "not named in")],
)
def test_a_value_beside_the_ignored_one_is_no_ignored_one(mapping, message, tmp_path):
    reader = partial(read_values, values=(0, 1, 9, 255))
    pairs = mapping and tuple(mapping.items())
    case = Case("a", "a", None, None, tmp_path, tmp_path, reader, label_map=pairs, ignore=9)
    with pytest.raises(UserError, match=message):
        case.read(3)
    case = replace(case, reader=partial(read_values, values=(0, 1, 9, 2)))
    assert case.read(3).label[0, 0].tolist() == [0, 1, IGNORED, 0 if mapping else 2]


def test_a_class_cannot_be_ignored(tmp_path, root):
    with pytest.raises(UserError, match=r"ignore_label=2.* stands for no class"):
        module_on(root, ignore_label=2)
    with pytest.raises(UserError, match=r"ignore_label=2.* stands for no class"):
        check_dataset(write_patient(tmp_path / "acdc" / "patient001").parent, ignore_label=2)


# ---- scribbles


def scribbled(label, unlabelled=4):
    """A label of the pixels of some rows."""
    scribble = np.full_like(label, unlabelled)
    scribble[::2] = label[::2]
    return scribble


def test_scribbles_are_read_for_training_alone(tmp_path):
    root = tmp_path / "data"
    for seed, name in enumerate(("patient001", "patient002")):
        write_patient(root / name, seed=seed)
        for offset, frame in enumerate((1, 12)):
            label = scribbled(pixels(100 * seed + offset)[1])
            write_nifti(root / name / f"{name}_frame{frame:02d}_scribble.nii.gz", label)
    case = acdc.find_cases(root)[0]
    read = for_training(case, [case.patient], "scribble").read(4).label
    truth = case.read(4).label
    assert (read[..., 1::2] == IGNORED).all() and np.array_equal(read[..., ::2], truth[..., ::2])
    report = check_dataset(root)
    assert report.ok and "4 of 4 cases have a scribble (data.labels=scribble" in report.supervision
    report = check_dataset(root, labels="scribble")
    assert report.ok and "4 of 4 cases are labelled in part: 50.0%" in report.supervision
    assert "labels: scribble" in propose(report, "mine", memory=(2**30, "a test"))
    (root / "patient001" / "patient001_frame01_scribble.nii.gz").unlink()
    (root / "patient001" / "patient001_frame12_scribble.nii.gz").write_bytes(b"poison")
    assert check_dataset(root).ok
    problems = [one.problem for one in check_dataset(root, labels="scribble").of("error")]
    assert len(problems) == 2 and any("has no scribble" in problem for problem in problems)


def test_an_h5_file_holds_its_scribble_itself(tmp_path):
    root = write_h5_patients(tmp_path / "data")
    case = for_training(acdc.find_cases(root)[0], ["patient001"], "scribble")
    with pytest.raises(UserError, match=r"'scribble' is no array.* \(keys: image, label\)"):
        case.read(4)
    with h5py.File(case.image_path, "a") as file:
        scribble = scribbled(file["label"][:].T).T
        file["scribble"] = scribble.astype(np.uint16)
        del file["label"]  # what is not read need not be there
    read = case.read(4).label
    assert np.array_equal(read, np.where(scribble == 4, IGNORED, scribble))


def test_a_number_of_patients_is_drawn_and_not_the_first_ones():
    train = tuple(f"p{number:02d}" for number in range(40))
    split = Split("random-seed0", train, ("v",), ("t",), "")
    some = [set(labelled_patients(split, count)) for count in (4, 8, 20)]
    assert some[0] < some[1] < some[2] and not some[1] <= set(train[:20])


def test_the_two_halves_are_in_orders_of_their_own():
    for batch in TwoStreams(40, labelled=20, batch_size=40, steps=3, seed=1):
        assert [one.item for one in batch[:20]] != [one.item - 20 for one in batch[20:]]
