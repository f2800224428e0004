"""Tables beside the scores: paired comparisons, clinical indices, costs, settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from statistics import fmean
from typing import Any

from mambaseg.reporting.clinical import UNITS, Agreement, agreement, indices
from mambaseg.reporting.collect import Comparison, Entry
from mambaseg.reporting.labels import differences
from mambaseg.reporting.score_tables import decimals, heading, of_seeds, repeats
from mambaseg.reporting.scores import estimate, value_scores
from mambaseg.reporting.statistics import RESAMPLES, Paired, compare, holm, mean_sd, verdict
from mambaseg.reporting.tables import UNDEFINED, Grid, signed


def paired(comparison: Comparison, metric: str) -> list[Paired]:
    """Every pair of entries on patients' mean foreground score, Holm over all of these pairs."""
    higher = decimals(metric) == 3
    sides = [
        (entry.label, value_scores(entry, metric), estimate(entry, metric).per_seed)
        for entry in comparison.entries
    ]
    pairs = [compare(a, b, higher_is_better=higher) for a, b in combinations(sides, 2)]
    known = [pair for pair in pairs if pair is not None]
    corrected = holm([pair.p for pair in known])
    least = holm([pair.p_least for pair in known])
    return [
        replace(pair, p_holm=p, p_least=q)
        for pair, p, q in zip(known, corrected, least, strict=True)
    ]


def paired_grids(comparison: Comparison) -> list[Grid]:
    """The comparisons on Dice and on HD95; none with a single entry."""
    if len(comparison.entries) < 2:
        return []
    return [_paired_grid(comparison, m) for m in ("dice", f"hd95_{comparison.unit}")]


def _paired_grid(comparison: Comparison, metric: str) -> Grid:
    higher, digits = decimals(metric) == 3, decimals(metric)
    subject = comparison.subject
    header = [
        "pair", "verdict", f"{subject}s", "difference", "95 % interval", "p", "p (Holm)",
        "rank-biserial", "first better", "second better", f"{subject}s left out",
        "values left out",
    ]  # fmt: skip
    pairs = paired(comparison, metric)
    rows = [
        [
            f"{pair.first} − {pair.second}",
            verdict(pair, higher_is_better=higher),
            str(pair.patients),
            signed(pair.difference, digits),
            f"{signed(pair.low, digits)} … {signed(pair.high, digits)}",
            probability(pair.p),
            probability(pair.p_holm),
            signed(pair.effect, 2),
            str(pair.wins),
            str(pair.losses),
            str(pair.left_out),
            str(pair.undefined),
        ]
        for pair in pairs
    ]
    notes = [
        f"Per {subject}: mean over seeds, then over cases and foreground classes; difference: mean "
        f"over {subject}s, first − second; interval: bootstrap over {subject}s, {RESAMPLES} "
        "resamples, fixed seed; p: two-sided Wilcoxon signed-rank test, Holm over the pairs of "
        "this table; effect size: matched-pairs rank-biserial correlation (+1: first larger in "
        f"every {subject}).",
        "Only structures that both networks have a score for count, of every seed: values left "
        f"out are the others, {subject}s left out those without any.",
    ]
    compared = {(pair.first, pair.second) for pair in pairs}
    labels = combinations([entry.label for entry in comparison.entries], 2)
    if alone := [" − ".join(pair) for pair in labels if pair not in compared]:
        notes.append(
            f"No {subject} has a structure that both have a score for: {', '.join(alone)}."
        )
    if not higher:
        notes.append("Smaller is better. A missed structure has no distance: read it with missed.")
    if any(pair.seed_margin is None for pair in pairs):
        notes.append(
            "A network with a single seed stands for one training: the test compares these "
            "trained networks, not the architectures."
        )
    return Grid(f"Paired comparison of {heading(metric)}", header, rows, notes, wide=2)


def probability(p: float) -> str:
    """Three decimals, `<0.001` below."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def agreement_of(entry: Entry) -> dict[str, list[Agreement]]:
    """Index -> agreement of each seed (all its folds together)."""
    found: dict[str, list[Agreement]] = {}
    for rows in entry.by_seed.values():
        values: dict[str, list[tuple[float | None, float | None]]] = {}
        for index in indices(rows):
            values.setdefault(index.name, []).append((index.prediction, index.reference))
        for name, pairs in values.items():
            found.setdefault(name, []).append(agreement(pairs))
    return found


def clinical_grid(comparison: Comparison) -> Grid | None:
    """Agreement of clinical indices; None where no patient has both phases."""
    header = [
        "index", "network", "patients", "bias", "95 % limits of agreement", "MAE", "Pearson r",
        "undefined",
    ]  # fmt: skip
    found = {entry.label: agreement_of(entry) for entry in comparison.entries}
    names = dict.fromkeys(name for own in found.values() for name in own)
    rows = []
    for name in names:
        unit = UNITS[name.rsplit(" ", 1)[-1]]
        for label, own in found.items():
            if name in own:
                rows.append([f"{name} ({unit})", label, *_agreement_cells(own[name])])
    if not rows:
        return None
    notes = [
        "Prediction − reference per patient; numbers of each seed, averaged over seeds (± standard "
        "deviation). EF is a ratio of voxel counts on one grid and needs no spacing; volumes and "
        "mass (myocardium at ED × 1.05 g/ml) need it.",
        "Limits: bias ± 1.96 standard deviations (Bland and Altman). undefined: an EF of a "
        "ventricle that is empty at ED, over all seeds.",
    ]
    return Grid("Clinical indices", header, rows, notes, wide=2)


def _agreement_cells(seeds: Sequence[Agreement]) -> list[str]:
    biases = [seed.bias for seed in seeds if seed.bias is not None]
    errors = [seed.mae for seed in seeds if seed.mae is not None]
    lows = [seed.low for seed in seeds if seed.low is not None]
    highs = [seed.high for seed in seeds if seed.high is not None]
    limits = f"{signed(fmean(lows), 1)} … {signed(fmean(highs), 1)}" if lows else UNDEFINED
    return [
        str(max(seed.patients for seed in seeds)),
        _plus_minus(biases, 1, sign=True) + of_seeds(len(biases), len(seeds)),
        limits,
        _plus_minus(errors, 1) + of_seeds(len(errors), len(seeds)),
        _plus_minus(known := [seed.r for seed in seeds if seed.r is not None], 3)
        + of_seeds(len(known), len(seeds)),
        str(sum(seed.undefined for seed in seeds)),
    ]


def _plus_minus(values: Sequence[float], digits: int, *, sign: bool = False) -> str:
    mean, sd = mean_sd(values)
    if mean is None:
        return UNDEFINED
    text = signed(mean, digits)
    text = text if sign else text.removeprefix("+")
    return text if sd is None else f"{text} ± {sd:.{digits}f}"


def cost_grid(comparison: Comparison) -> Grid:
    """Parameters, operations with the scan counted, time and memory of each entry."""
    header = [
        "network", "parameters", "GMAC", "scan GFLOP", "all GFLOP", "image", "s per case",
        "peak memory MiB", "training", "runs", "device",
    ]  # fmt: skip
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
                " × ".join(map(str, cost["image"])) if cost.get("image") else UNDEFINED,
                _plus_minus(seconds, 2),
                f"{max(memory) / 2**20:.0f}" if memory else UNDEFINED,
                duration(fmean(fits)) if fits else UNDEFINED,
                repeats(entry),
                ", ".join(dict.fromkeys(device(run.record) for run in entry.runs)),
            ]
        )
    notes = [
        "Per image. GMAC: multiply-adds of convolutions, linear layers and other matrix products; "
        "scan: (9 N + 1) L D operations each; all = 2 × GMAC + scan. Time and memory are this "
        "hardware's; training: mean of the runs' wall time.",
    ]
    return Grid("What the networks cost", header, rows, notes)


def device(record: Any) -> str:
    """The GPU's name, or the CPU's."""
    hardware = record.get("hardware") or {}
    gpus = hardware.get("gpus") or []
    return str(gpus[0] if gpus else hardware.get("cpu") or UNDEFINED)


def duration(seconds: float) -> str:
    """`3 h 20 min`, `4 min 5 s`, `12 s`."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


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


def paired_rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """Paired comparisons unrounded, for paired.csv."""
    if len(comparison.entries) > 1:
        for metric in ("dice", f"hd95_{comparison.unit}"):
            for pair in paired(comparison, metric):
                said = verdict(pair, higher_is_better=decimals(metric) == 3)
                yield {
                    "comparison": comparison.title,
                    "metric": metric,
                    **asdict(pair),
                    "verdict": said,
                }


def clinical_rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """Every patient's indices, for clinical.csv."""
    for entry in comparison.entries:
        for seed, rows in entry.by_seed.items():
            for index in indices(rows):
                yield {
                    "comparison": comparison.title,
                    "network": entry.label,
                    "seed": seed,
                    **asdict(index),
                }
