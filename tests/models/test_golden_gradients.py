"""Networks of 2024 to 2026 against their originals, in float64 with all gradients.

golden/*.npz hold what the originals gave in float64, eval mode, with weights and image from the
recipe of `test_goldens`: `logits`, `mean`, `std` as there, and of the sum of all outputs times
normal numbers of seed + 1 the gradient of the image (`grad_input`) and the norm of each parameter's
(`grad_norms`). `scale`: what entries of the recipe are multiplied by, lest the logits hardly vary.
"""

import json
from functools import partial

import numpy as np
import pytest
import torch
from einops import rearrange
from test_goldens import count, read_golden

from mambaseg.models import EMCAD, MambaUNetV2, MSVMUNet, RWKVUNet, UltraLightVMUNet, VMUNetV2

NETWORKS = {
    "ultralight_vm_unet_224": UltraLightVMUNet,
    "vm_unet_v2_224": VMUNetV2,
    "msvm_unet_224": MSVMUNet,
    "emcad_b2_224": EMCAD,
    "rwkv_unet_t_224": RWKVUNet,
    "rwkv_unet_s_224": partial(
        RWKVUNet, widths=(32, 64, 128, 192), depths=(3, 3, 6, 3), expansions=(2, 2.5, 3, 4)
    ),
    "rwkv_unet_b_224": partial(
        RWKVUNet, widths=(48, 72, 144, 240), depths=(3, 3, 6, 3), expansions=(2, 2.5, 4, 4),
        mix_width=48,
    ),
    "vm_unet_v2_1class_224": partial(VMUNetV2, num_classes=1, add_coarser_head=True),
}  # fmt: skip
PARAMETERS = {
    "ultralight_vm_unet_224": 49_340,
    "vm_unet_v2_224": 13_822_188,
    "msvm_unet_224": 35_925_028,
    "emcad_b2_224": 26_767_495,
    "rwkv_unet_t_224": 3_145_836,
    "rwkv_unet_s_224": 9_702_020,
    "rwkv_unet_b_224": 17_125_588,
    "vm_unet_v2_1class_224": 13_822_100,
}


def prepared(name, **options):
    """The golden file, the network with its weights, and its image."""
    golden, state_dict = read_golden(name)
    network = NETWORKS[name](**options).eval()
    network.load_original_state_dict(state_dict)
    image = np.random.default_rng(int(golden["seed"])).random((1, 1, *golden["size"]))
    return golden, network, torch.from_numpy(image.astype(np.float32))


def assert_near(actual, expected, tolerance):
    """Of the largest value."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def assert_outputs_agree(golden, logits, tolerance):
    logits, stride = logits.detach().numpy(), int(golden["stride"])
    assert_near(logits[..., ::stride, ::stride], golden["logits"], tolerance)
    assert_near(logits.mean(axis=(0, 2, 3)), golden["mean"], tolerance)
    assert_near(logits.std(axis=(0, 2, 3)), golden["std"], tolerance)


def assert_gradients_agree(golden, network, outputs, image):
    rng = np.random.default_rng(int(golden["seed"]) + 1)
    weights = [torch.from_numpy(rng.standard_normal(output.shape)) for output in outputs]
    sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)).backward()
    stride = int(golden["grad_stride"])
    assert_near(image.grad[..., ::stride, ::stride].numpy(), golden["grad_input"], 1e-6)
    unused, expected = set(json.loads(str(golden["unused"]))), {}
    for key, norm in json.loads(str(golden["grad_norms"])).items():
        if key not in unused:
            name = network.own_name(key)
            expected[name] = (expected.get(name, 0) ** 2 + norm**2) ** 0.5
    grads = {name: p.grad for name, p in network.named_parameters()}
    norms = {name: grad.norm().item() for name, grad in grads.items() if grad is not None}
    assert norms == pytest.approx(expected, rel=1e-6, abs=1e-6 * max(expected.values()) * 1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_float32_outputs_agree_with_the_original(name):
    golden, network, image = prepared(name)
    with torch.no_grad():
        assert_outputs_agree(golden, network(image), 1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_agree_with_the_original(name):
    backend = "reference" if name == "ultralight_vm_unet_224" else "torch"  # the small one
    scans = {} if name.startswith(("rwkv", "emcad")) else {"scan_backend": backend}
    golden, network, image = prepared(name, **scans)
    network.double()
    image = image.double().requires_grad_()
    logits = network(image)
    assert_outputs_agree(golden, logits, 1e-6)
    if "grad_norms" in golden:
        assert_gradients_agree(golden, network, [logits], image)


@pytest.mark.parametrize("name", NETWORKS)
def test_parameter_count_is_the_originals(name):
    assert count(NETWORKS[name]) == PARAMETERS[name]


def test_parameter_counts_follow_channels_classes_and_depths():
    assert count(UltraLightVMUNet, in_channels=3, num_classes=1) == 49_457
    assert count(MSVMUNet, num_classes=9) == 35_925_513
    assert count(MambaUNetV2) == 45_065_568
    assert count(MambaUNetV2, depths=(2, 2, 2, 2)) == 26_301_792


def test_vmamba_v2_encoder_agrees_with_the_original(tmp_path):
    golden, state_dict = read_golden("vmamba_v2_tiny_224")
    linear = {key: w[..., None, None] for key, w in state_dict.items() if w.ndim == 2}
    scan = ("A_logs",)  # all other matrices may be saved as 1×1 convolutions
    state_dict |= {key: w for key, w in linear.items() if not key.endswith(scan)}
    torch.save({"model": state_dict}, tmp_path / "vmamba.pth")
    network = MambaUNetV2(scan_backend="torch").eval()
    report = network.load_pretrained_encoder(tmp_path / "vmamba.pth", mirror=False)
    assert report.ignored == () and report.parameters["loaded"] == 29_478_528
    rng = np.random.default_rng(int(golden["seed"]))
    image = torch.from_numpy(rng.random((1, 1, *golden["size"])).astype(np.float32))
    image = image.double().requires_grad_()
    outputs = [rearrange(y, "b h w c -> b c h w") for y in network.double()._stage_outputs(image)]
    for stage, (output, stride) in enumerate(zip(outputs, golden["stride"], strict=True)):
        values = output.detach().numpy()
        few = values[:, :: int(golden["channel_stride"]), ::stride, ::stride]
        assert_near(few, golden[f"stage_{stage}"], 1e-6)
        assert_near(values.mean(axis=(0, 2, 3)), golden[f"mean_{stage}"], 1e-6)
        assert_near(values.std(axis=(0, 2, 3)), golden[f"std_{stage}"], 1e-6)
    encoder = [*network.patch_embed.parameters(), *network.encoder.parameters()]
    network.zero_grad(set_to_none=True)
    assert_gradients_agree(golden, network, outputs, image)
    assert sum(p.numel() for p in encoder) == 29_478_528


def test_all_heads_of_emcad_agree_with_the_original():
    golden, network, image = prepared("emcad_b2_224")
    network.double().supervise_deeply()
    network.training = True  # and all of its modules in evaluation mode
    with torch.no_grad():
        outputs = network(image.double())
    stride = int(golden["head_stride"])
    for level, output in enumerate(outputs):
        few = output.numpy()[..., ::stride, ::stride]
        assert_near(few, golden[f"head_{level + 1}"], 1e-6)
