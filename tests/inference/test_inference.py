import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mambaseg.data.geometry import Preprocessing
from mambaseg.errors import UserError
from mambaseg.evaluation.largest import keep_largest
from mambaseg.inference.segment import (
    Member,
    _through_windows,
    choose_precision,
    passes,
    predict_case,
    segment,
)


def each(num_classes: int) -> dict[str, tuple[int, ...]]:
    return {str(label): (label,) for label in range(1, num_classes)}


class Halving:
    """A grid of every second pixel, and each pixel doubled on the way back."""

    sides, windowed = (5, 5), False

    def stacked(self, image, start, stop):
        return image[start:stop]

    def to_grid(self, image, pixel):
        return image[..., ::2, ::2]

    def labels_to_native(self, logits, shape, pixel, seen):
        labels = logits.argmax(1).to(torch.uint8)
        native = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)
        assert tuple(native.shape[1:]) == shape
        return native


class Recorder(nn.Module):
    """Class 0, 1 or 2 by thresholds on the intensity; records how it was called."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.9)
        self.frozen = nn.BatchNorm2d(1).eval()
        self.batches, self.modes, self.inference = [], [], []

    def forward(self, image):
        self.batches.append(tuple(image.shape))
        self.modes.append(self.training or self.dropout.training)
        self.inference.append(torch.is_inference_mode_enabled())
        x = self.dropout(image) * self.scale
        return torch.cat([torch.full_like(x, 0.5), x, 2 * x - 1.5], 1)


def thresholds(image):
    """What `Recorder` and `Halving` make of an image that is constant on 2 x 2 pixels."""
    return ((image > 0.5).int() + (image > 1.5).int()).to(torch.uint8)


def blocky_image(slices=7, height=6, width=10):
    small = 2 * torch.rand(slices, 1, height // 2, width // 2)
    return small.repeat_interleave(2, -2).repeat_interleave(2, -1)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 24])
def test_a_case_comes_back_at_native_size_whatever_the_batch(batch_size):
    image, network = blocky_image(), Recorder()
    labels = predict_case(network, image, Halving(), batch_size=batch_size)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels, thresholds(image[:, 0]))
    sizes = [shape[0] for shape in network.batches]
    assert sum(sizes) == 7 and max(sizes) == min(batch_size, 7)
    assert network.batches[0][1:] == (1, 3, 5)


def test_the_network_predicts_in_evaluation_mode_and_gets_each_modules_mode_back():
    network = Recorder()
    network.train()
    network.frozen.eval()
    labels = predict_case(network, blocky_image(), Halving())
    assert network.modes == [False] and network.inference == [True]
    assert network.training and network.dropout.training and not network.frozen.training
    assert not labels.is_inference()


def test_the_mode_comes_back_also_after_an_error():
    class Failing(Recorder):
        def forward(self, image):
            raise RuntimeError("no memory")

    network = Failing().train()
    with pytest.raises(RuntimeError, match="no memory"):
        predict_case(network, blocky_image(), Halving())
    assert network.training and network.dropout.training


def test_the_callers_autocast_reaches_the_network_and_logits_are_resampled_in_float32():
    seen = {}

    class Watching(Halving):
        def labels_to_native(self, logits, *where, **how):
            seen["resampled"] = logits.dtype
            return super().labels_to_native(logits, *where, **how)

    class Conv(nn.Conv2d):
        def forward(self, image):
            logits = super().forward(image)
            seen["network"] = logits.dtype
            return logits

    with torch.autocast("cpu", dtype=torch.bfloat16):
        predict_case(Conv(1, 3, 1), blocky_image(), Watching())
    assert seen == {"network": torch.bfloat16, "resampled": torch.float32}


def test_a_network_without_parameters_works_where_the_image_is():
    class Constant(nn.Module):
        def forward(self, image):
            return image.new_tensor([0.0, 1.0]).reshape(1, 2, 1, 1).expand(len(image), 2, 3, 5)

    assert predict_case(Constant(), blocky_image(), Halving()).unique().tolist() == [1]


@pytest.mark.parametrize("preset", ["paper", "modern"])
def test_the_real_preprocessing_brings_a_bright_box_back_where_it_was(preset):
    class Bright(nn.Module):
        def forward(self, image):
            return torch.cat([torch.full_like(image, 0.5), image], 1)

    image = torch.zeros(3, 1, 40, 60)
    image[1, 0, 10:30, 20:50] = 1.0
    labels = predict_case(Bright(), image, Preprocessing(preset, 120), batch_size=2)
    assert labels.shape == image[:, 0].shape
    wrong = (labels != image[:, 0].to(torch.uint8)).float().mean().item()
    assert wrong < 0.02  # at most half a pixel along the edges of the box
    assert labels[0].max() == labels[2].max() == 0


# Images larger than the grid ------------------------------------------------------------------


class Threshold(nn.Module):
    """Bright or not, pixel by pixel; records what it is given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, image):
        self.seen.append(tuple(image.shape))
        image = image[:, :1]
        return torch.cat([1 - 2 * image, 2 * image - 1], 1)


@pytest.mark.parametrize("shape", [(100, 70), (33, 32), (20, 90)])
@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_windows_of_the_grids_size_see_all_of_a_larger_image(shape, batch_size):
    image, network = torch.rand(5, 2, *shape), Threshold()
    labels = predict_case(network, image, Preprocessing("native", 32), batch_size=batch_size)
    assert torch.equal(labels, (image[:, 0] > 0.5).to(torch.uint8))
    assert {seen[1:] for seen in network.seen} == {(2, 32, 32)}
    assert max(seen[0] for seen in network.seen) <= batch_size
    windows = sum(seen[0] for seen in network.seen)
    steps = [1 + -(-max(0, side - 32) // 16) for side in shape]
    assert windows == 5 * steps[0] * steps[1]  # they overlap by half
    assert windows == 5 * passes(Preprocessing("native", 32), image, None, "none")


def test_slices_share_their_forward_passes():
    network = Threshold()
    predict_case(network, torch.rand(9, 1, 48, 32), Preprocessing("native", 32), batch_size=6)
    assert [seen[0] for seen in network.seen] == [6, 6, 6]  # two windows per slice


@pytest.mark.parametrize("views", ["none", "flips", "rot90", "all"])
def test_windows_say_what_one_large_grid_says(views):
    image, pixel = torch.rand(2, 1, 61, 50), (8.0, 1.3, 0.9)
    small, large = (Preprocessing("spacing", size, spacing=0.8) for size in (32, 128))
    assert small.to_grid(image, pixel[1:]).shape == (2, 1, 99, 56)
    through, at_once = (
        segment([Member(Threshold(), one, views)], [image], spacing=pixel, probabilities=True)
        for one in (small, large)
    )
    assert through.labels.shape == (2, 61, 50)
    assert torch.equal(through.labels, at_once.labels)
    difference = through.probabilities.int() - at_once.probabilities.int()
    assert difference.abs().max() <= 1  # of 255: rounding


def test_an_image_that_fits_the_grid_takes_the_plain_path_bit_for_bit(monkeypatch):
    monkeypatch.setitem(sys.modules, "monai.inferers.utils", None)  # importing it would fail
    torch.manual_seed(0)
    network = nn.Conv2d(1, 3, 5, padding=2)
    for shape, pixel in (((64, 40), (1.0, 1.0)), ((30, 64), (1.5, 1.0)), ((7, 5), (2.0, 3.0))):
        preprocessing = Preprocessing("spacing", 64, spacing=1.0)
        image = torch.rand(3, 1, *shape)
        with torch.inference_mode():
            logits = network(preprocessing.to_grid(image, pixel))
            assert logits.shape == (3, 3, 64, 64)
            expected = preprocessing.labels_to_native(logits, shape, pixel)
        labels = predict_case(network, image, preprocessing, spacing=(9.0, *pixel))
        assert torch.equal(labels, expected)


def test_gaussian_weights_favour_the_middle_of_a_window():
    class Edges(nn.Module):
        """Says 1 near a window's left edge, 0 elsewhere."""

        def forward(self, image):
            left = (torch.arange(32) < 8).float().expand(len(image), 1, 32, 32)
            return torch.cat([1 - left, left], 1)

    labels = predict_case(Edges(), torch.zeros(1, 1, 32, 96), Preprocessing("native", 32))
    assert labels[0, :, :8].all()  # no other window sees these
    assert not labels[0, :, 8:].any()


def test_an_ensemble_joins_windows_and_whole_images_at_native_resolution():
    image = torch.rand(3, 1, 80, 60)
    members = [
        Member(Threshold(), Preprocessing("native", 32)),
        Member(Threshold(), Preprocessing("paper", 160)),
    ]
    both = segment(members, [image, image], probabilities=True, batch_size=4)
    assert both.labels.shape == (3, 80, 60) and both.probabilities.shape == (3, 2, 80, 60)
    assert (both.labels == (image[:, 0] > 0.5)).float().mean() > 0.85


def test_low_precision_networks_are_averaged_in_float32():
    class Low(Threshold):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones((), dtype=torch.bfloat16))

        def forward(self, image):
            assert image.dtype == torch.bfloat16
            return super().forward(image) * self.weight

    image = (torch.rand(2, 1, 70, 40) > 0.5).float()
    labels = predict_case(Low(), image, Preprocessing("native", 32))
    assert torch.equal(labels, image[:, 0].to(torch.uint8))


def test_an_image_that_was_reduced_before_comes_back_at_its_own_size():
    """Blocks of 3 x 2 pixels, reduced to one each, are blocks again."""
    small = (torch.rand(2, 1, 40, 50) > 0.5).float()
    member = Member(Threshold(), Preprocessing("native", 32))
    labels = segment([member], [small], shape=(120, 100)).labels
    blocks = small.repeat_interleave(3, -2).repeat_interleave(2, -1)
    middles = labels[:, 1::3, :]
    assert labels.shape == (2, 120, 100)
    assert torch.equal(middles, blocks[:, 0, 1::3].to(torch.uint8))


def test_a_case_without_a_voxel_size_is_refused_where_it_is_needed():
    with pytest.raises(UserError, match="voxel size is unknown"):
        predict_case(Threshold(), torch.rand(1, 1, 9, 9), Preprocessing("spacing", 8, spacing=1.0))


# Largest component ----------------------------------------------------------------------------


def test_only_the_largest_component_of_each_class_stays():
    labels = np.zeros((3, 6, 6), np.uint8)
    labels[0:2, 0:2, 0:2] = 1  # 8 voxels through two slices
    labels[0, 4:6, 0:3] = 1  # 6 voxels
    labels[2, 5, 5] = 2
    labels[0, 0, 4:6] = 2  # 2 voxels
    kept = keep_largest(labels, each(3))
    expected = np.zeros_like(labels)
    expected[0:2, 0:2, 0:2] = 1
    expected[0, 0, 4:6] = 2
    assert np.array_equal(kept, expected)
    assert labels[2, 5, 5] == 2  # the input is left as it was


def test_voxels_that_touch_at_an_edge_only_are_not_connected():
    labels = np.zeros((2, 3, 3), np.uint8)
    labels[0, 0, 0:2] = 1
    labels[0, 1, 2] = labels[1, 1, 1] = 1
    assert keep_largest(labels, each(2)).sum() == 2


def test_a_tensor_comes_back_as_a_tensor_and_an_empty_volume_as_it_is():
    labels = torch.zeros(2, 3, 3, dtype=torch.uint8)
    assert torch.equal(keep_largest(labels, each(4)), labels)
    labels[0, 0, 0] = labels[1, 2, 1] = labels[1, 2, 2] = 3
    kept = keep_largest(labels, each(4))
    assert kept.dtype == torch.uint8 and kept.nonzero().tolist() == [[1, 2, 1], [1, 2, 2]]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 4))
def test_what_stays_is_one_component_per_class_and_no_larger_one_was_dropped(seed, num_classes):
    from scipy.ndimage import label as components

    labels = np.random.default_rng(seed).integers(0, num_classes, (3, 6, 7)).astype(np.uint8)
    kept = keep_largest(labels, each(num_classes))
    assert np.array_equal(keep_largest(kept, each(num_classes)), kept)
    assert np.all((kept == labels) | (kept == 0))
    for index in range(1, num_classes):
        before, count = components(labels == index)
        sizes = [int((before == part).sum()) for part in range(1, count + 1)]
        assert components(kept == index)[1] == min(count, 1)
        assert (kept == index).sum() == max(sizes, default=0)


@pytest.mark.parametrize(
    ("features", "chosen"),
    [
        ({"avx512bf16": True, "amx-bf16": False}, "bf16-mixed"),
        ({"avx512bf16": False, "amx-bf16": True}, "bf16-mixed"),
        ({"neon": True, "bf16": True}, "bf16-mixed"),
        ({"avx2": True, "avx512bf16": False, "amx-bf16": False}, "32-true"),
    ],
)
def test_bfloat16_where_the_processor_multiplies_it(monkeypatch, features, chosen):
    monkeypatch.setattr("llvmlite.binding.get_host_cpu_features", lambda: features)
    assert choose_precision("bf16-native", gpu=False) == chosen
    assert choose_precision("auto", gpu=False) == "32-true"
    with pytest.raises(UserError, match="precision=bf16: choose auto"):
        choose_precision("bf16", gpu=False)


def test_of_overlapping_windows_the_middle_of_each_counts_most():
    def left(image):  # says 1 in the left half of what it sees
        half = (torch.arange(image.shape[-1]) < image.shape[-1] // 2).float()
        return half.expand(len(image), 2, *image.shape[-2:]).clone()

    found = _through_windows(left, torch.zeros(1, 1, 8, 12), (8, 8), 4)[0, 1, 4]
    # columns 4..7 are seen twice: as 4..7 (0) of the first window and as 0..3 (1) of the second
    assert found[:4].eq(1).all() and found[8:].eq(0).all()
    assert found[4] < 0.1 and found[5] < 0.5 < found[6] and found[7] > 0.9


def test_windows_are_turned_with_the_image():
    sizes = set()

    class Seen(nn.Module):
        def forward(self, image):
            sizes.add(tuple(image.shape[-2:]))
            return torch.cat([image, 1 - image], 1)

    predict_case(Seen(), torch.rand(1, 1, 20, 40), Preprocessing("native", (8, 16)), views="rot90")
    assert sizes == {(8, 16), (16, 8)}
