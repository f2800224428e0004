"""Tables of scores, costs and settings: of a run for the terminal, of a comparison for reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mambaseg.evaluation.metrics import BUILT_IN, OUTCOMES, Metric
from mambaseg.evaluation.summary import distance_unit
from mambaseg.reporting import quoted
from mambaseg.reporting.collect import Comparison, Entry
from mambaseg.reporting.grid import (
    UNDEFINED,
    Grid,
    counted,
    duration,
    heading,
    of_seeds,
    plus_minus,
)
from mambaseg.reporting.labels import differences
from mambaseg.reporting.runs import VOLUMES, described
from mambaseg.reporting.scores import (
    AVERAGES,
    Estimate,
    estimate,
    mean_sd,
    outcomes,
    rows_where,
    values_of,
)

if TYPE_CHECKING:
    from rich.table import Table

# What tables leave out of the built-in metrics: there is room for the usual ones only where a row
# is a network, and accuracy is close to 1 for every small structure. Networks are compared on the
# usual overlap and distance. A metric from outside is in all of these tables.
_DETAILS = ("iou", "precision", "sensitivity", "hd", "asd")
_NEVER = ("accuracy", "specificity")
_COMPARED = ("dice", "hd95")
_BUILT_IN = {metric.name: metric for metric in BUILT_IN}
_COUNTS = ("missed", "false +", "absent")
_SD = "± is the sample standard deviation over seeds; a single seed has none."
_EMPTY = (
    "Undefined values are left out of a mean. missed: in the reference but not predicted; false +: "
    "predicted but not in the reference; absent: in neither. Counts are over all runs of the row."
)


def _chosen(metrics: Iterable[Metric], unit: str, choose: Callable[[str], bool]) -> list[Metric]:
    """Metrics with distances in one unit: the built-in ones that are chosen, and all others."""
    return [
        metric
        for metric in metrics
        if metric.unit == unit or metric.unit not in ("mm", "vox")
        if metric.name not in _BUILT_IN or choose(metric.name.removesuffix(f"_{unit}"))
    ]


def main_metrics(metrics: Iterable[Metric], unit: str) -> list[Metric]:
    """Metrics of a table that has one row per network or structure, Dice first."""
    return _chosen(metrics, unit, lambda name: name not in (*_DETAILS, *_NEVER))


def compared_metrics(comparison: Comparison) -> list[Metric]:
    """Metrics that networks are compared on in pairs."""
    chosen = _chosen(comparison.metrics, comparison.unit, lambda name: name in _COMPARED)
    return [metric for metric in chosen if metric.higher_is_better is not None]


def table_of(summary: Mapping[str, Any], config: Mapping[str, Any]) -> Table:
    """The scores of a run for the terminal, in at most 80 characters.

    Args:
        summary: content of metrics.json.
        config: of the run; it names network, data and classes.
    """
    split, data = summary["split"], config["data"]
    notes = [seen_note(summary), split_note(split)]
    title = f"{config['model']['name']} · {data['title']}"
    notes = list(filter(None, notes))
    if "foreground" in summary:
        return run_grid(summary, title, data["class_names"], notes).terminal()
    return _means(summary, title, notes).terminal()


def run_grid(
    summary: Mapping[str, Any], title: str, class_names: Sequence[str], notes: Sequence[str] = ()
) -> Grid:
    """The scores of one evaluation.

    A row per structure with the mean over cases (± standard deviation for Dice), then the means
    over structures, without and with the background. Distances are in mm where every case's
    spacing is known, otherwise in voxels. Undefined values are left out of a mean: the last columns
    count the structures missed, and those predicted where there are none.

    Args:
        summary: of `mambaseg.evaluation.summary.summarise`.
        title: names the network and the dataset.
        class_names: names of the classes 0..K-1, the background first.
        notes: lines below the table; the convention follows them.
    """
    unit = distance_unit(summary)
    scored = [metric for metric in described(summary) if metric.name in summary["foreground"]]
    metrics = main_metrics((m for m in scored if m.name not in VOLUMES), unit)
    parts = {name: summary["classes"][name] for name in class_names[1:]}
    parts |= {"foreground": summary["foreground"], "+ background": summary["all"]}
    rows = []
    for name, part in parts.items():
        row = [name]
        for metric in metrics:
            score = part[metric.name]
            sd = score.get("sd") if metric is metrics[0] else None  # there is no room for more
            row.append(plus_minus(score["mean"], sd, metric.decimals))
        counts = [str(part["counts"][outcome]) for outcome in ("missed", "false_positive")]
        rows.append([*row, *counts])
    header = ["structure", *map(heading, metrics), "missed", "false +"]
    marks = {len(rows) - 2: "bold"}
    return Grid(title, header, rows, [*notes, _convention(summary, unit)], marks=marks)


def _convention(summary: Mapping[str, Any], unit: str) -> str:
    """The number of cases, and how they were scored."""
    convention = summary["convention"]
    side = (summary.get("preprocessing") or {}).get("longest_side")
    how = f"in 2-D at most {side} pixels a side" if side else "in 3-D at native resolution"
    return (
        f"{counted(summary['cases'], 'case')}, scored {how}; empty masks: {convention['policy']}.\n"
        f"NSD at {convention[f'tolerance_{unit}']:g} {unit}."
    )


def _means(summary: Mapping[str, Any], title: str, notes: Sequence[str]) -> Grid:
    """The scores of another task: means ± standard deviations over its cases."""
    rows = []
    for name, score in summary["scores"].items():
        column, digits = column_of(summary, name)
        rows.append([column, plus_minus(score["mean"], score["sd"], digits)])
    counts = f"{counted(summary['cases'], 'case')}, ± standard deviation over these."
    told = [*notes, *filter(None, [summary.get("note")]), counts]
    return Grid(title, ["score", "mean"], rows, told)


def column_of(summary: Mapping[str, Any], name: str) -> tuple[str, int]:
    """Heading and decimals of a score of another task."""
    title, digits = (summary.get("columns") or {}).get(name, (name, 4))
    return title, digits


def split_note(split: Mapping[str, Any]) -> str:
    """Name, hash and note of a split in one line."""
    return f"Split {split['name']} ({split['hash']}). {split['note']}".strip()


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
    """The one score that stands for a test, in words and as a number."""
    if "foreground" not in summary:
        name, score = next(iter(summary["scores"].items()))
        title, digits = column_of(summary, name)
        return f"mean {title} {plus_minus(score['mean'], None, digits)}", score["mean"]
    dice = summary["foreground"]["dice"]["mean"]
    return f"mean foreground Dice {UNDEFINED if dice is None else f'{dice:.4f}'}", dice


def score_grids(comparison: Comparison) -> list[Grid]:
    """All score tables of a comparison, the main one first."""
    found = [_main(comparison), _classes(comparison)]
    for key, title in (("phase", "Per phase"), ("group", "Per pathology group")):
        if any(values_of(entry, key) for entry in comparison.entries):
            found.append(_parts(comparison, key, title))
    if comparison.classes == quoted.CLASSES:
        found.append(_beside_the_paper(comparison))
    return found


def cell(score: Estimate, digits: int) -> str:
    """`0.833 ± 0.012`; ` (1 of 2 seeds)` where other seeds have no defined value."""
    if score.mean is None:
        return UNDEFINED
    return plus_minus(score.mean, score.sd, digits) + of_seeds(len(score.per_seed), score.seeds)


def _repeats(entry: Entry) -> str:
    """How many seeds, and folds where there are any."""
    folds = f" × {len(entry.folds)} folds" if entry.folds else ""
    return f"{len(entry.by_seed)}{folds}"


def _scores(entry: Entry, metrics: Sequence[Metric], **where: str) -> list[str]:
    return [cell(estimate(entry, m.name, **where), m.decimals) for m in metrics]


def _counts(entry: Entry, **where: str) -> list[str]:
    """Cells of the last three columns."""
    counts = outcomes(entry, **where)
    return [str(counts[name]) for name in OUTCOMES[1:]]


def _main(comparison: Comparison) -> Grid:
    dice, *others = main_metrics(comparison.metrics, comparison.unit)
    averages = {
        "cases": "Dice", "background": "Dice, with background", "patients": "Dice, by patient",
        "pooled": "Dice, pooled",
    }  # fmt: skip
    by_patient = "By patient: per patient, then over patients. "
    if comparison.subject == "case":
        del averages["patients"]
        by_patient = ""
    rows = []
    for entry in comparison.entries:
        own = [cell(estimate(entry, dice.name, average=a), dice.decimals) for a in averages]
        others_cells = _scores(entry, others)
        rows.append([entry.label, _repeats(entry), *own, *others_cells, *_counts(entry)])
    notes = [
        "Dice: per class over cases, then over the foreground classes. With background: the same "
        f"over all classes. {by_patient}Pooled: of all voxels of a class at once, then over "
        "classes. All other scores are averaged as the first column.",
        _tolerance(comparison),
        _SD,
        _EMPTY,
    ]
    header = ["network", "seeds", *averages.values(), *map(heading, others), *_COUNTS]
    return Grid(f"Test scores · {comparison.title}", header, rows, notes)


def _tolerance(comparison: Comparison) -> str:
    unit = comparison.unit
    tolerance = comparison.protocol[f"tolerance_{unit}"]
    return f"NSD: normalised surface Dice at {tolerance:g} {unit}."


def _classes(comparison: Comparison) -> Grid:
    metrics = _chosen(comparison.metrics, comparison.unit, lambda name: name not in _NEVER)
    rows = [
        [
            entry.label,
            name,
            *_scores(entry, metrics, class_name=name),
            *_counts(entry, class_name=name),
        ]
        for entry in comparison.entries
        for name in comparison.classes
    ]
    header = ["network", "class", *map(heading, metrics), *_COUNTS]
    notes = ["Mean over cases.", _tolerance(comparison), _SD]
    return Grid("Per class", header, rows, notes, wide=2)


def _parts(comparison: Comparison, key: str, title: str) -> Grid:
    dice, *others = compared_metrics(comparison)
    rows = []
    for entry in comparison.entries:
        for value in values_of(entry, key):
            where = {key: value}
            per_class = [_scores(entry, [dice], class_name=c, **where) for c in comparison.classes]
            rows.append(
                [
                    entry.label,
                    value,
                    str(len({row["case"] for row in rows_where(entry.rows, where)})),
                    *_scores(entry, [dice], **where),
                    *(text for own in per_class for text in own),
                    *_scores(entry, others, **where),
                    *_counts(entry, **where),
                ]
            )
    of_classes = [f"Dice {name}" for name in comparison.classes]
    header = ["network", key, "cases", "Dice", *of_classes, *map(heading, others), *_COUNTS]
    notes = [
        'Mean over cases, then over the foreground classes; "cases" counts distinct test cases.',
        _SD,
    ]
    return Grid(title, header, rows, notes, wide=2)


def _beside_the_paper(comparison: Comparison) -> Grid:
    metrics = [_BUILT_IN[name] for name in quoted.COLUMNS]
    rows = []
    for entry in comparison.entries:
        for average, words in (("cases", "foreground"), ("background", "with background")):
            scores = [estimate(entry, metric.name, average=average).mean for metric in metrics]
            cells = [_as_printed(s, metric) for s, metric in zip(scores, metrics, strict=True)]
            rows.append([entry.label, words, *cells])
    ours = len(rows)
    rows += [[f"{n} (quoted)", "not stated", *numbers] for n, numbers in quoted.TABLE_1.items()]
    data = str(comparison.protocol["data"])
    notes = [f"{quoted.SOURCE}.", quoted.CAVEAT]
    if "not ACDC" in data or "ACDC" not in data:
        notes.insert(0, f"Our rows are from another data set: {data}.")
    header = ["network", "average over classes", *map(heading, metrics)]
    marks = dict.fromkeys(range(ours, len(rows)), "quoted")
    return Grid("Beside the paper's table", header, rows, notes, wide=2, marks=marks)


def _as_printed(score: float | None, metric: Metric) -> str:
    """Four decimals without the leading zero, as in the paper."""
    if score is None:
        return UNDEFINED
    return f"{score:.4f}" if metric.unit else f"{score:.4f}".removeprefix("0")


def cost_grid(comparison: Comparison) -> Grid:
    """Parameters, operations with the scan counted, time and memory of each entry."""
    rows = []
    for entry in comparison.entries:
        costs = [run.record.get("cost") or {} for run in entry.runs]
        cost = next((cost for cost in costs if cost.get("macs") is not None), {})
        macs, scan = cost.get("macs"), cost.get("scan_flops")
        both = None if macs is None or scan is None else 2 * macs + scan
        memory = [c["peak_memory_bytes"] for c in costs if c.get("peak_memory_bytes") is not None]
        seconds = [c["seconds_per_case"] for c in costs if c.get("seconds_per_case") is not None]
        fits = [run.record["fit_seconds"] for run in entry.runs if run.record.get("fit_seconds")]
        parameters = entry.runs[0].record.get("parameters")
        rows.append(
            [
                entry.label,
                UNDEFINED if parameters is None else f"{parameters:,}",
                *(UNDEFINED if v is None else f"{v / 1e9:.2f}" for v in (macs, scan, both)),
                " × ".join(map(str, cost.get("image") or [])) or UNDEFINED,
                plus_minus(*mean_sd(seconds), 2),
                f"{max(memory) / 2**20:.0f}" if memory else UNDEFINED,
                duration(fmean(fits)) if fits else UNDEFINED,
                _repeats(entry),
                ", ".join(dict.fromkeys(device(run.record) for run in entry.runs)),
            ]
        )
    header = [
        "network", "parameters", "GMAC", "scan GFLOP", "all GFLOP", "image", "s per case",
        "peak memory MiB", "training", "runs", "device",
    ]  # fmt: skip
    notes = [
        "Per image. GMAC: multiply-adds of convolutions, linear layers and other matrix products; "
        "scan: (9 N + 1) L D operations each; all = 2 × GMAC + scan. Time and memory depend on the "
        "hardware; training: mean of the runs' wall time.",
    ]
    return Grid("What the networks cost", header, rows, notes)


def device(record: Mapping[str, Any]) -> str:
    """Name of the GPU, or of the CPU."""
    hardware = record.get("hardware") or {}
    gpus = hardware.get("gpus") or []
    return str(gpus[0] if gpus else hardware.get("cpu") or UNDEFINED)


def settings_grid(comparison: Comparison) -> Grid | None:
    """Every difference between the entries' configurations; None where there is none."""
    entries = comparison.entries
    different = differences([(entry.runs[0].model, entry.runs[0].settings) for entry in entries])
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
    units = ("vox", "mm") if comparison.unit == "mm" else ("vox",)
    metrics = [m.name for m in comparison.metrics if m.unit in units or m.unit != "mm"]
    for entry in comparison.entries:
        places: list[dict[str, str]] = [{}]
        places += [{key: v} for key in ("phase", "group") for v in values_of(entry, key)]
        for place in places:
            for name in ("foreground", *comparison.classes):
                where = place if name == "foreground" else {**place, "class_name": name}
                for metric in metrics:
                    for average in AVERAGES if name == "foreground" else ("cases",):
                        score = estimate(entry, metric, average=average, **where)
                        if average == "pooled" and score.mean is None:
                            continue  # defined for Dice only
                        yield {
                            "comparison": comparison.title,
                            "network": entry.label,
                            "seeds": len(entry.by_seed),
                            "folds": len(entry.folds) or None,
                            "class": name,
                            "phase": place.get("phase", "all"),
                            "group": place.get("group", "all"),
                            "metric": metric,
                            "average": average,
                            "mean": score.mean,
                            "sd_over_seeds": score.sd,
                            "values": score.values,
                            "undefined": score.undefined,
                            **outcomes(entry, **where),
                        }
