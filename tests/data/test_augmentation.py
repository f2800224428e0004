import hashlib
from functools import partial

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from scipy.ndimage import rotate, zoom

from mambaseg.app.entry import CONF
from mambaseg.data import tones
from mambaseg.data.augmentation import (
    Augmentation,
    Flip,
    Rotate,
    Scale,
    Shift,
    Tone,
    TurnOrRotate,
    View,
    Zoom,
)
from mambaseg.data.counter import uniforms
from mambaseg.data.geometry import Preprocessing
from mambaseg.data.sampling import read_affine
from mambaseg.errors import UserError
from runs import built, entered

COMBINATIONS = [
    (geometry, preset)
    for geometry in ("paper", "modern", "zscore", "native")
    for preset in ("none", "paper", "modern")
]


def batch_of(shapes, seed=0):
    """Smooth images, heart-like labels; zero beyond each native shape."""
    rng = np.random.default_rng(seed)
    height, width = np.max(shapes, axis=0)
    images = np.zeros((len(shapes), height, width), np.float32)
    labels = np.zeros((len(shapes), height, width), np.uint8)
    for image, label, (h, w) in zip(images, labels, shapes, strict=True):
        image[:h, :w] = rng.random((h, w))
        label[:h, :w] = heart(h, w)
    return (
        torch.from_numpy(images)[:, None],
        torch.from_numpy(labels),
        torch.tensor(np.array(shapes)),
    )


def heart(height, width):
    y, x = np.mgrid[:height, :width]
    radius = np.hypot(y - 0.55 * height, x - 0.45 * width) / min(height, width)
    label = np.zeros((height, width), np.uint8)
    label[np.hypot(y - 0.45 * height, x - 0.25 * width) / min(height, width) < 0.2] = 1
    label[radius < 0.22] = 2
    label[radius < 0.14] = 3
    return label


def augmented(augmentation, images, labels, shapes, step=0, positions=None):
    positions = range(len(images)) if positions is None else positions
    parameters = torch.from_numpy(augmentation.draw(step, positions, shapes.numpy()))
    return augmentation(images, labels, shapes, parameters)


def published(array, u, size):
    """The original augmentation with the same random numbers, in its two steps."""
    if u[0] < 0.5:
        array = np.flip(np.rot90(array, int(4 * u[1])), axis=int(2 * u[2])).copy()
    elif u[3] < 0.5:
        array = rotate(array, int(40 * u[4]) - 20, order=0, reshape=False)
    return zoom(array, (size / array.shape[0], size / array.shape[1]), order=0)


def branch(u):
    return "flip" if u[0] < 0.5 else "rotate" if u[3] < 0.5 else "identity"


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(2, 130),
    width=st.integers(2, 130),
    size=st.integers(2, 130),
    step=st.integers(0, 10**6),
)
def test_paper_equals_the_published_two_steps_of_scipy(height, width, size, step):
    augmentation = Augmentation("paper", Preprocessing("paper", size), seed=7)
    images, labels, shapes = batch_of([(height, width)] * 8, seed=step)
    grids, masks = augmented(augmentation, images, labels, shapes, step=step)
    assert grids.shape == (8, 1, size, size) and grids.dtype == torch.float32
    assert masks.shape == (8, size, size) and masks.dtype == torch.int64
    for position in range(8):
        u = uniforms(7, 1, step=step, position=position, count=5)
        image = published(images[position, 0].numpy(), u, size)
        label = published(labels[position].numpy(), u, size)
        different = (grids[position, 0].numpy() != image) | (masks[position].numpy() != label)
        # A rotation may meet a tie, which floating point decides either way.
        allowed = 0.002 * size**2 + 1 if branch(u) == "rotate" else 0
        assert different.sum() <= allowed, branch(u)


def test_rotations_equal_scipys_two_steps_and_differ_little_from_rounding_once():
    """Composing the two index maps costs nothing against SciPy and moves under 1 % of the pixels
    against one rounding at the end."""
    size, height, width = 224, 256, 216
    label = heart(height, width)
    augmentation = Augmentation("paper", Preprocessing("paper", size), seed=3)
    images, labels, shapes = batch_of([(height, width)])
    grid = np.arange(size)
    rows, columns = grid * ((height - 1) / (size - 1)), grid * ((width - 1) / (size - 1))
    exact, once, rotations = [], [], 0
    for step in range(40):
        u = uniforms(3, 1, step=step, position=0, count=5)
        if branch(u) != "rotate":
            continue
        rotations += 1
        mask = augmented(augmentation, images, labels, shapes, step=step)[1][0].numpy()
        exact.append((mask != published(label, u, size)).mean())

        angle = np.deg2rad(int(40 * u[4]) - 20)
        y, x = rows[:, None] - (height - 1) / 2, columns[None] - (width - 1) / 2
        source_y = np.floor(np.cos(angle) * y + np.sin(angle) * x + height / 2).astype(int)
        source_x = np.floor(np.cos(angle) * x - np.sin(angle) * y + width / 2).astype(int)
        inside = (source_y >= 0) & (source_y < height) & (source_x >= 0) & (source_x < width)
        rounded_once = np.where(
            inside, label[source_y.clip(0, height - 1), source_x.clip(0, width - 1)], 0
        )
        once.append((mask != rounded_once).mean())
    assert rotations > 5
    assert max(exact) <= 1e-4
    assert 0 < np.mean(once) < 0.01


def test_paper_draws_each_branch_as_often_as_published():
    us = [uniforms(1337, 1, step=s, position=p, count=5) for s in range(250) for p in range(24)]
    branches = [branch(u) for u in us]
    assert branches.count("flip") / len(us) == pytest.approx(0.5, abs=0.025)
    assert branches.count("rotate") / len(us) == pytest.approx(0.25, abs=0.025)
    angles = {int(40 * u[4]) - 20 for u in us}
    assert angles == set(range(-20, 20))
    assert {(int(4 * u[1]), int(2 * u[2])) for u in us} == {
        (k, a) for k in range(4) for a in (0, 1)
    }


@pytest.mark.parametrize(("geometry", "preset"), COMBINATIONS)
def test_a_batch_gives_what_its_elements_give_alone(geometry, preset):
    augmentation = Augmentation(preset, Preprocessing(geometry, 48), seed=5)
    shapes = [(60, 41), (33, 70), (52, 52), (70, 70), (20, 31), (64, 48)]
    images, labels, sizes = batch_of(shapes)
    together = augmented(augmentation, images, labels, sizes, step=9)
    for i, (h, w) in enumerate(shapes):
        image, label = images[i : i + 1, :, :h, :w], labels[i : i + 1, :h, :w]
        alone = augmented(augmentation, image, label, sizes[i : i + 1], step=9, positions=[i])
        # A vectorised power may differ in its last bit from the scalar one.
        tolerance = 1e-6 if preset == "modern" else 0.0
        assert torch.allclose(together[0][i], alone[0][0], atol=tolerance, rtol=0)
        assert torch.equal(together[1][i], alone[1][0])


@pytest.mark.parametrize("size", [48, [37, 61]])
@pytest.mark.parametrize(("geometry", "preset"), COMBINATIONS)
def test_what_a_cpu_reads_has_the_bits_of_the_definition(geometry, preset, size, monkeypatch):
    augmentation = Augmentation(preset, Preprocessing(geometry, size), seed=5, beyond=255)
    images, labels, shapes = batch_of([(60, 41), (33, 70), (52, 52), (20, 31), (109, 64)])
    images = torch.cat([images, -images.sqrt()], dim=1)
    for step in range(4):
        here = augmented(augmentation, images, labels, shapes, step=step)
        with monkeypatch.context() as patched:
            patched.setattr(
                "mambaseg.data.augmentation.read_affine", partial(read_affine, compiled=False)
            )
            defined = augmented(augmentation, images, labels, shapes, step=step)
        assert all(map(torch.equal, here, defined)) and here[0].count_nonzero() > 1000


@pytest.mark.parametrize(("geometry", "preset"), COMBINATIONS)
def test_channels_are_moved_together_and_keep_their_values(geometry, preset):
    augmentation = Augmentation(preset, Preprocessing(geometry, 48), seed=5)
    one, labels, shapes = batch_of([(60, 41), (33, 70)])
    other, *_ = batch_of([(60, 41), (33, 70)], seed=1)
    both, mask = augmented(augmentation, torch.cat([one, other], dim=1), labels, shapes, step=4)
    for c, image in enumerate((one, other)):
        alone, same_mask = augmented(augmentation, image, labels, shapes, step=4)
        assert torch.allclose(both[:, c], alone[:, 0], atol=1e-6, rtol=0)
        assert torch.equal(mask, same_mask)


@pytest.mark.parametrize("geometry", ["paper", "modern"])
def test_none_is_exactly_what_evaluation_does(geometry):
    preprocessing = Preprocessing(geometry, 50)
    images, labels, shapes = batch_of([(61, 43)] * 3)
    grid, mask = augmented(Augmentation("none", preprocessing, 0), images, labels, shapes)
    assert torch.equal(grid, preprocessing.to_grid(images))
    if geometry == "paper":
        assert torch.equal(mask, preprocessing.to_grid(labels[:, None])[:, 0].long())


@pytest.mark.parametrize("preset", ["paper", "modern"])
def test_image_and_label_stay_aligned(preset):
    """Give the label as image: what comes out must be the same picture twice."""
    augmentation = Augmentation(preset, Preprocessing("paper", 64), seed=11)
    shapes = [(90, 60), (60, 90), (75, 75), (40, 100)]
    _, labels, sizes = batch_of(shapes)
    for step in range(20):
        grid, mask = augmented(augmentation, labels[:, None].float() / 3, labels, sizes, step=step)
        if preset == "paper":
            assert torch.equal(grid[:, 0] * 3, mask.float())
        else:  # the tone changes, but one grey value per class remains
            for image, label in zip(grid[:, 0], mask, strict=True):
                for k in range(1, 4):
                    assert image[label == k].std(unbiased=False) < 1e-5


samples = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**63 - 1),
        "step": st.integers(0, 10**7),
        "position": st.integers(0, 500),
        "shape": st.tuples(st.integers(2, 90), st.integers(2, 90)),
        "size": st.integers(2, 90),
    }
)


@settings(max_examples=60)
@given(preset=st.sampled_from(["none", "paper", "modern"]), sample=samples)
def test_any_image_that_is_its_label_stays_so_under_any_augmentation(preset, sample):
    augmentation = Augmentation(preset, Preprocessing("paper", sample["size"]), sample["seed"])
    height, width = sample["shape"]
    rng = np.random.default_rng(sample["step"])
    labels = torch.from_numpy(rng.integers(0, 4, (1, height, width), "u1"))
    shapes = torch.tensor([sample["shape"]])
    where = {"step": sample["step"], "positions": [sample["position"]]}
    grid, mask = augmented(augmentation, labels[:, None].float() / 3, labels, shapes, **where)
    assert mask.max() < 4 and grid.min() >= 0 and grid.max() <= 1
    if preset != "modern":
        assert torch.equal((grid[:, 0] * 3).round(), mask.float())
        assert set(mask.unique().tolist()) <= {0, *labels.unique().tolist()}
    for k in range(1, 4):  # a tone changes all pixels of a class alike
        values = grid[0, 0][mask[0] == k]
        assert values.numel() == 0 or values.max() - values.min() < 1e-6
    again = augmented(augmentation, labels[:, None].float() / 3, labels, shapes, **where)
    assert torch.equal(grid, again[0]) and torch.equal(mask, again[1])


@settings(max_examples=40)
@given(
    geometry=st.sampled_from(["paper", "modern", "native"]),
    preset=st.sampled_from(["none", "paper", "modern"]),
    sample=samples,
    others=st.lists(st.tuples(st.integers(2, 90), st.integers(2, 90)), min_size=1, max_size=3),
)
def test_a_sample_does_not_depend_on_the_rest_of_its_batch(geometry, preset, sample, others):
    augmentation = Augmentation(preset, Preprocessing(geometry, sample["size"]), sample["seed"])
    step, position = sample["step"], sample["position"]
    images, labels, shapes = batch_of([sample["shape"], *others])
    positions = range(position, position + len(images))
    grid, mask = augmented(augmentation, images, labels, shapes, step=step, positions=positions)
    height, width = sample["shape"]
    cut = images[:1, :, :height, :width], labels[:1, :height, :width], shapes[:1]
    alone = augmented(augmentation, *cut, step=step, positions=[position])
    # A vectorised power may differ in its last bit from the scalar one.
    assert torch.allclose(grid[:1], alone[0], atol=1e-6, rtol=0)
    assert torch.equal(mask[:1], alone[1])
    assert grid.min() >= 0 and grid.max() <= 1 + 1e-6


def test_image_and_label_stay_aligned_with_bilinear_images():
    augmentation = Augmentation("modern", Preprocessing("modern", 128), seed=11)
    _, labels, sizes = batch_of([(180, 150)] * 4)
    ball = (labels == 3)[:, None].float()
    for step in range(10):
        grid, mask = augmented(augmentation, ball, labels, sizes, step=step)
        for image, label in zip(grid[:, 0], mask, strict=True):
            inside = image > (image.min() + image.max()) / 2
            overlap = 2 * (inside & (label == 3)).sum() / (inside.sum() + (label == 3).sum())
            assert overlap > 0.95


def test_modern_moves_scales_and_changes_tone_within_bounds():
    preprocessing = Preprocessing("modern", 128)
    augmentation = Augmentation("modern", preprocessing, seed=2)
    images, labels, shapes = batch_of([(160, 160)] * 16)
    _, still = augmented(Augmentation("none", preprocessing, 2), images, labels, shapes)
    grid, mask = augmented(augmentation, images, labels, shapes)
    areas = (mask == 3).sum((1, 2)) / (still == 3).sum((1, 2))
    assert areas.min() > 0.8**2 - 0.06 and areas.max() < 1.25**2 + 0.06
    assert areas.std() > 0.1
    assert grid.min() >= 0 and grid.max() <= 1
    assert torch.isfinite(grid).all()


def test_the_views_follow_from_the_operations():
    for operations, views in (
        ({"rotate": Rotate()}, "none"),
        ({"flip": Flip(probability=0.0)}, "none"),
        ({"flip": Flip(), "rotate": None}, "flips"),
        ({"flip": Flip(), "turn": TurnOrRotate()}, "all"),
    ):
        assert Augmentation(operations, Preprocessing("paper", 32), 0).views == views


def test_what_is_drawn_depends_on_seed_step_and_position_alone():
    shapes = np.full((24, 2), 64)
    augmentation = Augmentation("modern", Preprocessing("paper", 32), seed=1)
    whole = augmentation.draw(5, range(24), shapes)
    parts = [augmentation.draw(5, range(i, i + 6), shapes[:6]) for i in (18, 0, 12, 6)]
    assert np.array_equal(whole, np.concatenate([parts[1], parts[3], parts[2], parts[0]]))
    assert len(np.unique(whole, axis=0)) == 24
    assert not np.array_equal(whole, augmentation.draw(6, range(24), shapes))
    other = Augmentation("modern", Preprocessing("paper", 32), seed=2)
    assert not np.array_equal(whole, other.draw(5, range(24), shapes))


def test_the_random_numbers_are_those_of_philox_for_ever():
    """A change here would change every training, silently."""
    drawn = uniforms(1337, 1, step=3, position=4, count=3)
    assert drawn.tolist() == [0.3644235074142532, 0.8763500459735987, 0.9471863060908947]


def test_an_unknown_preset_is_a_clear_error():
    with pytest.raises(UserError, match=r"augmentation=strong: choose one of none, paper, modern"):
        Augmentation("strong", Preprocessing("paper", 32), 0)
    with pytest.raises(UserError, match=r"augmentation\.noise: int is no operation"):
        Augmentation({"noise": 3}, Preprocessing("paper", 32), 0)


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (Flip, {"probability": 50}),
        (Rotate, {"probability": -0.1}),
        (Rotate, {"degrees": -1}),
        (Rotate, {"degrees": True}),
        (Scale, {"smallest": 0}),
        (Shift, {"share": 5}),
        (TurnOrRotate, {"degrees": -20}),
        (Zoom, {"scale": [0, 0]}),
        (Zoom, {"scale": [1.4, 0.7]}),
        (Tone, {"gamma": [-2, -1]}),
        (Tone, {"brightness": [0.1]}),
        (tones.Blur, {"sigma": [0.5, float("inf")]}),
        (tones.Brightness, {"factor": 1.5}),
        (tones.Contrast, {"probability": "often"}),
        (tones.Gamma, {"gamma": [0, 1]}),
        (tones.LowResolution, {"smallest": 1.5}),
        (tones.Noise, {"most": float("nan")}),
    ],
)
def test_a_number_beyond_its_limits_is_refused_when_the_operation_is_made(make, wrong):
    (field,) = wrong
    with pytest.raises(UserError, match=rf"augmentation: {make.__name__} has {field}=.*: give "):
        make(**wrong)


def test_a_command_that_sets_one_ends_with_its_name(shared_run, capsys):
    words = [*shared_run, "augmentation=modern", "augmentation.flip.probability=50"]
    assert entered("train.py", *words) == 1
    said = capsys.readouterr().err
    assert "Flip has probability=50: give a number, 0 to 1" in said and "Traceback" not in said


DIGESTS = {
    "none": "a8636e8c519834cb", "paper": "185a868de41f3aa2", "modern": "3d94ee6c950c8a45"
}  # fmt: skip
"""Of positions, images and labels, as they were before there were operations."""


@pytest.mark.parametrize("preset", DIGESTS)
def test_the_configs_give_the_bits_that_they_always_gave(preset):
    operations = instantiate(OmegaConf.load(CONF / f"augmentation/{preset}.yaml"), _convert_="all")
    digest = hashlib.sha256()
    images, labels, shapes = batch_of([(64, 48), (50, 70), (40, 40), (130, 110)])
    pixels = [(1.0, 2.0), (0.7, 0.7), (1.5, 1.5), (1.1, 0.9)]
    for geometry, more in (("paper", {}), ("zscore", {}), ("spacing", {"spacing": 1.3})):
        for seed, step in ((0, 0), (1337, 3), (1337, 9999)):
            augmentation = Augmentation(operations, Preprocessing(geometry, 57, **more), seed)
            drawn = augmentation.draw(step, range(7, 11), shapes.numpy(), pixels)
            grid, mask = augmentation(images, labels, shapes, torch.from_numpy(drawn))
            for array in (drawn[:, :8].round(9) + 0, grid.numpy().round(4) + 0, mask.numpy()):
                digest.update(array.tobytes())
            same = Augmentation(preset, augmentation.preprocessing, seed)
            assert np.array_equal(drawn, same.draw(step, range(7, 11), shapes.numpy(), pixels))
    assert digest.hexdigest()[:16] == DIGESTS[preset]


OWN = """
import torch
from dataclasses import dataclass
from mambaseg.data.augmentation import Intensity, Spatial

@dataclass
class Shear(Spatial):
    most: float = 0.2
    def move(self, view, u):
        view.matrix = view.matrix @ [[1, self.most * (2 * u[0] - 1)], [0, 1]]

@dataclass
class Invert(Intensity):
    probability: float = 0.5
    def paint(self, image, drawn, *, unit):
        return torch.where(drawn[0] < self.probability, 1 - image, image)
"""
CHOSEN = """
shear: {_target_: own_operations.Shear, most: 0.4}
invert: {_target_: own_operations.Invert, probability: 1.0}
"""


def test_an_augmentation_of_ones_own_is_a_file_and_a_config(shared_run, tmp_path, monkeypatch):
    (tmp_path / "own_operations.py").write_text(OWN)
    (tmp_path / "augmentation").mkdir()
    (tmp_path / "augmentation/sheared.yaml").write_text(CHOSEN)
    monkeypatch.syspath_prepend(tmp_path)
    words = [*shared_run, "model=unet", "model.widths=[2,4]", "model.dropout=[0,0]"]
    run = built(*words, "augmentation=sheared", configs=tmp_path)
    names = [type(operation).__name__ for operation in run.data.augmentation.operations]
    assert names == ["Shear", "Invert"] and run.data.views == "none"
    (batch, *_) = run.data.train_dataloader()
    sheared = run.data.on_after_batch_transfer(dict(batch), 0)
    plain = built(*words, "augmentation=none", configs=tmp_path)
    (batch, *_) = plain.data.train_dataloader()
    straight = plain.data.on_after_batch_transfer(dict(batch), 0)
    assert sheared["case"] == straight["case"]
    assert not torch.equal(sheared["label"], straight["label"])
    assert sheared["image"].mean() > straight["image"].mean()  # dark images become bright
    assert run.key != plain.key
    words += ["augmentation=sheared", "augmentation.shear=null", "augmentation.invert=null"]
    less = built(*words, configs=tmp_path)
    assert less.key == plain.key


def test_a_part_of_the_samples_is_rotated_evenly_in_both_directions():
    angles = []
    for u in np.arange(0, 1, 0.01):
        view = View()
        Rotate(30, probability=0.2).move(view, np.array([u]))
        angles.append(np.rad2deg(np.arctan2(view.matrix[0, 1], view.matrix[0, 0])))
    assert np.allclose(angles[:20], np.arange(-30, 30, 3)) and not any(angles[20:])


def test_the_tone_of_ct_has_no_range_to_be_cut_to():
    ct = Preprocessing("native", 8, ct=[[-100, 200, 50, 40]])
    tone = Augmentation({"tone": Tone(contrast=(2, 2), brightness=(0, 0), probability=1)}, ct, 0)
    image, shapes = torch.linspace(-3, 3, 64).view(1, 1, 8, 8), np.array([[8, 8]])
    drawn = torch.from_numpy(tone.draw(0, [0], shapes))
    label = torch.zeros(1, 8, 8, dtype=torch.uint8)
    assert torch.allclose(tone(image, label, torch.tensor(shapes), drawn)[0], 2 * image)
