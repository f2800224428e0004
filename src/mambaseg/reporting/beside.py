"""Our rows beside the published tables that learnt from as many labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

import yaml

from mambaseg.evaluation.metrics import BUILT_IN
from mambaseg.reporting.collect import Comparison, Entry
from mambaseg.reporting.grid import Grid, heading, plus_minus
from mambaseg.reporting.scores import estimate

_METRICS = {metric.name: metric for metric in BUILT_IN}


@dataclass(frozen=True)
class Published:
    """An entry of `published_tables.yaml`, and which runs may stand beside it."""

    title: str
    source: str
    data: str  # title of the data set
    classes: list[str]  # without the background
    supervision: str  # `RunData.supervision` of runs that learnt from as many labels
    columns: list[str]  # columns of cases.csv
    rows: dict[str, str]  # name -> the numbers as printed
    caveat: str
    split: str = ""  # how its name begins
    networks: int = 1  # that a method trains, at least


@cache
def published_tables() -> list[Published]:
    """All that are quoted."""
    file = resources.files("mambaseg.reporting") / "published_tables.yaml"
    return [Published(**entry) for entry in yaml.safe_load(file.read_text("utf-8"))]


def beside_the_papers(comparison: Comparison) -> list[Grid]:
    """A table for each published one that entries of the comparison belong beside."""
    data, split = comparison.protocol["data"], str(comparison.protocol["split"])
    grids = []
    for table in published_tables():
        same = (table.data, table.classes) == (data, [*comparison.classes])
        entries = [entry for entry in comparison.entries if _fits(entry, table)]
        if same and entries and split.startswith(table.split):
            grids.append(_beside(table, entries))
    return grids


def _fits(entry: Entry, table: Published) -> bool:
    run, learnt = entry.runs[0], table.supervision
    return len(run.networks) >= table.networks and f"{run.supervision} ".startswith(f"{learnt} ")


def _beside(table: Published, entries: Sequence[Entry]) -> Grid:
    metrics = [_METRICS[name] for name in table.columns]
    rows = []
    for entry in entries:
        for average, words in (("cases", "foreground"), ("background", "with background")):
            cells = []
            for metric in metrics:  # four decimals, shares without the leading zero, as printed
                text = plus_minus(estimate(entry, metric.name, average=average).mean, None, 4)
                cells.append(text if metric.unit else text.removeprefix("0"))
            rows.append([entry.label, words, *cells])
    ours = len(rows)
    rows += [[f"{name} (quoted)", "not stated", *numbers.split()]
             for name, numbers in table.rows.items()]  # fmt: skip
    notes = [f"{table.source}.", table.caveat]
    header = ["network", "average over classes", *map(heading, metrics)]
    marks = dict.fromkeys(range(ours, len(rows)), "quoted")
    return Grid(table.title, header, rows, notes, wide=2, marks=marks)
