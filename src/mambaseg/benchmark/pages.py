"""Pages of what was measured: all networks (docs/models.md), and a GPU machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mambaseg.benchmark.tables import UNKNOWN, Column, Row, Table, number, tables, text
from mambaseg.storage.run_folder import RunFolder
from mambaseg.storage.untrusted import read_json

# ---- docs/models.md -----------------------------------------------------------------------------

INTRODUCTION = """\
# Networks

`make models` writes this page; do not edit it. The comment at the top of
`conf/model/<network>.yaml` describes a network; the docstrings of its module describe every
difference from the original. Tests compare everything here except the time with configs and code.

Every network accepts images of any size, any number of classes, and one or more channels. Images
are padded at the bottom and right to the next multiple given here, and the logits are cropped.
The numbers are for one channel, four classes and {size} × {size} pixels.

The optimizer of each network in `experiment=acdc_own_recipe` is in `conf/optim/own/<network>.yaml`
([protocol](protocol.md)).
"""
COSTS = """\
## Cost

GMAC: multiply-adds of all matrix products (convolutions, linear layers, attention, projections).
Scan: operations of the selective scans, 9 L D N + L D each. All: both, a multiply-add as two
operations ([performance](performance.md)).

Times: median of {repeats} calls, of one image in evaluation mode, and of a training step of two
images (forward, loss, backward, SGD). Measured by `{command}`:
{setting}.
Times are of that machine, with nothing else running. To compare two networks, measure them in turns
on yours: `mambaseg benchmark train 'models=[unet,mamba_unet]'`.
"""
HEADERS = [
    Column("network", lambda row: f"`{row['network']}`", is_number=False),
    text("what"), text("source"), text("differs from it", "differs"),
]  # fmt: skip
EXACT = [  # columns that follow from the code alone
    HEADERS[0],
    number("parameters", "parameters", ",.0f"),
    number("multiple of", "size_multiple", ".0f"),
    Column("GMAC", lambda row: f"{(row['layer_macs'] + row['other_macs']) / 1e9:.3f}"),
    Column("scan, GFLOP", lambda r: f"{r['scan_flops'] / 1e9:.3f}" if r["scan_flops"] else "–"),
    number("all, GFLOP", "flops", ".3f", 1e-9),
]
MEASURED_TIMES = [
    number("image, ms", "median_s", ".0f", 1e3),
    number("training step, ms", "step_s", ".0f", 1e3),
]


def read_header(network: str, config: str) -> dict[str, str]:
    """Reads the comment at the head of a network's config: what it is, `Source:`, `Differs:`.

    Raises:
        ValueError: a part is missing.
    """
    lines = config.splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    comment = " ".join(line.lstrip("# ") for line in lines[:end])
    what, _, rest = comment.partition(" Source: ")
    source, _, differs = rest.partition(" Differs: ")
    if not (what and source and differs):
        raise ValueError("a config of a network begins with a comment: summary, Source:, Differs:")
    return {"network": network, "what": what, "source": source, "differs": differs}


def networks_page(record: Row, configs: Mapping[str, str]) -> str:
    """The page of all networks as Markdown, from the record of `mambaseg benchmark profile`.

    `configs` is the text of `conf/model/<network>.yaml`, by the rows' `network`.
    """
    rows, versions, hardware = record["rows"], record["versions"], record["hardware"]
    device = hardware["gpus"][0] if record["device"] == "cuda" else hardware["cpu"]
    used = ", ".join(f"{name} {said}" for name, said in record["instructions"].items())
    setting = (
        f"{device}, threads: {hardware['threads']}, {record['precision']},\n"
        f"instruction sets: {used};\n"
        f"torch {versions['torch']}, numba {versions['numba']}, {record['started'][:10]}"
    )
    names = [row["network"] for row in rows]
    headers = Table("", HEADERS, [read_header(name, configs[name]) for name in names])
    repeats = record["settings"]["repeats"]
    costs = COSTS.format(repeats=repeats, command=record["command"], setting=setting)
    parts = (INTRODUCTION.format(size=record["settings"]["size"]), headers.markdown(), costs)
    return "\n".join((*parts, Table("", [*EXACT, *MEASURED_TIMES], rows).markdown()))


# ---- a GPU machine ------------------------------------------------------------------------------

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
