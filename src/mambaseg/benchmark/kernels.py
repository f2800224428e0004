"""Where the time of a training step goes on a GPU: kernel by kernel, and in launching them."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from mambaseg.benchmark.measure import Call, Protocol, why
from mambaseg.benchmark.networks import Builder, Step, Steps, built
from mambaseg.errors import UserError

CALLS, PROFILED = 10, 3
log = logging.getLogger(__name__)


def measure_kernels(
    builders: Mapping[str, Builder], step: Step, protocol: Protocol
) -> dict[str, Any]:
    """Profiles a step of each network.

    Returns:
        `rows`, one per network: `wall_s` of a step, `kernel_s` of it in kernels, `host_s` that the
        processor takes to queue it (the limit where it is longer than the kernels), `launches`, and
        `kernels` (name, seconds, calls per step), the longest first; `notes`.

    Raises:
        UserError: the device is not a CUDA device.
    """
    if protocol.device.type != "cuda":
        raise UserError("kernels: there are none to time on a CPU; use device=cuda")
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    steps = Steps(step)
    for name, build in builders.items():
        log.info("profiling %s", name)
        try:
            rows.append(_row(name, build, steps, protocol))
        except torch.OutOfMemoryError as error:
            notes.append(f"{name}: {why(error)}")
    return {"rows": rows, "notes": steps.notes + notes}


def _row(name: str, build: Builder, steps: Steps, protocol: Protocol) -> dict[str, Any]:
    call = steps.call(name, built(build, protocol))
    for _ in range(max(3, protocol.warmup)):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    queued = time.perf_counter() - start
    torch.cuda.synchronize()
    wall = time.perf_counter() - start
    return {"network": name, "wall_s": wall / CALLS, "host_s": queued / CALLS, **_profile(call)}


def _profile(call: Call) -> dict[str, Any]:
    """Seconds and calls per step, together and by kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED):
            call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in profile.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name][0] += event.device_time * 1e-6 / PROFILED
            found[event.name][1] += 1 / PROFILED
    kernels = [{"name": name, "seconds": s, "calls": calls} for name, (s, calls) in found.items()]
    return {
        "kernel_s": sum(seconds for seconds, _ in found.values()),
        "launches": sum(calls for _, calls in found.values()),
        "kernels": sorted(kernels, key=lambda kernel: kernel["seconds"], reverse=True),
    }
