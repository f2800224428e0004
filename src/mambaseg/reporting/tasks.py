"""Scores of tasks other than segmentation, shown by what their metrics.json says of itself.

`scores` has a mean and a standard deviation of each score; the first one stands for the test.
`title`, `columns` (score -> heading and decimals) and `note` say how to show them, and may be
missing.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from mambaseg.errors import UserError
from mambaseg.reporting.collect import (
    RunData,
    entry_labels,
    is_other_task,
    read_identity,
    run_folders,
    without_repeats,
)
from mambaseg.reporting.tables import UNDEFINED, Grid, column_of, mean_text, seen_note
from mambaseg.reporting.valid import check_means, reading
from mambaseg.storage.run_folder import RunFolder
from mambaseg.storage.untrusted import read_json


def other_runs(folder: str | Path) -> tuple[list[RunData], list[str]]:
    """The finished runs of other tasks in an experiment, and what had to be left out.

    Raises:
        UserError: no such folder.
    """
    runs, problems = [], []
    for path in run_folders(folder):
        if RunFolder(path).finished and is_other_task(path):
            try:
                record, config = read_identity(path)
                with reading(path / "metrics.json") as file:
                    summary = read_json(file)
                    check_means(summary)
                runs.append(RunData(path, record, config, summary, ()))
            except UserError as error:
                problems.append(f"left out: {error}")
    runs, repeated = without_repeats(runs, _setting)
    return runs, problems + repeated


def _setting(run: RunData) -> list[Any]:
    content = (run.record.get("data") or {}).get("fingerprint")
    return [run.setting, run.summary["data"], run.summary["split"], content, run.saw_cases]


def other_grids(runs: Sequence[RunData]) -> list[Grid]:
    """A table per task and set of scores; see `_grid`."""
    tasks: dict[str, list[RunData]] = defaultdict(list)
    for run in runs:
        tasks[json.dumps([run.summary["task"], list(run.summary["scores"])])].append(run)
    return [_grid(members) for _, members in sorted(tasks.items())]


def _grid(runs: Sequence[RunData]) -> Grid:
    """One row per network, setting and data; ± standard deviation over seeds."""
    entries: dict[str, list[RunData]] = defaultdict(list)
    for run in runs:
        entries[json.dumps(_setting(run), sort_keys=True, default=str)].append(run)
    groups, about = list(entries.values()), runs[-1].summary
    columns = {name: column_of(about, name) for name in about["scores"]}
    rows = []
    for name, members in sorted(zip(entry_labels(groups), groups, strict=True), key=lambda e: e[0]):
        first, cells = members[0], []
        for score, (_, digits) in columns.items():
            means = [run.summary["scores"][score]["mean"] for run in members]
            known = [mean for mean in means if mean is not None]
            spread = stdev(known) if len(known) > 1 else None
            cells.append(mean_text(fmean(known) if known else None, spread, digits))
        split = f"{first.split['name']} ({first.split['hash']})" + ", SEEN CASES" * first.saw_cases
        count = first.record.get("parameters")
        texts = [name, str(first.summary["data"]), split, *cells, str(first.summary["cases"])]
        rows.append([*texts, str(len(members)), UNDEFINED if count is None else f"{count:,}"])
    headings = [heading for heading, _ in columns.values()]
    notes = [
        "Means over the test cases; ± standard deviation over the runs' seeds. Rows with other "
        "data or another split are not comparable.",
        *filter(None, [about.get("note")]),
        *(f"{run.path.name}: {seen_note(run.summary)}" for run in runs if run.saw_cases),
    ]
    header = ["network", "data", "split", *headings, "cases", "runs", "parameters"]
    return Grid(about.get("title") or str(about["task"]), header, rows, notes, wide=3)
