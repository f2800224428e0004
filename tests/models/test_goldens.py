"""Our networks against the original repositories', with weights from a recipe.

golden/*.npz hold what the networks of the Mamba-UNet repository (commit dfe92ba) gave on a CPU in
float32, eval mode, with mamba-ssm's reference scan: `logits` at every `stride`-th row and column,
`mean` and `std` per class over the whole map, and `keys`, name -> shape of the original state dict.
Weights and image are functions of names and seeds (`recipe`), so nothing large is stored.

The narrow ones are of smaller width than published: U-Mamba's networks of January 2024 put together
from dynamic-network-architectures 0.4.4, UVM-Net (the folder Ultra/net) for an 8 × 8 grid, with the
Mamba block of mamba-ssm 2.3.2.post1 on its reference scan and causal-conv1d 1.7.0's reference, all
in float64: through Mamba without a residual, roundings grow to 1e-4.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from mambaseg.errors import UserError
from mambaseg.models import AnySize, MambaUNet, SwinUNet, UMamba, UNet, UVMNet

NETWORKS = {"unet_224": UNet, "swin_unet_224": SwinUNet, "mamba_unet_2222_224": MambaUNet}
PARAMETERS = {"unet_224": 1_813_764, "swin_unet_224": 27_168_420, "mamba_unet_2222_224": 19_121_664}
NARROW = {
    "u_mamba_bot_narrow": (UMamba, {"mamba": "bottom", "widths": (8, 16, 32, 32, 32)}),
    "u_mamba_enc_narrow": (UMamba, {"mamba": "encoder", "widths": (8, 16, 32, 32, 32)}),
    "u_mamba_none_narrow": (UMamba, {"mamba": "none", "widths": (8, 16, 32, 32, 32)}),
    "uvm_net_narrow": (
        UVMNet,
        {"in_channels": 3, "num_classes": 3, "widths": (8, 16, 32, 64, 64)}
        | {"grid": 8, "wide_scan": True, "attention": False},  # as the original on one sample
    ),
}
GOLDEN = Path(__file__).parent / "golden"
DERIVED = ("relative_position_index", "attn_mask", "num_batches_tracked")


def recipe(name, shape, seed):
    """The value of one entry of the original state dict."""
    last = name.rpartition(".")[2]
    if last in DERIVED:
        return torch.zeros(shape, dtype=torch.int64)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    n = rng.standard_normal(shape).astype(np.float32)
    if last in ("A_logs", "A_log"):
        value = np.log(np.arange(1, shape[1] + 1, dtype=np.float32)) + 0.1 * n
    elif name.endswith(("dt_projs_bias", "dt_proj.bias")):
        value = -4 + n
    elif last in ("Ds", "D", "skip_scale"):
        value = 1 + 0.1 * n
    elif last == "spatial_decay":
        value = 2 * n
    elif last == "spatial_first":
        value = 100 * n
    elif last in ("spatial_mix_k", "spatial_mix_v", "spatial_mix_r"):
        value = 0.5 + 0.1 * n
    elif last == "running_var":
        value = 1 + 0.2 * abs(n)
    elif last == "running_mean":
        value = 0.1 * n
    elif len(shape) == 1:
        value = 1 + 0.1 * n if last == "weight" else 0.05 * n
    else:
        value = n / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(value.astype(np.float32))


def read_golden(name):
    golden = np.load(GOLDEN / f"{name}.npz")
    keys, seed = json.loads(str(golden["keys"])), int(golden["seed"])
    state_dict = {key: recipe(key, tuple(shape), seed) for key, shape in keys.items()}
    for key, factor in json.loads(str(golden.get("scale", "{}"))).items():
        state_dict[key] *= factor
    return golden, state_dict


@pytest.mark.parametrize(
    ("name", "options"),
    [*[(name, {}) for name in NETWORKS], ("mamba_unet_2222_224", {"scan_backend": "reference"})],
    ids=str,
)
def test_network_agrees_with_the_original(name, options):
    assert_agrees(name, NETWORKS[name](in_channels=1, num_classes=4, **options))


@pytest.mark.parametrize("name", NARROW)
def test_narrow_network_agrees_with_the_original(name):
    network, options = NARROW[name]
    in_channels = options.get("in_channels", 1)
    residual = network is UVMNet  # as its authors train it
    assert_agrees(name, network(**options).double(), in_channels, residual, tolerance=1e-6)


def assert_agrees(name, network, in_channels=1, residual=False, tolerance=1e-4):
    golden, state_dict = read_golden(name)
    network.eval().load_original_state_dict(state_dict)
    image = np.random.default_rng(int(golden["seed"])).random((1, in_channels, *golden["size"]))
    image = torch.from_numpy(image.astype(np.float32)).to(next(network.parameters()).dtype)
    with torch.no_grad():
        logits = AnySize(network, 1, residual=residual)(image).numpy()
    stride = int(golden["stride"])
    np.testing.assert_allclose(
        logits[..., ::stride, ::stride], golden["logits"], rtol=0, atol=tolerance
    )
    np.testing.assert_allclose(logits.mean(axis=(0, 2, 3)), golden["mean"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(logits.std(axis=(0, 2, 3)), golden["std"], rtol=0, atol=tolerance)


def count(network, **options):
    with torch.device("meta"):  # shapes only
        return sum(parameter.numel() for parameter in network(**options).parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_parameter_count_is_the_published_one(name):
    assert count(NETWORKS[name]) == PARAMETERS[name]


def test_parameter_count_follows_depths_and_classes():
    assert count(MambaUNet, depths=(2, 2, 9, 2)) == 35_862_528
    assert count(MambaUNet, num_classes=2) == 19_121_472


@pytest.mark.parametrize(
    ("name", "wrapper"), [("swin_unet_224", "swin_unet."), ("mamba_unet_2222_224", "mamba_unet.")]
)
def test_checkpoint_of_the_original_wrapper_class_loads(name, wrapper):
    shapes = json.loads(str(np.load(GOLDEN / f"{name}.npz")["keys"]))
    state_dict = {wrapper + key: torch.full((1,), 0.5).expand(shapes[key]) for key in shapes}
    with torch.device("meta"):
        network = NETWORKS[name]()
    network.to_empty(device="cpu").load_original_state_dict(state_dict)
    assert all((parameter == 0.5).all() for parameter in network.parameters())


def drop_key(state_dict):
    del state_dict["decoder.out_conv.weight"]


def add_key(state_dict):
    state_dict["decoder.up1.up.weight"] = torch.zeros(3)


def reshape_key(state_dict):
    state_dict["decoder.out_conv.bias"] = torch.zeros(2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_key, r"head\.weight is missing"),
        (add_key, r"decoder\.up1\.up\.weight is left over"),
        (reshape_key, r"head\.bias is \(2,\) in the file, \(4,\) in the network"),
    ],
)
def test_original_state_dict_must_fit_exactly_or_nothing_changes(damage, message):
    _, state_dict = read_golden("unet_224")
    damage(state_dict)
    network = UNet()
    before = network.encoder[0][0].weight.clone()
    with pytest.raises(UserError, match=message):
        network.load_original_state_dict(state_dict)
    assert torch.equal(network.encoder[0][0].weight, before)
