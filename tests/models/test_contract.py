"""What every network of conf/model promises: all of them small, and some at full width."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from mambaseg.app.entry import CONF
from mambaseg.models.stochastic import stochastic_layers
from small_networks import NAMES, full_network, small_network


def is_ours(name):
    """Whether a network is of this package, not of another library."""
    target = OmegaConf.load(CONF / "model" / f"{name}.yaml")._target_
    return target.startswith("mambaseg.") and ".zoo." not in target


each_network = pytest.mark.parametrize("name", NAMES)

# networks whose graph torch.compile has to break, and where
GRAPH_BREAKS = {
    "swin_unetr": "MONAI looks at values of its attention mask",
    "monai_basic_unet": "MONAI asks torch.jit what its inputs are",
    "monai_flexible_unet": "MONAI asks torch.jit what its inputs are",
}
# parameters whose gradient is zero but for roundings: a norm takes away what they add
NO_GRADIENT = ("bi_ssm.local.2.bias",)
# quick to compile; the others are for `make test-long`
QUICK_TO_COMPILE = {"nnunet_2d": {}, "mamba_unet": {"depths": [1, 1]}}


@each_network
@pytest.mark.parametrize(
    ("size", "in_channels", "num_classes"),
    [
        ((64, 96), 1, 9),  # a multiple of what every network needs
        ((97, 131), 3, 2),
        ((33, 47), 3, 9),
        ((17, 100), 2, 5),
    ],
    ids=str,
)
def test_it_trains_at_any_size_with_any_channels_and_classes(name, size, in_channels, num_classes):
    network = small_network(name, in_channels, num_classes).train()
    logits = network(torch.rand(2, in_channels, *size))
    assert logits.shape == (2, num_classes, *size)
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    logits.square().mean().backward()
    for name, parameter in trainable(network):
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@each_network
def test_no_random_layer_is_used_twice_in_a_pass(name):
    network, used = small_network(name).train(), Counter()
    layers = stochastic_layers(network)
    for layer in layers:
        layer.register_forward_hook(lambda layer, *_: used.update([id(layer)]))
    network(torch.rand(2, 1, 64, 64))
    # told a number per sample, a layer drops the same samples each time it is called
    assert [used[id(layer)] for layer in layers] == [1] * len(layers)


def trainable(network):
    """The parameters but those a network is made with frozen."""
    return [(name, p) for name, p in network.named_parameters() if p.requires_grad]


def open_branches(network):
    """Undo the zeros that residual branches begin with: they keep all gradients out."""
    for norm in network.modules():
        if isinstance(norm, torch.nn.InstanceNorm2d) and norm.affine and not norm.weight.any():
            torch.nn.init.ones_(norm.weight)


@each_network
def test_every_parameter_gets_a_gradient_that_is_not_zero(name):
    network = small_network(name).eval()  # no dropout, no drop path
    open_branches(network)
    network(torch.rand(2, 1, 64, 64)).square().sum().backward()
    for name, parameter in trainable(network):
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@each_network
def test_its_state_dict_carries_it_whole_and_inference_repeats(name, tmp_path):
    first, second = small_network(name), small_network(name)
    image = torch.rand(2, 1, 64, 64)
    first(image)  # in training mode: running statistics are part of the state
    first.eval(), second.eval()
    with torch.no_grad():
        expected = first(image)
        assert not torch.allclose(second(image), expected)
        torch.save(first.state_dict(), tmp_path / "weights.pt")
        second.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        torch.manual_seed(1)
        assert torch.equal(second(image), expected)
        assert torch.equal(first(image), expected)


@each_network
def test_samples_of_a_batch_do_not_mix(name):
    network = (
        small_network(name).eval().double()
    )  # where a norm follows Mamba, float32 is off by 1e-4
    images = torch.rand(3, 1, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        alone = torch.cat([network(image[None]) for image in images])
        torch.testing.assert_close(network(images), alone)


@each_network
def test_bfloat16_autocast_stays_near_float32(name):
    network = small_network(name).eval()
    image = torch.rand(2, 1, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(image)
        F.cross_entropy(logits.float(), torch.randint(4, (2, 64, 64))).backward()
    for name, parameter in trainable(network):
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name
    with torch.no_grad():
        expected = network(image)
    error = (logits.float() - expected).std() / expected.std()
    assert error < 0.1


def two_discs(size):
    """Two images with a bright ring and a disc in it, and their labels."""
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    label = torch.zeros(2, size, size, dtype=torch.int64)
    for sample, (y, x) in enumerate([(0.38, 0.56), (0.6, 0.34)]):
        distance = ((row / size - y) ** 2 + (column / size - x) ** 2).sqrt()
        label[sample][distance < 0.28] = 1
        label[sample][distance < 0.16] = 2
    image = torch.tensor([0.2, 0.5, 0.9])[label] + 0.05 * torch.randn(2, size, size)
    return image[:, None], label


def dice(prediction, label, structure):
    a, b = prediction == structure, label == structure
    return 2 * (a & b).sum().item() / (a.sum() + b.sum()).item()


def learn(network, size, rate, patience=12):
    """Trains with its dropout and drop path until ring and disc are found in evaluation mode."""
    image, label = two_discs(size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    scores = []
    for _ in range(patience):
        network.train()
        for _ in range(10):
            loss = F.cross_entropy(network(image), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            prediction = network.eval()(image).argmax(1)
        scores.append([dice(prediction, label, structure) for structure in (1, 2)])
        if min(scores[-1]) > 0.9:
            return
    pytest.fail(f"Dice of ring and disc after every ten steps: {scores}")


@each_network
def test_it_learns_one_batch_by_heart(name):
    learn(small_network(name, num_classes=3), size=64, rate=3e-3)


@pytest.mark.parametrize(
    ("name", "rate", "patience"),
    [
        ("unet", 3e-3, 8),
        ("mamba_unet", 1e-3, 4),
        pytest.param("swin_unet", 5e-4, 8, marks=pytest.mark.slow),
    ],
)
def test_full_width_learns_one_batch_by_heart(name, rate, patience):
    learn(full_network(name, num_classes=3), size=32, rate=rate, patience=patience)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK_TO_COMPILE else pytest.mark.slow)
        for name in NAMES
    ],
)
def test_it_compiles(name):
    network = small_network(name, **QUICK_TO_COMPILE.get(name, {})).eval()
    image = torch.rand(1, 1, 64, 64)
    expected = network(image)
    expected.sum().backward()
    gradients = {name: p.grad.clone() for name, p in trainable(network)}
    network.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=name not in GRAPH_BREAKS, backend="aot_eager")
    logits = compiled(image)
    logits.sum().backward()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    for name, parameter in trainable(network):
        if name.endswith(NO_GRADIENT):
            continue
        scale = gradients[name].abs().max().item()
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name
        )


@pytest.mark.parametrize("name", [name for name in NAMES if is_ours(name)])
def test_its_linear_layers_are_those_that_are_fast_on_a_cpu(name):
    slow = [key for key, module in small_network(name).named_modules()
            if type(module) is torch.nn.Linear]  # fmt: skip
    assert slow == []
