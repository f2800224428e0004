"""nnU-Net's network, and the one at half the resolution, which is it on blocks of 2 × 2 pixels."""

import copy

import pytest
import torch
from monai.networks.nets import DynUNet

from mambaseg.errors import UserError
from small_networks import small_network

DEEP = {"deep_supervision": True, "deep_supr_num": 2}


def test_heads_are_those_of_monai_before_it_enlarges_them():
    network = small_network("nnunet_2d", 2, 3, **DEEP).network
    image = torch.rand(2, 2, 64, 96)
    with torch.no_grad():
        heads, enlarged = network(image), DynUNet.forward(network, image)
        single = network.eval()(image)
    assert [tuple(head.shape) for head in heads] == [(2, 3, 64 // k, 96 // k) for k in (1, 2, 4)]
    for k, head, large in zip((1, 2, 4), heads, enlarged.unbind(1), strict=True):
        assert torch.equal(head, large[..., ::k, ::k])
    torch.testing.assert_close(single, heads[0])  # instance norms do the same in both modes


def test_no_head_outlives_its_pass():
    network = small_network("nnunet_2d", 2, 3, **DEEP).network
    network(torch.rand(2, 2, 64, 64))[1].sum().backward()
    copy.deepcopy(network)  # torch copies no tensor with a history


def test_no_head_outlives_a_pass_with_gradients_in_eval_mode_either():
    network = small_network("nnunet_2d", 2, 3, **DEEP).network.eval()
    network(torch.rand(2, 2, 64, 64)).sum().backward()
    copy.deepcopy(network)


@pytest.mark.parametrize("name", ["nnunet_2d", "nnunet_2d_half"])
def test_strides_may_be_pairs(name):
    strides = [1, [2, 1], 2, 2, 2] + [2] * (name == "nnunet_2d")
    changes = {"size_multiple": None} if name == "nnunet_2d" else {}
    changes |= {"strides": strides, "upsample_kernel_size": strides[1:]}
    network = small_network(name, **changes).eval()
    assert network.multiples == (32, 16)
    image = torch.rand(1, 1, 64, 48)
    assert network(image).shape == (1, 4, 64, 48)
    with pytest.raises(UserError, match=r"multiples of \[32, 16\]"):
        network.network(image[:, :, 16:])


@pytest.mark.parametrize("heads", [1, 3])
def test_the_four_pixels_of_a_block_are_channels_of_input_and_logits(heads):
    network = small_network("nnunet_2d_half", 2, 3, **(DEEP if heads > 1 else {})).network
    network.train(heads > 1)
    image = torch.rand(2, 2, 64, 96)
    blocks, places = torch.empty(2, 8, 32, 48), [(i, j) for i in (0, 1) for j in (0, 1)]
    for place, (i, j) in enumerate(places):
        blocks[:, place::4] = image[..., i::2, j::2]
    with torch.no_grad():
        found, expected = network(image), DynUNet.forward(network, blocks)
    found = found if heads > 1 else [found]
    expected = expected.unbind(1) if heads > 1 else [expected]
    for k, logits, theirs in zip((1, 2, 4)[:heads], found, expected, strict=True):
        assert logits.shape == (2, 3, 64 // k, 96 // k)
        for place, (i, j) in enumerate(places):
            assert torch.equal(logits[..., i::2, j::2], theirs[..., place::4, ::k, ::k])
