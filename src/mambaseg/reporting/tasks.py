"""Tables of tasks other than segmentation, shown by what their metrics.json says of itself.

`scores` has a mean and a standard deviation of each score; the first one stands for the test.
`title`, `metrics` (descriptions of the scores) and `note` say how to show them, and may be missing.
"""

from __future__ import annotations

from collections.abc import Sequence

from mambaseg.reporting.collect import entry_labels, grouped
from mambaseg.reporting.grid import UNDEFINED, Grid, heading, plus_minus
from mambaseg.reporting.runs import RunData
from mambaseg.reporting.scores import mean_sd
from mambaseg.reporting.tables import metric_of, seen_note


def other_grids(runs: Sequence[RunData]) -> list[Grid]:
    """A table per task and set of scores; see `_grid`."""
    tasks = grouped(runs, lambda run: [run.task, list(run.summary["scores"])])
    return [_grid(members) for members in sorted(tasks, key=lambda own: own[0].task)]


def _grid(runs: Sequence[RunData]) -> Grid:
    """One row per network, setting and data; ± standard deviation over seeds."""
    groups, about = grouped(runs, lambda run: [run.protocol, run.setting]), runs[-1].summary
    metrics = [metric_of(about, name) for name in about["scores"]]
    rows = []
    for name, members in sorted(zip(entry_labels(groups), groups, strict=True), key=lambda e: e[0]):
        cells = []
        for metric in metrics:
            means = [run.summary["scores"][metric.name]["mean"] for run in members]
            known = [mean for mean in means if mean is not None]
            cells.append(plus_minus(*mean_sd(known), metric.decimals))
        first = members[0]
        digest = first.protocol["split hash"]
        split = first.protocol["split"] + (f" ({digest})" if digest else "")
        split += ", SEEN CASES" * first.saw_cases
        count = first.record.get("parameters")
        texts = [name, str(first.summary["data"]), split, *cells, str(first.summary["cases"])]
        rows.append([*texts, str(len(members)), UNDEFINED if count is None else f"{count:,}"])
    notes = [
        "Means over the test cases; ± standard deviation over the runs' seeds. Rows with other "
        "data or another split are not comparable.",
        *filter(None, [about.get("note")]),
        *(f"{run.path.name}: {seen_note(run.summary)}" for run in runs if run.saw_cases),
    ]
    header = ["network", "data", "split", *map(heading, metrics), "cases", "runs", "parameters"]
    return Grid(about.get("title") or runs[0].task, header, rows, notes, wide=3)
