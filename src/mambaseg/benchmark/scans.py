"""Scan backends against each other and the definition, at the shapes of Mamba-UNet."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambaseg.benchmark.measure import Call, Protocol, peak_memory, time_interleaved, why
from mambaseg.errors import UserError
from mambaseg.scan import (
    available_backends,
    choose_backend,
    selective_scan,
    selective_scan_2d,
)

Scan = Callable[..., Tensor]
FORMS: dict[str, Scan] = {"1d": selective_scan, "2d": selective_scan_2d}
PASSES = ("forward", "forward+backward")
GROUPS, STATES = 4, 16
LOOP = "reference"
TENSORS = ("y", "x", "delta", "A", "B", "C", "D", "delta_bias")
TINY = 1e-12
BARE = "exp"
"""The candidate beside the scans: `torch.exp` of as many numbers as there are state updates."""
AT_A_TIME = 2**24
"""Numbers per call of it, which take the time per number of far more."""
log = logging.getLogger(__name__)


class Shape(NamedTuple):
    """Sizes of a scan of square maps in four directions: B, side = √L, D."""

    name: str
    batch: int
    side: int
    channels: int

    @property
    def elements(self) -> int:
        """B K D L."""
        return self.batch * GROUPS * self.channels * self.side**2


SMALL = Shape("small", 2, 7, 40)  # for errors: no power of two, no whole block


def shapes_of(names: Sequence[str], *, size: int, batch: int) -> list[Shape]:
    """Shapes by name, of images of `size` x `size` pixels.

    `stage1` to `stage4` are those of Mamba-UNet's blocks, at `batch` images. `headline` is stage1
    at four images.
    """
    if size < 32 or size % 32:
        raise UserError(f"size={size}: the scans want a multiple of 32, such as 224")
    stages = (Shape(f"stage{i + 1}", batch, size // (4 << i), 192 << i) for i in range(4))
    known = {shape.name: shape for shape in (*stages, Shape("headline", 4, size // 4, 192))}
    return [known[choice("shapes", name, known)] for name in names]


def choice(key: str, name: str, known: Sequence[str] | dict[str, Any]) -> str:
    """Give `name`, or refuse it where it is not known."""
    if name not in known:
        raise UserError(f"{key}: unknown {name!r}; choose from {list(known)}")
    return name


def measure_scans(
    shapes: Sequence[Shape],
    protocol: Protocol,
    forms: Sequence[str],
    backends: Sequence[str],
    *,
    loop_limit: int | None,
) -> dict[str, Any]:
    """Measures backends at shapes, forward and forward + backward, in the 1-D and 2-D form.

    A backend that fails costs the others nothing: a note tells why.

    Args:
        shapes: of `shapes_of`.
        protocol: with its autocast x, delta, B and C are bfloat16.
        forms: of `1d` and `2d`.
        backends: names; empty for all that can run on the device.
        loop_limit: B K D L above which the loop over time is left out; None: nowhere.

    Returns:
        `rows`, `errors`, `notes`; see docs/performance.md.
    """
    forms = [choice("forms", form, FORMS) for form in forms]
    names = [choose_backend(name, protocol.device) for name in backends]
    names = names or list(available_backends(protocol.device))
    notes: list[str] = []
    errors: list[dict[str, Any]] = []
    for form, name in product(forms, names):
        try:
            errors += errors_of([form], [name], _dtype(protocol), protocol.device)
        except Exception as error:
            notes.append(f"errors {form}: {name}: {why(error)}")
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        here = names
        if loop_limit is not None and shape.elements > loop_limit and LOOP in names:
            here = [name for name in names if name != LOOP]
            notes.append(f"{shape.name}: the loop is left out (loop_limit)")
        for form in forms:
            log.info("measuring %s, %s", shape, form)
            try:
                rows += _rows(shape, form, here, protocol, notes)
            except Exception as error:  # e.g. a device that an earlier failure has left unusable
                notes.append(f"{shape.name} {form}: {why(error)}")
    return {"rows": rows, "errors": errors, "notes": notes}


def _dtype(protocol: Protocol) -> torch.dtype:
    return torch.bfloat16 if protocol.autocast else torch.float32


def _scan(name: str, form: str) -> Scan:
    return partial(FORMS[form], backend=name)


def _rows(
    shape: Shape, form: str, names: Sequence[str], protocol: Protocol, notes: list[str]
) -> list[dict[str, Any]]:
    """One row per pass and backend at a shape; the loop is the base, or else the last backend."""
    inputs = scan_inputs(shape, form, _dtype(protocol), protocol.device)
    sizes = {
        "shape": shape.name, "batch": shape.batch, "groups": GROUPS, "channels": shape.channels,
        "length": shape.side**2, "states": STATES,
    }  # fmt: skip
    rows = []
    for what in PASSES:
        calls = {name: _call(_scan(name, form), inputs, what) for name in names}
        bare = _exponentials(shape.elements * STATES, protocol.device)
        times, failures = time_interleaved({**calls, BARE: bare}, protocol)
        notes += [f"{shape.name} {form} {what}: {n}: {said}" for n, said in failures.items()]
        if BARE not in times:  # then nothing runs on the device any more
            break
        exp_s = times.pop(BARE)["median_s"]
        baseline = LOOP if LOOP in times else next(reversed(times), "")
        for name, time in times.items():
            speedup = times[baseline]["median_s"] / time["median_s"]
            added = peak_memory(calls[name], protocol.device)["peak_added_bytes"]
            rows.append({
                **sizes, "form": form, "pass": what, "backend": name, **time,
                "baseline": baseline, "speedup": speedup, "peak_added_bytes": added,
                "exp_s": exp_s, "exps": time["median_s"] / exp_s,
            })  # fmt: skip
    return rows


def _exponentials(count: int, device: torch.device) -> Call:
    """`torch.exp` of `count` float32 numbers, some at a time, into memory that is there."""
    numbers = torch.randn(min(count, AT_A_TIME), device=device)
    out = torch.empty_like(numbers)

    def call() -> None:
        for first in range(0, count, AT_A_TIME):
            size = min(AT_A_TIME, count - first)
            torch.exp(numbers[:size], out=out[:size])

    return call


def _call(scan: Scan, inputs: list[Tensor], what: str) -> Call:
    """The call that is timed: one of `PASSES` of a scan on `scan_inputs`."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    d_y = torch.randn_like(inputs[0])

    def forward() -> None:
        with torch.no_grad():
            scan(*inputs)

    def forward_and_backward() -> None:
        torch.autograd.grad(scan(*leaves), leaves, d_y)

    return forward if what == PASSES[0] else forward_and_backward


def scan_inputs(shape: Shape, form: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Random inputs with the decay rates and step sizes of a fresh Mamba-UNet."""
    generator = torch.Generator().manual_seed(0)
    batch, channels, side = shape.batch, shape.channels, shape.side

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    def per_direction(width: int) -> Tensor:
        if form == "1d":
            return normal(batch, GROUPS, width, side**2)
        return normal(batch, side, side, GROUPS, width)

    u = per_direction(channels) if form == "1d" else normal(batch, side, side, channels)
    delta, B, C = per_direction(channels) * 0.5, per_direction(STATES), per_direction(STATES)
    A = -torch.arange(1.0, STATES + 1).repeat(GROUPS, channels, 1)
    D = torch.ones(GROUPS, channels)
    step = 10 ** (2 * torch.rand(GROUPS, channels, generator=generator) - 3)  # 0.001 to 0.1
    bias = step + torch.log(-torch.expm1(-step))  # inverse of softplus
    return [u, delta, A.to(device), B, C, D.to(device), bias.to(device)]


# ---- agreement with float64 ---------------------------------------------------------------------


def errors_of(
    forms: Sequence[str],
    names: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    *,
    shape: Shape = SMALL,
) -> list[dict[str, Any]]:
    """Worst error of each backend at a shape: output and every gradient, against float64."""
    rows = []
    for form in forms:
        inputs, d_y, exact = _exact(shape, form)
        kinds = [dtype if i in (0, 1, 3, 4) else torch.float32 for i in range(len(inputs))]
        narrow = [t.to(device, kind) for t, kind in zip(inputs, kinds, strict=True)]
        for backend in names:
            found = _tensors(_scan(backend, form), narrow, d_y.to(device, dtype))
            errors = worst_error(dict(zip(TENSORS, found, strict=True)), exact)
            rows.append({"backend": backend, "form": form, **errors})
    return rows


def worst_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, Any]:
    """Largest error of each tensor over its largest value, the `worst` and the `tensor` with it."""
    errors = {}
    for name, want in exact.items():
        error = (found[name].double().cpu() - want).abs().max()
        errors[name] = float(error / want.abs().max().clamp_min(TINY))
    worst = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))
    return {"worst": errors[worst], "tensor": worst, "errors": errors}


@cache
def _exact(shape: Shape, form: str) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
    """Inputs, the gradient of the output, and in float64 the output and every other gradient."""
    inputs = scan_inputs(shape, form, torch.float32, torch.device("cpu"))
    d_y = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    found = _tensors(_scan(LOOP, form), [t.double() for t in inputs], d_y.double())
    return inputs, d_y, dict(zip(TENSORS, found, strict=True))


def _tensors(scan: Scan, inputs: list[Tensor], d_y: Tensor) -> list[Tensor]:
    """The output and the gradient of each input."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = scan(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, d_y)]
