import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import zoom
from torch.nn import functional

from mambaseg.data.formats.pictures import reduced_labels
from mambaseg.data.geometry import Preprocessing
from mambaseg.data.sampling import nearest_positions
from mambaseg.errors import UserError

PRESETS = ("paper", "percentile", "zscore", "modern")
sizes = st.integers(1, 400)


def resized_by_scipy(image, shape):
    factors = [target / source for target, source in zip(shape, image.shape, strict=True)]
    return zoom(image, factors, order=0)


def test_nearest_index_is_scipys_zoom_map_for_all_kinds_of_size_pairs():
    outside = 0
    pairs = [(s, t) for s in range(1, 401) for t in range(1, 401) if (31 * s + 17 * t) % 29 == 0]
    for source, target in pairs:
        pixels = np.arange(1, source + 1)  # zoom fills with 0, which is no pixel here
        index = nearest_positions(torch.tensor([source]), target)[0].nan_to_num(nan=-1).numpy()
        assert np.array_equal(index + 1, zoom(pixels, target / source, order=0)), (source, target)
        outside += (index < 0).any()
    assert len(pairs) > 5000
    assert outside > 50, "the pairs whose last sample SciPy loses to rounding must be among these"


@settings(max_examples=50, deadline=None)
@given(height=sizes, width=sizes, size=st.integers(1, 300), seed=st.integers(0, 99))
def test_paper_resizes_there_and_back_like_two_scipy_zooms(height, width, size, seed):
    rng = np.random.default_rng(seed)
    label = rng.integers(1, 4, (height, width)).astype(np.uint8)
    paper = Preprocessing("paper", size)

    grid = paper.to_grid(torch.from_numpy(label)[None, None])
    assert grid.shape == (1, 1, size, size)
    there = resized_by_scipy(label, (size, size))
    assert np.array_equal(grid[0, 0].numpy(), there)

    logits = functional.one_hot(grid[:, 0].long(), 4).permute(0, 3, 1, 2).float()
    back = paper.labels_to_native(logits, (height, width))
    assert back.dtype == torch.uint8
    assert np.array_equal(back[0].numpy(), resized_by_scipy(there, (height, width)))


def one_hot(label):
    return functional.one_hot(label.long(), 4).permute(0, 3, 1, 2).float()


def random_labels(height, width, seed):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 4, (2, height, width), "u1"))


grids = st.tuples(st.integers(1, 150), st.integers(1, 150)) | st.integers(1, 150)


@settings(max_examples=60)
@given(name=st.sampled_from((*PRESETS, "native")), size=grids, seed=st.integers(0, 99))
def test_an_image_of_the_grids_size_is_left_as_it_is(name, size, seed):
    preprocessing = Preprocessing(name, size)
    label = random_labels(*preprocessing.sides, seed)
    assert torch.equal(preprocessing.to_grid(label[:, None].float())[:, 0], label.float())
    back = preprocessing.labels_to_native(one_hot(label), preprocessing.sides)
    assert torch.equal(back, label)


@settings(max_examples=60)
@given(
    name=st.sampled_from(PRESETS),
    shape=st.tuples(sizes, sizes),
    size=grids,
    seed=st.integers(0, 99),
)
def test_there_and_back_gives_the_native_shape_and_invents_nothing(name, shape, size, seed):
    preprocessing = Preprocessing(name, size)
    image = torch.from_numpy(np.random.default_rng(seed).random((2, 3, *shape), np.float32)) + 0.5
    grid = preprocessing.to_grid(image)
    assert grid.shape == (2, 3, *preprocessing.sides)
    assert grid.min() >= 0 and grid.max() <= image.max() * (1 + 1e-6)
    label = random_labels(*preprocessing.sides, seed) | 1  # classes 1 and 3
    back = preprocessing.labels_to_native(one_hot(label), shape)
    assert back.dtype == torch.uint8 and back.shape == (2, *shape)
    # 0 besides: the last sample that SciPy loses to rounding
    allowed = {0, *label.unique().tolist()} if name != "modern" else set(label.unique().tolist())
    assert set(back.unique().tolist()) <= allowed


@settings(max_examples=60)
@given(shape=st.tuples(sizes, sizes), larger=st.integers(0, 200), seed=st.integers(0, 99))
def test_a_grid_no_smaller_than_the_image_gives_every_label_back(shape, larger, seed):
    """All but a last row or column that SciPy's rounding turns to zero."""
    label = random_labels(*shape, seed)
    paper = Preprocessing("paper", max(shape) + larger)
    back = paper.labels_to_native(one_hot(paper.to_grid(label[:, None])[:, 0]), shape)
    assert torch.equal(back[:, :-1, :-1], label[:, :-1, :-1])
    assert ((back == label) | (back == 0)).all()


@pytest.mark.parametrize("name", ["paper", "percentile", "zscore"])
@pytest.mark.parametrize("shape", [(150, 200), (97, 200)])
def test_labels_of_a_reduced_picture_lie_where_the_network_saw_them(name, shape):
    labels = np.random.default_rng(0).integers(0, 4, shape).astype(np.uint8)
    seen = reduced_labels(labels, 52)
    preprocessing = Preprocessing(name, 64)
    logits = one_hot(preprocessing.to_grid(torch.from_numpy(seen)[None, None])[:, 0])
    back = preprocessing.labels_to_native(logits, shape, seen=seen.shape)[0].numpy()
    assert np.array_equal(preprocessing.labels_to_native(logits, seen.shape)[0], seen)
    rows, columns = (
        np.floor((np.arange(side) + 0.5) * few / side).astype(int)
        for side, few in zip(shape, seen.shape, strict=True)
    )
    assert np.array_equal(back, seen[np.ix_(rows, columns)])
    # a reduced pixel lies in the middle of those that it stands for
    assert np.array_equal(reduced_labels(back, 52), seen)
    same = preprocessing.labels_to_native(logits, shape, seen=shape)
    assert torch.equal(same, preprocessing.labels_to_native(logits, shape))


@pytest.mark.parametrize("name", PRESETS)
def test_each_slice_is_resized_as_if_it_were_alone(name):
    preprocessing = Preprocessing(name, 40)
    image = torch.rand(5, 3, 31, 57)
    together = preprocessing.to_grid(image)
    alone = [preprocessing.to_grid(one) for one in image.split(1)]
    assert torch.equal(together, torch.cat(alone))
    channels = [preprocessing.to_grid(one) for one in image.split(1, dim=1)]
    assert torch.equal(together, torch.cat(channels, dim=1))

    logits = torch.randn(5, 4, 40, 40)
    together = preprocessing.labels_to_native(logits, (31, 57))
    alone = [preprocessing.labels_to_native(one[None], (31, 57)) for one in logits]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("shape", [(120, 80), (80, 120), (64, 64), (301, 299)])
def test_modern_keeps_the_aspect_and_centres_the_image_on_zeros(shape):
    height, width = shape
    grid = Preprocessing("modern", 64).to_grid(torch.ones(1, 1, height, width))[0, 0]
    scale = 64 / max(shape)
    rows, columns = grid.sum(0).max().item(), grid.sum(1).max().item()
    assert rows == pytest.approx(height * scale, abs=1.01)
    assert columns == pytest.approx(width * scale, abs=1.01)
    assert torch.allclose(grid, grid.flip(0), atol=1e-5)
    assert torch.allclose(grid, grid.flip(1), atol=1e-5)


def test_modern_agrees_with_torchs_interpolation_inside_a_square_image():
    image = torch.rand(2, 2, 50, 50)
    grid = Preprocessing("modern", 64).to_grid(image)
    reference = functional.interpolate(image, size=64, mode="bilinear")
    assert torch.allclose(grid[..., 1:-1, 1:-1], reference[..., 1:-1, 1:-1], atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(height=st.integers(40, 120), width=st.integers(40, 120))
def test_a_disc_survives_modern_there_and_back(height, width):
    y, x = np.mgrid[:height, :width]
    disc = (y - height / 2) ** 2 + (x - width / 3) ** 2 < (min(height, width) / 5) ** 2
    modern = Preprocessing("modern", 96)
    grid = modern.to_grid(torch.from_numpy(disc.astype(np.float32))[None, None])
    logits = torch.cat([1 - grid, grid], dim=1)
    back = modern.labels_to_native(logits, (height, width))[0].numpy().astype(bool)
    assert 2 * (back & disc).sum() / (back.sum() + disc.sum()) > 0.95


@pytest.mark.parametrize("name", PRESETS)
def test_half_precision_logits_go_back_like_single_precision_ones(name):
    preprocessing = Preprocessing(name, 32)
    logits = torch.randn(2, 4, 32, 32).bfloat16()
    half = preprocessing.labels_to_native(logits, (47, 35))
    assert torch.equal(half, preprocessing.labels_to_native(logits.float(), (47, 35)))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("value", [0.0, 1000.1, -3.3])
def test_a_constant_volume_becomes_zeros(name, value):
    image = np.full((3, 1, 8, 9), value, dtype=np.float32)
    scaled = Preprocessing(name, 8).scale_intensity(image)
    assert scaled.dtype == np.float32
    assert np.array_equal(scaled, np.zeros_like(image))


def test_intensity_scalings_are_what_their_names_say():
    image = np.random.default_rng(0).gamma(2.0, 100.0, (6, 1, 40, 30)).astype(np.float32) + 7
    wide = image.astype(np.float64)

    min_max = Preprocessing("paper", 8).scale_intensity(image)
    reference = (wide - wide.min()) / (wide.max() - wide.min())
    assert np.allclose(min_max, reference, atol=1e-6)

    low, high = np.percentile(wide, [0.5, 99.5])
    reference = (np.clip(wide, low, high) - low) / (high - low)
    for name in ("percentile", "modern"):
        assert np.allclose(Preprocessing(name, 8).scale_intensity(image), reference, atol=1e-6)

    z_score = Preprocessing("zscore", 8).scale_intensity(image)
    assert np.allclose(z_score, (wide - wide.mean()) / wide.std(), atol=1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_each_channel_is_scaled_on_its_own(name):
    image = np.random.default_rng(0).gamma(2.0, 100.0, (3, 2, 20, 30)).astype(np.float32)
    preprocessing = Preprocessing(name, 8)
    together = preprocessing.scale_intensity(image * np.array([1, 50])[None, :, None, None])
    assert together.shape == image.shape and together.dtype == np.float32
    for c in (0, 1):
        alone = preprocessing.scale_intensity(image[:, c : c + 1] * (1, 50)[c])
        assert np.array_equal(together[:, c : c + 1], alone)


@settings(max_examples=40, deadline=None)
@given(slope=st.floats(1e-3, 1e4), intercept=st.floats(-1e3, 1e3), name=st.sampled_from(PRESETS))
def test_intensity_does_not_depend_on_the_scanners_units(slope, intercept, name):
    image = np.random.default_rng(1).random((2, 1, 16, 16), dtype=np.float32)
    preprocessing = Preprocessing(name, 8)
    other = (image * slope + intercept).astype(np.float32)
    resolution = 1e-6 * (1 + abs(intercept) / slope)
    assert np.allclose(
        preprocessing.scale_intensity(image),
        preprocessing.scale_intensity(other),
        atol=10 * resolution,
    )


WINDOWS = ([-125, 275], [0, 255], [-1.5, 0.25])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", PRESETS)
def test_a_window_is_numpys_clip_whatever_else_the_volume_holds(name, window):
    low, high = window
    image = np.random.default_rng(0).normal(50, 300, (4, 2, 20, 30)).astype(np.float32)
    image[0] = 1000  # a constant slice is white, not nothing
    scaled = Preprocessing(name, 8, window=window).scale_intensity(image)
    reference = (np.clip(image.astype(np.float64), low, high) - low) / (high - low)
    assert scaled.dtype == np.float32 and scaled.min() == 0 and scaled.max() == 1
    assert np.allclose(scaled, reference, atol=1e-6)
    alone = Preprocessing(name, 8, window=window).scale_intensity(image[:1])
    assert np.array_equal(scaled[:1], alone)


def test_pictures_of_8_bits_are_divided_by_255():
    image = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    scaled = Preprocessing("modern", 8, window=[0, 255]).scale_intensity(image)
    assert np.array_equal(scaled, image.astype(np.float32) / np.float32(255))


def test_another_intensity_takes_the_place_of_the_presets_own():
    image = np.random.default_rng(0).gamma(2.0, 100.0, (3, 1, 20, 30)).astype(np.float32)
    other = Preprocessing("modern", 8, intensity="zscore")
    assert np.array_equal(
        other.scale_intensity(image), Preprocessing("zscore", 8).scale_intensity(image)
    )
    assert other.geometry == "fit"
    assert Preprocessing("modern", 8, intensity="percentile") == Preprocessing("modern", 8)


def test_a_few_bright_voxels_are_not_lost_to_the_percentiles():
    image = np.zeros((1, 1, 100, 100), dtype=np.float32)
    image[0, 0, 3, :5] = 9
    assert Preprocessing("percentile", 8).scale_intensity(image).sum() == 5


def test_integer_volumes_are_accepted():
    image = np.arange(24, dtype=np.int16).reshape(2, 1, 3, 4)
    assert Preprocessing("paper", 8).scale_intensity(image).max() == 1.0


def test_the_description_is_plain_data_and_rebuilds_the_preprocessing():
    for name in PRESETS:
        description = Preprocessing(name, 96).describe()
        assert all(type(value) in (str, int) for value in description.values())
        rebuilt = Preprocessing(description["name"], description["size"])
        assert rebuilt.describe() == description


VARIANTS = [
    {}, {"intensity": "zscore"}, {"window": (-125.0, 275.0)},
    {"intensity": "window", "window": (0.0, 255.0)}, {"name": "spacing", "spacing": 1.25},
    {"name": "spacing", "spacing": 0.7, "intensity": "zscore"},
    {"name": "spacing", "spacing": [0.7, 1.25], "size": [96, 64]},
    {"ct": [[-960, 300, 100.5, 250], None]}, {"size": [96, 64]},
]  # fmt: skip


@pytest.mark.parametrize("how", VARIANTS, ids=str)
def test_a_preprocessing_comes_back_from_its_description_and_its_settings(how):
    for name in (*PRESETS, "native") if "name" not in how else ("spacing",):
        preprocessing = Preprocessing(**{"name": name, "size": 96} | how)
        written = json.loads(json.dumps(preprocessing.describe()))
        assert Preprocessing.restored(written) == preprocessing
        settings = {key: value for key, value in preprocessing.settings().items() if value}
        assert Preprocessing(settings.pop("preprocessing"), **settings) == preprocessing


def test_two_equal_sides_are_one():
    assert Preprocessing("paper", [64, 64]) == Preprocessing("paper", 64)


def test_ct_is_clipped_and_standardised_alike_in_every_image_and_other_channels_by_themselves():
    image = np.random.default_rng(0).normal(0, 500, (3, 2, 8, 9))
    scaled = Preprocessing("native", 8, ct=[[-100, 200, 40, 60], None]).scale_intensity(image)
    assert np.allclose(scaled[:, 0], (np.clip(image[:, 0], -100, 200) - 40) / 60, atol=1e-5)
    zscore = Preprocessing("native", 8, intensity="zscore").scale_intensity(image)
    assert np.array_equal(scaled[:, 1], zscore[:, 1])
    with pytest.raises(UserError, match="2 entries for images of 1 channels"):
        Preprocessing("native", 8, ct=[[0, 1, 0, 1], None]).scale_intensity(image[:, :1])


@pytest.mark.parametrize("size", [0, [64], [64, 0], [8, 8, 8], "auto", [8.0, 8.0], None], ids=str)
def test_a_size_that_cannot_be_is_a_clear_error(size):
    with pytest.raises(UserError, match=r"data\.size=.* or \[rows, columns\]"):
        Preprocessing("paper", size)


def test_what_an_older_checkpoint_leaves_unsaid_is_the_presets():
    assert Preprocessing.restored({"name": "zscore", "size": 64}) == Preprocessing("zscore", 64)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"intensity": "bright"}, "data.intensity=bright.*minmax"),
        ({"intensity": "window"}, "needs its two grey values"),
        ({"intensity": "zscore", "window": [0, 1]}, "data.intensity=zscore with data.window"),
        *(
            ({"window": window}, "lowest and the highest grey value")
            for window in ([1, 0], [3, 3], [0], 5, "ab", [0, "1"], [0, float("nan")], [0, 1e300])
        ),
    ],
    ids=str,
)
def test_an_intensity_that_cannot_be_is_a_clear_error(how, said):
    with pytest.raises(UserError, match=said):
        Preprocessing("paper", 32, **how)


@pytest.mark.parametrize(
    ("name", "spacing", "said"),
    [
        ("spacing", None, "needs the side of a pixel in mm"),
        ("modern", 1.25, "data.preprocessing=modern with data.spacing=1.25"),
        ("native", 1.25, "others have none"),
        *(
            ("spacing", s, "0.01 to 100")
            for s in (0.0, -1.0, 1e-3, 101, float("nan"), "a", [1.0], [1.0, 0])
        ),
    ],
)
def test_a_spacing_that_cannot_be_is_a_clear_error(name, spacing, said):
    with pytest.raises(UserError, match=said):
        Preprocessing(name, 32, spacing=spacing)


def test_an_unknown_preset_is_a_clear_error():
    with pytest.raises(UserError, match=r"data.preprocessing=papr: choose one of paper"):
        Preprocessing("papr", 224)
    with pytest.raises(UserError, match="positive"):
        Preprocessing("paper", 0)
