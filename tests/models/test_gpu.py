"""CUDA graphs with a stand-in for their recording: the real one needs a GPU."""

import gc
import weakref

import pytest
import torch
from torch import nn

from mambaseg.models import (
    GraphedNetwork,
    SwinUNet,
    UMamba,
    UNet,
    channels_last,
    drawing,
    is_faster_channels_last,
    keep_layout,
    stochastic_layers,
)
from small_networks import full_network


def stand_in_for_recording(monkeypatch, record):
    """Has `record` do what PyTorch does on a GPU; gives the streams that were made the current one.

    A recording that fails leaves its own stream behind as the current one.
    """
    streams = ["of the training"]
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: torch.set_rng_state(state)
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    return streams


@pytest.fixture
def recording(monkeypatch):
    """Records on the CPU: a pass that reads what is dropped from where it was while recording."""

    def record(network, arguments, **_):
        layers = stochastic_layers(network)
        fixed = [(layer, layer.kept, layer.mask) for layer in layers]
        forward = network.forward
        network(*arguments)  # as a graph does, which changes running statistics

        def replay(image):
            if not network.training:
                return forward(image)
            for layer, kept, mask in fixed:
                layer.kept, layer.mask = kept, mask
            try:
                return forward(image)
            finally:
                for layer, *_ in fixed:
                    layer.kept = layer.mask = None

        network.forward = replay
        return network

    stand_in_for_recording(monkeypatch, record)


def networks():
    unet = {"widths": (4, 8), "dropout": (0.3, 0.5)}
    swin = {"embed_dim": 8, "depths": (2, 2), "heads": (2, 2), "window_size": 4}
    return {
        "unet": UNet(1, 3, **unet).train(),
        "swin_unet": SwinUNet(1, 3, drop_path_rate=0.5, **swin).train(),
    }


def test_a_network_that_cannot_be_recorded_is_as_it_was(monkeypatch):
    def fail(network, arguments, **_):
        network(*arguments)  # as the warm-up does
        torch.rand(3)
        streams.append("of the recording")
        raise RuntimeError("a network that looks at its own numbers")

    streams = stand_in_for_recording(monkeypatch, fail)
    network = networks()["unet"]
    layers = stochastic_layers(network)
    image = torch.rand(4, 1, 32, 32)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    generator = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="looks at its own"):
        GraphedNetwork(network, image, layers)
    for key, value in network.state_dict().items():
        assert torch.equal(value, state[key]), f"the attempt has changed {key}"
    assert torch.equal(torch.get_rng_state(), generator)
    assert streams[-1] == "of the training"
    assert "forward" not in vars(network) and all(layer.kept is None for layer in layers)


def test_a_pass_that_fails_leaves_no_hooks_behind(monkeypatch):
    stand_in_for_recording(monkeypatch, lambda network, *_, **__: network)
    network = networks()["unet"]
    layers = stochastic_layers(network)
    with pytest.raises(RuntimeError):
        GraphedNetwork(network, torch.rand(4, 2, 32, 32), layers)  # two channels, for one
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_earlier_recorded_networks_are_gone_before_the_next_recording(recording, monkeypatch):
    """Their graphs' end would take memory from graphs that are in use (pytorch#193402)."""
    record, recorded = torch.cuda.make_graphed_callables, []

    def checks(network, *arguments, **options):
        assert not any(earlier() for earlier in recorded)
        recorded.append(weakref.ref(network))
        return record(network, *arguments, **options)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", checks)
    gc.disable()  # which would let them go now and then
    try:
        for _ in range(2):
            GraphedNetwork(nn.Sequential(nn.Conv2d(1, 1, 1)).train(), torch.rand(1, 1, 2, 2), [])
            assert recorded[-1]() is not None  # it refers to itself
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["unet", "swin_unet"])
def test_a_recorded_network_drops_what_the_same_numbers_drop_otherwise(recording, name):
    torch.manual_seed(0)
    network = networks()[name]
    layers = stochastic_layers(network)
    image = torch.rand(4, 1, 32, 32)
    numbers = torch.randint(2**62, (3, 4, len(layers))) * 2
    state = {key: value.clone() for key, value in network.state_dict().items()}
    wanted = []
    for step in numbers:
        with drawing(layers, step):
            wanted.append(network(image))
    network.load_state_dict(state)
    graphed = GraphedNetwork(network, image, layers)
    for key, value in network.state_dict().items():
        assert torch.equal(value, state[key]), f"recording has changed {key}"
    for step, expected in zip(numbers, wanted, strict=True):
        with graphed.drawing(step):
            assert torch.equal(network(image), expected)
    assert len({output.sum().item() for output in wanted}) == 3  # something was dropped


def test_hooks_are_called_while_graphs_are_off(recording):
    network = nn.Sequential(nn.Conv2d(1, 1, 1)).train()
    graphed = GraphedNetwork(network, torch.rand(1, 1, 2, 2), [])
    replaced = network.forward
    with graphed.off():
        assert network.forward != replaced
        assert "forward" not in network.__dict__
    assert network.forward == replaced


def test_channels_last_changes_the_layout_of_convolutions_only():
    network = channels_last(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)))
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not network[0].weight.is_contiguous()
    assert network[2].weight.is_contiguous()


def test_networks_with_batch_norms_lie_channels_last_on_a_cpu_too():
    assert is_faster_channels_last(UNet()) and not is_faster_channels_last(UMamba())
    weight = full_network("unet").state_dict()["network.encoder.1.0.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_a_training_resumes_with_the_layout_that_it_began_with():
    key = "network.encoder.1.0.weight"
    last, plain = full_network("unet"), full_network("unet")
    plain.to(memory_format=torch.contiguous_format)
    resumed = full_network("unet")
    keep_layout(resumed, last.state_dict())
    assert not resumed.state_dict()[key].is_contiguous()
    keep_layout(resumed, plain.state_dict())
    assert resumed.state_dict()[key].is_contiguous()
