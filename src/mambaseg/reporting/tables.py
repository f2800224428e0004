"""Tables of scores, costs and settings: of a run for the terminal, of a comparison for reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

from rich.table import Table

from mambaseg.errors import counted
from mambaseg.evaluation.metrics import BUILT_IN, OUTCOMES, Metric
from mambaseg.evaluation.summary import distance_unit, kept_in_words
from mambaseg.reporting.beside import beside_the_papers
from mambaseg.reporting.collect import Comparison, Entry, entry_settings, repeats
from mambaseg.reporting.curves import DICE, rise
from mambaseg.reporting.grid import UNDEFINED, Grid, heading, of_seeds, plus_minus
from mambaseg.reporting.labels import differences
from mambaseg.reporting.methods import networks_grid
from mambaseg.reporting.runs import described
from mambaseg.reporting.scores import (
    AVERAGES,
    Estimate,
    estimate,
    mean_sd,
    outcomes,
    rows_where,
    values_of,
)

# The built-in metrics that networks are compared on, that have room where a row is a network, and
# where it is a class. Accuracy is close to 1 for every small structure, volumes are no scores. A
# metric from outside is in all tables.
_COMPARED = ("dice", "hd95")
_MAIN = (*_COMPARED, "assd", "nsd")
_DETAILED = (*_MAIN, "iou", "precision", "sensitivity", "hd", "asd")
_BUILT_IN = {metric.name: metric for metric in BUILT_IN}
_SD = "± is the sample standard deviation over seeds; a single seed has none."
_EMPTY = (
    "Undefined values are left out of a mean. missed: in the reference but not predicted; false +: "
    "predicted but not in the reference; absent: in neither. Counts are over all runs of the row."
)


class _Column(NamedTuple):
    """A column of scores: the heading, the metric, which average, and of one class or all."""

    heading: str
    metric: Metric
    average: str = "cases"
    class_name: str = ""


def _chosen(metrics: Iterable[Metric], unit: str, built_in: Sequence[str]) -> list[Metric]:
    """Metrics with distances in one unit: the built-in ones with these names, and all others."""
    return [
        metric
        for metric in metrics
        if metric.unit == unit or metric.unit not in ("mm", "vox")
        if metric.name not in _BUILT_IN or metric.name.removesuffix(f"_{unit}") in built_in
    ]


def compared_metrics(comparison: Comparison) -> list[Metric]:
    """Metrics that networks are compared on in pairs."""
    chosen = _chosen(comparison.metrics, comparison.unit, _COMPARED)
    return [metric for metric in chosen if metric.higher_is_better is not None]


def table_of(summary: Mapping[str, Any], config: Mapping[str, Any]) -> Table:
    """The scores of a run (its metrics.json) for the terminal, in at most 80 characters."""
    split, data = summary["split"], config["data"]
    kept = summary.get("keep_largest")
    how = "" if kept is None else f"Post-processing, chosen in validation: {kept_in_words(kept)}."
    seen = f"Views of each slice: {views}." if (views := summary.get("views")) else ""
    told = [
        seen_note(summary),
        how,
        seen,
        f'Split "{split["name"]}" ({split["hash"]}): {split["note"]}',
    ]
    notes = [note for note in (*told, summary.get("note")) if note]
    title = f"{config['model']['name']} · {data['title']}"
    if "foreground" in summary:
        return _fitting(run_grid(summary, title, list(summary["classes"]), notes)).terminal()
    rows = []
    for name, score in summary["scores"].items():
        metric = metric_of(summary, name)
        rows.append([heading(metric), plus_minus(score["mean"], score["sd"], metric.decimals)])
    notes.append(f"{counted(summary['cases'], 'case')}, ± standard deviation over these.")
    return Grid(title, ["score", "mean"], rows, notes).terminal()


def _fitting(grid: Grid) -> Grid:
    """A run's table in 80 characters: metrics without room are named below it."""
    header, rows = list(grid.header), [list(row) for row in grid.rows]
    left: list[str] = []
    while len(header) > 4 and (
        sum(max(map(len, column)) + 2 for column in zip(header, *rows, strict=True)) > 80
    ):
        place = len(header) - 3  # the last two columns count what is missing
        left.insert(0, f"{header.pop(place)} {[row.pop(place) for row in rows][-2]}")
    notes = [*grid.notes, f"Foreground: {', '.join(left)}."] if left else grid.notes
    return replace(grid, header=header, rows=rows, notes=notes)


def metric_of(summary: Mapping[str, Any], name: str) -> Metric:
    """Description of a score of another task."""
    found = {metric.name: metric for metric in described(summary)}
    return found.get(name) or Metric(name, name, decimals=4)


def run_grid(
    summary: Mapping[str, Any], title: str, class_names: Sequence[str], notes: Sequence[str] = ()
) -> Grid:
    """The scores of one evaluation; `summary` is of `mambaseg.evaluation.summary.summarise`.

    A row per structure with the mean over cases (± standard deviation for Dice), then the means
    over structures, without and with the background (the first of `class_names`). Distances are in
    mm where every case's spacing is known, otherwise in voxels. Undefined values are left out of a
    mean: the last columns count the structures missed, and those predicted where there are none.
    """
    unit, convention = distance_unit(summary), summary["convention"]
    scored = [metric for metric in described(summary) if metric.name in summary["foreground"]]
    metrics = _chosen(scored, unit, _MAIN)
    parts = {name: summary["classes"][name] for name in class_names[1:]}
    parts |= {"foreground": summary["foreground"], "+ background": summary["all"]}
    rows = []
    for name, part in parts.items():
        rows.append([name])
        for metric in metrics:
            score = part[metric.name]
            sd = score.get("sd") if metric is metrics[0] else None  # there is no room for more
            rows[-1].append(plus_minus(score["mean"], sd, metric.decimals))
        rows[-1] += [str(part["counts"][outcome]) for outcome in ("missed", "false_positive")]
    side = (summary.get("preprocessing") or {}).get("longest_side")
    how = f"in 2-D at most {side} pixels a side" if side else "in 3-D at native resolution"
    told = [
        f"{counted(summary['cases'], 'case')}, scored {how}; empty masks: {convention['policy']}.",
        f"NSD at {convention[f'tolerance_{unit}']:g} {unit}.",
    ]
    header = ["structure", *map(heading, metrics), "missed", "false +"]
    return Grid(title, header, rows, [*notes, *told], marks={len(rows) - 2: "bold"})


def seen_note(summary: Mapping[str, Any]) -> str:
    """Marks scores of cases that trained or chose the network; empty where there are none."""
    count = len(((summary.get("seen") or {}).get("cases")) or ())
    if not count:
        return ""
    return (
        f"SEEN CASES: the network was trained or chosen on {count} of the {summary['cases']} cases "
        "scored; these scores are too good."
    )


def headline(summary: Mapping[str, Any]) -> tuple[str, float | None]:
    """The one score that represents a test, in words and as a number."""
    if "foreground" in summary:
        dice = summary["foreground"]["dice"]["mean"]
        return f"mean foreground Dice {plus_minus(dice, None, 4)}", dice
    name, score = next(iter(summary["scores"].items()))
    metric, mean = metric_of(summary, name), score["mean"]
    return f"mean {heading(metric)} {plus_minus(mean, None, metric.decimals)}", mean


def score_grids(comparison: Comparison) -> list[Grid]:
    """All score tables of a comparison, the main one first."""
    metrics = _chosen(comparison.metrics, comparison.unit, _MAIN)
    networks = networks_grid(comparison, metrics)
    found = [_main(comparison, metrics), *([networks] if networks else []), _classes(comparison)]
    for key, title in (("phase", "Per phase"), ("group", "Per pathology group")):
        if any(values_of(entry, key) for entry in comparison.entries):
            found.append(_parts(comparison, key, title))
    return [*found, *beside_the_papers(comparison)]


def cell(score: Estimate, metric: Metric) -> str:
    """`0.833 ± 0.012`; ` (1 of 2 seeds)` where other seeds have no defined value."""
    if score.mean is None:
        return UNDEFINED
    text = plus_minus(score.mean, score.sd, metric.decimals)
    return text + of_seeds(len(score.per_seed), score.seeds)


def _score_grid(
    title: str,
    texts: Sequence[str],
    columns: Sequence[_Column],
    members: Iterable[tuple[Entry, Sequence[str], dict[str, str]]],
    notes: Sequence[str],
) -> Grid:
    """A row per member: its name and texts, and the scores and outcomes of rows with its values."""
    rows = []
    for entry, own, where in members:
        cells = []
        for _, metric, average, name in columns:
            chosen = where | ({"class_name": name} if name else {})
            cells.append(cell(estimate(entry, metric.name, average=average, **chosen), metric))
        counts = outcomes(entry, **where)
        rows.append([entry.label, *own, *cells, *(str(counts[name]) for name in OUTCOMES[1:])])
    headings = [*texts, *(column.heading for column in columns)]
    return Grid(title, ["network", *headings, "missed", "false +", "absent"], rows, notes, wide=2)


def _columns(metrics: Iterable[Metric]) -> list[_Column]:
    return [_Column(heading(metric), metric) for metric in metrics]


def _main(comparison: Comparison, metrics: Sequence[Metric]) -> Grid:
    dice, *others = metrics
    averages = {
        "cases": "Dice", "background": "Dice, with background", "patients": "Dice, by patient",
        "pooled": "Dice, pooled",
    }  # fmt: skip
    by_patient = "By patient: per patient, then over patients. "
    if comparison.subject == "case":
        del averages["patients"]
        by_patient = ""
    columns = [_Column(title, dice, average) for average, title in averages.items()]
    about = {"labels": _labels, "result of": _result, "seeds": repeats}
    texts = {title: [tell(entry) for entry in comparison.entries] for title, tell in about.items()}
    shown = [title for title, own in texts.items() if title == "seeds" or set(own) != {""}]
    members = (
        (entry, [texts[title][place] for title in shown], dict[str, str]())
        for place, entry in enumerate(comparison.entries)
    )
    notes = [
        "Dice: per class over cases, then over the foreground classes. With background: the same "
        f"over all classes. {by_patient}Pooled: of all voxels of a class at once, then over "
        "classes. All other scores are averaged as the first column.",
        _tolerance(comparison),
        _SD,
        _EMPTY,
    ]
    title = f"Test scores · {comparison.title}"
    if "result of" in shown:
        notes.append("Result of: the network of the method that was best in validation, per run.")
    grid = _score_grid(title, shown, [*columns, *_columns(others)], members, notes)
    return _with_rise(replace(grid, wide=1 + len(shown)), comparison)


def _with_rise(grid: Grid, comparison: Comparison) -> Grid:
    """The table with how fast each validation curve still rose; as it is without curves."""
    rises = [[rise(own[DICE]) for own in entry.curves] for entry in comparison.entries]
    known = [[value for value in own if value is not None] for own in rises]
    if not any(known):
        return grid
    rows = [[*row, plus_minus(*mean_sd(own), 3, sign=True)]
            for row, own in zip(grid.rows, known, strict=True)]  # fmt: skip
    note = (
        "Rise: of the validation Dice over the last third of the training, per 1,000 steps (mean "
        "over runs): where it is large, more steps would have scored higher."
    )
    return replace(grid, header=[*grid.header, "rise"], rows=rows, notes=[*grid.notes, note])


def _labels(entry: Entry) -> str:
    """Which labels it learnt from; nothing where it was all of them."""
    told = ", ".join(dict.fromkeys(run.supervision for run in entry.runs))
    return "" if told == "all" else told


def _result(entry: Entry) -> str:
    """Of several networks those that were chosen, and how often."""
    counts = Counter(run.chosen for run in entry.runs if len(run.networks) > 1)
    return ", ".join(f"{name} ({count})" for name, count in counts.most_common())


def _tolerance(comparison: Comparison) -> str:
    tolerance = comparison.protocol[f"tolerance_{comparison.unit}"]
    return f"NSD: normalised surface Dice at {tolerance:g} {comparison.unit}."


def _classes(comparison: Comparison) -> Grid:
    columns = _columns(_chosen(comparison.metrics, comparison.unit, _DETAILED))
    members = product(comparison.entries, comparison.classes)
    rows = ((entry, [name], {"class_name": name}) for entry, name in members)
    notes = ["Mean over cases.", _tolerance(comparison), _SD]
    return _score_grid("Per class", ["class"], columns, rows, notes)


def _parts(comparison: Comparison, key: str, title: str) -> Grid:
    dice, *others = compared_metrics(comparison)
    columns = [_Column("Dice", dice)]
    columns += [_Column(f"Dice {name}", dice, class_name=name) for name in comparison.classes]
    members = []
    for entry in comparison.entries:
        for value in values_of(entry, key):
            cases = {row["case"] for row in rows_where(entry.rows, {key: value})}
            members.append((entry, [value, str(len(cases))], {key: value}))
    means = 'Mean over cases, then over the foreground classes; "cases" counts distinct test cases.'
    notes = [means, _SD]
    return _score_grid(title, [key, "cases"], [*columns, *_columns(others)], members, notes)


def settings_grid(comparison: Comparison) -> Grid | None:
    """Every difference between the entries' configurations; None where there is none."""
    entries = comparison.entries
    different = differences(
        [(entry.runs[0].model, entry_settings(entry.runs)) for entry in entries]
    )
    different = {key: v for key, v in different.items() if not key.startswith("model._target_")}
    if not different:
        return None
    rows = [
        [entry.label, *(values[index] for values in different.values())]
        for index, entry in enumerate(entries)
    ]
    notes = ["–: this configuration has no such key. Seeds and folds are not settings."]
    return Grid("What differs between the settings", ["network", *different], rows, notes)


def tidy(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """The scores unrounded, one per row, for table.csv."""
    shown = (m.name for m in comparison.metrics if comparison.unit == "mm" or m.unit != "mm")
    metrics = [name for name in shown if not name.endswith("volume_ml")]
    for entry in comparison.entries:
        places: list[dict[str, str]] = [{}]
        places += [{key: v} for key in ("phase", "group") for v in values_of(entry, key)]
        names = ("", *comparison.classes)
        for place, name in product(places, names):
            where = {**place, "class_name": name} if name else place
            counts = outcomes(entry, **where)
            averages = ("cases",) if name else AVERAGES
            for metric, average in product(metrics, averages):
                score = estimate(entry, metric, average=average, **where)
                if average == "pooled" and score.mean is None:
                    continue  # defined for Dice only
                yield {
                    "comparison": comparison.title,
                    "network": entry.label,
                    "seeds": len(entry.by_seed),
                    "folds": entry.folds or None,
                    "class": name or "foreground",
                    "phase": place.get("phase", "all"),
                    "group": place.get("group", "all"),
                    "metric": metric,
                    "average": average,
                    "mean": score.mean,
                    "sd_over_seeds": score.sd,
                    "values": score.values,
                    "undefined": score.undefined,
                    **counts,
                }
