"""Networks against each other: an inference call, or a training step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mambaseg.benchmark.measure import Call, Protocol, peak_memory, time_interleaved, why
from mambaseg.evaluation.costs import count_operations
from mambaseg.models import GraphedNetwork, ScanBlock, channels_last

Builder = Callable[[], nn.Module]
Step = Callable[[nn.Module], Call]  # makes, from a network on its device, the call to measure
Loss = Callable[[Tensor, Tensor], Tensor]
OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
log = logging.getLogger(__name__)


class NotRecordedError(RuntimeError):
    """A network cannot be recorded as CUDA graphs; `step` is what it can do without them."""

    def __init__(self, step: Step, reason: str) -> None:
        super().__init__(f"measured without CUDA graphs, it cannot be recorded ({reason})")
        self.step = step


class Steps:
    """The step of each network; one that cannot be recorded does without, and `notes` tell why."""

    def __init__(self, step: Step) -> None:
        self.step, self.notes = step, list[str]()
        self._unrecorded: dict[str, Step] = {}  # a second try could harm graphs that are in use

    def call(self, name: str, network: nn.Module) -> Call:
        """The call to measure of a network."""
        try:
            return self._unrecorded.get(name, self.step)(network)
        except NotRecordedError as error:
            self.notes.append(f"{name}: {error}")
            self._unrecorded[name] = error.step
            return error.step(network)


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

    With `graph` the network's pass is recorded as CUDA graphs first, as `trainer.graph` does; where
    that fails, making the call raises a `NotRecordedError`.
    """

    def make(network: nn.Module) -> Call:
        network.train()
        rule = optimizer(network.parameters())

        def call() -> None:
            with autocast_on(image, autocast):
                value = loss(network(image), label)
            value.backward()
            rule.step()
            rule.zero_grad(set_to_none=True)

        if graph:
            try:
                with autocast_on(image, autocast):
                    GraphedNetwork(network, image, [])
            except RuntimeError as error:  # e.g. a network that looks at its own numbers
                plain = training(image, label, loss, optimizer, autocast=autocast)
                raise NotRecordedError(plain, why(error)) from None
        return call

    return make


def measure_networks(
    builders: Mapping[str, Builder], step: Step, protocol: Protocol, *, images: int
) -> dict[str, Any]:
    """Measures a step of each network, in turns.

    Memory comes first, with one network in the process at a time, at its second step: by then the
    optimizer has its state and everything is compiled. Then all networks are built and timed. What
    does not fit the memory or cannot be compiled is left out, with a note; what cannot be recorded
    as CUDA graphs is measured without them, with a note.

    The first of `builders` is the network that the others are compared with; `images` is per step.

    Returns:
        `rows` and `notes`; see docs/performance.md.
    """
    rows: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    steps = Steps(step)
    for name, build in builders.items():
        log.info("measuring the memory of %s", name)
        try:
            rows[name] = {"network": name, **_size(name, build, steps, protocol)}
        except torch._dynamo.exc.TorchDynamoException as error:
            refused[name] = f"cannot be compiled ({str(error).strip().splitlines()[0]})"
        except torch.OutOfMemoryError:
            refused[name] = "out of memory"
    log.info("measuring the time of %s", ", ".join(rows))
    calls: dict[str, Call] = {}
    for name in rows:
        try:
            calls[name] = steps.call(name, built(builders[name], protocol))
        except torch.OutOfMemoryError:
            refused[name] = "out of memory beside the others"
    timings, failures = time_interleaved(calls, protocol)
    failures |= refused
    baseline = next(iter(timings), None)
    for name, timing in timings.items():
        ratio = timing["median_s"] / timings[baseline or name]["median_s"]
        rate = images / timing["median_s"]
        rows[name].update(timing, baseline=baseline, ratio=ratio, images_per_s=rate)
    notes = steps.notes + [f"{name}: {reason}" for name, reason in failures.items()]
    return {"rows": [rows[name] for name in timings], "notes": notes}


def _size(name: str, build: Builder, steps: Steps, protocol: Protocol) -> dict[str, Any]:
    """Parameters and memory of a network that is alone in the process.

    CUDA graphs take their memory while they are recorded, and launching them adds none: what counts
    is making the call or calling it for the second time, whichever adds more.
    """
    network = built(build, protocol)
    calls: list[Call] = []
    making = peak_memory(lambda: calls.append(steps.call(name, network)), protocol.device)
    calls[0]()
    calling = peak_memory(calls[0], protocol.device)
    scans = (m.scan_backend for m in network.modules() if isinstance(m, ScanBlock))
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "scan_backend": next(scans, None),
        **max(calling, making, key=lambda memory: memory["peak_added_bytes"] or 0),
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
    trainings = Steps(train) if train else None
    for row in measured["rows"]:
        name = row["network"]
        network = builders[name]().to(protocol.device)
        row["size_multiple"] = max(getattr(network, "multiples", (1,)))  # bare ones have none
        row.update(count_operations(network, image))
        del network
        if trainings:
            log.info("measuring a training step of %s", name)
            call = trainings.call(name, built(builders[name], protocol))
            timings, failed = time_interleaved({name: call}, protocol)
            del call
            row["step_s"] = timings[name]["median_s"] if timings else None
            measured["notes"] += [f"{name}: a training step: {said}" for said in failed.values()]
    if trainings:
        measured["notes"] += trainings.notes
    return measured
