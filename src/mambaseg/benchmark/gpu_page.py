"""The page of a GPU machine: what `mambaseg benchmark gpu` measured there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mambaseg.benchmark.tables import UNKNOWN, Column, Row, Table, number, tables, text
from mambaseg.storage.run_folder import RunFolder
from mambaseg.storage.untrusted import read_json

MEASURED = ("smoke", "truth", "steps", "scan", "kernels")  # parts that leave a record
RUNS = [
    text("network"),
    text("status"),
    number("steps", "steps", ".0f"),
    number("minutes", "fit_seconds", ".1f", 1 / 60),
    number("of them validation", "validation_seconds", ".1f", 1 / 60),
    number("ms per step", "step_seconds", ".2f", 1e3),
    number("network alone", "alone", ".2f", 1e3),
]
RUNS_NOTE = """\
ms per step: median over windows of the training without validations and saving; network alone: the
pure step. Scores: `report/index.html` in the experiment's folder.
"""
PARTS = [
    text("part", "name"), text("status"), number("s", "seconds", ".0f"),
    Column("command", lambda row: f"`{row['command']}`", is_number=False),
]  # fmt: skip


def write_page(out: Path, parts: Sequence[Row]) -> Path:
    """Writes `<out>/table.md`: what the parts that have ended left in `out`."""
    return RunFolder(out).write_text("table.md", "\n".join(_sections(out, parts)))


def newest_record(out: Path, part: str) -> dict[str, Any] | None:
    """What the benchmark of a part has measured."""
    files = sorted((out / "bench" / part).glob("*.json"))
    return read_json(files[-1]) if files else None


def _sections(out: Path, parts: Sequence[Row]) -> Iterator[str]:
    found = {part: newest_record(out, part) for part in MEASURED}
    records = {part: record for part, record in found.items() if record is not None}
    yield "# A GPU machine: numbers, speed, the paper's table\n"
    yield from dict.fromkeys(map(_setting, records.values()))
    paths = sorted((out / "runs").glob("*/*/run.json"))
    steps = records.get("steps", {"rows": []})["rows"]
    alone = {row["network"]: row["median_s"] for row in steps}
    folders = [RunFolder(path.parent) for path in paths]
    if runs := [_run(folder, alone) for folder in folders if folder.path.suffix != ".previous"]:
        yield f"## Trainings, nothing pretrained\n\n{Table('', RUNS, runs).markdown()}"
        yield RUNS_NOTE
    for report in sorted((out / "runs").glob("*/report/table.md")):
        yield f"\n{report.read_text('utf-8')}".replace("\n#", "\n##")[1:]
    for part, record in records.items():
        yield f"## {part.capitalize()}\n\nMade by `{record['command']}`\n"
        yield from (table.markdown() for table in tables(record))
        yield from (f"- {note}\n" for note in record["notes"])
    yield f"## Commands\n\n{Table('', PARTS, parts).markdown()}"


def _setting(record: Row) -> str:
    """Device, versions, code and day of a record."""
    hardware, versions = record["hardware"], record["versions"]
    named = (f"{name} {versions.get(name, '–')}" for name in ("python", "torch", "lightning"))
    return (
        f"- {(hardware['gpus'] or [hardware['cpu']])[0]}, {', '.join(named)}; commit "
        f"{str(record['code'].get('commit'))[:10]}; {str(record['started'])[:10]} (UTC)\n"
    )


def _run(folder: RunFolder, alone: Mapping[str, float]) -> Row:
    """The row of a training."""
    record, name = folder.record, folder.path.name.partition("-")[0]
    costs = record.get("cost") or {}
    return {"status": UNKNOWN, **record, **costs, "network": name, "alone": alone.get(name)}
