"""Scan backends against each other, the reference and a limit, at the shapes of Mamba-UNet."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from mambaseg.benchmark.limits import Ceilings, ScanSize, floor, measure_ceilings
from mambaseg.benchmark.measure import Call, Protocol, peak_memory, time_interleaved
from mambaseg.benchmark.unbind_loop import unbind_loop
from mambaseg.errors import UserError
from mambaseg.scan import (
    available_backends,
    choose_backend,
    cross,
    reference,
    selective_scan,
    selective_scan_2d,
)

Scan = Callable[..., Tensor]
FORMS: dict[str, Scan] = {"1d": selective_scan, "2d": selective_scan_2d}
PASSES = ("forward", "forward+backward")
GROUPS, STATES = 4, 16
LOOP_NAME = "unbind loop"
LOOPS = ("reference", LOOP_NAME)
TENSORS = ("y", "x", "delta", "A", "B", "C", "D", "delta_bias")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shape:
    """Sizes of a scan of square maps in four directions: B, side = √L, D."""

    name: str
    batch: int
    side: int
    channels: int

    @property
    def elements(self) -> int:
        """B K D L."""
        return self.batch * GROUPS * self.channels * self.side**2

    def scan_size(self, form: str) -> ScanSize:
        """As `limits` takes it."""
        return ScanSize(self.batch, self.side**2, self.channels, STATES, GROUPS, form == "2d")

    def __str__(self) -> str:
        return (
            f"{self.name}: B={self.batch} K={GROUPS} D={self.channels} L={self.side**2} N={STATES}"
        )


SMALL = Shape("small", 2, 7, 40)
"""For errors: no power of two, no whole block."""


def shapes_of(names: Sequence[str], *, size: int, batch: int) -> list[Shape]:
    """Shapes by name, of images of `size` x `size` pixels.

    `stage1` to `stage4` are those of Mamba-UNet's blocks, at `batch` images. `headline` is stage1
    at four images.
    """
    if size < 32 or size % 32:
        raise UserError(f"size={size}: the scans want a multiple of 32, such as 224")
    known = {
        f"stage{i + 1}": Shape(f"stage{i + 1}", batch, size // (4 << i), 192 << i) for i in range(4)
    }
    known["headline"] = Shape("headline", 4, size // 4, 192)
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"shapes: unknown {unknown}; choose from {sorted(known)}")
    return [known[name] for name in names]


def measure_scans(
    shapes: Sequence[Shape],
    *,
    protocol: Protocol,
    forms: Sequence[str],
    backends: Sequence[str],
    dtype: torch.dtype,
    loop_limit: int | None,
) -> dict[str, Any]:
    """Measures backends at shapes, forward and forward + backward, in the 1-D and 2-D form.

    Args:
        shapes: of `shapes_of`.
        protocol: how to measure.
        forms: of `1d` and `2d`.
        backends: names; empty for all that can run on the device.
        dtype: of x, delta, B and C; parameters are float32.
        loop_limit: B K D L above which the two loops over time are left out; None: nowhere.

    Returns:
        `rows`, `errors`, `ceilings` (None on a CPU), `notes`; see docs/performance.md.
    """
    if unknown := [form for form in forms if form not in FORMS]:
        raise UserError(f"forms: unknown {unknown}; choose from {list(FORMS)}")
    names = [choose_backend(name, protocol.device) for name in backends]
    names = names or list(available_backends(protocol.device))
    notes: list[str] = []
    yardsticks: dict[str, Scan] = {LOOP_NAME: unbind_loop}
    ceilings = measure_ceilings(protocol)
    errors = errors_of(forms, names, yardsticks, dtype, protocol.device)
    rows = []
    for shape in shapes:
        affordable = loop_limit is None or shape.elements <= loop_limit
        if not affordable:
            notes.append(f"{shape.name}: the loops are left out (loop_limit)")
        for form in forms:
            log.info("measuring %s, %s", shape, form)
            scans = _scans(form, names, yardsticks)
            if not affordable:
                scans = {name: scan for name, scan in scans.items() if name not in LOOPS}
            rows += _rows(shape, form, scans, protocol, dtype, ceilings, notes)
    return {
        "rows": rows,
        "errors": errors,
        "ceilings": ceilings,
        "notes": notes,
    }


def _scans(form: str, names: Sequence[str], yardsticks: dict[str, Scan]) -> dict[str, Scan]:
    """The candidates for a form, by name."""

    def bound(name: str) -> Scan:
        if name == "reference":  # without recomputation: the fastest that this loop can be
            return in_form(partial(reference.selective_scan, recompute=False))
        return lambda *inputs: FORMS[form](*inputs, backend=name)

    def in_form(scan: Scan) -> Scan:
        return scan if form == "1d" else partial(cross.selective_scan_2d, scan)

    scans = {name: bound(name) for name in names}
    for name, scan in yardsticks.items():
        scans[name] = in_form(scan)
    return scans


def _rows(
    shape: Shape,
    form: str,
    scans: dict[str, Scan],
    protocol: Protocol,
    dtype: torch.dtype,
    ceilings: Ceilings | None,
    notes: list[str],
) -> list[dict[str, Any]]:
    """One row per pass and backend at a shape."""
    inputs = scan_inputs(shape, form, dtype, protocol.device)
    rows = []
    for what in PASSES:
        calls = {name: call_of(scan, inputs, what) for name, scan in scans.items()}
        timings, failures = time_interleaved(calls, protocol)
        notes += [f"{shape.name} {form} {what}: {n}: {why}" for n, why in failures.items()]
        times = {name: timing.as_dict() for name, timing in timings.items()}
        baseline = _baseline(list(times))
        for name, time in times.items():
            median = time["median_s"]
            row = {
                "shape": shape.name, "batch": shape.batch, "groups": GROUPS,
                "channels": shape.channels, "length": shape.side**2, "states": STATES,
                "form": form, "pass": what, "backend": name, **time,
                "baseline": baseline, "speedup": times[baseline]["median_s"] / median,
                "peak_added_bytes": peak_memory(calls[name], protocol.device).added,
            }  # fmt: skip
            if ceilings is not None:
                least, by = floor(
                    shape.scan_size(form), dtype.itemsize, ceilings, backward=what != PASSES[0]
                )
                row.update(limit_s=least, limit_by=by, limit_share=least / median)
            rows.append(row)
    return rows


def _baseline(names: Sequence[str]) -> str:
    """What others are compared with: the loop of public code, or else the last choice of `auto`."""
    for loop in (LOOP_NAME, "reference"):
        if loop in names:
            return loop
    return names[-1]


def call_of(scan: Scan, inputs: list[Tensor], what: str) -> Call:
    """The call that is timed: one of `PASSES` of a scan on `scan_inputs`."""
    if what == PASSES[0]:

        def forward() -> None:
            with torch.no_grad():
                scan(*inputs)

        return forward
    leaves = [t.detach().requires_grad_() for t in inputs]
    with torch.no_grad():
        d_y = torch.randn_like(inputs[0])

    def forward_and_backward() -> None:
        torch.autograd.grad(scan(*leaves), leaves, d_y)

    return forward_and_backward


def scan_inputs(shape: Shape, form: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Random inputs with the decay rates and step sizes of a fresh Mamba-UNet."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    batch, channels, side = shape.batch, shape.channels, shape.side
    sizes: list[tuple[int, ...]]
    if form == "1d":
        sizes = [
            *[(batch, GROUPS, channels, side**2)] * 2,
            *[(batch, GROUPS, STATES, side**2)] * 2,
        ]
    else:
        sizes = [
            (batch, side, side, channels),
            (batch, side, side, GROUPS, channels),
            *[(batch, side, side, GROUPS, STATES)] * 2,
        ]
    x, delta, B, C = (normal(*size).to(device, dtype) for size in sizes)
    A = -torch.arange(1.0, STATES + 1).repeat(GROUPS, channels, 1)
    D = torch.ones(GROUPS, channels)
    step = 10 ** (2 * torch.rand(GROUPS, channels, generator=generator) - 3)  # 0.001 to 0.1
    bias = step + torch.log(-torch.expm1(-step))  # inverse of softplus
    return [x, delta * 0.5, A.to(device), B, C, D.to(device), bias.to(device)]


# ---- agreement with float64 ---------------------------------------------------------------------


def errors_of(
    forms: Sequence[str],
    names: Sequence[str],
    yardsticks: dict[str, Scan],
    dtype: torch.dtype,
    device: torch.device,
    *,
    shape: Shape = SMALL,
) -> list[dict[str, Any]]:
    """Worst error of each backend at a shape: output and every gradient, against float64."""
    rows = []
    for form in forms:
        inputs, d_y, exact = _exact(shape, form)
        narrow = [
            t.to(device, dtype if i in (0, 1, 3, 4) else torch.float32)
            for i, t in enumerate(inputs)
        ]
        for backend, scan in _scans(form, names, yardsticks).items():
            tensors = _tensors(scan, narrow, d_y.to(device, dtype))
            errors = {
                tensor: float((got.double().cpu() - want).abs().max() / want.abs().max())
                for tensor, got, want in zip(TENSORS, tensors, exact, strict=True)
            }
            worst = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))
            rows.append({"backend": backend, "form": form, "worst": errors[worst], "tensor": worst,
                         "errors": errors})  # fmt: skip
    return rows


@cache
def _exact(shape: Shape, form: str) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Inputs, the gradient of the output, and in float64 the output and every other gradient."""
    inputs = scan_inputs(shape, form, torch.float32, torch.device("cpu"))
    d_y = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    scan = _scans(form, ["reference"], {})["reference"]
    return inputs, d_y, _tensors(scan, [t.double() for t in inputs], d_y.double())


def _tensors(scan: Scan, inputs: list[Tensor], d_y: Tensor) -> list[Tensor]:
    """The output and the gradient of each input."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = scan(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, d_y)]
