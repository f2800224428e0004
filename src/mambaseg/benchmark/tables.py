"""What was measured as tables of at most 100 characters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

UNKNOWN = "–"
WORDS = (
    "form", "pass", "backend", "map", "two blocks", "network", "worst in", "limit", "shape",
    "inputs", "within", "same bits", "same bits, deterministic", "kernel",
)  # fmt: skip
"""Columns that hold no numbers."""
MOST_KERNELS = 25
"""Of a network, the longest ones; the record has all of them."""
Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]
"""Heading and how its cell is made."""


def tables(record: Mapping[str, Any]) -> list[Table]:
    """The tables of a benchmark's record."""
    if record["what"] == "scan":
        return [
            *_scan_tables(record),
            _table("worst error against float64", ERRORS, record["errors"]),
        ]
    title = f"{record['what']} · {_setting(record)}"
    if record["what"] == "truth":
        by_type = _table(title, TRUTH, record["rows"], group=_shape_and("dtype"))
        weights = _table(
            "networks against float64; the same weights from the same start",
            REPEATS,
            record["networks"],
        )
        return [by_type, weights]
    if record["what"] == "kernels":
        steps = _table(title, STEPS, record["rows"])
        names = [
            _table(row["network"], KERNELS, row["kernels"][:MOST_KERNELS]) for row in record["rows"]
        ]
        return [steps, *names]
    columns = {"profile": PROFILE, "blocks": BLOCKS}.get(record["what"], NETWORKS)
    return [_table(title, columns, record["rows"], group=lambda row: row.get("stage"))]


def _shape_and(key: str) -> Callable[[Row], Any]:
    return lambda row: (row["shape"], row[key])


def markdown(table: Table) -> str:
    """One of `tables` as Markdown, its title above it."""
    columns = [(str(column.header), [str(cell) for cell in column.cells], column.justify)
               for column in table.columns]  # fmt: skip
    rules = ["---:" if justify == "right" else "---" for _, _, justify in columns]
    lines = [[heading for heading, _, _ in columns], rules]
    lines += [list(cells) for cells in zip(*(cells for _, cells, _ in columns), strict=True)]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    title = " · ".join(str(table.title).split("\n"))
    return f"**{title}**\n\n{body}\n"


def _setting(record: Mapping[str, Any]) -> str:
    settings, hardware = record["settings"], record["hardware"]
    device = record["device"]
    name = hardware["gpus"][0] if device == "cuda" else hardware["cpu"]
    threads = "" if device == "cuda" else f", threads: {hardware['threads']}"
    size = f"{settings['size']}²" + (f", batch {settings['batch']}" if "batch" in settings else "")
    return f"{size}, {record['precision']}\n{name}{threads}"


def _scan_tables(record: Mapping[str, Any]) -> list[Table]:
    """One table per shape; a rule between forms and passes."""
    result = []
    columns = list(SCANS)
    if record["ceilings"]:
        columns.append(("of limit", lambda row: _percent(row["limit_share"])))
        columns.append(("limit", lambda row: row["limit_by"]))
    for shape in dict.fromkeys(row["shape"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["shape"] == shape]
        sizes = "B={batch} K={groups} D={channels} L={length} N={states}".format(**rows[0])
        title = f"{shape}: {sizes}, {record['precision']}"
        result.append(_table(title, columns, rows, group=lambda row: (row["form"], row["pass"])))
    return result


def _table(
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Row],
    *,
    group: Callable[[Row], Any] = lambda row: None,
) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for heading, _ in columns:
        table.add_column(
            heading,
            justify="left" if heading in WORDS else "right",
            no_wrap=heading != "network",
            overflow="fold",
        )
    for index, row in enumerate(rows):
        if index and group(row) != group(rows[index - 1]):
            table.add_section()
        table.add_row(*(cell(row) for _, cell in columns))
    return table


# ---- cells --------------------------------------------------------------------------------------


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _spread(row: Row) -> str:
    return f"{_milliseconds(row['min_s'])}–{_milliseconds(row['max_s'])}"


def _ratio(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.2f}×" if value < 10 else f"{value:.1f}×"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _mebibytes(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value / 2**20:,.0f}"


def _billions(value: int) -> str:
    return f"{value / 1e9:.3f}"


def _answer(value: bool | None) -> str:
    return UNKNOWN if value is None else "yes" if value else "no"


def _speedup(row: Row) -> str:
    return "1 (base)" if row["backend"] == row["baseline"] else _ratio(row["speedup"])


TIMES: list[Column] = [
    ("ms", lambda row: _milliseconds(row["median_s"])),
    ("min–max", _spread),
]
SCANS: list[Column] = [
    ("form", lambda row: row["form"]),
    ("pass", lambda row: row["pass"]),
    ("backend", lambda row: row["backend"]),
    *TIMES,
    ("speed-up", _speedup),
    ("MiB added", lambda row: _mebibytes(row["peak_added_bytes"])),
]
ERRORS: list[Column] = [
    ("form", lambda row: row["form"]),
    ("backend", lambda row: row["backend"]),
    ("error", lambda row: f"{row['worst']:.1e}"),
    ("worst in", lambda row: row["tensor"]),
]
NETWORKS: list[Column] = [
    ("network", lambda row: row["network"]),
    *TIMES,
    ("time ratio", lambda row: _ratio(row["ratio"])),
    ("images/s", lambda row: f"{row['images_per_s']:.1f}"),
    ("peak MiB", lambda row: _mebibytes(row["peak_bytes"])),
    ("MiB added", lambda row: _mebibytes(row["peak_added_bytes"])),
]
BLOCKS: list[Column] = [
    ("map", lambda row: f"{row['side']}² × {row['channels']}"),
    ("two blocks", lambda row: row["network"]),
    *TIMES,
    ("time ratio", lambda row: _ratio(row["ratio"])),
    ("MiB added", lambda row: _mebibytes(row["peak_added_bytes"])),
]
PROFILE: list[Column] = [
    ("network", lambda row: row["network"]),
    ("parameters", lambda row: f"{row['parameters']:,}"),
    ("layers GMAC", lambda row: _billions(row["layer_macs"])),
    ("other GMAC", lambda row: _billions(row["other_macs"])),
    ("scan GFLOP", lambda row: _billions(row["scan_flops"])),
    ("all GFLOP", lambda row: _billions(row["flops"])),
    ("ms", lambda row: _milliseconds(row["median_s"])),
    ("peak MiB", lambda row: _mebibytes(row["peak_bytes"])),
]
TRUTH: list[Column] = [
    ("shape", lambda row: row["shape"]),
    ("inputs", lambda row: row["dtype"]),
    *ERRORS[:3],
    ("limit", lambda row: f"{row['limit']:.0e}"),
    ("within", lambda row: _answer(row["worst"] <= row["limit"])),
    ("worst in", lambda row: row["tensor"]),
    ("same bits", lambda row: _answer(row["repeats"])),
]
REPEATS: list[Column] = [
    ("network", lambda row: row["network"]),
    ("error", lambda row: f"{row['worst']:.1e}"),
    ("limit", lambda row: f"{row['limit']:.0e}"),
    ("same bits", lambda row: _answer(row["repeats"])),
    ("same bits, deterministic", lambda row: _answer(row["repeats_deterministic"])),
]
STEPS: list[Column] = [
    ("network", lambda row: row["network"]),
    ("ms", lambda row: _milliseconds(row["wall_s"])),
    ("in kernels", lambda row: _milliseconds(row["kernel_s"])),
    ("launching", lambda row: _milliseconds(row["host_s"])),
    ("launches", lambda row: f"{row['launches']:.0f}"),
]
KERNELS: list[Column] = [
    ("kernel", lambda row: row["name"][:72]),
    ("ms", lambda row: _milliseconds(row["seconds"])),
    ("calls", lambda row: f"{row['calls']:.0f}"),
]
