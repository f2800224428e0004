"""Scores of an entry: averaged over cases, patients or voxels first, then over its seeds.

The four averages, by name. Undefined values are left out of a mean and counted.

============  ====================================================================================
`cases`       per class over all cases, then over the foreground classes: metrics.json's foreground
`background`  the same over all classes, the background included, as part of the published tables
`patients`    per patient over their cases and foreground classes, then over patients
`pooled`      Dice only: one Dice of all voxels of a class in all cases, then over classes
============  ====================================================================================

Folds of a cross-validation are put together before averaging: each patient counts once per seed.
Functions that take `where` use the rows with these values only, `phase="ED"` for example.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from mambaseg.evaluation.metrics import OUTCOMES, Metric
from mambaseg.reporting.collect import Entry
from mambaseg.reporting.runs import Row, rows_where

AVERAGES = ("cases", "background", "patients", "pooled")


class Estimate(NamedTuple):
    """A score over seeds."""

    mean: float | None  # None where all seeds are undefined
    sd: float | None  # sample standard deviation, None with a single seed
    per_seed: tuple[float, ...]
    values: int  # case × class values that entered, all seeds together
    undefined: int  # values left out because they are undefined
    seeds: int  # those without any defined value included


def mean_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there are too few values."""
    return fmean(values) if values else None, stdev(values) if len(values) > 1 else None


def estimate(entry: Entry, metric: str, *, average: str = "cases", **where: str) -> Estimate:
    """One score of an entry: `metric` is a column of cases.csv, `average` one of `AVERAGES`."""
    per_seed: list[float] = []
    values = undefined = 0
    for own in entry.chosen(where, background=average == "background").values():
        known = [row for row in own if row.get(metric) is not None]
        values += len(known)
        undefined += len(own) - len(known)
        score = _average(known, metric, average)
        if score is not None:
            per_seed.append(score)
    return Estimate(*mean_sd(per_seed), tuple(per_seed), values, undefined, len(entry.by_seed))


def is_absent(row: Row, metric: Metric) -> bool:
    """Whether a network rightly found nothing, and an overlap has no value for that."""
    nothing = row.get(metric.name) is None and row.get("outcome") == "both_empty"
    return nothing and metric.empty == "overlap"


def compared_value(row: Row, metric: Metric) -> float | None:
    """A row's score where networks are compared: 1 where `is_absent`.

    What another network invents there scores 0, and would cost it nothing beside no value at all.
    The distance 0 that `legacy` gives to a missed structure is none.
    """
    convention = row.get("policy"), row.get("outcome")
    if metric.empty == "distance" and convention == ("legacy", "missed"):
        return None
    return 1.0 if is_absent(row, metric) else row.get(metric.name)


def _average(rows: Sequence[Row], metric: str, average: str) -> float | None:
    if average == "pooled":
        return _pooled(rows) if metric == "dice" else None
    groups = _grouped(rows, "patient" if average == "patients" else "class", metric)
    return fmean(fmean(values) for values in groups.values()) if groups else None


def _pooled(rows: Sequence[Row]) -> float | None:
    """2 Σ|A∩B| / Σ(|A|+|B|) per class; the overlap is a case's Dice times its (|A|+|B|) / 2."""
    if any(row.get("voxels") is None for row in rows):
        return None
    overlaps: dict[int, float] = defaultdict(float)
    totals: dict[int, int] = defaultdict(int)
    for row in rows:
        total = row["voxels"] + row["reference_voxels"]
        overlaps[row["class"]] += row["dice"] * total
        totals[row["class"]] += total
    parts = [overlaps[index] / total for index, total in totals.items() if total]
    return fmean(parts) if parts else None


def _grouped(rows: Iterable[Row], key: str, metric: str) -> dict[Any, list[float]]:
    groups: dict[Any, list[float]] = defaultdict(list)
    for row in rows:
        groups[row[key]].append(row[metric])
    return groups


def outcomes(entry: Entry, **where: str) -> dict[str, int]:
    """How often foreground structures were scored, missed, invented or absent, over all runs."""
    rows = rows_where(entry.rows, where)
    return {name: sum(row["outcome"] == name for row in rows) for name in OUTCOMES}


def values_of(entry: Entry, key: str) -> list[str]:
    """Phases or groups of an entry's rows, ED before ES."""
    return sorted({row[key] for row in entry.rows if row.get(key)})


def patient_scores(entry: Entry, metric: str) -> dict[str, float | None]:
    """Patient -> mean score over cases and foreground classes, then seeds; None if undefined."""
    per_seed: dict[str, list[float]] = {patient: [] for patient in entry.patients}
    for rows in entry.by_seed.values():
        known = [row for row in rows_where(rows) if row.get(metric) is not None]
        for patient, values in _grouped(known, "patient", metric).items():
            per_seed[patient].append(fmean(values))
    return {patient: fmean(v) if v else None for patient, v in sorted(per_seed.items())}


def best_middle_worst(entries: Sequence[Entry]) -> dict[str, str]:
    """Which patients a reader is shown, by the mean over networks of a patient's mean Dice.

    Of two patients none is in the middle, and of a single one none is the worst.
    """
    scores: dict[str, list[float]] = defaultdict(list)
    for entry in entries:
        for patient, value in patient_scores(entry, "dice").items():
            if value is not None:
                scores[patient].append(value)
    # only patients that every network was tested on: a missing network would shift the mean
    common = [p for p, values in scores.items() if len(values) == len(entries)]
    ranked = sorted(common or scores, key=lambda patient: (fmean(scores[patient]), patient))
    if not ranked:
        return {}
    places = {"best": ranked[-1], "median": ranked[len(ranked) // 2], "worst": ranked[0]}
    shown = list(places.values())
    return {place: one for k, (place, one) in enumerate(places.items()) if one not in shown[:k]}
