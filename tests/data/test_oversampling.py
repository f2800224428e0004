"""Samples that must show foreground."""

from itertools import chain

import numpy as np
import pytest
import torch
from fake_cases import find_fakes, write_cases
from hydra.utils import instantiate
from omegaconf import OmegaConf

from mambaseg.app.entry import CONF
from mambaseg.data.augmentation import Augmentation
from mambaseg.data.batches import StepSampler
from mambaseg.data.cache import open_cache
from mambaseg.data.geometry import Preprocessing
from mambaseg.data.oversampling import Foreground
from mambaseg.data.slices import Collate, SliceDataset
from mambaseg.errors import UserError
from runs import trained

NATIVE = Preprocessing("native", 8)


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    place = tmp_path_factory.mktemp("fakes")
    write_cases(place / "data", patients=3)
    for path in (place / "data").glob("*.npz"):  # one voxel of another class in each case
        arrays = dict(np.load(path))
        arrays["label"][1, 2, 3] = arrays["label"].max() % 3 + 1
        np.savez(path, **arrays)
    cases = find_fakes(place / "data")
    cache = open_cache(cases, NATIVE, cache_dir=place / "cache", num_classes=4)
    return SliceDataset(cache, [case.id for case in cases], preprocessing=NATIVE)


def sampler(slices, share=0.33, **options):
    options = {"batch_size": 12, "steps": 5, "seed": 3, **options}
    required = Foreground(slices, 4, share, 3)
    return StepSampler(len(slices), required=required, **options)


@pytest.mark.parametrize(
    ("size", "share", "count"), [(12, 0.33, 4), (2, 0.33, 1), (1, 1, 1), (48, 1 / 3, 16)]
)
def test_as_many_samples_of_a_batch_as_in_nnunet_must_show_foreground(slices, size, share, count):
    assert Foreground(slices, 4, share, 0).count(size, 2) == count
    batch = sampler(slices, share, batch_size=size).batch(2)
    assert [draw.about is not None for draw in batch] == [False] * (size - count) + [True] * count
    assert [draw.position for draw in batch] == list(range(size))


def test_a_batch_of_one_must_show_foreground_as_often_as_the_share_says(slices):
    alone = list(sampler(slices, batch_size=1, steps=600))
    shown = [draw.about is not None for (draw,) in alone]
    assert 0.28 < np.mean(shown) < 0.38
    assert {draw.item for (draw,) in alone if draw.about is None} == {*range(len(slices))}
    assert list(sampler(slices, batch_size=1, steps=600, start_step=400)) == alone[400:]


def test_the_pixel_has_a_class_each_case_and_class_as_often_as_others(slices):
    foreground = Foreground(slices, 4, 0.5, 7)
    classes, cases = [], []
    for step in range(600):
        draw = foreground.draw(step, 11)
        classes.append(int(slices[draw]["label"][draw.about]))
        cases.append(int(slices.case_numbers[draw.item]))
    present = len(set(cases))
    assert present == 6 and np.bincount(cases).min() > 600 / present * 0.7
    rare = [slices[draw]["slice"] == 1 and draw.about == (2, 3)
            for draw in (foreground.draw(step, 11) for step in range(600))]  # fmt: skip
    assert 0 not in classes and 0.4 < np.mean(rare) < 0.6


def test_ranks_micro_batches_and_restarts_see_the_same_samples(slices):
    alone = list(sampler(slices))
    parts = [list(sampler(slices, rank=r, world_size=2, accumulate=3)) for r in (0, 1)]
    for step, batch in enumerate(alone):
        own = [micro for part in parts for micro in part[3 * step : 3 * step + 3]]
        assert list(chain(*own)) == batch
    assert list(sampler(slices, start_step=3)) == alone[3:]


@pytest.mark.parametrize("preset", ["none", "paper", "modern"])
def test_the_crop_shows_the_pixel_and_lies_within_the_image_where_it_can(slices, preset):
    required, seen = Foreground(slices, 4, 1.0, 1), 0
    augmentation = Augmentation(preset, NATIVE, 5)
    for step in range(40):
        draw = required.draw(step, 0)
        item = slices[draw]
        item["label"] = np.zeros_like(item["label"])
        row, column = draw.about
        item["label"][max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = 1
        batch = Collate(augmentation)([item])
        _, label = augmentation(*(batch[k] for k in ("image", "label", "shape", "augmentation")))
        seen += int(label.any())
        if preset == "none":
            room = np.array(item["label"].shape) - 8
            middle = np.clip(np.array(draw.about) - 4 + 1, 0, room)
            lead = batch["augmentation"][0, 4:6].numpy()
            assert np.abs(lead - middle).max() <= 1 and (lead >= 0).all() and (lead <= room).all()
    assert seen == 40


SETTINGS = [
    (Preprocessing("spacing", 64, spacing=1.0), (200, 200), (0.5, 0.5)),
    (Preprocessing("spacing", 64, spacing=1.0), (100, 100), (1.0, 1.0)),
    (Preprocessing("spacing", [64, 80], spacing=1.5625), (256, 216), (0.8, 0.7)),
    (Preprocessing("spacing", 128, spacing=1.0), (100, 99), (1.0, 1.0)),
    (Preprocessing("native", 64), (200, 201), None),
]


@pytest.mark.parametrize("preset", ["none", "paper", "modern", "nnunet"])
@pytest.mark.parametrize("setting", range(len(SETTINGS)))
def test_an_object_of_one_pixel_is_in_every_sample_that_must_show_it(preset, setting):
    preprocessing, shape, pixel = SETTINGS[setting]
    config = OmegaConf.load(CONF / f"augmentation/{preset}.yaml")
    if preset == "nnunet":
        config.rotate.degrees = 180
    operations = instantiate(config, _convert_="all")
    augmentation = Augmentation(operations, preprocessing, 1)
    sizes, rng = np.array([shape]), np.random.default_rng(0)
    for step in range(60):
        about = rng.integers(shape)
        if step % 3 == 0:  # at the border
            about[step % 2] = rng.choice([0, shape[step % 2] - 1])
        label = torch.zeros(1, *shape, dtype=torch.uint8)
        label[0, about[0], about[1]] = 1
        drawn = augmentation.draw(step, [0], sizes, [pixel], [tuple(about)])
        parameters = torch.from_numpy(drawn)
        _, seen = augmentation(torch.zeros(1, 1, *shape), label, torch.tensor(sizes), parameters)
        assert (seen == 1).any(), (step, about)
        if {*np.abs(drawn[0, :4])} == {
            0.0,
            1.0,
        } and preset != "modern":  # turned by quarters at most
            assert (drawn[0, 4:6] % 1 == 0).all()


def test_without_it_batches_are_as_they_always_were(slices):
    plain = StepSampler(len(slices), batch_size=12, steps=5, seed=3)
    assert all(draw.about is None for draw in plain.batch(0))
    with pytest.raises(UserError, match=r"data\.oversample=1\.5"):
        Foreground(slices, 4, 1.5, 0)


# ---- a class of one voxel in ten thousand


@pytest.fixture(scope="module")
def spots(phantom_root, tmp_path_factory):
    """The phantom of eight with one bright spot per case, which is the only class."""
    import nibabel as nib

    root = tmp_path_factory.mktemp("spots") / "data"
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True)
    share, rng = [], np.random.default_rng(0)
    for path in sorted(phantom_root.glob("*/*_frame??.nii.gz")):
        volume = nib.load(path)
        image = np.asarray(volume.dataobj).astype(np.float32)
        label = np.zeros(image.shape, np.uint8)
        x, y = (int(rng.integers(4, side - 4)) for side in image.shape[:2])
        z = int(rng.integers(image.shape[2]))
        spot = (slice(x - 1, x + 2), slice(y - 1, y + 2), z)
        label[spot] = 1
        image[spot] = 1.5 * image.max()
        share.append(label.mean())
        nib.save(nib.Nifti1Image(image, volume.affine), root / "images" / path.name)
        nib.save(nib.Nifti1Image(label, volume.affine), root / "labels" / path.name)
    assert np.mean(share) < 1.5e-4
    return root


def spotted(spots, place, *words):
    return trained(
        "data=nifti", f"data.root={spots}", "data.patient_pattern='^([^_]+)'",
        "data.class_names=[background,spot]", "model=unet", "model.widths=[4,8]",
        "model.dropout=[0,0]", f"data.cache_dir={place / 'cache'}", f"outputs={place / 'out'}",
        "data.preprocessing=native", "data.size=32", "data.batch_size=4", "data.steps=80",
        "data.val_every=80", "optim=adamw", "optim.optimizer.lr=0.01", "augmentation=paper",
        "loss=dice_ce_nnunet", "trainer=cpu", *words,
    )  # fmt: skip


def test_a_class_of_a_ten_thousandth_of_the_voxels_is_learnt_with_it_alone(spots, tmp_path):
    dice = {}
    for share in (0, 0.33):
        run = spotted(spots, tmp_path, f"data.oversample={share}")
        dice[share] = run.task.results["means"]["dice"]["mean"]
    assert dice[0.33] > 0.3 and dice[0] < 0.1, dice


def test_in_batches_of_one_every_case_shows_its_foreground(slices):
    alone = list(sampler(slices, batch_size=1, steps=600))
    shown = [int(slices.case_numbers[draw.item]) for (draw,) in alone if draw.about]
    assert np.bincount(shown, minlength=6).min() > len(shown) / 6 * 0.6
