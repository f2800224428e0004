"""Paired comparisons of two networks on the same patients, and what may be concluded.

The patient is the unit: ED and ES of one heart are not independent, and neither are two seeds
scored on one heart, so a patient's scores are averaged first: over seeds, then over the structures
that both networks have a score for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import comb
from statistics import fmean
from typing import NamedTuple

import numpy as np

from mambaseg.evaluation.metrics import Metric
from mambaseg.reporting.collect import Comparison, Entry
from mambaseg.reporting.grid import UNDEFINED, Grid, heading, signed
from mambaseg.reporting.scores import compared_value, estimate, is_absent, rows_where

Structure = tuple[str, str, int]  # patient, case, class

RESAMPLES = 10_000
LEVEL = 0.05
MOST = 25  # networks of which all pairs are compared
_AT_ONCE = 2**24  # drawn values that are held at a time: 128 MiB
_WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}


class Scored(NamedTuple):
    """A network's values of one score."""

    label: str
    structures: Mapping[Structure, float | None]  # of the foreground, mean over seeds
    absent: frozenset[Structure]  # not in the reference, rightly found with no seed: not compared
    failed: frozenset[Structure]  # without a value, because a seed missed or invented it
    per_seed: Sequence[float]


class Paired(NamedTuple):
    """One network against another on one score; names are columns of paired.csv."""

    first: str  # label of the one
    second: str  # and of the other
    patients: int  # with a structure that both have a score for
    left_out: int  # patients without one
    undefined: int  # values (case × class) left out because one or both have none
    difference: float  # mean over patients of first - second
    low: float | None  # bootstrap 95 % interval of that mean; None with one patient
    high: float | None
    p: float  # of the two-sided Wilcoxon signed-rank test
    p_holm: float  # the same, corrected for all pairs of the comparison
    p_least: float  # what p_holm would be if in every pair all patients favoured one network
    effect: float  # matched-pairs rank-biserial correlation, -1..1
    wins: int  # patients for whom first is better
    losses: int  # patients for whom second is better; the rest are ties
    seeds: int  # of the network that has fewer
    seed_margin: float | None  # difference that seeds alone explain (95 %), None with one seed
    first_failed: int = 0  # structures without a value because the first alone missed or invented
    second_failed: int = 0


def _signed_ranks(differences: Sequence[float]) -> tuple[float, float]:
    """Two-sided p of Wilcoxon's signed-rank test, rank-biserial correlation (Kerby 2014), -1..1."""
    from scipy import stats

    # zeros are dropped (Wilcoxon 1945) before SciPy sees any: up to 50 differences without ties it
    # tests exactly, but not where there is a zero
    values = np.asarray([value for value in differences if value != 0], float)
    if values.size == 0:
        return 1.0, 0.0
    ranks = stats.rankdata(np.abs(values))
    effect = (ranks * np.sign(values)).sum() / ranks.sum()
    return float(stats.wilcoxon(values).pvalue), float(effect)


def _holm(p_values: Sequence[float], family: int | None = None) -> list[float]:
    """Holm's step-down correction (Holm 1979), in the order given.

    `family` counts the hypotheses, where some have not been tested.
    """
    values = np.asarray(p_values, float)
    order = np.argsort(values, kind="stable")
    first = len(values) if family is None else family
    steps = np.arange(first, first - len(values), -1) * values[order]
    values[order] = np.minimum(1, np.maximum.accumulate(steps))
    return values.tolist()


def _bootstrap_interval(differences: Sequence[float]) -> tuple[float | None, float | None]:
    """95 % percentile interval of the mean over resampled patients; the same at every call."""
    from scipy import stats

    if len(differences) == 1:
        return None, None
    found = stats.bootstrap(
        (differences,), np.mean, n_resamples=RESAMPLES, method="percentile",
        batch=max(1, _AT_ONCE // len(differences)), rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def _seed_margin(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Half of Welch's 95 % interval of a difference of means over seeds; None with one seed."""
    from scipy import stats

    if min(len(first), len(second)) < 2:
        return None
    if len(set(first)) == len(set(second)) == 1:
        return 0.0
    interval = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    return float(interval.high - interval.low) / 2


def scored(entry: Entry, metric: Metric) -> Scored:
    """What `compare` needs of an entry."""
    values: dict[Structure, list[float | None]] = defaultdict(list)
    outcomes: dict[Structure, set[str | None]] = defaultdict(set)
    for rows in entry.by_seed.values():
        for row in rows_where(rows):
            structure = row["patient"], row["case"], row["class"]
            values[structure].append(compared_value(row, metric))
            outcomes[structure].add("absent" if is_absent(row, metric) else row.get("outcome"))
    structures = {
        structure: None if None in own else fmean(value for value in own if value is not None)
        for structure, own in values.items()
    }
    errors = {"missed", "false_positive"}
    return Scored(
        entry.label,
        structures,
        absent=frozenset(key for key, own in outcomes.items() if own == {"absent"}),
        failed=frozenset(key for key in structures
                         if structures[key] is None and outcomes[key] & errors),
        per_seed=estimate(entry, metric.name).per_seed,
    )  # fmt: skip


def _patient_differences(first: Scored, second: Scored) -> tuple[list[float], int, int]:
    """Mean difference of each patient; patients without one; structures left out.

    Only structures that both networks have a score for count: otherwise a network that misses the
    difficult ones would look better on the rest. Nor do those that both rightly did not find.
    """
    patients: dict[str, list[float]] = {}
    undefined, absent = 0, first.absent & second.absent
    for structure in sorted(first.structures.keys() | second.structures.keys()):
        own = patients.setdefault(structure[0], [])
        a, b = (one.structures.get(structure) for one in (first, second))
        if a is None or b is None or structure in absent:
            undefined += 1
        else:
            own.append(a - b)
    # means of equal scores may differ in their last digits, and ranks would see these
    differences = [round(fmean(own), 12) for own in patients.values() if own]
    return differences, len(patients) - len(differences), undefined


def compare(first: Scored, second: Scored, metric: Metric) -> Paired | None:
    """Two networks, `p_holm` and `p_least` not corrected yet; None if they share no structure."""
    differences, left_out, undefined = _patient_differences(first, second)
    if not differences:
        return None
    p, effect = _signed_ranks(differences)
    low, high = _bootstrap_interval(differences)
    above, below = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    seeds = first.per_seed, second.per_seed
    return Paired(
        first.label,
        second.label,
        patients=len(differences),
        left_out=left_out,
        undefined=undefined,
        difference=fmean(differences),
        low=low,
        high=high,
        p=p,
        p_holm=p,
        p_least=min(1.0, 2.0 ** (1 - len(differences))),  # of 2 ** n equally likely signs, two
        effect=effect,
        wins=above if metric.higher_is_better else below,
        losses=below if metric.higher_is_better else above,
        seeds=min(map(len, seeds)),
        seed_margin=_seed_margin(*seeds),
        first_failed=len(first.failed - second.failed),
        second_failed=len(second.failed - first.failed),
    )


def compared(entries: Sequence[Entry]) -> list[tuple[Entry, Entry]]:
    """All pairs; of more than `MOST` networks the best, by Dice, with each of the others."""
    if len(entries) <= MOST:
        return list(combinations(entries, 2))
    best = max(entries, key=lambda entry: estimate(entry, "dice").mean or 0)
    return [(best, entry) for entry in entries if entry is not best]


def pairs(comparison: Comparison, metric: Metric) -> list[Paired]:
    """The pairs of `compared` on patients' mean foreground score, Holm over all of them.

    Where only the best network is compared, it was chosen from all pairs: these are the family.
    """
    own = {entry.label: scored(entry, metric) for entry in comparison.entries}
    both = compared(comparison.entries)
    found = [compare(own[a.label], own[b.label], metric) for a, b in both]
    known = [pair for pair in found if pair is not None]
    family = None if len(own) <= MOST else comb(len(own), 2)
    corrected = _holm([pair.p for pair in known], family)
    least = _holm([pair.p_least for pair in known], family)
    return [
        pair._replace(p_holm=p, p_least=q)
        for pair, p, q in zip(known, corrected, least, strict=True)
    ]


def verdict(pair: Paired, *, higher_is_better: bool = True) -> str:
    """What the numbers allow to conclude, in plain words."""
    if pair.p_least >= LEVEL:
        return (
            f"too few patients ({pair.patients}): even if all of them favoured one network, "
            f"p (Holm) would be {pair.p_least:.2f}"
        )
    if pair.p_holm >= LEVEL or pair.low is None or pair.high is None or pair.low <= 0 <= pair.high:
        return "within noise: these patients show no clear difference"
    both = (pair.first, pair.first_failed), (pair.second, pair.second_failed)
    if (pair.difference > 0) != higher_is_better:
        both = both[1], both[0]
    (better, failed), (other, others) = both
    if pair.effect * pair.difference < 0:
        return (
            f"no verdict: {better} is better on average, {other} by the ranks of the test, so a "
            "few patients decide"
        )
    if failed > others:
        return (
            f"{better} scores better on what both have found, but it alone missed or invented "
            f"{failed} structures, {other} alone {others}"
        )
    if pair.seed_margin is None:
        return (
            f"{better} scores better on these patients, but with a single seed per network "
            "seed-to-seed variation is unknown"
        )
    if abs(pair.difference) <= pair.seed_margin:
        count = _WORDS.get(pair.seeds, str(pair.seeds))
        return (
            f"{better} scores better, but with as few as {count} seeds per network this could be "
            "seed-to-seed variation"
        )
    return f"{better} scores better, by more than patients and seeds vary"


def minus(first: str, second: str) -> str:
    """A difference in words; names with a + of their own in brackets."""
    return " − ".join(f"({name})" if "+" in name else name for name in (first, second))


def paired_grid(comparison: Comparison, metric: Metric, found: Sequence[Paired]) -> Grid:
    """The comparisons on one score; `found` is of `pairs`."""
    higher, digits = bool(metric.higher_is_better), metric.decimals
    subject = comparison.subject
    header = [
        "pair", "verdict", f"{subject}s", "difference", "95 % interval", "p", "p (Holm)",
        "rank-biserial", "first better", "second better", f"{subject}s left out",
        "values left out",
    ]  # fmt: skip
    rows = [
        [
            minus(pair.first, pair.second),
            verdict(pair, higher_is_better=higher),
            str(pair.patients),
            signed(pair.difference, digits),
            UNDEFINED
            if pair.low is None or pair.high is None
            else f"{signed(pair.low, digits)} … {signed(pair.high, digits)}",
            *("<0.001" if p < 0.001 else f"{p:.3f}" for p in (pair.p, pair.p_holm)),
            signed(pair.effect, 2),
            *map(str, (pair.wins, pair.losses, pair.left_out, pair.undefined)),
        ]
        for pair in found
    ]
    notes = [
        f"Per {subject}: mean over seeds, then over cases and foreground classes; difference: mean "
        f"over {subject}s, first − second; interval: bootstrap over {subject}s, {RESAMPLES} "
        "resamples, fixed seed; p: two-sided Wilcoxon signed-rank test, Holm over the pairs of "
        "this table; effect size: matched-pairs rank-biserial correlation (+1: first larger in "
        f"every {subject}).",
        "Only structures for which both networks have a score of every seed count"
        + (
            " (1 where one rightly finds nothing and the other invents something)"
            if metric.empty == "overlap" and comparison.protocol.get("policy") == "strict"
            else ""
        )
        + f'. "values left out" counts the other structures, "{subject}s left out" those without '
        "any.",
    ]
    if not found:
        notes = []
    if found and len(comparison.entries) > MOST:
        notes.append(
            f"Of more than {MOST} networks the one with the best Dice is compared with each of the "
            "others; since it was chosen by these scores, Holm counts all pairs of networks."
        )
    known = {(pair.first, pair.second) for pair in found}
    labels = [(one.label, other.label) for one, other in compared(comparison.entries)]
    if alone := [minus(*pair) for pair in labels if pair not in known]:
        notes.append(f"No {subject} has a structure that both score: {', '.join(alone)}.")
    if found and not higher:
        left_out = {"strict": "missed and invented structures", "legacy": "invented structures"}
        what = metric.empty == "distance" and left_out.get(comparison.protocol.get("policy") or "")
        notes.append(
            "Smaller is better."
            + (
                f' {metric.title} has no value for {what}: the columns "missed" and "false +" '
                "count them."
                if what
                else ""
            )
        )
    if any(pair.seed_margin is None for pair in found):
        notes.append(
            "A network with a single seed stands for one training: the test compares these "
            "trained networks, not the architectures."
        )
    return Grid(f"Paired comparison of {heading(metric)}", header, rows, notes, wide=2)
