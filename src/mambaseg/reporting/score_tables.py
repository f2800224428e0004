"""What a report's tables hold: scores of a comparison's entries, per class, phase and group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from mambaseg.reporting import quoted
from mambaseg.reporting.collect import Comparison, Entry, Row
from mambaseg.reporting.scores import (
    AVERAGES,
    OUTCOMES,
    Estimate,
    estimate,
    metrics_of,
    outcomes,
    values_of,
)
from mambaseg.reporting.tables import UNDEFINED, Grid

NAMES = {
    "dice": "Dice", "iou": "IoU", "accuracy": "accuracy", "precision": "precision",
    "sensitivity": "sensitivity", "specificity": "specificity", "hd95": "HD95", "hd": "HD",
    "asd": "ASD", "assd": "ASSD", "nsd": "NSD",
}  # fmt: skip
_SD = "± is the sample standard deviation over seeds; a single seed has none."
_EMPTY = (
    "Undefined values are left out of a mean. missed: not predicted though there; false +: "
    "predicted though not there; absent: in neither. Counts are over all runs of the row."
)


def grids(comparison: Comparison) -> list[Grid]:
    """All score tables of a comparison, the main one first."""
    found = [_main(comparison), _classes(comparison)]
    for key in ("phase", "group"):
        if any(values_of(entry, key) for entry in comparison.entries):
            found.append(_parts(comparison, key))
    if comparison.classes == quoted.CLASSES:
        found.append(_beside_the_paper(comparison))
    return found


def cell(score: Estimate, metric: str) -> str:
    """`0.833 ± 0.012`; distances with two decimals; ` (1 of 2 seeds)` where others have none."""
    if score.mean is None:
        return UNDEFINED
    digits = decimals(metric)
    text = f"{score.mean:.{digits}f}"
    if score.sd is not None:
        text = f"{text} ± {score.sd:.{digits}f}"
    return text + of_seeds(len(score.per_seed), score.seeds)


def of_seeds(defined: int, seeds: int) -> str:
    """Says when a mean is not over all seeds, because some have no defined value."""
    return "" if defined == seeds else f" ({defined} of {seeds} seeds)"


def decimals(metric: str) -> int:
    """How many a metric is shown with: shares three, distances two."""
    return 2 if metric.startswith(("hd", "asd", "assd")) else 3


def heading(metric: str) -> str:
    """`HD95 mm`, `Dice`."""
    name, _, unit = metric.partition("_")
    return f"{NAMES[name]} {unit}".strip()


def repeats(entry: Entry) -> str:
    """How many seeds, and folds where there are any."""
    seeds = len(entry.by_seed)
    folds = f" × {len(entry.folds)} folds" if entry.folds else ""
    return f"{seeds}{folds}"


def _main(comparison: Comparison) -> Grid:
    unit = comparison.unit
    distances = [f"{name}_{unit}" for name in ("hd95", "assd", "nsd")]
    averages = {
        "cases": "Dice", "background": "Dice, with background", "patients": "Dice, by patient",
        "pooled": "Dice, pooled",
    }  # fmt: skip
    by_patient = "By patient: per patient, then over patients. "
    if comparison.subject == "case":
        del averages["patients"]
        by_patient = ""
    header = [
        "network", "seeds", *averages.values(), *(heading(metric) for metric in distances),
        "missed", "false +", "absent",
    ]  # fmt: skip
    rows = []
    for entry in comparison.entries:
        dice = [estimate(entry, "dice", average=average) for average in averages]
        far = [(estimate(entry, metric), metric) for metric in distances]
        rows.append(
            [
                entry.label,
                repeats(entry),
                *(cell(score, "dice") for score in dice),
                *(cell(score, metric) for score, metric in far),
                *_counts(entry),
            ]
        )
    notes = [
        "Dice: per class over cases, then over the foreground classes. With background: the same "
        f"over all classes. {by_patient}Pooled: of all voxels of a class at once, then over "
        "classes. Distances and NSD are averaged as the first column.",
        _tolerance(comparison),
        _SD,
        _EMPTY,
    ]
    return Grid(f"Test scores · {comparison.title}", header, rows, notes)


def _tolerance(comparison: Comparison) -> str:
    unit = comparison.unit
    tolerance = comparison.protocol[f"tolerance_{unit}"]
    return f"NSD: normalised surface Dice at {tolerance:g} {unit}."


def _counts(entry: Entry, keep: Callable[[Row], bool] | None = None) -> list[str]:
    counts = outcomes(entry, keep=keep)
    return [str(counts[name]) for name in OUTCOMES[1:]]


def _classes(comparison: Comparison) -> Grid:
    metrics = ["dice", "iou", "precision", "sensitivity"]
    metrics += [f"{name}_{comparison.unit}" for name in ("hd95", "hd", "asd", "assd", "nsd")]
    header = ["network", "class", *map(heading, metrics), "missed", "false +", "absent"]
    rows = []
    for entry in comparison.entries:
        for name in comparison.classes:
            keep = _is("class_name", name)
            scores = [cell(estimate(entry, metric, keep=keep), metric) for metric in metrics]
            rows.append([entry.label, name, *scores, *_counts(entry, keep)])
    return Grid(
        "Per class", header, rows, ["Mean over cases.", _tolerance(comparison), _SD], wide=2
    )


def _parts(comparison: Comparison, key: str) -> Grid:
    distance = f"hd95_{comparison.unit}"
    names = comparison.classes
    header = ["network", key, "cases", "Dice", *(f"Dice {name}" for name in names)]
    header += [heading(distance), "missed", "false +", "absent"]
    rows = []
    for entry in comparison.entries:
        for value in values_of(entry, key):
            keep = _is(key, value)
            own = [_is_both(keep, _is("class_name", name)) for name in names]
            rows.append(
                [
                    entry.label,
                    value,
                    str(_cases(entry, keep)),
                    cell(estimate(entry, "dice", keep=keep), "dice"),
                    *(cell(estimate(entry, "dice", keep=part), "dice") for part in own),
                    cell(estimate(entry, distance, keep=keep), distance),
                    *_counts(entry, keep),
                ]
            )
    title = {"phase": "Per phase", "group": "Per pathology group"}[key]
    notes = ["Mean over cases, then over the foreground classes. cases: different ones.", _SD]
    return Grid(title, header, rows, notes, wide=2)


def _beside_the_paper(comparison: Comparison) -> Grid:
    metrics = [f"{name}_vox" if name in ("hd95", "asd") else name for name in quoted.COLUMNS]
    header = ["network", "average over classes", *map(heading, metrics)]
    rows = []
    for entry in comparison.entries:
        for average, said in (("cases", "foreground"), ("background", "with background")):
            scores = [estimate(entry, metric, average=average) for metric in metrics]
            cells = [_as_printed(s, metric) for s, metric in zip(scores, metrics, strict=True)]
            rows.append([entry.label, said, *cells])
    first = len(rows)
    for network, numbers in quoted.TABLE_1.items():
        rows.append([f"{network} (quoted)", "not stated", *numbers])
    notes = [f"{quoted.SOURCE}.", quoted.CAVEAT]
    if "not ACDC" in str(comparison.protocol["data"]) or "ACDC" not in comparison.protocol["data"]:
        notes.insert(0, f"Ours here are of another data set: {comparison.protocol['data']}.")
    return Grid(
        "Beside the paper's table", header, rows, notes, wide=2,
        quoted=frozenset(range(first, len(rows))),
    )  # fmt: skip


def _as_printed(score: Estimate, metric: str) -> str:
    """Four decimals without the leading zero, as in the paper."""
    if score.mean is None:
        return UNDEFINED
    text = f"{score.mean:.4f}"
    return text.removeprefix("0") if decimals(metric) == 3 else text


def _is(key: str, value: str) -> Callable[[Row], bool]:
    return lambda row: bool(row[key] == value)


def _is_both(one: Callable[[Row], bool], other: Callable[[Row], bool]) -> Callable[[Row], bool]:
    return lambda row: one(row) and other(row)


def _cases(entry: Entry, keep: Callable[[Row], bool]) -> int:
    return len({row["case"] for run in entry.runs for row in run.rows if keep(row)})


def tidy(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """The same numbers unrounded, one per row, for table.csv."""
    for entry in comparison.entries:
        rows = entry.runs[0].rows
        units = ["vox", "mm"] if comparison.unit == "mm" else ["vox"]
        metrics = list(dict.fromkeys(m for unit in units for m in metrics_of(rows, unit)))
        for part, keep in _subsets(comparison, entry):
            for metric in metrics:
                for average in ("cases",) if part["class"] != "foreground" else AVERAGES:
                    score = estimate(entry, metric, average=average, keep=keep)
                    if average == "pooled" and score.mean is None:
                        continue  # defined for Dice only
                    yield {
                        "comparison": comparison.title,
                        "network": entry.label,
                        "seeds": len(entry.by_seed),
                        "folds": len(entry.folds) or None,
                        **part,
                        "metric": metric,
                        "average": average,
                        "mean": score.mean,
                        "sd_over_seeds": score.sd,
                        "values": score.values,
                        "undefined": score.undefined,
                        **outcomes(entry, keep=keep),
                    }


def _subsets(
    comparison: Comparison, entry: Entry
) -> Iterator[tuple[dict[str, str], Callable[[Row], bool]]]:
    everything: Callable[[Row], bool] = lambda row: True  # noqa: E731 - typed in place
    places: list[tuple[dict[str, str], Callable[[Row], bool]]]
    places = [({"phase": "all", "group": "all"}, everything)]
    for value in values_of(entry, "phase"):
        places.append(({"phase": value, "group": "all"}, _is("phase", value)))
    for value in values_of(entry, "group"):
        places.append(({"phase": "all", "group": value}, _is("group", value)))
    for part, keep in places:
        yield {"class": "foreground", **part}, keep
        for name in comparison.classes:
            yield {"class": name, **part}, _is_both(keep, _is("class_name", name))
