"""How many seeds and patients a difference between two networks would need to be found.

`variation` has the model of the scores and the test, which is also that of a report's verdicts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache, partial
from math import sqrt
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mambaseg.errors import UserError, counted
from mambaseg.evaluation.metrics import OVERLAP
from mambaseg.reporting.collect import Comparison, Entry, collect
from mambaseg.reporting.grid import Grid, signed
from mambaseg.reporting.paired import LEVEL, by_network, compared, minus, scored, tables
from mambaseg.reporting.variation import Components, Scores, components, estimated, spread

DIFFERENCE = 0.0033  # of Mamba-UNet over UNet in its paper
POWER = 0.8
PATIENTS = (100, 1000)  # beside the number that was tested
_MOST = 10**6  # seeds, patients: more than anybody has
_DRAWN = 1024  # experiments, a power of 2
_STEP = 1e-5  # of differences that are tried
_DICE = OVERLAP[0]
NEVER = "never"


def power(parts: Components, seeds: int, patients: int, difference: float) -> float:
    """How often, 0..1, a two-sided test finds a true difference, and on the right side.

    An experiment tests against the variances that it estimates, not against the true ones. In this
    balanced design the mean squares are independent multiples of chi squared variables, and the
    difference of the means does not depend on them: the power is a mean over their distribution,
    taken at `_DRAWN` points of a Sobol sequence.

    Args:
        parts: of the two networks.
        seeds: of each network, at least two.
        patients: that both are tested on, at least two.
        difference: the true one.
    """
    from scipy import stats

    deviation, needed = _tested(parts, seeds, patients)
    if deviation == 0:
        return 1.0
    return float(stats.norm.sf((needed - abs(difference)) / deviation).mean())


@lru_cache(8)
def _tested(parts: Components, seeds: int, patients: int) -> tuple[float, npt.NDArray[np.float64]]:
    """The deviation of the difference of two means, and how large each experiment needs it."""
    from scipy import stats

    counts = (seeds, seeds)
    variance, _ = spread(parts, counts, patients)
    degrees = [patients - 1, *2 * [seeds - 1], *2 * [(seeds - 1) * (patients - 1)]]
    of_patients, *others = (
        stats.chi2.ppf(points, free) / free for points, free in zip(_points(), degrees, strict=True)
    )
    by_seed = [own + rest / patients for own, rest in zip(parts.seeds, parts.rest, strict=True)]
    of_seeds, of_rest = (
        [value * one for value, one in zip(values, drawn, strict=True)]
        for values, drawn in ((by_seed, others[:2]), (parts.rest, others[2:]))
    )
    paired = (parts.patients + sum(parts.rest) / seeds) * of_patients
    seen, free = spread(estimated(paired, of_seeds, of_rest, counts, patients), counts, patients)
    return float(np.sqrt(variance)), stats.t.isf(LEVEL / 2, free) * np.sqrt(seen)


@cache
def _points() -> npt.NDArray[np.float64]:
    """Quantiles (5, `_DRAWN`) of the variances that an experiment may see."""
    from scipy.stats import qmc

    points = qmc.Sobol(5, scramble=False).random(_DRAWN)  # the same in every version of SciPy
    return (points + 0.5 / _DRAWN).T  # the first one is 0


def least(enough: Callable[[int], bool]) -> int | None:
    """The smallest number of 2 or more that is enough, where all larger ones are too."""
    if not enough(_MOST):  # with few seeds, more patients may cost degrees of freedom
        return None
    high = 2
    while not enough(high):
        high = min(2 * high, _MOST)
    low = max(2, high // 2)
    return low + bisect_left(range(low, high), True, key=enough)


def smallest_difference(
    parts: Components, seeds: int, patients: int, wanted: float
) -> float | None:
    """The smallest true difference that would be found with the wanted power; None: not even 1."""
    steps = least(lambda step: power(parts, seeds, patients, step * _STEP) >= wanted)
    return steps * _STEP if steps and steps * _STEP <= 1 else None


def patient_scores(first: Entry, second: Entry) -> tuple[Scores, Scores]:
    """Mean foreground Dice (seeds, patients) of two networks, on what all their runs have scored.

    Raises:
        UserError: there are too few seeds or patients.
    """
    one, other = (scored(entry, _DICE) for entry in (first, second))
    found, _, _ = tables(one, other)
    if min(one.seeds, other.seeds) < 2 or len(found) < 2:
        raise UserError(
            f"{first.label} and {second.label}: this needs two seeds of each network (seed=1,2,3) "
            "and two patients that all of them have scored"
        )
    return by_network(found)


def power_grids(
    folder: str | Path,
    *,
    networks: Sequence[str] = (),
    difference: float = DIFFERENCE,
    wanted: float = POWER,
) -> list[Grid]:
    """Two tables for each comparison of an experiment: what varies, and what a difference needs.

    Args:
        folder: `outputs/<experiment>`.
        networks: names of those that are compared; none: all.
        difference: the true difference of mean Dice, between 0 and 1.
        wanted: the power, between 0.05 and 1.

    Raises:
        UserError: no such folder, nobody to compare, or no pair with two seeds each.
    """
    if not (0 < difference < 1 and LEVEL < wanted < 1):
        raise UserError(f"--difference is between 0 and 1, --power between {LEVEL} and 1")
    grids, refused, without = [], "", []
    comparisons = collect(folder)[0]
    there = {entry.runs[0].model for one in comparisons for entry in one.entries}
    if unknown := sorted(set(networks) - there):
        raise UserError(f"--networks: no {', '.join(unknown)} here, but {', '.join(sorted(there))}")
    for comparison in comparisons:
        entries = [e for e in comparison.entries if not networks or e.runs[0].model in networks]
        found, left_out = [], 0
        for first, second in compared(entries):
            try:
                scores = patient_scores(first, second)
            except UserError as error:
                refused, left_out = str(error), left_out + 1
            else:
                found.append(_Pair(minus(first.label, second.label), scores))
        if found:
            needs = _needs(comparison, found, difference, wanted)
            if left_out:
                note = (
                    f"Left out: {counted(left_out, 'pair')} with a single seed of a network, or "
                    f"fewer than two {comparison.subject}s that all runs have scored."
                )
                needs = replace(needs, notes=[*needs.notes, note])
            grids += [_variation(comparison, found, wanted), needs]
        else:
            without.append(f"No two networks with two seeds each: {comparison.title}.")
    if not grids:
        raise UserError(f"{folder}: {refused or 'a comparison needs at least two networks'}")
    grids[-1] = replace(grids[-1], notes=[*grids[-1].notes, *without])
    return grids


class _Pair:
    """Two networks, what makes their difference vary, and how much of each there was."""

    def __init__(self, label: str, scores: tuple[Scores, Scores]) -> None:
        self.label = label
        self.difference, self.parts = components(*scores)
        both = [len(one) for one in scores]
        self.seeds, self.patients = min(both), scores[0].shape[1]
        self.unequal = len(set(both)) > 1
        self.told = " and ".join(map(str, both if self.unequal else both[:1])) + " seeds"


def _variation(comparison: Comparison, pairs: Sequence[_Pair], wanted: float) -> Grid:
    who = comparison.subject
    header = ["networks", "difference", f"{who}s", "seeds", "rest", "found from"]
    found = [smallest_difference(p.parts, p.seeds, p.patients, wanted) for p in pairs]
    rows = [
        [
            pair.label,
            signed(pair.difference, 4),
            *(
                f"{sqrt(part):.4f}"
                for part in (pair.parts.patients, sum(pair.parts.seeds), sum(pair.parts.rest))
            ),
            NEVER if smallest is None else f"{smallest:.4f}",
        ]
        for pair, smallest in zip(pairs, found, strict=True)
    ]
    counts = {pair.label: f"{pair.patients} {who}s, {pair.told}" for pair in pairs}
    if len(set(counts.values())) == 1:
        told = counts[pairs[0].label]
    else:
        told = "; ".join(f"{label}: {count}" for label, count in counts.items())
    unequal = any(pair.unequal for pair in pairs)
    notes = [
        f"Mean foreground Dice of {told}. Standard "
        f"deviations of the difference: how differently {who}s favour the two networks; trainings "
        "of both with other seeds; all else (the same pair of trainings on the same "
        f"{who}, beyond these).",
        f"Found from: the smallest true difference that as many {who}s and seeds as here find in "
        f"{100 * wanted:g} of 100 repetitions"
        + ("; of unequal numbers of seeds, with the smaller one of each." if unequal else ".")
        + (f" {NEVER}: not even a difference of 1." if None in found else ""),
        _doubt(min(pair.seeds for pair in pairs)),
    ]
    return Grid(f"What makes a difference vary · {comparison.title}", header, rows, notes)


def _needs(
    comparison: Comparison, pairs: Sequence[_Pair], difference: float, wanted: float
) -> Grid:
    who, first = comparison.subject, pairs[0]
    sizes = [first.patients, *(number for number in PATIENTS if number > first.patients)]
    rows = []
    for pair in pairs:

        def enough(seeds: int, patients: int, parts: Components = pair.parts) -> bool:
            return power(parts, seeds, patients, difference) >= wanted

        of_seeds = [least(partial(enough, patients=size)) for size in sizes]
        of_patients = least(partial(enough, first.seeds))
        numbers = (*of_seeds, of_patients)
        rows.append([pair.label, *(NEVER if n is None else f"{n:,}" for n in numbers)])
    header = ["networks", *(f"{size:,} {who}s" for size in sizes), f"{first.seeds} seeds"]
    notes = [
        f"Seeds of each network needed with that many {who}s. Last column: {who}s needed with "
        f"{first.seeds} seeds of each.",
        f"Found: a two-sided test at the {100 * LEVEL:g} % level says so in {100 * wanted:g} of "
        f"100 repetitions of the experiment. {NEVER}: no number is enough, because the {who}s (in "
        "the last column: the seeds) vary too much.",
    ]
    title = f"Seeds and {who}s to find a difference of {difference:g} Dice"
    return Grid(title, header, rows, notes)


def _doubt(seeds: int) -> str:
    """How well a standard deviation over this many seeds of two networks is known."""
    from scipy import stats

    degrees = 2 * (seeds - 1)
    low, high = (sqrt(degrees / stats.chi2.ppf(q, degrees)) for q in (0.975, 0.025))
    return (
        f"The true deviation of seeds is {low:.1f} to {high:.1f} times the one here (95 % "
        "interval), so numbers of seeds are rough."
    )
