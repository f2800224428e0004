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
from test_goldens import count, read_golden

from mambaseg.models import UltraLightVMUNet, VMUNetV2

NETWORKS = {
    "ultralight_vm_unet_224": UltraLightVMUNet,
    "vm_unet_v2_224": VMUNetV2,
    "vm_unet_v2_1class_224": partial(VMUNetV2, num_classes=1, add_coarser_head=True),
}
PARAMETERS = {
    "ultralight_vm_unet_224": 49_340,
    "vm_unet_v2_224": 13_822_188,
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
    norms = {name: p.grad.norm().item() for name, p in network.named_parameters()}
    assert norms == pytest.approx(expected, rel=1e-6, abs=1e-6 * max(expected.values()) * 1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_float32_outputs_agree_with_the_original(name):
    golden, network, image = prepared(name)
    with torch.no_grad():
        assert_outputs_agree(golden, network(image), 1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_agree_with_the_original(name):
    golden, network, image = prepared(name, scan_backend="reference")
    network.double()
    image = image.double().requires_grad_()
    logits = network(image)
    assert_outputs_agree(golden, logits, 1e-6)
    if "grad_norms" in golden:
        assert_gradients_agree(golden, network, [logits], image)


@pytest.mark.parametrize("name", NETWORKS)
def test_parameter_count_is_the_originals(name):
    assert count(NETWORKS[name]) == PARAMETERS[name]


def test_ultralight_has_the_published_parameters():
    assert count(UltraLightVMUNet, in_channels=3, num_classes=1) == 49_457
