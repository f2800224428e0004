"""The page of a measured GPU machine: what it has given so far, and the commands that made it."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mambaseg.benchmark.tables import markdown, tables
from mambaseg.benchmark.truth import compare_curves
from mambaseg.evaluation.summary import distance_unit
from mambaseg.storage.run_folder import RunFolder
from mambaseg.storage.untrusted import read_json

Row = Mapping[str, Any]
UNKNOWN = "–"
CURVES = "curves"
PRECISIONS = {"bf16": "bf16-mixed", "fp32": "32-true"}
TRAININGS = {
    "acdc_paper": "The paper's protocol, nothing pretrained",
    "loop": "Short trainings: what the loop costs beside the network's step",
}
HEADINGS = {
    "smoke": "Networks and a small scan against float64",
    "truth": "Scans of full size against float64",
    "steps": "The networks' own training step",
    "scan": "Scans against the limit of the device",
    "kernels": "A training step by kernel",
}


def write_page(out: Path, parts: Sequence[Mapping[str, Any]]) -> Path:
    """Writes `<out>/table.md`: what the parts that have ended left in `out`."""
    text = "\n".join(_sections(out, parts)).rstrip() + "\n"
    return RunFolder(out).write_text("table.md", text)


def _sections(out: Path, parts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    records = _records(out)
    yield "# A GPU machine: numbers, speed, the paper's table\n"
    yield _setting([*records.values(), *(run.record for run in _runs(out))])
    for experiment, title in TRAININGS.items():
        if runs := _runs(out, experiment):
            yield f"## {title}\n\n{_run_table(runs, records.get('steps'))}\n"
            report = out / "runs" / experiment / "report" / "table.md"
            if report.is_file():
                yield report.read_text("utf-8").replace("\n#", "\n##").replace("## ", "### ", 1)
    if curves := _curves(out):
        yield f"## bf16 against fp32\n\n{curves}\n"
    for name, record in records.items():
        yield f"## {HEADINGS.get(name, name)}\n\nMade by `{record['command']}`\n"
        yield "\n".join(markdown(table) for table in tables(record))
        yield from (f"- {note}\n" for note in record["notes"])
    yield f"## Commands\n\n{_commands(parts)}\n"


def _records(out: Path) -> dict[str, dict[str, Any]]:
    """The newest record of each benchmark, by the part's name."""
    found = {}
    for folder in sorted((out / "bench").glob("*")):
        files = sorted(folder.glob("*.json"))
        if files:
            found[folder.name] = read_json(files[-1])
    order = [name for name in HEADINGS if name in found]
    return {name: found[name] for name in (*order, *(found.keys() - set(order)))}


def _runs(out: Path, experiment: str = "*") -> list[RunFolder]:
    paths = sorted((out / "runs").glob(f"{experiment}/*/run.json"))
    return [RunFolder(path.parent) for path in paths if not path.parent.name.endswith(".previous")]


def _setting(records: list[dict[str, Any]]) -> str:
    """Device, versions, code and day of what was made last; more than one device is said."""
    records = [record for record in records if record.get("hardware")]
    if not records:
        return "Nothing has been measured yet.\n"
    lines = dict.fromkeys(
        "{device}, Python {python}, torch {torch}, lightning {lightning}; commit {commit}".format(
            device=(record["hardware"]["gpus"] or [record["hardware"]["cpu"]])[0],
            commit=str(record["code"].get("commit"))[:10],
            **{name: record["versions"].get(name, UNKNOWN)
               for name in ("python", "torch", "lightning")},
        )
        for record in records
    )  # fmt: skip
    days = sorted({str(record["started"])[:10] for record in records})
    return "\n".join([*(f"- {line}" for line in lines), f"- {', '.join(days)} (UTC)", ""])


# ---- trainings ------------------------------------------------------------------------------


def _run_table(runs: list[RunFolder], steps: Row | None) -> str:
    alone = {row["network"]: row["median_s"] for row in steps["rows"]} if steps else {}
    heads = (
        "network", "seed", "status", "steps", "test Dice", "HD95", "minutes", "of them validation",
        "ms per step", "network alone", "beside it", "img/s",
    )  # fmt: skip
    lines = [heads, ["---"] * 3 + ["---:"] * (len(heads) - 3)]
    lines += [_run_cells(run, alone) for run in runs]
    note = (
        "HD95 in mm, or in voxels where the data do not say how large these are. ms per step: "
        "median over windows of the training without validations and saving; network alone: the "
        "pure step of `steps` below; beside it: the share of the training's step that is not the "
        "network's."
    )
    return "\n".join([*(f"| {' | '.join(map(str, line))} |" for line in lines), "", note])


def _run_cells(run: RunFolder, alone: Mapping[str, float]) -> list[str]:
    record = run.record
    name, _, rest = run.path.name.partition("-")
    seed = rest.partition("seed")[2].partition("-")[0]
    cost = record.get("cost") or {}
    pace, network = cost.get("step_seconds"), alone.get(name)
    images = cost.get("images_per_step")
    return [
        name, seed, str(record.get("status")), str(record.get("steps", 0)), *_scores(run),
        _number(record.get("fit_seconds"), 1 / 60, 1),
        _number(cost.get("validation_seconds"), 1 / 60, 1),
        _number(pace, 1e3, 2), _number(network, 1e3, 2),
        f"{100 * (1 - network / pace):.0f} %" if pace and network else UNKNOWN,
        f"{images / pace:.0f}" if pace and images else UNKNOWN,
    ]  # fmt: skip


def _scores(run: RunFolder) -> tuple[str, str]:
    if not run.finished:
        return UNKNOWN, UNKNOWN
    foreground = run.summary["foreground"]
    unit = distance_unit(run.summary)
    distance = _number(foreground[f"hd95_{unit}"]["mean"], 1, 2)
    return _number(foreground["dice"]["mean"], 1, 4), f"{distance} {unit}"


def _number(value: float | None, factor: float, digits: int) -> str:
    return UNKNOWN if value is None else f"{factor * value:.{digits}f}"


# ---- curves ---------------------------------------------------------------------------------


def _curves(out: Path) -> str:
    """The verdict in words; empty until both precisions are there."""
    by_precision: dict[str, dict[int, float]] = {}
    for run in _runs(out, CURVES):
        precision = _precision(run)
        if precision and run.trained:
            by_precision[precision] = _losses(run.path / "metrics.csv")
    if set(by_precision) != set(PRECISIONS.values()):
        return ""
    one, other = (by_precision[precision] for precision in PRECISIONS.values())
    verdict = compare_curves(one.items(), other.items())
    rows = [{"step": step, "bf16": one[step], "fp32": other[step]}
            for step in sorted(one.keys() & other.keys())]  # fmt: skip
    RunFolder(out).write_rows("curves.csv", rows)
    if not rows:
        return "The two trainings have no step in common."
    words = "within" if verdict["within"] else "NOT within"
    limits = verdict["limits"]
    return (
        f"The same batches: over {verdict['steps']} steps the mean losses differ by "
        f"{verdict['mean']:.4f} (limit {limits['mean']}), over the last fifth by "
        f"{verdict['end']:.4f} (limit {limits['end']}): **{words} the limits**. Both curves: "
        "curves.csv."
    )


def _precision(run: RunFolder) -> str | None:
    from mambaseg.storage.untrusted import read_yaml

    path = run.path / "config.yaml"
    if not path.is_file():
        return None
    precision = read_yaml(path)["trainer"]["precision"]
    return precision if isinstance(precision, str) else None


def _losses(path: Path) -> dict[int, float]:
    with path.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("train/loss")]
    return {int(row["step"]): float(row["train/loss"]) for row in rows}


# ---- commands -------------------------------------------------------------------------------


def _commands(parts: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| part | status | s | command |", "| --- | --- | ---: | --- |"]
    for part in parts:
        cells = (part["name"], part["status"], f"{part['seconds']:.0f}", f"`{part['command']}`")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
