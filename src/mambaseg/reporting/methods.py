"""What each network of a learning method has learnt: a row per network, and their mean."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from mambaseg.evaluation.metrics import Metric
from mambaseg.reporting.collect import Comparison, Entry
from mambaseg.reporting.grid import Grid, heading, plus_minus
from mambaseg.reporting.runs import RunData
from mambaseg.reporting.scores import mean_sd


def networks_grid(comparison: Comparison, metrics: Sequence[Metric]) -> Grid | None:
    """Each network of each entry, where a method of the comparison trains several."""
    if all(len(run.networks) == 1 for run in comparison.runs):
        return None
    rows: list[list[str]] = []
    marks: dict[int, str] = {}
    for entry in comparison.entries:
        networks = list(entry.runs[0].networks)
        for name in networks:
            chosen = sum(run.chosen == name for run in entry.runs)
            if chosen and len(networks) > 1:
                marks[len(rows)] = "bold"
            told = f"{chosen} of {len(entry.runs)}"
            rows.append([entry.label, name, told, *_cells(entry, [name], metrics)])
        if len(networks) > 1:
            rows.append([entry.label, "mean of both" if len(networks) == 2 else "mean of all", "",
                         *_cells(entry, networks, metrics)])  # fmt: skip
    notes = [
        "Chosen (bold): in how many runs the network was best of its method in validation, so the "
        "result that all other tables show. Scores as in the first table: per class over cases, "
        "then over the foreground classes; ± standard deviation over seeds."
    ]
    if any(entry.folds > 1 for entry in comparison.entries):
        notes.append("Of folds the mean of their means: other tables pool their cases first.")
    header = ["network", "trained", "chosen", *map(heading, metrics)]
    return Grid("Networks of each method", header, rows, notes, wide=3, marks=marks)


def _cells(entry: Entry, networks: Sequence[str], metrics: Sequence[Metric]) -> list[str]:
    """Scores of a network, or the mean of several, over the runs of each seed and over seeds."""
    cells = []
    for metric in metrics:
        per_seed = []
        for seed in entry.by_seed:
            runs = [run for run in entry.runs if run.seed == seed]
            known = [v for run in runs for name in networks
                     if (v := _score(run, name, metric)) is not None]  # fmt: skip
            if known:
                per_seed.append(fmean(known))
        cells.append(plus_minus(*mean_sd(per_seed), metric.decimals))
    return cells


def _score(run: RunData, network: str, metric: Metric) -> float | None:
    score = run.networks.get(network, {}).get("foreground", {}).get(metric.name) or {}
    mean: float | None = score.get("mean")
    return mean
