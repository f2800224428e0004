"""How a call is measured: time by interleaved repeats, memory as a peak above what was there."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mambaseg.evaluation.costs import peak, start_peak

Call = Callable[[], object]

MOST_CALLS = 1000
"""Calls per repeat, at most, of something very quick."""


@dataclass(frozen=True)
class Protocol:
    """What is done with every candidate of a comparison.

    Args:
        device: where it runs.
        repeats: measured repeats; the median of them is reported.
        warmup: repeats before them that do not count (compilation, caches, memory pools).
        budget_s: a candidate that has taken this long, warm-up included, is not repeated again;
            one repeat is always measured.
        least_s: a repeat lasts at least this long: quick calls are repeated back to back within it.
    """

    device: torch.device
    repeats: int = 5
    warmup: int = 1
    budget_s: float = 60.0
    least_s: float = 0.02


@dataclass
class Timing:
    """Times of one candidate, in seconds per call."""

    first_s: float = math.nan
    calls: int = 1
    seconds: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Median, extremes and how they were made."""
        return {
            "median_s": statistics.median(self.seconds),
            "min_s": min(self.seconds),
            "max_s": max(self.seconds),
            "first_s": self.first_s,
            "repeats": len(self.seconds),
            "calls": self.calls,
        }


def time_interleaved(
    candidates: Mapping[str, Call], protocol: Protocol
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times candidates in turns, so that what the machine does meanwhile hits all of them alike.

    Every second round goes through them backwards. Time on a GPU is that of a full queue: a repeat
    ends when the device has finished all of its calls.

    Returns:
        Timings by name, and the reason why by the names of those that cannot run here.
    """
    timings: dict[str, Timing] = {}
    failures: dict[str, str] = {}
    spent = dict.fromkeys(candidates, 0.0)
    for name, call in candidates.items():
        try:
            timings[name] = _warm_up(call, protocol)
        except torch.OutOfMemoryError:
            failures[name] = "out of memory"
            continue
        spent[name] = timings[name].first_s
    for turn in range(max(1, protocol.repeats)):
        for name in list(timings)[:: 1 if turn % 2 == 0 else -1]:
            timing = timings[name]
            if timing.seconds and spent[name] > protocol.budget_s:
                continue
            seconds = _seconds(candidates[name], timing.calls, protocol.device)
            timing.seconds.append(seconds / timing.calls)
            spent[name] += seconds
    return timings, failures


def _warm_up(call: Call, protocol: Protocol) -> Timing:
    """The first call, and as many as the protocol wants; finds out how long a call takes."""
    first = last = _seconds(call, 1, protocol.device)
    for _ in range(max(0, protocol.warmup - 1)):
        if first > protocol.budget_s:
            break
        last = _seconds(call, 1, protocol.device)
    if last < protocol.least_s:  # the first call may have compiled something
        last = _seconds(call, 1, protocol.device)
    calls = math.ceil(protocol.least_s / max(last, 1e-9))
    return Timing(first_s=first, calls=min(max(calls, 1), MOST_CALLS))


def _seconds(call: Call, calls: int, device: torch.device) -> float:
    _wait_for(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    _wait_for(device)
    return time.perf_counter() - start


def processor_seconds(call: Call) -> float:
    """Processor time of one call, all threads together; time spent waiting does not count."""
    start = time.process_time()
    call()
    return time.process_time() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- memory -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peak:
    """Peak memory in bytes during one call; None where the system does not tell.

    Args:
        added: above what was there before the call.
        total: altogether; on the CPU that is the process, with all libraries that it has loaded.
    """

    added: int | None
    total: int | None


def peak_memory(call: Call, device: torch.device) -> Peak:
    """Peak memory of one call: of the GPU's allocator, or the resident memory of the process."""
    before = start_peak(device)
    call()
    total = peak(device)
    if before is None or total is None:
        return Peak(None, None)
    return Peak(max(0, total - before), total)
