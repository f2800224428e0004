import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mambaseg.errors import UserError
from mambaseg.models import AnySize, MambaUNet, SwinUNet, UNet


class Recorder(nn.Module):
    """Remembers what it got and returns it."""

    def forward(self, image):
        self.seen = image
        return image


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 16))
def test_network_sees_the_next_multiple_and_the_caller_gets_the_image_size(height, width, multiple):
    network = AnySize(Recorder(), multiple)
    image = torch.rand(1, 1, height, width)
    assert torch.equal(network(image), image)
    padded_height, padded_width = network.network.seen.shape[-2:]
    assert padded_height % multiple == 0
    assert 0 <= padded_height - height < multiple
    assert padded_width % multiple == 0
    assert 0 <= padded_width - width < multiple


def test_padding_is_zero_at_the_bottom_and_right():
    network = AnySize(Recorder(), 4)
    network(torch.ones(1, 1, 3, 6))
    assert torch.equal(network.network.seen, F.pad(torch.ones(1, 1, 3, 6), (0, 2, 0, 1)))


def test_sizes_that_fit_pass_through_untouched():
    network = AnySize(Recorder(), 4)
    image = torch.rand(1, 1, 8, 12)
    network(image)
    assert network.network.seen is image


@pytest.mark.parametrize("network", [SwinUNet, MambaUNet])
def test_image_smaller_than_a_patch_is_refused(network):
    small = network(embed_dim=24)
    wrapped = AnySize(small, small.size_multiple)
    with pytest.raises(UserError, match=r"3 × 64 pixels is smaller than one patch \(4 × 4\)"):
        wrapped(torch.rand(1, 1, 3, 64))


def test_network_without_patches_takes_the_smallest_image():
    network = UNet()
    wrapped = AnySize(network, network.size_multiple).eval()
    assert wrapped(torch.rand(1, 1, 1, 1)).shape == (1, 4, 1, 1)


def test_multiple_below_one_is_a_mistake():
    with pytest.raises(ValueError, match="at least 1"):
        AnySize(Recorder(), 0)


def test_an_image_too_small_for_the_norms_is_told_with_its_own_size():
    network = AnySize(nn.Sequential(nn.Conv2d(1, 2, 8, stride=8), nn.InstanceNorm2d(2)), 8).train()
    with pytest.raises(UserError, match="reduces an image of 5 × 7 pixels to a single one"):
        network(torch.zeros(2, 1, 5, 7))
