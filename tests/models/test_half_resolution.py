"""The network at half the resolution is DynUNet on blocks of 2 × 2 pixels."""

import pytest
import torch
from monai.networks.nets import DynUNet

from small_networks import small_network


@pytest.mark.parametrize("heads", [1, 3])
def test_the_four_pixels_of_a_block_are_channels_of_input_and_logits(heads):
    network = small_network("nnunet_2d_half", 2, 3, deep_supervision=heads > 1,
                            deep_supr_num=max(1, heads - 1)).network  # fmt: skip
    network.train(heads > 1)
    image = torch.rand(2, 2, 64, 96)
    blocks, places = torch.empty(2, 8, 32, 48), [(i, j) for i in (0, 1) for j in (0, 1)]
    for place, (i, j) in enumerate(places):
        blocks[:, place::4] = image[..., i::2, j::2]
    with torch.no_grad():
        logits, expected = network(image), DynUNet.forward(network, blocks)
    assert logits.shape == (2, *([heads] if heads > 1 else []), 3, 64, 96)
    for place, (i, j) in enumerate(places):
        assert torch.equal(logits[..., i::2, j::2], expected[..., place::4, :, :])
