"""What the networks cost: parameters, operations with the scan counted, time and memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from mambaseg.errors import counted
from mambaseg.reporting.collect import Comparison, Entry, repeats
from mambaseg.reporting.grid import UNDEFINED, Grid, duration, plus_minus
from mambaseg.reporting.runs import RunData
from mambaseg.reporting.scores import mean_sd


class Costs(NamedTuple):
    """What an entry costs; None or nothing where it was not measured.

    Of a method with several networks, parameters and operations are those of the chosen one.
    """

    parameters: int | None
    macs: float | None  # of a pass
    scan_flops: float | None  # of a pass
    image: Sequence[int]  # shape (C, H, W) of what the network sees in a pass
    passes: float | None  # of a slice at testing: windows times views, mean over the cases
    seconds: list[float]  # per case at testing, of each run
    memory: list[float]  # peak, bytes, of each run
    step: list[float]  # seconds per optimizer step, of each run
    training: list[float]  # seconds of each run
    conditions: list[str]  # see `conditions`, without repetition


def costs_of(runs: Sequence[RunData]) -> Costs:
    """Costs from the records of an entry's runs."""
    costs = [run.record.get("cost") or {} for run in runs]
    counted_once = next((cost for cost in costs if cost.get("macs") is not None), {})
    seconds, memory, step = (
        [own[key] for own in costs if own.get(key) is not None]
        for key in ("seconds_per_case", "peak_memory_bytes", "step_seconds")
    )
    return Costs(
        counted_once.get("parameters") or runs[0].record.get("parameters"),
        counted_once.get("macs"),
        counted_once.get("scan_flops"),
        counted_once.get("image") or [],
        counted_once.get("passes"),
        seconds,
        memory,
        step,
        [run.record["fit_seconds"] for run in runs if run.record.get("fit_seconds")],
        list(dict.fromkeys(map(conditions, runs))),
    )


def cost_grid(comparison: Comparison) -> Grid:
    """A row per entry; of a method that trains more than it predicts with, one for each of both."""
    rows = [row for entry in comparison.entries for row in _rows(entry)]
    header = [
        "network", "parameters", "GMAC", "scan GFLOP", "all GFLOP", "image", "passes", "s per case",
        "peak memory MiB", "s per step", "training", "runs", "device",
    ]  # fmt: skip
    notes = [
        "GMAC: multiply-adds of convolutions, linear layers and other matrix products; scan: "
        "(9 N + 1) L D operations each; all = 2 × GMAC + scan; all of one pass of an image of this "
        "size. Passes: that a slice takes at testing (windows times views), mean over the cases. "
        "Time and memory depend on the hardware, and time on what else it did; training: mean of "
        "the runs' wall time.",
    ]
    if len(rows) > len(comparison.entries):
        notes.append(
            "Prediction: with the network that was chosen. Training: parameters of all that the "
            "method holds, teachers too; operations of one pass of each network that learns. What "
            "else a method computes is in the time of a step."
        )
    return Grid("What the networks cost", header, rows, notes)


def _rows(entry: Entry) -> Iterator[list[str]]:
    whole = next(filter(None, map(_whole, entry.runs)), None)
    if whole is None:
        yield _row(entry.label, entry, costs_of(entry.runs))
        return
    for name in dict.fromkeys(run.chosen for run in entry.runs):
        cost = costs_of([run for run in entry.runs if run.chosen == name])
        cost = cost._replace(memory=[], step=[], training=[])
        yield _row(f"{entry.label}, prediction ({name})", entry, cost)
    cost = costs_of(entry.runs)._replace(**whole, passes=None, seconds=[])
    yield _row(f"{entry.label}, training", entry, cost)


def _whole(run: RunData) -> dict[str, Any] | None:
    """What all that a method trains costs; None where it trains one network and nothing else."""
    found: dict[str, Any] | None = (run.record.get("cost") or {}).get("method")
    return found and {key: found.get(key) for key in ("parameters", "macs", "scan_flops")}


def _row(label: str, entry: Entry, cost: Costs) -> list[str]:
    macs, scan = cost.macs, cost.scan_flops
    both = None if macs is None or scan is None else 2 * macs + scan
    return [
        label,
        UNDEFINED if cost.parameters is None else f"{cost.parameters:,}",
        *(UNDEFINED if v is None else f"{v / 1e9:.2f}" for v in (macs, scan, both)),
        " × ".join(map(str, cost.image)) or UNDEFINED,
        UNDEFINED if cost.passes is None else f"{cost.passes:.3g}",
        plus_minus(*mean_sd(cost.seconds), 2),
        f"{max(cost.memory) / 2**20:.0f}" if cost.memory else UNDEFINED,
        plus_minus(*mean_sd(cost.step), 3),
        duration(fmean(cost.training)) if cost.training else UNDEFINED,
        repeats(entry),
        "; ".join(cost.conditions),
    ]


def conditions(run: RunData) -> str:
    """What times depend on beside the network: device, threads, precision, test batch.

    Of a resumed run they are those of its last session, which was tested, and its earlier devices.
    """
    record, devices = run.record, {device(run.record): None}  # in order, each once
    for session in run.record.get("resumed") or ():
        record = {**record, **session}  # earlier versions recorded less of a session
        devices[device(record)] = None
    gpus = (record.get("hardware") or {}).get("gpus")
    known = [device(record)]
    if earlier := [one for one in devices if one != known[0]]:
        known[0] += f" (before a pause {', '.join(earlier)})"
    if not gpus and record.get("threads"):
        known.append(counted(record["threads"], "thread"))
    if gpus and (record.get("devices") or 1) != 1:
        known.append(f"{record['devices']} devices")
    if precision := (run.config.get("trainer") or {}).get("precision"):
        known.append(f"precision {precision}")
    if batch := (run.config.get("evaluation") or {}).get("batch_size"):
        known.append(f"tested in batches of {batch}")
    return ", ".join(known)


def device(record: Mapping[str, Any]) -> str:
    """Name of the GPU, or of the CPU with its instruction set, where the record has that."""
    hardware = record.get("hardware") or {}
    if gpus := hardware.get("gpus"):
        return str(gpus[0])
    cpu, used = hardware.get("cpu") or UNDEFINED, hardware.get("instructions")
    return f"{cpu} ({used})" if used else str(cpu)
