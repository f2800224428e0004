"""What was measured as tables: for a terminal of 100 characters, and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from rich import box
from rich.table import Table as RichTable

UNKNOWN = "–"
MOST_KERNELS = 25  # of a network, the longest ones; the record has all of them
Row = Mapping[str, Any]


class Column(NamedTuple):
    """A column: its heading, and how a cell is made of a row."""

    heading: str
    cell: Callable[[Row], str]
    is_number: bool = True


@dataclass(frozen=True)
class Table:
    """Rows to be shown; printed by rich as it is, or written as Markdown."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]  # of a record
    groups: Sequence[str] = ()  # keys of a row; where one changes, a rule is drawn

    def __rich__(self) -> RichTable:
        """The table for a terminal."""
        table = RichTable(
            title=self.title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left"
        )
        for column in self.columns:
            table.add_column(
                column.heading,
                justify="right" if column.is_number else "left",
                no_wrap=column.heading not in ("network", "what"),
                overflow="fold",
            )
        groups = [[row.get(key) for key in self.groups] for row in self.rows]
        for index, row in enumerate(self.rows):
            if index and groups[index] != groups[index - 1]:
                table.add_section()
            table.add_row(*(column.cell(row) for column in self.columns))
        return table

    def markdown(self) -> str:
        """The table as Markdown, its title above it."""
        headings = [column.heading for column in self.columns]
        rules = ["---:" if column.is_number else "---" for column in self.columns]
        lines = [headings, rules, *([c.cell(row) for c in self.columns] for row in self.rows)]
        body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        title = self.title.replace("\n", " · ")
        return f"**{title}**\n\n{body}" if title else body


def tables(record: Mapping[str, Any]) -> Iterator[Table]:
    """The tables of a benchmark's record."""
    what, rows = record["what"], record["rows"]
    title = f"{what} · {_setting(record)}"
    if what == "scan":
        sizes = "{shape}: B={batch} K={groups} D={channels} L={length} N={states}"
        for name, of_shape in groupby(rows, lambda row: sizes.format(**row)):
            title = f"{name}, {record['precision']}"
            yield Table(title, SCANS, list(of_shape), ("form", "pass"))
        yield Table("worst error against float64", ERRORS, record["errors"])
    elif what == "truth":
        yield Table(title, TRUTH, rows, ("shape", "dtype"))
        again = "networks against float64; the same weights from the same start"
        yield Table(again, REPEATS, record["networks"])
    elif what == "growth":
        yield Table(f"growth, {record['precision']}", GROWTH, record["exponents"], ("part",))
    elif what == "loop":
        yield Table(title, LOOP, rows)
    elif what == "kernels":
        yield Table(title, STEPS, rows)
        for row in rows:
            yield Table(row["network"], KERNELS, row["kernels"][:MOST_KERNELS])
    else:
        columns = {"profile": PROFILE, "blocks": BLOCKS}.get(what, NETWORKS)
        yield Table(title, columns, rows, ("stage",))


def _setting(record: Mapping[str, Any]) -> str:
    settings, hardware = record["settings"], record["hardware"]
    on_gpu = record["device"] == "cuda"
    device = hardware["gpus"][0] if on_gpu else f"{hardware['cpu']}, threads: {hardware['threads']}"
    size = f"{settings['size']}²" + (f", batch {settings['batch']}" if "batch" in settings else "")
    return f"{size}, {record['precision']}\n{device}"


# ---- columns ------------------------------------------------------------------------------------


def text(heading: str, key: str | None = None) -> Column:
    """A column of words."""
    return Column(heading, lambda row: str(row[key or heading]), is_number=False)


def number(heading: str, key: str, form: str, factor: float = 1.0) -> Column:
    """A column of numbers, `factor` times those of the rows; None is unknown."""

    def cell(row: Row) -> str:
        value = row.get(key)
        return UNKNOWN if value is None else format(factor * value, form)

    return Column(heading, cell)


def _milliseconds(heading: str, *keys: str) -> Column:
    def one(seconds: float) -> str:
        value = 1e3 * seconds
        return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"

    return Column(heading, lambda row: UNKNOWN.join(one(row[key]) for key in keys))


def _seconds(heading: str, *keys: str) -> Column:
    return Column(heading, lambda row: UNKNOWN.join(f"{row[key]:.3g}" for key in keys))


def _ratio(value: float) -> str:
    return f"{value:.2f}×" if value < 10 else f"{value:.1f}×"


def _answer(heading: str, of: Callable[[Row], bool | None]) -> Column:
    words = {None: UNKNOWN, True: "yes", False: "no"}
    return Column(heading, lambda row: words[of(row)], is_number=False)


def _speedup(row: Row) -> str:
    return "1 (base)" if row["backend"] == row["baseline"] else _ratio(row["speedup"])


def _within(row: Row) -> bool:
    """Whether an error is within its limit; NaN, which a record has as None, is not."""
    return row["worst"] is not None and row["worst"] <= row["limit"]


TIMES = [_milliseconds("ms", "median_s"), _milliseconds("min–max", "min_s", "max_s")]
TIME_RATIO = Column("time ratio", lambda row: _ratio(row["ratio"]))
PEAK = number("peak MiB", "peak_bytes", ",.0f", 2**-20)
ADDED = number("MiB added", "peak_added_bytes", ",.0f", 2**-20)
LIMIT = number("limit", "limit", ".0e")
ERROR, WORST = number("error", "worst", ".1e"), text("worst in", "tensor")
REPEAT = _answer("same bits", lambda row: row["repeats"])

SCANS = [
    text("form"), text("pass"), text("backend"), *TIMES, Column("speed-up", _speedup),
    Column("× exp", lambda row: _ratio(row["exps"])), ADDED,
]  # fmt: skip
ERRORS = [text("form"), text("backend"), ERROR, WORST]
NETWORKS = [
    text("network"), *TIMES, TIME_RATIO, number("images/s", "images_per_s", ".1f"), PEAK, ADDED,
]  # fmt: skip
BLOCKS = [
    Column("map", lambda row: f"{row['side']}² × {row['channels']}", is_number=False),
    text("two blocks", "network"), *TIMES, TIME_RATIO, ADDED,
]  # fmt: skip
PROFILE = [
    text("network"),
    number("parameters", "parameters", ",.0f"),
    number("layers GMAC", "layer_macs", ".3f", 1e-9),
    number("other GMAC", "other_macs", ".3f", 1e-9),
    number("scan GFLOP", "scan_flops", ".3f", 1e-9),
    number("all GFLOP", "flops", ".3f", 1e-9),
    TIMES[0], PEAK,
]  # fmt: skip
TRUTH = [
    text("shape"), text("inputs", "dtype"), text("form"), text("backend"), ERROR, LIMIT,
    _answer("within", _within), WORST, REPEAT,
]  # fmt: skip
REPEATS = [
    text("network"), ERROR, LIMIT, REPEAT,
    _answer("same bits, deterministic", lambda row: row["repeats_deterministic"]),
]  # fmt: skip
GROWTH = [
    text("part"), text("what"), number("from", "from", ",.0f"), number("to", "to", ",.0f"),
    _seconds("s", "first_s", "last_s"), number("time ~ n^", "time", ".2f"),
    number("at the end", "time_at_the_end", ".2f"), number("memory ~ n^", "memory", ".2f"),
]  # fmt: skip
LOOP = [
    text("network"), _milliseconds("a step of the loop, ms", "loop_s"),
    _milliseconds("the step alone, ms", "bare_s"), number("added, %", "added", "+.1f", 100),
    number("steps", "steps", ".0f"),
]  # fmt: skip
STEPS = [
    text("network"), _milliseconds("ms", "wall_s"), _milliseconds("in kernels", "kernel_s"),
    _milliseconds("launching", "host_s"), number("launches", "launches", ".0f"),
]  # fmt: skip
KERNELS = [
    Column("kernel", lambda row: row["name"][:72], is_number=False),
    _milliseconds("ms", "seconds"), number("calls", "calls", ".0f"),
]  # fmt: skip
