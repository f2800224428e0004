"""Paired comparisons of two networks on the same patients, and what may be concluded.

The patient is the unit: ED and ES of one heart are not independent, and neither are two seeds
scored on one heart, so a patient's scores are averaged first: over seeds, then over the structures
that both networks have a score for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import ceil, comb, log10
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mambaseg.evaluation.metrics import Metric
from mambaseg.reporting.collect import Comparison, Entry
from mambaseg.reporting.grid import UNDEFINED, Grid, heading, signed
from mambaseg.reporting.scores import compared_value, estimate, is_absent, rows_where
from mambaseg.reporting.variation import Scores, p_and_share

Structure = tuple[str, str, int]  # patient, case, class

RESAMPLES = 10_000
LEVEL = 0.05
EXACT = 50  # patients up to whom Wilcoxon's test counts all signs
MOST = 25  # networks of which all pairs are compared
_AT_ONCE = 2**24  # drawn values that are held at a time: 128 MiB
_WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}


class Scored(NamedTuple):
    """A network's values of one score."""

    label: str
    seeds: int
    structures: Mapping[Structure, Sequence[float] | None]  # of the foreground; a value per seed
    absent: frozenset[Structure]  # not in the reference, rightly found with no seed: not compared
    failed: frozenset[Structure]  # without a value, because a seed missed or invented it


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
    p_seeds: float | None  # of other seeds and patients, corrected likewise; None with one seed
    seeds_share: float | None  # of how the difference varies, what seeds make of it; None likewise
    effect: float  # matched-pairs rank-biserial correlation, -1..1
    wins: int  # patients for whom first is better
    losses: int  # patients for whom second is better; the rest are ties
    first_seeds: int
    second_seeds: int
    first_failed: int = 0  # structures without a value because the first alone missed or invented
    second_failed: int = 0


def _signed_ranks(differences: Sequence[float]) -> tuple[float, float]:
    """Two-sided p of Wilcoxon's signed-rank test, rank-biserial correlation (Kerby 2014), -1..1."""
    from scipy import stats

    # zeros are dropped (Wilcoxon 1945)
    values = np.asarray([value for value in differences if value != 0], float)
    if values.size == 0:
        return 1.0, 0.0
    ranks = stats.rankdata(np.abs(values))
    effect = (ranks * np.sign(values)).sum() / ranks.sum()
    if values.size > EXACT:
        return float(stats.wilcoxon(values).pvalue), float(effect)
    return _exact_p(ranks, values > 0), float(effect)


def _exact_p(ranks: npt.NDArray[Any], positive: npt.NDArray[np.bool_]) -> float:
    """Two-sided p over all signs, also of ties, which SciPy draws at random or approximates."""
    twice = np.rint(2 * ranks).astype(int)  # whole: the ranks of ties are halves
    ways = np.zeros(twice.sum() + 1)  # in how many ways the ranks of some make a sum
    ways[0] = 1
    for rank in twice:
        ways[rank:] = ways[rank:] + ways[:-rank]
    found, share = twice[positive].sum(), ways / 2.0 ** len(twice)
    return float(min(1.0, 2 * min(share[: found + 1].sum(), share[found:].sum())))


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


def scored(entry: Entry, metric: Metric) -> Scored:
    """What `compare` needs of an entry."""
    values: dict[Structure, list[float | None]] = defaultdict(list)
    outcomes: dict[Structure, set[str | None]] = defaultdict(set)
    for rows in entry.by_seed.values():
        own: dict[Structure, list[float | None]] = defaultdict(list)  # several of folds that share
        for row in rows_where(rows):
            structure = row["patient"], row["case"], row["class"]
            own[structure].append(compared_value(row, metric))
            outcomes[structure].add("absent" if is_absent(row, metric) else row.get("outcome"))
        for structure, found in own.items():
            values[structure].append(_mean(found))
    seeds = len(entry.by_seed)
    structures = {
        structure: known if len(known) == seeds else None
        for structure, found in values.items()
        for known in [[value for value in found if value is not None]]
    }
    errors = {"missed", "false_positive"}
    return Scored(
        entry.label,
        seeds,
        structures,
        absent=frozenset(key for key, own in outcomes.items() if own == {"absent"}),
        failed=frozenset(key for key in structures
                         if structures[key] is None and outcomes[key] & errors),
    )  # fmt: skip


def _mean(values: Sequence[float | None]) -> float | None:
    """Of all values; None if one is missing."""
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def tables(first: Scored, second: Scored) -> tuple[list[tuple[Scores, Scores]], int, int]:
    """What each patient adds to the tables of both networks.

    Only structures of which every seed of both networks has a score count: otherwise a network that
    misses the difficult ones would look better on the rest. Nor do those that both rightly did not
    find.

    Returns:
        mean scores of both networks by seed, a pair of arrays per patient who has any; how many
        patients have none; how many structures are left out.
    """
    patients: dict[str, list[tuple[Sequence[float], Sequence[float]]]] = {}
    undefined, absent = 0, first.absent & second.absent
    for structure in sorted(first.structures.keys() | second.structures.keys()):
        own = patients.setdefault(structure[0], [])
        a, b = (one.structures.get(structure) for one in (first, second))
        if a is None or b is None or structure in absent:
            undefined += 1
        else:
            own.append((a, b))
    found = [
        (np.mean([a for a, _ in own], axis=0), np.mean([b for _, b in own], axis=0))
        for own in patients.values() if own
    ]  # fmt: skip
    return found, len(patients) - len(found), undefined


def by_network(found: Sequence[tuple[Scores, Scores]]) -> tuple[Scores, Scores]:
    """The same as two tables (seeds, patients)."""
    first, second = zip(*found, strict=True)
    return np.stack(first, axis=1), np.stack(second, axis=1)


def compare(first: Scored, second: Scored, metric: Metric) -> Paired | None:
    """Two networks, `p_holm`, `p_least` and `p_seeds` not corrected; None: no common structure."""
    found, left_out, undefined = tables(first, second)
    if not found:
        return None
    both = by_network(found)
    # means of equal scores may differ in their last digits, and ranks would see these
    differences = (both[0].mean(0) - both[1].mean(0)).round(12).tolist()
    p, effect = _signed_ranks(differences)
    low, high = _bootstrap_interval(differences)
    above, below = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    several = min(first.seeds, second.seeds, len(differences)) > 1
    p_seeds, share = p_and_share(*both) if several else (None, None)
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
        p_seeds=p_seeds,
        seeds_share=share,
        effect=effect,
        wins=above if metric.higher_is_better else below,
        losses=below if metric.higher_is_better else above,
        first_seeds=first.seeds,
        second_seeds=second.seeds,
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
    several = [pair for pair in known if pair.p_seeds is not None]
    count = family or len(known)
    of_seeds = iter(_holm([pair.p_seeds or 0.0 for pair in several], count))
    return [
        pair._replace(p_holm=p, p_least=q, p_seeds=None if pair.p_seeds is None else next(of_seeds))
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
    seeds = {pair.first: pair.first_seeds, pair.second: pair.second_seeds}
    if pair.p_seeds is None:
        single = [name for name, count in seeds.items() if count == 1]
        of = f"of {single[0]}" if len(single) == 1 else "per network"
        return (
            f"{better} scores better on these patients, but with a single seed {of} "
            "seed-to-seed variation is unknown"
        )
    if pair.p_seeds >= LEVEL and (pair.seeds_share or 0) < 0.5:
        return (
            f"{better} scores better on these patients, who differ so much that others might not "
            "show it"
        )
    if pair.p_seeds >= LEVEL:
        fewest = min(seeds.values())
        return (
            f"{better} scores better, but with as few as {_WORDS.get(fewest, str(fewest))} seeds "
            "per network this could be seed-to-seed variation"
        )
    return f"{better} scores better, by more than patients and seeds vary"


def minus(first: str, second: str) -> str:
    """A difference in words; names with a + of their own in brackets."""
    return " − ".join(f"({name})" if "+" in name else name for name in (first, second))


def digits(pair: Paired, usual: int) -> int:
    """As many decimals as show that an interval leaves out 0; seven at most."""
    nearest = min(abs(pair.low or 0.0), abs(pair.high or 0.0))
    return usual if nearest == 0 else min(7, max(usual, ceil(-log10(nearest))))


def _p_value(p: float | None) -> str:
    if p is None:
        return UNDEFINED
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def paired_grid(comparison: Comparison, metric: Metric, found: Sequence[Paired]) -> Grid:
    """The comparisons on one score; `found` is of `pairs`."""
    higher = bool(metric.higher_is_better)
    subject = comparison.subject
    header = [
        "pair", "verdict", f"{subject}s", "difference", "95 % interval", "p", "p (Holm)",
        "p with seeds", "rank-biserial", "first better", "second better", f"{subject}s left out",
        "values left out",
    ]  # fmt: skip
    rows = [
        [
            minus(pair.first, pair.second),
            verdict(pair, higher_is_better=higher),
            str(pair.patients),
            signed(pair.difference, digits(pair, metric.decimals)),
            UNDEFINED
            if pair.low is None or pair.high is None
            else " … ".join(
                signed(end, digits(pair, metric.decimals)) for end in (pair.low, pair.high)
            ),
            *map(_p_value, (pair.p, pair.p_holm, pair.p_seeds)),
            signed(pair.effect, 2),
            *map(str, (pair.wins, pair.losses, pair.left_out, pair.undefined)),
        ]
        for pair in found
    ]
    notes = [
        f"Per {subject}: mean over seeds, then over cases and foreground classes; difference: mean "
        f"over {subject}s, first − second; interval: bootstrap over {subject}s, {RESAMPLES} "
        "resamples, fixed seed; p: two-sided Wilcoxon signed-rank test, Holm over the pairs of "
        "this table; p with seeds: t test of the difference against how patients and seeds vary, "
        "Holm likewise; effect size: matched-pairs rank-biserial correlation (+1: first larger in "
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
    if any(min(pair.first_seeds, pair.second_seeds) < 2 for pair in found):
        notes.append(
            "A network with a single seed stands for one training: the test compares these "
            "trained networks, not the architectures."
        )
    return Grid(f"Paired comparison of {heading(metric)}", header, rows, notes, wide=2)
