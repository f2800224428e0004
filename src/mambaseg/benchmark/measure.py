"""How a call is measured: time by interleaved repeats, memory as a peak above what was there."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mambaseg.evaluation.costs import peak, seconds_on, start_peak

Call = Callable[[], object]

MOST_CALLS = 1000  # per repeat, of something very quick


@dataclass(frozen=True)
class Protocol:
    """What is done with every candidate of a comparison; one repeat is always measured."""

    device: torch.device
    repeats: int = 5  # measured; their median is reported
    warmup: int = 1  # calls before them (compilation, caches, memory pools)
    budget_s: float = 60.0  # no more repeats of a candidate that has taken this long
    seed: int = 0  # of weights and dropout
    autocast: bool = False  # bfloat16 where that is safe
    least_s: float = 0.02  # of a repeat: quick calls follow each other within it


def time_interleaved(
    candidates: Mapping[str, Call], protocol: Protocol
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Times candidates in turns, so that what the machine does meanwhile hits all of them alike.

    Every second round goes through them backwards. Time on a GPU is that of a full queue: a repeat
    ends when the device has finished all of its calls.

    Returns:
        By name `median_s`, `min_s`, `max_s` and `first_s` of a call, and how many `calls` a repeat
        has; by the names of those that cannot run here, the reason why.
    """
    first_s: dict[str, float] = {}
    calls: dict[str, int] = {}
    failures: dict[str, str] = {}
    for name, call in candidates.items():
        try:
            first_s[name], calls[name] = _warm_up(call, protocol)
        except Exception as error:  # of compilers, drivers, memory: any of them
            failures[name] = why(error)
    spent = dict(first_s)
    seconds: dict[str, list[float]] = {name: [] for name in calls}  # per call, of each repeat
    for turn in range(max(1, protocol.repeats)):
        for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
            if name in failures or (seconds[name] and spent[name] > protocol.budget_s):
                continue
            try:
                taken = _seconds(candidates[name], calls[name], protocol.device)
            except Exception as error:  # also what another one has left of the device
                failures[name] = why(error)
                continue
            seconds[name].append(taken / calls[name])
            spent[name] += taken
    found = {
        name: {
            "median_s": statistics.median(own), "min_s": min(own), "max_s": max(own),
            "first_s": first_s[name], "repeats": len(own), "calls": calls[name],
        }
        for name, own in seconds.items()
        if name not in failures
    }  # fmt: skip
    return found, failures


def why(error: Exception) -> str:
    """The reason that an error gives, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _warm_up(call: Call, protocol: Protocol) -> tuple[float, int]:
    """Seconds of the first of the calls that the protocol wants; how many calls a repeat has."""
    first = last = _seconds(call, 1, protocol.device)
    for _ in range(max(0, protocol.warmup - 1)):
        if first > protocol.budget_s:
            break
        last = _seconds(call, 1, protocol.device)
    if last < protocol.least_s:  # the first call may have compiled something
        last = _seconds(call, 1, protocol.device)
    calls = math.ceil(protocol.least_s / max(last, 1e-9))
    return first, min(max(calls, 1), MOST_CALLS)


def _seconds(call: Call, calls: int, device: torch.device) -> float:
    start = seconds_on(device)
    for _ in range(calls):
        call()
    return seconds_on(device) - start


def instruction_sets() -> dict[str, str]:
    """The instruction sets of `torch` and, where it is installed, `numba` and the `processor`.

    Both may have been told to use less than the processor has.
    """
    found = {"torch": torch.backends.cpu.get_cpu_capability()}
    try:
        from mambaseg.scan import numba
    except ImportError:
        return found
    return found | dict(zip(("numba", "processor"), numba.instruction_sets(), strict=True))


def peak_memory(call: Call, device: torch.device) -> dict[str, int | None]:
    """Peak memory of one call in bytes: of the GPU's allocator, or resident in the process.

    Returns:
        `peak_bytes` altogether (on a CPU with all libraries that are loaded) and `peak_added_bytes`
        above what was there before the call; None where the system does not tell.
    """
    before = start_peak(device)
    call()
    total = peak(device)
    added = None if before is None or total is None else max(0, total - before)
    return {"peak_bytes": None if added is None else total, "peak_added_bytes": added}
