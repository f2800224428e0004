"""What some networks promise beyond the contract of all (`test_contract`)."""

import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from mambaseg.app.entry import CONF
from mambaseg.errors import UserError
from mambaseg.models import (
    EMCAD,
    AttentionUNet,
    MambaUNet,
    MambaUNetNoScan,
    MambaUNetV2,
    MSVMUNet,
    RWKVUNet,
    ScanBlock,
    SwinUMamba,
    SwinUMambaD,
    SwinUNet,
    TransUNet,
    UltraLightVMUNet,
    UMamba,
    UNet,
    UVMNet,
    VMUNet,
    VMUNetV2,
    names_without_decay,
)
from small_networks import NAMES, full_network, small_network

TARGETS = {name: OmegaConf.load(CONF / "model" / f"{name}.yaml")._target_ for name in NAMES}
OURS = [
    name for name, target in TARGETS.items()
    if target.startswith("mambaseg.") and not target.startswith("mambaseg.models.zoo.")
]  # fmt: skip
WITHOUT_SCAN = (
    "attention_unet", "emcad_b2", "mamba_unet_no_scan", "nnunet_2d", "nnunet_2d_half",
    "rwkv_unet_b", "rwkv_unet_s", "rwkv_unet_t", "swin_unet", "trans_unet", "u_mamba_none", "unet",
)  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_sizes_that_do_not_fit_name_the_wrapper(name):
    with pytest.raises(UserError, match=r"multiples of \d+, got 40 × 65.*AnySize"):
        small_network(name).network(torch.rand(1, 1, 40, 65))


REPEATING = (
    "swin_unet", "mamba_unet", "mamba_unet_no_scan", "mamba_unet_v2", "msvm_unet", "vm_unet",
    "vm_unet_v2",
)  # fmt: skip
repeats_a_single_channel = pytest.mark.parametrize("name", REPEATING)


@repeats_a_single_channel
def test_one_channel_is_repeated_to_three(name):
    grey, colour = (
        small_network(name, in_channels=1).eval(),
        small_network(name, in_channels=3).eval(),
    )
    colour.load_state_dict(grey.state_dict())
    image = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(grey(image), colour(image.repeat(1, 3, 1, 1)))


@repeats_a_single_channel
def test_other_channel_counts_are_taken_as_they_are(name):
    embedding = small_network(name, in_channels=2).network.patch_embed
    assert next(embedding.parameters()).shape[1] == 2


@pytest.mark.parametrize("name", OURS)
def test_networks_with_a_scan_say_so(name):
    network = small_network(name)
    expected = name not in WITHOUT_SCAN
    assert any(isinstance(module, ScanBlock) for module in network.modules()) == expected


def test_parameters_that_decay_would_harm_are_named():
    mamba, swin = (small_network(name, depths=[2, 2, 2, 2]) for name in ("mamba_unet", "swin_unet"))
    for wrapped, parts in [(mamba, ("A_logs", "Ds")), (swin, ("relative_position_bias_table",))]:
        network = wrapped.network
        expected = {name for name, _ in network.named_parameters() if name.endswith(parts)}
        assert len(expected) == len(parts) * 14
        assert names_without_decay(network) == expected
        assert names_without_decay(wrapped) == {f"network.{name}" for name in expected}
    assert names_without_decay(small_network("unet")) == set()


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("unet", UNet),
        ("attention_unet", AttentionUNet),
        ("swin_unet", SwinUNet),
        ("trans_unet", TransUNet),
        ("mamba_unet", MambaUNet),
        ("mamba_unet_no_scan", MambaUNetNoScan),
        ("mamba_unet_v2", MambaUNetV2),
        ("msvm_unet", MSVMUNet),
        ("emcad_b2", EMCAD),
        ("rwkv_unet_t", RWKVUNet),
        ("vm_unet", VMUNet),
        ("vm_unet_v2", VMUNetV2),
        ("swin_umamba", SwinUMamba),
        ("swin_umamba_d", SwinUMambaD),
        ("u_mamba_bot", UMamba),
        ("ultralight_vm_unet", UltraLightVMUNet),
        ("uvm_net", UVMNet),
    ],
)
def test_config_holds_the_defaults_of_its_network(name, network):
    with torch.device("meta"):
        configured, default = full_network(name).network, network()
    assert type(configured) is network
    assert repr(configured) == repr(default)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("mednext_b", 10_432_004), ("mednext_m", 17_402_820), ("mednext_l", 61_503_908)],
)
def test_mednext_has_its_size(name, parameters):
    with torch.device("meta"):
        network = full_network(name)
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_importing_the_networks_loads_no_heavy_package():
    heavy = {"lightning", "monai", "numba", "hydra", "omegaconf", "safetensors", "scipy", "wandb"}
    code = f"import sys, mambaseg.models; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
