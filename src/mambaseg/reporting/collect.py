"""Decides which runs may be averaged and which may be compared.

Three levels, each stricter than a reader would check by hand:

- *run*: one finished folder with test scores.
- *entry*: a row of the tables. Its runs differ in seed and fold only; any other difference of the
  configuration makes another entry, whose label shows the difference.
- *comparison*: entries scored on the same data and split under the same metric convention. Others
  get a comparison, and a section of the page, of their own.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mambaseg.errors import counted
from mambaseg.evaluation.metrics import Metric
from mambaseg.reporting.curves import Curve, read_curves
from mambaseg.reporting.labels import labels
from mambaseg.reporting.reading import read_runs
from mambaseg.reporting.runs import SEGMENTATION, Row, RunData, rows_where

_SEED = re.compile(r"-seed\d+-[0-9a-f]{8}(?=/)")  # in the name of a run folder
_LABELS_ALONE = ("supervised", "partial_ce")  # what other methods are compared with


@dataclass(frozen=True)
class Entry:
    """A network under one setting: a row of the tables."""

    label: str  # unique in its comparison; shows what differs from the other entries
    runs: tuple[RunData, ...]  # differ in seed and fold only; sorted by both

    @cached_property
    def by_seed(self) -> dict[int, list[Row]]:
        """Seed -> rows of all its folds together, a case that is in two folds once per fold."""
        rows: dict[int, list[Row]] = defaultdict(list)
        for run in self.runs:
            rows[run.seed] += run.rows
        return dict(rows)

    @cached_property
    def _chosen(self) -> dict[tuple[Any, ...], dict[int, list[Row]]]:
        return {}  # of `chosen`: a report asks for the same rows once for each metric

    def chosen(self, where: Mapping[str, str], *, background: bool) -> dict[int, list[Row]]:
        """Seed -> rows with these values, of the foreground classes or of all."""
        key = (background, *where.items())
        if key not in self._chosen:
            self._chosen[key] = {
                seed: rows_where(rows, where, background=background)
                for seed, rows in self.by_seed.items()
            }
        return self._chosen[key]

    @cached_property
    def rows(self) -> list[Row]:
        """Rows of all runs."""
        return [row for run in self.runs for row in run.rows]

    @cached_property
    def curves(self) -> list[dict[str, Curve]]:
        """Of each run the points of its loss and validation Dice."""
        return [read_curves(run) for run in self.runs]

    @property
    def folds(self) -> int:
        """How many folds of a cross-validation there are; 0 without one."""
        return len({run.fold for run in self.runs} - {None})

    @cached_property
    def patients(self) -> set[str]:
        """Patients that any run tested."""
        return {row["patient"] for row in self.rows}


def repeats(entry: Entry) -> str:
    """How many seeds, and folds where there are any; runs where a seed lacks a fold."""
    seeds, runs = len(entry.by_seed), len(entry.runs)
    if not entry.folds:
        return f"{seeds}"
    whole = runs == seeds * entry.folds
    return f"{seeds} × {counted(entry.folds, 'fold')}" if whole else f"{seeds} ({runs} runs)"


@dataclass(frozen=True)
class Comparison:
    """Entries that were scored on the same data, split and convention."""

    protocol: Mapping[str, Any]  # what they share; see `RunData.protocol`
    entries: tuple[Entry, ...]  # in order of their labels
    mark: str = ""  # what tells it from others whose title would be the same

    @property
    def runs(self) -> list[RunData]:
        """Runs of all entries."""
        return [run for entry in self.entries for run in entry.runs]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the foreground classes."""
        return tuple(self.protocol["classes"][1:])

    @property
    def title(self) -> str:
        """Data, split and convention in one line."""
        protocol = self.protocol
        digest = f" ({protocol['split hash']})" if protocol["split hash"] else ""
        side = protocol.get("longest side")
        parts = [
            str(protocol["data"]),
            f"split {protocol['split']}{digest}",
            f"empty masks: {protocol['policy']}",
            f"at most {side} pixels a side" if side else "",
            "SEEN CASES" if protocol.get("seen cases") else "",
            self.mark,
        ]
        return ", ".join(filter(None, parts))

    @cached_property
    def subject(self) -> str:
        """`patient`, or `case` where every case is one of its own, as pictures are."""
        rows = [row for entry in self.entries for row in entry.rows]
        return "case" if all(row["patient"] == row["case"] for row in rows) else "patient"

    @cached_property
    def unit(self) -> str:
        """`mm` where every run shows its distances in mm, otherwise `vox`, which all have."""
        known = all(row.get("volume_ml") is not None for e in self.entries for row in e.rows)
        shown = {run.summary["convention"].get("distances", "mm") for run in self.runs}
        return "mm" if known and shown == {"mm"} else "vox"

    @cached_property
    def metrics(self) -> list[Metric]:
        """Descriptions of all scores that any run has, in the order of the columns."""
        found: dict[str, Metric] = {}
        for run in self.runs:
            for metric in run.metrics:
                found.setdefault(metric.name, metric)
        return list(found.values())


def collect(folder: str | Path) -> tuple[list[Comparison], list[RunData], list[str]]:
    """Reads all finished runs of an experiment, `outputs/<name>`.

    Returns:
        Comparisons, the largest first; runs of other tasks than segmentation; and what had to be
        left out, one sentence each.

    Raises:
        UserError: there is no finished run with test scores.
    """
    runs, problems = read_runs(folder)
    runs, repeated = _without_repeats(_with_scored(runs))
    segmented = [run for run in runs if run.task == SEGMENTATION]
    others = [run for run in runs if run.task != SEGMENTATION]
    return group(segmented), others, problems + repeated


def group(runs: Sequence[RunData]) -> list[Comparison]:
    """Runs -> comparisons -> entries, by protocol and by setting."""
    comparisons = []
    for members in _of_one_truth(grouped(runs, lambda run: run.protocol)):
        groups = grouped(members, lambda run: run.setting)
        entries = [
            Entry(name, tuple(sorted(own, key=lambda run: (run.seed, run.fold or 0))))
            for name, own in zip(entry_labels(groups), groups, strict=True)
        ]
        entries.sort(key=_order)
        comparisons.append(Comparison(members[0].protocol, tuple(entries)))
    comparisons.sort(key=lambda part: (-len(part.entries), part.title))
    return _told_apart(comparisons)


def _told_apart(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same with titles that differ: by what their protocols differ in, or else by a number."""
    alike: dict[str, list[Comparison]] = defaultdict(list)
    for comparison in comparisons:
        alike[comparison.title].append(comparison)
    marks = {}
    for same in filter(lambda same: len(same) > 1, alike.values()):
        keys = [key for key in same[0].protocol if len({_key(c.protocol[key]) for c in same}) > 1]
        words = [", ".join(_told(key, one.protocol[key]) for key in keys) for one in same]
        for place, (one, mark) in enumerate(zip(same, words, strict=True)):
            number = words[: place + 1].count(mark) if words.count(mark) > 1 else None
            parts = (mark, f"labels no. {number}" if number else "")
            marks[id(one)] = ", ".join(filter(None, parts))
    return [replace(one, mark=marks.get(id(one), "")) for one in comparisons]


def _told(key: str, value: Any) -> str:
    """A part of a protocol in a title; of regions their names."""
    several = isinstance(value, (list, Mapping))
    return f"{key.replace('_', ' ')} {'/'.join(map(str, value)) if several else value}"


def grouped(runs: Sequence[RunData], setting: Callable[[RunData], Any]) -> list[list[RunData]]:
    """Runs with the same setting together."""
    groups: dict[str, list[RunData]] = defaultdict(list)
    for run in runs:
        groups[_key(setting(run))].append(run)
    return list(groups.values())


def _of_one_truth(protocols: Iterable[Sequence[RunData]]) -> Iterator[list[RunData]]:
    """Runs of one protocol, apart where the cases of a fold have had other labels."""
    for runs in protocols:
        parts: list[tuple[dict[int | None, Any], list[RunData]]] = []
        for run in runs:
            truth = (run.record.get("data") or {}).get("scored")
            for known, own in parts:
                if known.setdefault(run.fold, truth) == truth:
                    own.append(run)
                    break
            else:
                parts.append(({run.fold: truth}, [run]))
        yield from (own for _, own in parts)


def entry_labels(groups: Sequence[Sequence[RunData]]) -> list[str]:
    """A unique name for each entry's runs; where two settings read alike, with a run's hash."""
    names = labels([(runs[0].model, entry_settings(runs)) for runs in groups])
    return [
        f"{name} ({runs[0].path.name[-8:]})" if names.count(name) > 1 else name
        for name, runs in zip(names, groups, strict=True)
    ]


def entry_settings(runs: Sequence[RunData]) -> dict[str, Any]:
    """The settings that an entry is named by: those of its runs, a checkpoint without its seed."""
    settings = dict(runs[0].settings)
    if "checkpoint" in settings and len({run.seed for run in runs}) > 1:
        settings["checkpoint"] = _SEED.sub("-seed*", settings["checkpoint"])
    return settings


def _order(entry: Entry) -> tuple[int, bool, int, str]:
    """The paper's three networks in its order, others by name; labels alone, then few networks."""
    known = ("unet", "swin_unet", "mamba_unet")
    model = entry.label.split(" ", 1)[0]
    place = known.index(model) if model in known else len(known)
    run = entry.runs[0]
    return place, run.method not in _LABELS_ALONE, len(run.networks), entry.label


def _with_scored(runs: Sequence[RunData]) -> list[RunData]:
    """The runs, with what others tell of the same data: earlier versions wrote one fingerprint."""
    data = [run.record.get("data") or {} for run in runs]
    places = [
        (own.get("fingerprint"), run.split["hash"]) for run, own in zip(runs, data, strict=True)
    ]
    known: dict[Any, dict[str, Any]] = defaultdict(dict)
    for place, own in zip(places, data, strict=True):
        known[place] |= {key: own[key] for key in ("scored", "images") if key in own}
    return [
        replace(run, record={**run.record, "data": {**known[place], **own}})
        for run, place, own in zip(runs, places, data, strict=True)
    ]


def _without_repeats(runs: Sequence[RunData]) -> tuple[list[RunData], list[str]]:
    """Of runs with the same setting, seed and fold the latest; and a sentence for each other."""
    latest: dict[str, RunData] = {}
    repeated = []
    for run in sorted(runs, key=lambda run: str(run.record.get("ended", ""))):
        key = _key([run.protocol, run.setting, run.fold, run.seed])
        if key in latest:
            repeated.append(
                f"left out: {latest[key].path.name} has the setting, seed and fold of "
                f"{run.path.name}, which ended later"
            )
        latest[key] = run
    return sorted(latest.values(), key=lambda run: run.path.name), repeated


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
