"""Arguments that no network can have are refused by their keys, and told as errors of the user."""

import pytest

from mambaseg.errors import UserError
from mambaseg.models import UNet
from small_networks import small_network


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("unet", {"widths": [4, 8, 16]}, r"model\.dropout=.* one value per level, equally many"),
        ("vm_unet", {"decoder_depths": [1, 1]}, r"model\.decoder_depths=\[1, 1\]: .* equally many"),
        ("swin_unet", {"heads": [1, 2, 4]}, r"model\.heads=\[1, 2, 4\]: .* equally many"),
        ("swin_unet", {"heads": [1, 2, 4, 8, 16]}, r"model\.heads=.* equally many"),
        ("rwkv_unet_t", {"depths": [1, 1, 1]}, r"model\.depths=\[1, 1, 1\].* equally many"),
        ("rwkv_unet_t", {"expansions": [2] * 5}, r"model\.expansions=.* equally many"),
        ("emcad_b2", {"depths": [1, 1, 1]}, r"model\.depths=\[1, 1, 1\].* exactly 4"),
        ("emcad_b2", {"widths": [64] * 5, "depths": [1] * 5, "heads": [1] * 5}, "exactly 4"),
        ("trans_unet", {"decoder_widths": [16] * 5}, r"model\.decoder_widths=.*exactly 4"),
        ("trans_unet", {"decoder_widths": [32, 16, 16]}, r"model\.decoder_widths=.*exactly 4"),
    ],
)
def test_lists_have_a_value_per_level(name, changes, said):
    with pytest.raises(UserError, match=said):
        small_network(name, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("unet", {"widths": [4], "dropout": [0]}, r"model\.widths=\[4\].* at least 2"),
        ("rwkv_unet_t", {"widths": [8], "depths": [1], "expansions": [2]}, "at least 2"),
        ("u_mamba_none", {"widths": [8]}, r"model\.widths=\[8\]: .* at least 2"),
        ("uvm_net", {"widths": [8]}, r"model\.widths=\[8\]: .* at least 2"),
        ("ultralight_vm_unet", {"widths": [8]}, r"model\.widths=\[8\]: .* at least 2"),
        ("mamba_unet", {"depths": []}, r"model\.depths=\[\]: .* at least 1"),
    ],
)
def test_a_network_has_levels(name, changes, said):
    with pytest.raises(UserError, match=said):
        small_network(name, **changes)


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("unet", "widths", [4, 8, 0, 32, 64], r"must be 1 or more"),
        ("u_mamba_none", "widths", [4, 0], r"must be 1 or more"),
        ("uvm_net", "grid", 0, "must be 1 or more"),
        ("mamba_unet", "patch_size", 0, "must be 1 or more"),
        ("mamba_unet", "embed_dim", 0, "must be 1 or more"),
        ("swin_unet", "window_size", 0, "must be 1 or more"),
        ("mamba_unet_no_scan", "kernel_size", 0, "must be odd"),
        ("mamba_unet_no_scan", "kernel_size", 4, "must be odd"),
        ("ultralight_vm_unet", "widths", [8, 16, 24, 32, 48, 62], "must be multiples of 4"),
        ("mamba_unet", "drop_path_rate", 1.2, "must be 0 or more and below 1"),
        ("emcad_b2", "drop_path_rate", -0.1, "must be 0 or more and below 1"),
        ("rwkv_unet_t", "drop_path_rate", 1, "must be 0 or more and below 1"),
        ("trans_unet", "heads", 5, "48 channels do not divide into 5 heads"),
        ("swin_unet", "heads", [1, 2, 4, 0], "192 channels do not divide into 0 heads"),
    ],
)
def test_a_value_that_no_network_can_have_is_refused_by_its_key(name, key, value, said):
    with pytest.raises(UserError, match=rf"model\.{key}\b.*{said}"):
        small_network(name, **{key: value})


def test_in_python_it_is_a_value_error():
    with pytest.raises(ValueError, match=r"model\.widths=\[8, 16\]"):
        UNet(widths=(8, 16))
