"""Cost as the work grows: larger images and batches, more cases, more runs in a report.

Of each kind of work the time and memory at several sizes n, and the exponents e of a growth as n^e:
the slope of a line through the logarithms. Time is that of the processor, all threads together,
which other programs on the machine hardly change; on a GPU it is the wall time of a step.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import linear_regression
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from mambaseg.benchmark.measure import Call, Protocol
from mambaseg.benchmark.networks import Builder, Step, Steps, built
from mambaseg.errors import UserError
from mambaseg.evaluation.costs import peak, start_peak
from mambaseg.evaluation.metrics import BUILT_IN
from mambaseg.evaluation.summary import summarise

PARTS = ("size", "batch", "cases", "runs")
SIDE = 128  # pixels of the images of which there are more and more in a batch
NAMES = ("background", "foreground")
CPU = torch.device("cpu")
Row = dict[str, Any]
StepAt = Callable[[int, int], Step]  # pixels a side, images -> what is measured of a network
log = logging.getLogger(__name__)


def measure_growth(
    builders: Mapping[str, Builder],
    step_at: StepAt,
    protocol: Protocol,
    points: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """Measures each part of `points` at its sizes.

    Returns:
        `rows` (part, what, n, seconds, `peak_added_bytes`), `exponents` of each part and what is
        measured in it, and `notes`.

    Raises:
        UserError: a part has no such name, or less than two sizes.
    """
    for part, sizes in points.items():
        if part not in PARTS:
            raise UserError(f"growth.{part}: choose of {', '.join(PARTS)}")
        if len(set(sizes)) < 2 or min(sizes) < 1:
            raise UserError(f"growth.{part}={list(sizes)}: give two sizes or more, from 1 on")
    rows = []
    notes: list[str] = []
    for part, sizes in points.items():
        ordered = sorted(set(sizes))
        if part in _OTHER_WORK:  # the first time imports what is needed
            list(_OTHER_WORK[part](ordered[0]))
        for n in ordered:
            log.info("growth: %s %d", part, n)
            if part in _OTHER_WORK:
                found = list(_OTHER_WORK[part](n))
            else:
                steps = Steps(step_at(*((n, 1) if part == "size" else (SIDE, n))))
                found = list(_steps(builders, steps, protocol))
                notes += [f"{part} {n}: {note}" for note in steps.notes]
            rows += [{"part": part, "n": n, **row} for row in found]
    return {"rows": rows, "exponents": exponents(rows), "notes": notes}


def exponents(rows: Sequence[Row]) -> list[Row]:
    """Exponents of time and memory by part and what is measured: of all sizes, and of the last two.

    Rows of one kind are in the order of their sizes. Fixed costs flatten the beginning, so the last
    two say more about what is to come.
    """
    series: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        series.setdefault((row["part"], row["what"]), []).append(row)
    found = []
    for (part, what), own in series.items():
        growth: Row = {"part": part, "what": what, "from": own[0]["n"], "to": own[-1]["n"],
                       "first_s": own[0]["seconds"], "last_s": own[-1]["seconds"]}  # fmt: skip
        for name, key in (("time", "seconds"), ("memory", "peak_added_bytes")):
            # memory that the process held anyway is no growth
            known = [(math.log(row["n"]), math.log(row[key])) for row in own if row[key]]
            growth[name] = linear_regression(*zip(*known, strict=True)).slope if known[1:] else None
            last = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in pairwise(known)][-1:]
            growth[f"{name}_at_the_end"] = last[0] if last else None
        found.append(growth)
    return found


def _measured(call: Call, device: torch.device = CPU) -> tuple[Any, Row]:
    """What a call returns; its seconds and memory."""
    before, start = start_peak(device), _clock(device)
    value = call()
    seconds, total = _clock(device) - start, peak(device)
    added = None if before is None or total is None else max(0, total - before)
    return value, {"seconds": seconds, "peak_added_bytes": added}


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def _steps(builders: Mapping[str, Builder], steps: Steps, protocol: Protocol) -> Iterator[Row]:
    """A training step of each network, the quickest of the protocol's repeats."""
    for name, build in builders.items():
        try:
            call = steps.call(name, built(build, protocol))
            call()
            rows = [_measured(call, protocol.device)[1] for _ in range(max(1, protocol.repeats))]
            del call  # and with it the network
        except torch.OutOfMemoryError:
            log.warning("%s: out of memory", name)
            continue
        yield {"what": name, **min(rows, key=lambda row: row["seconds"])}


# ---- cases ---------------------------------------------------------------------------------------


def _cases(count: int) -> Iterator[Row]:
    """A training's start with `count` cases, small pictures, and the summary of a test of them."""
    from mambaseg.data.datamodule import SegmentationDataModule
    from mambaseg.data.readers.folder import find_cases

    with TemporaryDirectory(prefix="mambaseg-growth-") as place:
        _write_pictures(Path(place), count)
        module = partial(
            SegmentationDataModule, find_cases=partial(find_cases, masks="binary", channels=1),
            root=place, cache_dir=Path(place) / "cache", class_names=NAMES, split="random",
            size=32, steps=10, val_every=5, batch_size=8,
        )  # fmt: skip
        for what in ("first start, which decodes", "start"):
            data, row = _measured(lambda: _loaded(module()))
            yield {"what": what, **row}
        yield {"what": "first batch", **_measured(lambda: next(iter(data.train_dataloader())))[1]}
    rows = _scores(range(count), np.random.default_rng(0))
    yield {"what": "summary of a test", **_measured(lambda: summarise(rows, NAMES))[1]}


def _loaded(data: Any) -> Any:
    logger = logging.getLogger("mambaseg.data")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        data.setup("fit")
    finally:
        logger.setLevel(before)
    return data


def _write_pictures(root: Path, count: int) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:9, 5:12] = 255
    for kind in ("images", "masks"):
        (root / kind).mkdir()
        for number in range(count):
            pixels = mask if kind == "masks" else rng.integers(0, 256, (16, 16), np.uint8)
            Image.fromarray(pixels).save(root / kind / f"case{number:06d}.png")


# ---- runs ----------------------------------------------------------------------------------------


def _runs(count: int) -> Iterator[Row]:
    """Reports of `count` runs: seeds of three networks, and as many networks."""
    from mambaseg.reporting.report import write_report

    for what, networks in (("report, seeds of 3 networks", 3), ("report, networks", count)):
        with TemporaryDirectory(prefix="mambaseg-growth-") as place:
            for number in range(count):
                _write_run(Path(place), f"net{number % networks}", number // networks)
            yield {"what": what, **_measured(partial(write_report, place))[1]}


def _write_run(experiment: Path, model: str, seed: int) -> None:
    """A finished run with drawn scores of twenty cases."""
    from mambaseg.storage.run_folder import RunFolder

    folder = RunFolder(experiment / f"{model}-seed{seed}")
    split = {"name": "random-seed0", "hash": "0", "note": ""}
    title = "drawn scores"
    folder.start(key=folder.path.name, data={"title": title, "fingerprint": "0"}, split=split)
    config = {
        "seed": seed,
        "model": {"name": model},
        "data": {"name": "drawn", "title": title, "synthetic": True, "class_names": list(NAMES)},
        "evaluation": {"empty": "strict"},
    }
    folder.write_json("config.yaml", config)  # which is YAML too
    rows = _scores(range(20), np.random.default_rng([seed, int(model[3:])]))
    folder.write_rows("cases.csv", rows)
    about = {"data": title, "model": model, "split": split, "checkpoint": "best"}
    folder.write_json("metrics.json", {**about, **summarise(rows, NAMES)})
    folder.finish("done")


def _scores(cases: Sequence[int], rng: np.random.Generator) -> list[Row]:
    """Rows of cases.csv."""
    rows = []
    for case in cases:
        for index, name in enumerate(NAMES):
            values = dict(zip((m.name for m in BUILT_IN), rng.random(len(BUILT_IN)), strict=True))
            identity = {"case": f"case{case:06d}_ED", "patient": f"case{case:06d}", "phase": "ED",
                        "group": None, "class_name": name, "class": index}  # fmt: skip
            rows.append({
                **identity, "outcome": "scored", **{k: float(v) for k, v in values.items()},
                "voxels": 100, "reference_voxels": 100, "policy": "strict", "tolerance_mm": 2.0,
                "tolerance_vox": 1.0,
            })  # fmt: skip
    return rows


_OTHER_WORK: dict[str, Callable[[int], Iterator[Row]]] = {"cases": _cases, "runs": _runs}
