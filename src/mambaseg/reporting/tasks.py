"""Scores of tasks other than segmentation, shown by what their metrics.json says of itself.

`scores` has a mean and a standard deviation of each score; the first one stands for the test.
`title`, `columns` (score -> heading and decimals) and `note` say how to show them, and may be
missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mambaseg.errors import UserError
from mambaseg.reporting.collect import entry_labels, grouped, is_other_task, without_repeats
from mambaseg.reporting.grid import UNDEFINED, Grid, plus_minus
from mambaseg.reporting.runs import (
    ORIGIN,
    Check,
    RunData,
    is_mapping,
    is_number,
    is_text,
    optional,
    read_file,
    read_identity,
    run_folders,
)
from mambaseg.reporting.scores import mean_sd
from mambaseg.reporting.tables import column_of, seen_note
from mambaseg.storage.run_folder import RunFolder


def _are_means(scores: Any) -> bool:
    return is_mapping(scores) and 0 < len(scores) <= 256 and all(map(_is_mean, scores.values()))


def _is_mean(score: Any) -> bool:
    known = is_mapping(score) and {"mean", "sd"} <= score.keys()
    return known and all(optional(is_number)(score[field]) for field in ("mean", "sd"))


def _are_columns(columns: Any) -> bool:
    return is_mapping(columns) and all(
        isinstance(column, list)
        and len(column) == 2
        and is_text(column[0])
        and type(column[1]) is int
        and column[1] in range(10)
        for column in columns.values()
    )


_SUMMARY: dict[str, Check] = {
    **ORIGIN,
    "task": is_text,
    "cases": lambda value: type(value) is int and is_number(value) and value >= 0,
    "scores": _are_means,
    "columns": optional(_are_columns),
    "title": optional(is_text),
    "note": optional(is_text),
}


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
                summary = read_file(path / "metrics.json", _SUMMARY)
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
    tasks = grouped(runs, lambda run: [run.summary["task"], list(run.summary["scores"])])
    return [_grid(members) for members in sorted(tasks, key=lambda own: own[0].summary["task"])]


def _grid(runs: Sequence[RunData]) -> Grid:
    """One row per network, setting and data; ± standard deviation over seeds."""
    groups, about = grouped(runs, _setting), runs[-1].summary
    columns = {name: column_of(about, name) for name in about["scores"]}
    rows = []
    for name, members in sorted(zip(entry_labels(groups), groups, strict=True), key=lambda e: e[0]):
        first, cells = members[0], []
        for score, (_, digits) in columns.items():
            means = [run.summary["scores"][score]["mean"] for run in members]
            known = [mean for mean in means if mean is not None]
            cells.append(plus_minus(*mean_sd(known), digits))
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
