"""Which sizes of the Triton kernels are the fastest: they are constants, chosen by measuring."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch

from mambaseg.benchmark.measure import Call, Protocol, time_interleaved
from mambaseg.benchmark.scans import FORMS, PASSES, Shape, call_of, scan_inputs
from mambaseg.errors import UserError
from mambaseg.scan import available_backends

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sizes:
    """Constants of `mambaseg.scan.triton`: see there."""

    BLOCK_D: int
    WARPS: int
    STEPS: int
    UNROLL: int
    UNROLL_BACKWARD: int

    def __str__(self) -> str:
        return (
            f"{self.BLOCK_D} channels, {self.WARPS} warps, {self.STEPS} steps, "
            f"{self.UNROLL}/{self.UNROLL_BACKWARD} ahead"
        )


def measure_sizes(
    shapes: Sequence[Shape], variants: Sequence[Sequence[int]], *, protocol: Protocol,
    dtype: torch.dtype,
) -> dict[str, Any]:  # fmt: skip
    """Times the Triton backend with other constants than its own, in turns; images only.

    Args:
        shapes: of `shapes_of`.
        variants: values of `Sizes`; the module's own are measured first, as the base.
        protocol: how to measure.
        dtype: of x, delta, B and C.

    Returns:
        `rows`: a shape, pass and variant each, with `sizes`, times and the `speedup` over the
        module's own; `notes`.

    Raises:
        UserError: Triton cannot run here, or a variant has not five numbers.
    """
    if "triton" not in available_backends(protocol.device):
        raise UserError(f"tune: the Triton kernels do not run on {protocol.device}")
    from mambaseg.scan import triton

    own = Sizes(**{name: getattr(triton, name) for name in Sizes.__annotations__})
    try:
        wanted = dict.fromkeys([own, *(Sizes(*variant) for variant in variants)])
    except TypeError:
        names = ", ".join(Sizes.__annotations__)
        raise UserError(f"tune: each of `sizes` is a list of five numbers: {names}") from None
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for shape in shapes:
        log.info("measuring %d variants at %s", len(wanted), shape)
        inputs = scan_inputs(shape, "2d", dtype, protocol.device)
        for what in PASSES:
            calls = {str(sizes): _with(triton, sizes, inputs, what) for sizes in wanted}
            calls, failed = _that_run(calls)
            timings, lost = time_interleaved(calls, protocol)
            notes += [f"{shape.name} {what}: {n}: {why}" for n, why in {**failed, **lost}.items()]
            times = {name: timing.as_dict() for name, timing in timings.items()}
            base = times.get(str(own), {}).get("median_s", float("nan"))
            rows += [
                {
                    "shape": shape.name, "batch": shape.batch, "channels": shape.channels,
                    "length": shape.side**2, "pass": what, "variant": str(sizes),
                    "sizes": asdict(sizes), "own": sizes == own, **times[str(sizes)],
                    "speedup": base / times[str(sizes)]["median_s"],
                }
                for sizes in wanted if str(sizes) in times
            ]  # fmt: skip
    return {"rows": rows, "notes": notes}


def _with(module: ModuleType, sizes: Sizes, inputs: list[torch.Tensor], what: str) -> Call:
    call = call_of(lambda *tensors: FORMS["2d"](*tensors, backend="triton"), inputs, what)

    def sized() -> None:
        with _set(module, sizes):
            call()

    return sized


@contextlib.contextmanager
def _set(module: ModuleType, sizes: Sizes) -> Iterator[None]:
    before = {name: getattr(module, name) for name in asdict(sizes)}
    try:
        for name, value in asdict(sizes).items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _that_run(calls: dict[str, Call]) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls that end well once, and why the others do not: a size may not fit the device."""
    failures = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:  # Triton's compiler raises many kinds
            failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return {name: call for name, call in calls.items() if name not in failures}, failures
