import logging
import warnings
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from fake_cases import find_fakes, find_unreadable, read_npz, write_cases
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from tiny_acdc import write_nifti

from mambaseg.data.batches import share_of
from mambaseg.data.case import Case
from mambaseg.data.datamodule import SegmentationDataModule
from mambaseg.data.readers import folder
from mambaseg.data.readers.acdc import find_cases
from mambaseg.data.splits import make_split
from mambaseg.errors import UserError

CLASSES = ("background", "RV", "MYO", "LV")


@pytest.fixture
def root(tmp_path):
    write_cases(tmp_path / "data", patients=10)
    return tmp_path / "data"


def module_on(root, **options):
    defaults = {
        "name": "fake",
        "find_cases": find_fakes,
        "root": root,
        "cache_dir": root.parent / "cache",
        "class_names": CLASSES,
        "num_classes": 4,
        "split": "random",
        "size": 32,
        "batch_size": 8,
        "steps": 6,
        "val_every": 3,
    }
    return SegmentationDataModule(**{**defaults, **options})


def test_a_place_may_begin_with_the_home_folder(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root.parent))
    rows = [f"patient{number:03d},{'AB'[number % 2]}" for number in range(1, 11)]
    (root / "patients.csv").write_text("\n".join(["patient,vendor", *rows]))
    how = {"split": "kfold", "split_by": "vendor", "find_cases": find_homely}
    module = module_on(Path("~/data"), cache_dir="~/cache", **how)
    module.load()
    assert "vendor" in module.split.note
    assert module.cache.folder.parent == root.parent / "cache"


def find_homely(place):
    return find_fakes(place.expanduser())  # as every reader does


def as_rank(module, rank, world_size, step=0):
    """Attach what the data module asks of a trainer."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    module.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        global_step=step,
        strategy=strategy,
        accumulate_grad_batches=1,
    )
    return module


def on_device(module, batch):
    batch = module.transfer_batch_to_device(batch, torch.device("cpu"), 0)
    return module.on_after_batch_transfer(batch, 0)


def training_batches(module):
    return [on_device(module, batch) for batch in module.train_dataloader()]


def assert_same(batches, others):
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key, value in batch.items():
            same = torch.equal if isinstance(value, torch.Tensor) else (lambda a, b: a == b)
            assert same(value, other[key]), key


def joined(batches):
    """One batch out of several parts."""
    return {
        key: torch.cat([batch[key] for batch in batches])
        if isinstance(value, torch.Tensor)
        else list(chain(*(batch[key] for batch in batches)))
        if isinstance(value, list)
        else sum(batch[key] for batch in batches)
        if key == "labelled"
        else value
        for key, value in batches[0].items()
    }


# ---- loading


def test_loading_splits_the_patients_and_counts_them(root, caplog):
    module = module_on(root)
    with caplog.at_level(logging.INFO):
        module.load()
        module.load()
    parts = [getattr(module.split, part) for part in ("train", "val", "test")]
    assert sorted(patient for part in parts for patient in part) == sorted(
        {case.patient for case in find_fakes(root)}
    )
    assert module.counts["train"]["cases"] == 2 * len(module.split.train)
    assert sum(counts["slices"] for counts in module.counts.values()) == sum(
        case.read().image.shape[0] for case in find_fakes(root)
    )
    assert caplog.text.count("decoding 20 cases once") == 1
    assert "train: 7 patients, 14 cases" in caplog.text
    assert len(module.fingerprint) == 16


def test_preparing_happens_before_the_cases_are_looked_for(tmp_path):
    calls = []

    def prepare(root):
        calls.append(root)
        write_cases(root, patients=5)

    module = module_on(tmp_path / "new", prepare=prepare)
    module.load()
    module.load()
    assert calls == [tmp_path / "new"]
    assert module.counts["train"]["patients"] > 0


def test_the_fingerprint_does_not_depend_on_where_the_data_are(root, tmp_path):
    write_cases(tmp_path / "copy", patients=10)
    one, other = module_on(root), module_on(tmp_path / "copy")
    one.load()
    other.load()
    assert one.fingerprint == other.fingerprint
    assert one.split.hash == other.split.hash


def test_the_runs_seed_does_not_change_who_is_tested(root):
    splits = []
    for options in ({"seed": 1}, {"seed": 2}, {"split_seed": 1}):
        module = module_on(root, **options)
        module.load()
        splits.append(module.split.hash)
    assert splits[0] == splits[1] != splits[2]


@pytest.mark.parametrize("stored", ["as it is", "again"])
def test_patients_with_the_same_images_stay_together_and_are_told(root, caplog, stored):
    for phase in ("ED", "ES"):
        path, copy = (root / f"patient{number}_{phase}.npz" for number in ("001", "007"))
        copy.write_bytes(path.read_bytes())
        if stored == "again":  # turned, rescaled, not compressed
            with np.load(path) as arrays:
                turned = {key: array[..., ::-1] if array.ndim > 2 else array
                          for key, array in arrays.items()}  # fmt: skip
            np.savez(copy, **{**turned, "image": turned["image"] * np.float32(0.5) + 3})
    caplog.set_level(logging.INFO)
    for seed in range(4):
        module = module_on(root, split_seed=seed)
        module.load()
        parts = (module.split.train, module.split.val, module.split.test)
        assert sum(bool({"patient001", "patient007"} & set(part)) for part in parts) == 1
    assert "same images belong to more than one patient: patient001, patient007" in caplog.text


def drawn_again(root, before, after):
    """A seed, and who is in another part once patient001 and patient007 are known to be alike."""
    for phase in ("ED", "ES"):
        path, copy = (root / f"patient{number}_{phase}.npz" for number in ("001", "007"))
        copy.write_bytes(path.read_bytes())
    patients, alike = {case.patient for case in find_fakes(root)}, ("patient001", "patient007")
    for seed in range(99):
        drawn = make_split("random", patients, seed=seed)
        final = make_split("random", patients, seed=seed, duplicates=[alike])
        moved = {*getattr(drawn, before)} & {*getattr(final, after)}
        if moved := moved.difference(alike):
            return seed, moved.pop()
    raise AssertionError


@pytest.mark.parametrize(("before", "after"), [("train", "val"), ("val", "train")])
def test_an_unlabelled_image_is_held_against_the_split_that_is_trained_with(root, before, after):
    seed, moved = drawn_again(root, before, after)
    place = root.parent / "more" / "x.nii.gz"
    place.parent.mkdir()
    with np.load(root / f"{moved}_ED.npz") as arrays:
        write_nifti(place, arrays["image"].T)
    more = {"unlabelled_images": place.parent, "unlabelled": True}
    module = module_on(root, split_seed=seed, **more)
    if after == "train":
        module.load()
        assert moved in module.split.train
    else:
        with pytest.raises(UserError, match=f"x shows the same as {moved}"):
            module.load()


def test_named_labels_are_those_of_patients_that_train_in_the_end(root):
    seed, moved = drawn_again(root, "val", "train")
    module = module_on(root, split_seed=seed, labelled=[moved])
    module.load()
    assert module.labelled == (moved,)
    seed, moved = drawn_again(root, "train", "val")
    with pytest.raises(UserError, match=f"{moved} not in the training set"):
        module_on(root, split_seed=seed, labelled=[moved]).load()
    with pytest.raises(UserError, match=r"nobody not in the training set, which has \w+"):
        module_on(root, labelled=["nobody"], cache_dir=root.parent / "other").load()
    assert not (root.parent / "other").exists()  # before anything is decoded


def test_a_data_set_that_is_only_tested_has_no_plan(root):
    with pytest.raises(UserError, match="no training patients"):
        module_on(root, split="test").survey(greys=False)


def read_without_voxel_size(case):
    return replace(read_npz(case), spacing=None)


@pytest.mark.parametrize(("part", "unit"), [("train", "mm"), ("val", "vox"), ("test", "vox")])
def test_distances_are_in_mm_where_the_scored_cases_have_a_voxel_size(root, part, unit):
    split = module_on(root)
    split.load()
    unknown = getattr(split.split, part)[0]

    def find(root):
        readers = {True: read_without_voxel_size, False: read_npz}
        return [replace(one, reader=readers[one.patient == unknown]) for one in find_fakes(root)]

    module = module_on(root, find_cases=find)
    module.load()
    assert module.for_task()["distances"] == unit


def test_epoch_two_and_a_second_run_read_no_source(root):
    module_on(root).load()
    module = module_on(root, find_cases=find_unreadable, steps=30)
    batches = training_batches(module)
    slices = module.counts["train"]["slices"]
    assert len(batches) * 8 > 2 * slices
    assert len(list(module.val_dataloader())) == module.counts["val"]["cases"]


def test_nobody_is_fitted_to_an_external_cohort(root):
    with pytest.raises(UserError, match="no training patients"):
        module_on(root, split="test").setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 3}, "4 names for num_classes=3"),
        ({"in_channels": 3}, "has 1 channel, the data set has 3"),
        ({"preprocessing": "papr"}, "papr"),
        ({"augmentation": "strong"}, "strong"),
        ({"split": "ssl4mis"}, "missing"),
        ({"split": "thirds"}, "thirds"),
    ],
)
def test_what_cannot_be_is_a_clear_error(root, options, message):
    with pytest.raises(UserError, match=message):
        module_on(root, **options).load()


def test_a_batch_size_that_devices_cannot_share_is_a_clear_error(root):
    with pytest.raises(UserError, match="batch_size=8"):
        as_rank(module_on(root), 0, 3).train_dataloader()


def test_a_trainer_that_accumulates_otherwise_is_a_clear_error(root):
    with pytest.raises(UserError, match=r"accumulates 1 .* into 2"):
        as_rank(module_on(root, accumulate=2), 0, 1).train_dataloader()


# ---- training batches


@pytest.mark.parametrize("preset", ["paper", "modern"])
def test_at_a_spacing_a_batch_is_a_part_of_each_resampled_slice(root, preset):
    """The fake slices are 20 to 39 pixels of 1.5 mm on a side: 40 to 78 pixels of 0.75 mm."""
    how = {"preprocessing": "spacing", "spacing": 0.75, "augmentation": preset}
    for batch in training_batches(module_on(root, **how)):
        assert batch["image"].shape == (8, 1, 32, 32) and batch["label"].shape == (8, 32, 32)
        assert (batch["image"].amax((1, 2, 3)) > 0).all()
    module = module_on(root, **how | {"augmentation": "none"})
    for batch in training_batches(module)[:2]:
        for i, (case, z) in enumerate(zip(batch["case"], batch["slice"], strict=True)):
            image = torch.from_numpy(module.cache.image(module.cache.position(case))[z].copy())
            whole = module.preprocessing.to_grid(image[None], (1.5, 1.5))[0, 0]
            top, left = ((side - 32) // 2 for side in whole.shape)
            assert min(whole.shape) > 32
            part = whole[top : top + 32, left : left + 32]
            assert torch.allclose(batch["image"][i, 0], part, atol=1e-5)


def test_a_case_whose_voxel_size_is_unknown_is_named_before_the_first_step(root):
    def without_spacing(case):
        return replace(read_npz(case), spacing=None)

    def find(folder):
        cases = find_fakes(folder)
        return [*cases[:3], replace(cases[3], reader=without_spacing), *cases[4:]]

    fourth = find_fakes(root)[3].image_path.name
    module = module_on(root, find_cases=find, preprocessing="spacing", spacing=1.0)
    with pytest.raises(UserError, match=rf"{fourth}: the voxel size is unknown.*native or modern"):
        module.load()
    module_on(root, find_cases=find, preprocessing="native").load()


def test_a_case_is_read_again_where_another_thread_disturbed_pythons_parser(root):
    disturbed = set()

    def disturbed_once(case):
        if case.id not in disturbed:
            disturbed.add(case.id)
            raise SystemError("AST constructor recursion depth mismatch (before=42, after=38)")
        return read_npz(case)

    found = partial(find_fakes, reader=disturbed_once)
    for one, other in zip(
        training_batches(module_on(root)),
        training_batches(module_on(root, find_cases=found)),
        strict=True,
    ):
        torch.testing.assert_close(one["image"], other["image"], rtol=0, atol=0)
    assert len(disturbed) == len(find_fakes(root))


@pytest.mark.parametrize("preset", ["paper", "modern"])
def test_a_training_batch_is_what_the_network_gets(root, preset):
    batches = training_batches(module_on(root, preprocessing=preset, augmentation=preset))
    assert [batch["step"] for batch in batches] == list(range(6))
    for batch in batches:
        assert sorted(batch) == ["case", "image", "label", "labelled", "position", "slice", "step"]
        assert batch["image"].shape == (8, 1, 32, 32) and batch["image"].dtype == torch.float32
        assert batch["label"].shape == (8, 32, 32) and batch["label"].dtype == torch.int64
        assert batch["image"].min() >= 0 and batch["image"].max() <= 1
        assert batch["label"].unique().tolist()[0] == 0 and batch["label"].max() in (1, 2, 3)
        assert batch["position"].tolist() == list(range(8))
        assert len(batch["case"]) == len(batch["slice"]) == 8


def test_without_augmentation_a_batch_is_the_evaluation_transform_of_its_slices(root):
    module = module_on(root, augmentation="none")
    for batch in training_batches(module)[:2]:
        for i, (case, z) in enumerate(zip(batch["case"], batch["slice"], strict=True)):
            image = torch.from_numpy(module.cache.image(module.cache.position(case))[z].copy())
            assert torch.equal(batch["image"][i], module.preprocessing.to_grid(image[None])[0])


def test_only_training_patients_are_trained_on(root):
    module = module_on(root, steps=20)
    seen = {case[:10] for batch in training_batches(module) for case in batch["case"]}
    assert seen == set(module.split.train)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_give_the_same_batches(root):
    alone = training_batches(module_on(root))
    module = module_on(root, num_workers=2)
    assert_same(training_batches(module), alone)
    cases = [batch["case"].id for batch in module.val_dataloader()]
    assert cases == [case.id for case in module.cases["val"]]


def test_two_ranks_give_together_what_one_device_gets(root):
    alone = training_batches(module_on(root))
    ranks = [training_batches(as_rank(module_on(root), rank, 2)) for rank in (0, 1)]
    assert_same([joined(parts) for parts in zip(*ranks, strict=True)], alone)


def test_accumulated_micro_batches_give_together_one_batch(root):
    alone = training_batches(module_on(root))
    micro = training_batches(module_on(root, accumulate=4))
    assert len(micro) == 4 * len(alone)
    assert_same([joined(micro[i : i + 4]) for i in range(0, len(micro), 4)], alone)


def test_a_loader_made_at_a_later_step_goes_on_exactly_there(root):
    alone = training_batches(module_on(root))
    loader = as_rank(module_on(root), 0, 1, step=4).train_dataloader()
    assert len(loader) == 6
    assert_same([on_device(module_on(root), batch) for batch in loader], alone[4:])


# ---- evaluation batches


@pytest.mark.parametrize("part", ["val", "test"])
def test_an_evaluation_batch_is_one_whole_case_at_native_size(root, part):
    module = module_on(root)
    module.load()
    batches = [on_device(module, batch) for batch in getattr(module, f"{part}_dataloader")()]
    patients = getattr(module.split, part)
    assert [batch["case"].patient for batch in batches] == [p for p in patients for _ in "DS"]
    for batch in batches:
        assert isinstance(batch["case"], Case)
        volume = batch["case"].read()
        scaled = module.preprocessing.scale_intensity(volume.image)
        assert np.array_equal(batch["image"].numpy(), scaled)
        assert np.array_equal(batch["label"].numpy(), volume.label)
        assert batch["image"].dtype == torch.float32 and batch["label"].dtype == torch.uint8
        assert batch["spacing"] == (10.0, 1.5, 1.5)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_every_case_is_scored_on_one_rank_unless_another_would_have_none(root, world_size):
    ids = [
        batch["case"].id
        for rank in range(world_size)
        for batch in as_rank(module_on(root), rank, world_size).test_dataloader()
    ]
    module = module_on(root)
    module.load()
    cases = [case.id for case in module.cases["test"]]
    assert sorted(set(ids)) == cases and len(ids) == max(len(cases), world_size)


def test_ranks_share_the_cases():
    assert [len(share_of(rank, 5, 3)) for rank in range(3)] == [2, 2, 1]


def test_every_rank_has_a_case_where_there_are_more_ranks_than_cases():
    """Lightning leaves out the hooks of a rank without one, and the others wait for it for ever."""
    assert [share_of(rank, 2, 5) for rank in range(5)] == [[0], [1], [0], [1], [0]]
    assert share_of(1, 0, 2) == []


@pytest.mark.acdc
def test_real_acdc_has_the_published_numbers_of_slices(acdc_root, tmp_path):
    module = module_on(
        acdc_root, find_cases=find_cases, split="ssl4mis", cache_dir=tmp_path, size=224
    )
    module.load()
    slices = {part: counts["slices"] for part, counts in module.counts.items()}
    assert slices == {"train": 1312, "val": 210, "test": 380}
    batch = on_device(module, next(iter(module.train_dataloader())))
    assert batch["label"].unique().tolist() == [0, 1, 2, 3]


# ---- under Lightning


class Recorder(L.LightningModule):
    """A network of one weight that remembers what it saw and may be killed."""

    def __init__(self, kill_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated, self.kill_at = [], [], kill_at

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.kill_at:
            raise KeyboardInterrupt
        self.seen.append((batch_idx, batch))
        return (self.weight - batch["image"].mean()).square()

    def validation_step(self, batch, batch_idx):
        self.validated.append((self.trainer.global_step, batch["case"].id))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, recorder, folder, ckpt_path=None):
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=module.steps,
        max_epochs=-1,
        accumulate_grad_batches=module.accumulate,
        val_check_interval=module.val_every * module.accumulate,
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[
            ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=1, filename="{step}")
        ],
    )
    trainer.fit(recorder, datamodule=module, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning on new torch
@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # so that both folders can be kept
@pytest.mark.parametrize(("accumulate", "num_workers"), [(1, 0), (2, 0), (1, 2)])
def test_a_killed_training_goes_on_with_the_very_same_batches(
    root, tmp_path, accumulate, num_workers
):
    build = partial(module_on, root, accumulate=accumulate, num_workers=num_workers)
    undisturbed = Recorder()
    fit(build(), undisturbed, tmp_path / "undisturbed")
    assert len(undisturbed.seen) == 6 * accumulate
    assert {step for step, _ in undisturbed.validated} == {3, 6}

    killed = Recorder(kill_at=4 * accumulate)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(build(), killed, tmp_path / "killed")

    resumed = Recorder()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable.*")
        fit(build(), resumed, tmp_path / "resumed", ckpt_path=tmp_path / "killed/step=4.ckpt")
    seen = killed.seen + resumed.seen
    assert [index for index, _ in seen] == [index for index, _ in undisturbed.seen]
    assert_same([batch for _, batch in seen], [batch for _, batch in undisturbed.seen])
    assert torch.equal(resumed.weight, undisturbed.weight)
    assert [case for _, case in resumed.validated] == [
        case for step, case in undisturbed.validated if step > 4
    ]


# ---- what a data set may be like


def read_two_channels(case):
    volume = read_npz(case)
    return replace(volume, image=np.concatenate([volume.image, 100 - volume.image], axis=1))


def test_several_channels_reach_the_network_each_scaled_on_its_own(root):
    module = module_on(
        root, in_channels=2, find_cases=partial(find_fakes, reader=read_two_channels)
    )
    batch = training_batches(module)[0]
    assert batch["image"].shape == (8, 2, 32, 32)
    # paper: nearest neighbour of what is in [0, 1], the second channel the first upside down
    seen = batch["image"].amax(1) > 0
    assert torch.allclose(batch["image"].sum(1)[seen], torch.ones(()), atol=1e-5)
    case = next(iter(module.val_dataloader()))
    assert case["image"].shape == (case["label"].shape[0], 2, *case["label"].shape[1:])


def test_a_label_map_reaches_training_and_evaluation_and_is_another_cache(root):
    plain, mapped = module_on(root), module_on(root, label_map={0: 0, 1: 3, 2: 2, 3: 1})
    exchanged = np.array([0, 3, 2, 1])
    for one, other in zip(training_batches(plain), training_batches(mapped), strict=True):
        assert np.array_equal(exchanged[one["label"]], other["label"])
    one, other = (next(iter(module.val_dataloader())) for module in (plain, mapped))
    assert np.array_equal(exchanged[one["label"]], other["label"])
    assert plain.cache.folder != mapped.cache.folder


def test_a_given_split_follows_the_cases(root):
    def find(folder):
        parts = ["train"] * 6 + ["test"] * 4
        return [replace(c, part=parts[int(c.patient[-3:]) - 1]) for c in find_fakes(folder)]

    module = module_on(root, split="given", find_cases=find)
    module.load()
    assert len(module.split.train) == 6 and module.split.val == module.split.test
    assert {case.part for case in module.cases["test"]} == {"test"}


def test_patients_are_not_compared_with_all_others(tmp_path):
    compared = []

    class Patient(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            compared.append(other)
            return str.__eq__(self, other)

    count = 60
    for kind, value in (("images", 90), ("masks", 255)):
        (tmp_path / kind).mkdir()
        for number in range(count):
            pixels = np.full((16, 16), value, np.uint8)
            pixels[: 1 + number // 16, : 1 + number % 16] = 0
            Image.fromarray(pixels).save(tmp_path / kind / f"p{number}.png")

    def find_cases(root):
        found = folder.find_cases(root, masks="binary", channels=1)
        return [replace(case, patient=Patient(case.patient)) for case in found]

    data = SegmentationDataModule(
        find_cases=find_cases, root=tmp_path, cache_dir=tmp_path / "cache", split="random",
        class_names=["background", "foreground"], size=32,
    )  # fmt: skip
    data.load()
    assert sum(map(len, data.cases.values())) == count
    assert len(compared) < 20 * count, "each case's patient was compared with many others"
