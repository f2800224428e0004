"""Scores of an entry: averaged over cases, patients or voxels first, then over its seeds.

The four averages, by name. Undefined values are left out of a mean and counted.

============  ====================================================================================
`cases`       per class over all cases, then over the foreground classes: metrics.json's foreground
`background`  the same over all classes, the background included, as part of the published tables
`patients`    per patient over their cases and foreground classes, then over patients
`pooled`      Dice only: one Dice of all voxels of a class in all cases, then over classes
============  ====================================================================================

Folds of a cross-validation are put together before averaging: each patient counts once per seed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from mambaseg.reporting.collect import Entry, Row
from mambaseg.reporting.statistics import mean_sd

OVERLAP = ("dice", "iou", "accuracy", "precision", "sensitivity", "specificity")
SURFACE = ("hd95", "hd", "asd", "assd", "nsd")
AVERAGES = ("cases", "background", "patients", "pooled")
OUTCOMES = ("scored", "missed", "false_positive", "both_empty")

Keep = Callable[[Row], bool]


@dataclass(frozen=True)
class Estimate:
    """A score over seeds.

    Attributes:
        mean: over the seeds' scores, None where all are undefined.
        sd: sample standard deviation over seeds, None with a single seed.
        per_seed: the seeds' scores.
        values: case × class values that entered, all seeds together.
        undefined: values left out because they are undefined.
        seeds: how many there are, also those without any defined value.
    """

    mean: float | None
    sd: float | None
    per_seed: tuple[float, ...]
    values: int
    undefined: int
    seeds: int


def metrics_of(rows: Sequence[Row], unit: str) -> list[str]:
    """Metrics that a table of these rows can show, distances in one unit."""
    names = [*OVERLAP, *(f"{name}_{unit}" for name in SURFACE)]
    return [name for name in names if name in rows[0]]


def estimate(
    entry: Entry, metric: str, *, average: str = "cases", keep: Keep | None = None
) -> Estimate:
    """One score of an entry.

    Args:
        entry: its runs.
        metric: a column of cases.csv.
        average: one of `AVERAGES`.
        keep: which rows count, e.g. those of one class or phase; all by default.
    """
    per_seed: list[float] = []
    values = undefined = 0
    for rows in entry.by_seed.values():
        own = [
            row
            for row in rows
            if (average == "background" or row["class"]) and (keep is None or keep(row))
        ]
        known = [row for row in own if row.get(metric) is not None]
        values += len(known)
        undefined += len(own) - len(known)
        score = _AVERAGE[average](known, metric)
        if score is not None:
            per_seed.append(score)
    return Estimate(*mean_sd(per_seed), tuple(per_seed), values, undefined, len(entry.by_seed))


def _over_cases(rows: Sequence[Row], metric: str) -> float | None:
    classes = _grouped(rows, "class", metric)
    return fmean(fmean(values) for values in classes.values()) if classes else None


def _over_patients(rows: Sequence[Row], metric: str) -> float | None:
    patients = _grouped(rows, "patient", metric)
    return fmean(fmean(values) for values in patients.values()) if patients else None


def _over_voxels(rows: Sequence[Row], metric: str) -> float | None:
    """2 Σ|A∩B| / Σ(|A|+|B|) per class; the overlap is a case's Dice times its (|A|+|B|) / 2."""
    if metric != "dice" or any(row.get("voxels") is None for row in rows):
        return None
    overlaps: dict[int, float] = defaultdict(float)
    totals: dict[int, int] = defaultdict(int)
    for row in rows:
        total = row["voxels"] + row["reference_voxels"]
        overlaps[row["class"]] += row["dice"] * total
        totals[row["class"]] += total
    parts = [overlaps[index] / total for index, total in totals.items() if total]
    return fmean(parts) if parts else None


_AVERAGE: dict[str, Callable[[Sequence[Row], str], float | None]] = {
    "cases": _over_cases,
    "background": _over_cases,
    "patients": _over_patients,
    "pooled": _over_voxels,
}


def _grouped(rows: Iterable[Row], key: str, metric: str) -> dict[Any, list[float]]:
    groups: dict[Any, list[float]] = defaultdict(list)
    for row in rows:
        groups[row[key]].append(row[metric])
    return groups


def outcomes(entry: Entry, *, keep: Keep | None = None) -> dict[str, int]:
    """How often foreground structures were scored, missed, invented or absent, over all runs."""
    rows = [
        row
        for run in entry.runs
        for row in run.rows
        if row["class"] and (keep is None or keep(row))
    ]
    return {name: sum(row["outcome"] == name for row in rows) for name in OUTCOMES}


def patient_scores(
    entry: Entry, metric: str, *, keep: Keep | None = None
) -> dict[str, float | None]:
    """Patient -> mean foreground score, averaged over the patient's cases, then over seeds.

    None for a patient without any defined value.
    """
    per_seed: dict[str, list[float]] = {patient: [] for patient in entry.patients}
    for rows in entry.by_seed.values():
        known = [
            row
            for row in rows
            if row["class"] and row.get(metric) is not None and (keep is None or keep(row))
        ]
        for patient, values in _grouped(known, "patient", metric).items():
            per_seed[patient].append(fmean(values))
    return {patient: fmean(v) if v else None for patient, v in sorted(per_seed.items())}


def value_scores(entry: Entry, metric: str) -> dict[str, dict[tuple[str, int], float | None]]:
    """Patient -> (case, foreground class) -> score averaged over seeds; None if any has none.

    What paired comparisons are made of: both networks have to be scored on the same structures, or
    one that misses the difficult ones would look better on the rest.
    """
    per_seed: dict[str, dict[tuple[str, int], list[float | None]]] = defaultdict(dict)
    for rows in entry.by_seed.values():
        for row in rows:
            if row["class"]:
                own = per_seed[row["patient"]].setdefault((row["case"], row["class"]), [])
                own.append(row.get(metric))
    return {
        patient: {key: _mean_of_all(values) for key, values in own.items()}
        for patient, own in per_seed.items()
    }


def _mean_of_all(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def values_of(entry: Entry, key: str) -> list[str]:
    """Phases or groups that an entry's rows carry, ED before ES."""
    return sorted({row[key] for run in entry.runs for row in run.rows if row.get(key)})


def best_middle_worst(entries: Sequence[Entry]) -> dict[str, str]:
    """Which patients a reader is shown, by the mean over networks of a patient's mean Dice."""
    scores: Mapping[str, list[float]] = defaultdict(list)
    for entry in entries:
        for patient, value in patient_scores(entry, "dice").items():
            if value is not None:
                scores[patient].append(value)
    # only patients that every network was tested on: a missing network would shift the mean
    common = [p for p, values in scores.items() if len(values) == len(entries)]
    ranked = sorted(common or scores, key=lambda patient: (fmean(scores[patient]), patient))
    if not ranked:
        return {}
    return {"best": ranked[-1], "median": ranked[len(ranked) // 2], "worst": ranked[0]}
