"""Are the numbers of a device right, and are they the same the next time?"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from mambaseg.benchmark.measure import Protocol, why
from mambaseg.benchmark.networks import Builder, Step, Steps
from mambaseg.benchmark.scans import (
    FORMS,
    LOOP,
    SMALL,
    Shape,
    choice,
    errors_of,
    scan_inputs,
    worst_error,
)
from mambaseg.benchmark.tables import UNKNOWN
from mambaseg.models import ScanBlock
from mambaseg.scan import available_backends

# largest error of an output or a gradient, over its largest value, by the type of the inputs
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# no power of two, no whole block; the longest and the widest of Mamba-UNet
SHAPES = {s.name: s for s in (SMALL, Shape("stage1", 2, 56, 192), Shape("stage4", 1, 7, 1536))}
NETWORK_LIMIT = 1e-3  # likewise for logits and gradients of a whole network in float32
NETWORK_SIZE = 64  # pixels: the CPU computes the same in float64
LOOP_LIMIT = 2_000_000  # B K D L above which the loop over time is not compared with itself
REPEATS = 3
STEPS = 3
FAILED = {"worst": math.nan, "tensor": UNKNOWN, "repeats": None}  # of what raised an error
log = logging.getLogger(__name__)


def measure_truth(
    builders: Mapping[str, Builder], step: Step, protocol: Protocol, *, shapes: Sequence[str]
) -> dict[str, Any]:
    """Compares every scan backend and network with float64, and everything with itself.

    Whatever memory an operation allocates holds NaN first, so that an element that no kernel writes
    cannot pass by luck. What raises an error costs the others nothing: its row has NaN, which is
    wrong, and a note tells why.

    `shapes` are names of `SHAPES`, of the scans.

    Returns:
        `rows`: a backend, form, shape and type of inputs each, with `worst` error against
        float64, the `tensor` that has it, the `limit`, and whether the bits `repeat`; `networks`:
        `worst` error of logits and gradients in float32 against float64 on the CPU, and whether a
        few steps from the same start give the same weights, as they are and with PyTorch's
        deterministic algorithms; `within`: no error is above its limit; `notes`.
    """
    notes: list[str] = []
    steps = Steps(step)
    sizes = [SHAPES[choice("scans", name, SHAPES)] for name in shapes]
    rows = [
        row
        for shape in sizes
        for dtype in LIMITS
        for row in _scan_rows(shape, dtype, protocol.device, notes)
    ]
    networks = []
    for name, build in builders.items():
        log.info("comparing %s with float64 and with itself", name)
        try:
            found = _network_row(name, build, steps, protocol)
        except Exception as error:
            notes.append(f"{name}: {why(error)}")
            found = {**FAILED, "repeats_deterministic": None}
        networks.append({"network": name, "limit": NETWORK_LIMIT, **found})
    within = all(row["worst"] <= row["limit"] for row in (*rows, *networks))  # NaN is not
    notes += steps.notes
    return {"rows": rows, "networks": networks, "within": within, "notes": notes}


def _network_row(name: str, build: Builder, steps: Steps, protocol: Protocol) -> dict[str, Any]:
    error = _network_error(build, protocol.device, protocol.seed)
    same = partial(_same_weights, name, build, steps, protocol)
    return {
        "worst": error["worst"], "tensor": error["tensor"], "repeats": same(strict=False),
        "repeats_deterministic": same(strict=True),
    }  # fmt: skip


def _network_error(build: Builder, device: torch.device, seed: int) -> dict[str, Any]:
    """Error of a network's logits and gradients in float32, against the definition in float64."""

    def numbers(where: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        network = build().to(where, dtype).eval()  # nothing is dropped
        for module in network.modules():
            if dtype == torch.float64 and isinstance(module, ScanBlock):
                module.scan_backend = "reference"
        generator = torch.Generator().manual_seed(seed)
        image = torch.rand(1, 1, NETWORK_SIZE, NETWORK_SIZE, generator=generator)
        image = image.to(where, dtype).requires_grad_()
        logits = network(image)
        weights = dict(network.named_parameters())
        gradients = torch.autograd.grad(logits.square().mean(), [image, *weights.values()])
        named = zip(("image", *weights), gradients, strict=True)
        return {"logits": logits.detach(), **dict(named)}

    exact = numbers(torch.device("cpu"), torch.float64)
    # deterministic algorithms fill memory with NaN first
    with _deterministic(device.type == "cuda", warn_only=True), _whole_float32():
        found = numbers(device, torch.float32)
    return worst_error(found, exact)


def _scan_rows(
    shape: Shape, dtype: torch.dtype, device: torch.device, notes: list[str]
) -> Iterator[dict[str, Any]]:
    names = list(available_backends(device))
    log.info("comparing %s with float64: %s, %s", ", ".join(names), shape, dtype)
    if shape.elements > LOOP_LIMIT:
        names.remove(LOOP)  # it is what these are compared with, and slow
    kind = str(dtype).removeprefix("torch.")
    for form, backend in product(FORMS, names):
        try:
            with _deterministic(True, warn_only=True):  # which fills memory with NaN
                (found,) = errors_of([form], [backend], dtype, device, shape=shape)
            found["repeats"] = _repeats(shape, form, backend, dtype, device)
        except Exception as error:
            notes.append(f"{shape.name} {kind} {form}: {backend}: {why(error)}")
            found = FAILED
        yield {
            "shape": shape.name, "dtype": kind, "form": form, "backend": backend,
            "limit": LIMITS[dtype], **{key: found[key] for key in FAILED},
        }  # fmt: skip


def _repeats(
    shape: Shape, form: str, backend: str, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether the same inputs give the same bits, output and gradients."""
    leaves = [tensor.requires_grad_() for tensor in scan_inputs(shape, form, dtype, device)]

    def run() -> list[Tensor]:
        y = FORMS[form](*leaves, backend=backend)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]

    first = run()
    return all(all(map(torch.equal, first, run())) for _ in range(REPEATS - 1))


def _same_weights(
    name: str, build: Builder, steps: Steps, protocol: Protocol, *, strict: bool
) -> bool | None:
    """Whether two trainings of a few steps end alike; None where an operation has no such form."""
    ends = []
    for _ in range(2):
        torch.manual_seed(protocol.seed)
        network = build().to(protocol.device)
        call = steps.call(name, network)
        torch.manual_seed(protocol.seed)  # of dropout
        try:
            with _deterministic(strict):
                for _ in range(STEPS):
                    call()
        except RuntimeError as error:
            if strict and "deterministic" in str(error):
                return None
            raise
        ends.append([value.clone() for value in network.state_dict().values()])
        del network, call  # a recorded network has to go before the next one: `GraphedNetwork`
    return all(map(torch.equal, *ends))


@contextlib.contextmanager
def _whole_float32() -> Iterator[None]:
    """Computes in float32 throughout: GPUs round what convolutions read to TensorFloat-32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _deterministic(wanted: bool, *, warn_only: bool = False) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before, warn_only=warn_only)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have a deterministic impl")
            yield
    finally:
        torch.use_deterministic_algorithms(before)
