"""Means of the rows of many cases: over cases, then over classes."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any, Literal

from mambaseg.evaluation.metrics import BUILT_IN, OUTCOMES, Metric

CONVENTION = ("policy", "tolerance_mm", "tolerance_vox")


def distance_unit(summary: Mapping[str, Any]) -> Literal["mm", "vox"]:
    """The unit in which a summary's distances are shown: one for all of a run."""
    unit = summary["convention"].get("distances")
    if unit is None:  # written before it was recorded
        known = summary["foreground"].get("volume_ml", {}).get("count", 0)
        foreground = len(summary["classes"]) - 1
        unit = "mm" if known == summary["cases"] * foreground else "vox"
    return "mm" if unit == "mm" else "vox"


def kept_in_words(parts: Mapping[str, Any]) -> str:
    """The post-processing by these structures' largest components, for tables and pages."""
    return f"largest component of {', '.join(parts)}" if parts else "none"


def summarise(
    rows: Iterable[Mapping[str, Any]],
    class_names: Sequence[str],
    *,
    distances: Literal["mm", "vox"] | None = None,
    more: Sequence[Metric] = (),
) -> dict[str, Any]:
    """Averages over cases and classes, each beside the number of values it is made of.

    ``classes[name][metric]`` is mean, sample sd, median and count over cases. ``foreground`` (all
    classes but 0) and ``all`` average those means over classes, and say over how many classes and
    values. Undefined values are left out, so a count below the number of cases says that some
    were; ``counts`` says why (missed, false positive, both empty). ``by_phase`` and ``by_group``
    hold the same three parts per phase and group, where rows carry them.

    Args:
        rows: of `score_case`, of any number of cases, all under one convention.
        class_names: name of class 0 (background), 1, ..., K-1.
        distances: unit in which to show distances; None: mm if every case's spacing is known.
        more: metrics beside the built-in ones.

    Returns:
        Plain dicts, strings, numbers and None, ready for JSON.

    Raises:
        ValueError: no rows, or rows of different conventions.
    """
    table = list(rows)
    conventions = {tuple(row[key] for key in CONVENTION) for row in table}
    if len(conventions) != 1:
        raise ValueError(f"rows must share one convention, but have {sorted(conventions)}")
    if distances is None:
        distances = "mm" if all(row.get("volume_ml") is not None for row in table) else "vox"
    metrics = [metric for metric in (*BUILT_IN, *more) if metric.name in table[0]]
    names = [metric.name for metric in metrics]
    summary: dict[str, Any] = {
        "convention": {
            **dict(zip(CONVENTION, conventions.pop(), strict=True)),
            "distances": distances,
            "average": "per class over cases, then over classes",
            "units": "_vox in voxels, _mm in mm, _ml in ml, everything else in [0, 1]",
        },
        "metrics": [metric.plain() for metric in metrics],
        **_parts(table, class_names, names),
    }
    for key in ("phase", "group"):
        values = sorted({row[key] for row in table if row.get(key) is not None})
        if values:
            summary[f"by_{key}"] = {
                value: _parts([row for row in table if row.get(key) == value], class_names, names)
                for value in values
            }
    return summary


def _parts(
    rows: Sequence[Mapping[str, Any]], class_names: Sequence[str], metrics: Sequence[str]
) -> dict[str, Any]:
    classes: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(class_names):
        own = [row for row in rows if row["class"] == index]
        counts = {outcome: sum(row["outcome"] == outcome for row in own) for outcome in OUTCOMES}
        classes[name] = {"counts": counts}
        for metric in metrics:
            classes[name][metric] = _describe([row[metric] for row in own])
    foreground = [classes[name] for name in class_names[1:]]
    return {
        "cases": sum(row["class"] == 0 for row in rows),
        "classes": classes,
        "foreground": _average(foreground, metrics),
        "all": _average(list(classes.values()), metrics),
    }


def _describe(values: Sequence[float | None]) -> dict[str, float | int | None]:
    known = [float(value) for value in values if value is not None]
    return {
        "mean": fmean(known) if known else None,
        "sd": stdev(known) if len(known) > 1 else None,
        "median": median(known) if known else None,
        "count": len(known),
    }


def _average(classes: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> dict[str, Any]:
    average: dict[str, Any] = {
        "counts": {key: sum(part["counts"][key] for part in classes) for key in OUTCOMES}
    }
    for metric in metrics:
        means = [part[metric]["mean"] for part in classes if part[metric]["count"]]
        average[metric] = {
            "mean": fmean(means) if means else None,
            "classes": len(means),
            "count": sum(part[metric]["count"] for part in classes),
        }
    return average
