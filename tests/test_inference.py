import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mambaseg.data.geometry import Preprocessing
from mambaseg.inference import keep_largest_component, predict_case


class Halving:
    """A grid of every second pixel, and each pixel doubled on the way back."""

    def to_grid(self, image):
        return image[..., ::2, ::2]

    def labels_to_native(self, logits, shape):
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
        def labels_to_native(self, logits, shape):
            seen["resampled"] = logits.dtype
            return super().labels_to_native(logits, shape)

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


# Largest component ----------------------------------------------------------------------------


def test_only_the_largest_component_of_each_class_stays():
    labels = np.zeros((3, 6, 6), np.uint8)
    labels[0:2, 0:2, 0:2] = 1  # 8 voxels through two slices
    labels[0, 4:6, 0:3] = 1  # 6 voxels
    labels[2, 5, 5] = 2
    labels[0, 0, 4:6] = 2  # 2 voxels
    kept = keep_largest_component(labels, 3)
    expected = np.zeros_like(labels)
    expected[0:2, 0:2, 0:2] = 1
    expected[0, 0, 4:6] = 2
    assert np.array_equal(kept, expected)
    assert labels[2, 5, 5] == 2  # the input is left as it was


def test_voxels_that_touch_at_an_edge_only_are_not_connected():
    labels = np.zeros((2, 3, 3), np.uint8)
    labels[0, 0, 0:2] = 1
    labels[0, 1, 2] = labels[1, 1, 1] = 1
    assert keep_largest_component(labels, 2).sum() == 2


def test_a_tensor_comes_back_as_a_tensor_and_an_empty_volume_as_it_is():
    labels = torch.zeros(2, 3, 3, dtype=torch.uint8)
    assert torch.equal(keep_largest_component(labels, 4), labels)
    labels[0, 0, 0] = labels[1, 2, 1] = labels[1, 2, 2] = 3
    kept = keep_largest_component(labels, 4)
    assert kept.dtype == torch.uint8 and kept.nonzero().tolist() == [[1, 2, 1], [1, 2, 2]]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 4))
def test_what_stays_is_one_component_per_class_and_no_larger_one_was_dropped(seed, num_classes):
    from scipy.ndimage import label as components

    labels = np.random.default_rng(seed).integers(0, num_classes, (3, 6, 7)).astype(np.uint8)
    kept = keep_largest_component(labels, num_classes)
    assert np.array_equal(keep_largest_component(kept, num_classes), kept)
    assert np.all((kept == labels) | (kept == 0))
    for index in range(1, num_classes):
        before, count = components(labels == index)
        sizes = [int((before == part).sum()) for part in range(1, count + 1)]
        assert components(kept == index)[1] == min(count, 1)
        assert (kept == index).sum() == max(sizes, default=0)
