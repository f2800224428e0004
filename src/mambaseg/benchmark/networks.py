"""Networks against each other: an inference call, or a training step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mambaseg.benchmark.measure import Call, Protocol, peak_memory, time_interleaved
from mambaseg.evaluation.costs import count_operations
from mambaseg.models import GraphedNetwork, ScanBlock, channels_last

Builder = Callable[[], nn.Module]
Step = Callable[[nn.Module], Call]  # makes, from a network on its device, the call to measure
Loss = Callable[[Tensor, Tensor], Tensor]
OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
log = logging.getLogger(__name__)


def inference(image: Tensor, *, autocast: bool) -> Step:
    """Logits of `image` (B, C, H, W), network in evaluation mode, no gradients."""

    def make(network: nn.Module) -> Call:
        network.eval()

        def call() -> None:
            with torch.inference_mode(), autocast_on(image, autocast):
                network(image)

        return call

    return make


def training(
    image: Tensor,
    label: Tensor,
    loss: Loss,
    optimizer: OptimizerFactory,
    *,
    autocast: bool,
    graph: bool = False,
) -> Step:
    """One optimizer step on `image` (B, C, H, W) and `label` (B, H, W): all that repeats in it.

    With `graph` the network's pass is recorded as CUDA graphs first, as `trainer.graph` does.
    """

    def make(network: nn.Module) -> Call:
        network.train()
        rule = optimizer(network.parameters())
        if graph:
            with autocast_on(image, autocast):
                GraphedNetwork(network, image, [])

        def call() -> None:
            with autocast_on(image, autocast):
                value = loss(network(image), label)
            value.backward()
            rule.step()
            rule.zero_grad(set_to_none=True)

        return call

    return make


def measure_networks(
    builders: Mapping[str, Builder], step: Step, protocol: Protocol, *, images: int
) -> dict[str, Any]:
    """Measures a step of each network, in turns.

    Memory comes first, with one network in the process at a time, at its second step: by then the
    optimizer has its state and everything is compiled. Then all networks are built and timed. What
    does not fit the memory or cannot be compiled is left out, with a note.

    The first of `builders` is the network that the others are compared with; `images` is per step.

    Returns:
        `rows` and `notes`; see docs/performance.md.
    """
    rows: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    for name, build in builders.items():
        log.info("measuring the memory of %s", name)
        try:
            rows[name] = {"network": name, **_size(build, step, protocol)}
        except torch._dynamo.exc.TorchDynamoException as error:
            refused[name] = f"cannot be compiled ({str(error).strip().splitlines()[0]})"
        except torch.OutOfMemoryError:
            refused[name] = "out of memory"
    log.info("measuring the time of %s", ", ".join(rows))
    calls: dict[str, Call] = {}
    for name in rows:
        try:
            calls[name] = step(built(builders[name], protocol))
        except torch.OutOfMemoryError:
            refused[name] = "out of memory beside the others"
    timings, failures = time_interleaved(calls, protocol)
    failures |= refused
    baseline = next(iter(timings), None)
    for name, timing in timings.items():
        ratio = timing["median_s"] / timings[baseline or name]["median_s"]
        rate = images / timing["median_s"]
        rows[name].update(timing, baseline=baseline, ratio=ratio, images_per_s=rate)
    notes = [f"{name}: {why}" for name, why in failures.items()]
    return {"rows": [rows[name] for name in timings], "notes": notes}


def _size(build: Builder, step: Step, protocol: Protocol) -> dict[str, Any]:
    """Parameters and memory of a network that is alone in the process."""
    network = built(build, protocol)
    call = step(network)
    call()
    scans = (m.scan_backend for m in network.modules() if isinstance(m, ScanBlock))
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "scan_backend": next(scans, None),
        **peak_memory(call, protocol.device),
    }


def built(build: Builder, protocol: Protocol) -> nn.Module:
    """A network on the device, laid out as in a training there."""
    torch.manual_seed(protocol.seed)
    network = build().to(protocol.device)
    if protocol.device.type == "cuda":  # as in a training
        channels_last(network)
    return network


def autocast_on(image: Tensor, enabled: bool) -> torch.autocast:
    """Autocast to bfloat16 on the device of `image`, or none."""
    return torch.autocast(image.device.type, torch.bfloat16, enabled=enabled)


def profile_networks(
    builders: Mapping[str, Builder],
    image: Tensor,
    protocol: Protocol,
    train: Step | None = None,
) -> dict[str, Any]:
    """Parameters, operations, latency and peak memory of one inference call of each network.

    With `train` also `step_s`, the median time of that training step, one network after the other:
    the optimizers of all of them would not fit into memory.

    Returns:
        `rows` and `notes`; see docs/performance.md.
    """
    step = inference(image, autocast=protocol.autocast)
    measured = measure_networks(builders, step, protocol, images=len(image))
    for row in measured["rows"]:
        name = row["network"]
        network = builders[name]().to(protocol.device)
        row["size_multiple"] = max(getattr(network, "multiples", (1,)))  # bare ones have none
        row.update(count_operations(network, image))
        del network
        if train:
            log.info("measuring a training step of %s", name)
            timings, failed = time_interleaved(
                {name: train(built(builders[name], protocol))}, protocol
            )
            row["step_s"] = timings[name]["median_s"] if timings else None
            measured["notes"] += [f"{name}: a training step: {why}" for why in failed.values()]
    return measured
