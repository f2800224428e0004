"""The jobs of a sweep side by side, for the terminal at its end."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mambaseg.errors import UserError
from mambaseg.evaluation.summary import distance_unit
from mambaseg.reporting.grid import UNDEFINED, Grid, heading, plus_minus
from mambaseg.reporting.status import jobs, state_of
from mambaseg.reporting.tables import metric_of
from mambaseg.storage.identity import monitor_of
from mambaseg.storage.run_folder import RunFolder
from mambaseg.storage.untrusted import read_yaml


def jobs_grid(experiment: Path, files: Collection[str]) -> Grid:
    """State, scores and time of the jobs listed by these files of `<experiment>/.jobs`.

    Args:
        experiment: `outputs/<experiment>`.
        files: names of files; they list the jobs of one sweep.
    """
    now, rows, scores, notes, marks = datetime.datetime.now(datetime.UTC), [], [], [], {}
    for place, (words, run, error, listed) in enumerate(sorted(jobs(experiment, files))):
        there = run and (experiment / run / "run.json").is_file()
        found = state_of(experiment / run, words, now) if there else None
        state = found.state if found else listed
        cause = (found.cause if found else "") or error
        rows.append([words or run or "the only job", state, found.time if found else ""])
        scores.append(_scores(RunFolder(experiment / run)) if there else {})
        if state != "done":
            marks[place] = f"state-{state}"
        if cause:
            notes.append(f"{rows[-1][0]}: {cause}")
    columns = list(dict.fromkeys(name for one in scores for name in one))
    cells = [
        [name, state, *(one.get(column, UNDEFINED) for column in columns), time or UNDEFINED]
        for (name, state, time), one in zip(rows, scores, strict=True)
    ]
    header = ["job", "state", *columns, "time"]
    return Grid(str(experiment), header, cells, notes, wide=1, marks=marks)


def _scores(folder: RunFolder) -> dict[str, str]:
    """Heading -> score: the one that chose the checkpoint, and the first ones of the test."""
    found: dict[str, str] = {}
    record = folder.record
    with contextlib.suppress(UserError, OSError, KeyError, TypeError, ValueError):
        monitor = monitor_of(read_yaml(folder.path / "config.yaml"))
        if monitor:
            found[monitor] = _number(record.get(monitor.replace("/", "_")))
        summary = folder.summary
        if "foreground" in summary:
            mean = summary["foreground"]
            distance = f"hd95_{distance_unit(summary)}"
            chosen = {"dice": mean["dice"]["mean"], distance: mean[distance]["mean"]}
        else:
            chosen = {name: score["mean"] for name, score in summary["scores"].items()}
        for name, score in list(chosen.items())[:2]:
            metric = metric_of(summary, name)
            found[f"test {heading(metric)}"] = plus_minus(score, None, metric.decimals)
    return found


def _number(score: Any) -> str:
    return plus_minus(score if isinstance(score, int | float) else None, None, 4)
