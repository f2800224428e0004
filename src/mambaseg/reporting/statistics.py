"""Paired comparisons of two networks on the same patients, and what may be concluded.

The patient is the unit: ED and ES of one heart are not independent, and neither are two seeds
scored on one heart, so a patient's scores are averaged first: over seeds
(`mambaseg.reporting.scores.value_scores`), then over the structures that both networks have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

Values = Mapping[tuple[str, int], float | None]  # (case, class) -> score

RESAMPLES = 10_000
LEVEL = 0.05


@dataclass(frozen=True)
class Paired:
    """One network against another on one score.

    Attributes:
        first: label of the one.
        second: label of the other.
        patients: pairs that both have a score for.
        left_out: patients without a structure that both have a score for.
        undefined: values (case × class) of one or both left out because the other has none.
        difference: mean over patients of first - second.
        low: lower end of the bootstrap 95 % interval of that mean.
        high: upper end.
        p: of the two-sided Wilcoxon signed-rank test.
        p_holm: the same, corrected for all pairs of the comparison.
        p_least: what `p_holm` would be if in every pair all patients favoured one network.
        effect: matched-pairs rank-biserial correlation, -1..1.
        wins: patients for whom first is better.
        losses: patients for whom second is better; the rest are ties.
        seed_margin: how large a difference seeds alone explain (95 %), None unless both networks
            have two or more.
    """

    first: str
    second: str
    patients: int
    left_out: int
    undefined: int
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    p_least: float
    effect: float
    wins: int
    losses: int
    seed_margin: float | None


def mean_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there are too few values."""
    return (
        fmean(values) if values else None,
        stdev(values) if len(values) > 1 else None,
    )


def wilcoxon(differences: Sequence[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; zeros are dropped (Wilcoxon 1945).

    Exact for up to 50 differences without ties or zeros, otherwise the normal approximation, as
    SciPy decides. 1 where all differences are 0.
    """
    from scipy import stats

    if not any(differences):
        return 1.0
    return float(stats.wilcoxon(np.asarray(differences, float), zero_method="wilcox").pvalue)


def rank_biserial(differences: Sequence[float]) -> float:
    """Matched-pairs rank-biserial correlation (Kerby 2014): share of ranks for minus against.

    1: every patient favours the first, 0: no preference, -1: every patient favours the second.
    """
    values = np.asarray([value for value in differences if value != 0], float)
    if values.size == 0:
        return 0.0
    magnitude = np.abs(values)
    # mean rank of ties: (number smaller + number smaller or equal + 1) / 2
    ordered = np.sort(magnitude)
    below = np.searchsorted(ordered, magnitude, side="left")
    ranks = (below + np.searchsorted(ordered, magnitude, side="right") + 1) / 2
    return float((ranks * np.sign(values)).sum() / ranks.sum())


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def bootstrap_interval(
    differences: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean over resampled patients; the same at every call."""
    values = np.asarray(differences, float)
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, values.size, (resamples, values.size))
    low, high = np.percentile(values[picks].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


def seed_margin(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Half the width of Welch's 95 % interval of a difference of means over seeds.

    Few seeds have a wide one: with two each it is up to 4.3 standard errors (one network's spread
    alone: 12.7).

    Args:
        first: the score of each seed of one network.
        second: of the other.

    Returns:
        None when either has a single seed.
    """
    if len(first) < 2 or len(second) < 2:
        return None
    from scipy import stats

    parts = [stdev(values) ** 2 / len(values) for values in (first, second)]
    total = sum(parts)
    if total == 0:
        return 0.0
    freedom = total**2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (first, second), strict=True)
    )
    return float(stats.t.ppf(0.975, freedom) * math.sqrt(total))


def patient_differences(
    first: Mapping[str, Values], second: Mapping[str, Values]
) -> tuple[list[float], int, int]:
    """Per patient the mean difference over the structures that both networks have a score for.

    Args:
        first: patient -> (case, class) -> score, None where undefined.
        second: likewise.

    Returns:
        first - second of each patient that has such structures, in order of their names; how many
        patients have none; how many structures (case × class) are left out.
    """
    differences, left_out, undefined = [], 0, 0
    for patient in sorted(first.keys() | second.keys()):
        own, other = first.get(patient, {}), second.get(patient, {})
        pairs = [(own.get(key), other.get(key)) for key in own.keys() | other.keys()]
        common = [a - b for a, b in pairs if a is not None and b is not None]
        undefined += len(pairs) - len(common)
        if common:
            differences.append(fmean(sorted(common)))  # sorted: a set's order is not repeatable
        else:
            left_out += 1
    return differences, left_out, undefined


def compare(
    first: tuple[str, Mapping[str, Values], Sequence[float]],
    second: tuple[str, Mapping[str, Values], Sequence[float]],
    *,
    higher_is_better: bool = True,
) -> Paired | None:
    """Compares two networks; `p_holm` is still `p`, and `p_least` is uncorrected too.

    Args:
        first: label, patient -> (case, class) -> score (None: undefined), score of each seed.
        second: likewise.
        higher_is_better: for counting wins.

    Returns:
        None when no patient has scores of both.
    """
    (name, scores, seeds), (other, other_scores, other_seeds) = first, second
    differences, left_out, undefined = patient_differences(scores, other_scores)
    if not differences:
        return None
    p = wilcoxon(differences)
    low, high = bootstrap_interval(differences)
    above, below = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return Paired(
        first=name,
        second=other,
        patients=len(differences),
        left_out=left_out,
        undefined=undefined,
        difference=fmean(differences),
        low=low,
        high=high,
        p=p,
        p_holm=p,
        p_least=min(1.0, 2.0 ** (1 - len(differences))),  # of 2 ** n equally likely signs, two
        effect=rank_biserial(differences),
        wins=above if higher_is_better else below,
        losses=below if higher_is_better else above,
        seed_margin=seed_margin(seeds, other_seeds),
    )


def verdict(pair: Paired, *, higher_is_better: bool = True) -> str:
    """What the numbers allow to say, in plain words."""
    if pair.p_least >= LEVEL:
        return (
            f"too few patients ({pair.patients}): if all of them favoured one network, p (Holm) "
            f"would still be {pair.p_least:.2f}"
        )
    if pair.p_holm >= LEVEL or pair.low <= 0 <= pair.high:
        return "within noise: these patients do not tell the two apart"
    better = pair.first if (pair.difference > 0) == higher_is_better else pair.second
    if pair.seed_margin is None:
        return (
            f"{better} is better on these patients; too few seeds to say whether another "
            "training would repeat it"
        )
    if abs(pair.difference) <= pair.seed_margin:
        return (
            f"{better} is better on these patients, but by no more than seeds alone explain "
            f"({pair.seed_margin:.2g})"
        )
    return f"{better} is better, by more than the spread of patients and seeds explains"
