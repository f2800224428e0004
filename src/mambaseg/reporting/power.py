"""How many seeds and patients a difference between two networks would need to be found.

The Dice of network k, trained with seed i, on patient j is taken as

    mean of k  +  patient j on k  +  seed i of k  +  rest

with random parts that do not depend on each other. Everything is paired by patient, so of the
patients only how differently they favour the two networks counts. With n seeds of each network and
m patients, the difference of the two means then varies by

    V = patients / m + (seeds of the one + seeds of the other) / n + (their rests) / (n m)

The components are those of an analysis of variance (method of moments, negative ones are 0). The
test is a t test of the difference against V as one would estimate it, with Satterthwaite's degrees
of freedom (Biometrics Bulletin 2, 1946): few seeds tell little about how seeds vary, which counts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mambaseg.errors import UserError
from mambaseg.evaluation.metrics import OVERLAP
from mambaseg.reporting.collect import Comparison, Entry, collect
from mambaseg.reporting.grid import Grid, counted, signed
from mambaseg.reporting.paired import compared, minus, scored
from mambaseg.reporting.scores import compared_value

Scores = npt.NDArray[np.float64]  # (seeds, patients)

DIFFERENCE = 0.0033  # of Mamba-UNet over UNet in its paper
POWER, LEVEL = 0.8, 0.05
PATIENTS = (100, 1000)  # beside the number that was tested
_MOST = 10**6  # seeds, patients: more than anybody has
_STEP = 1e-5  # of differences that are tried
_DICE = OVERLAP[0]
NEVER = "never"


class Components(NamedTuple):
    """Variances of a pair of networks, in squares of the score's unit."""

    patients: float  # by how much patients favour one of the two, whatever the seed
    seeds: tuple[float, float]  # between trainings of each network
    rest: tuple[float, float]  # of one training on one patient, of each network


def components(first: Scores, second: Scores) -> tuple[float, Components]:
    """Difference of the means and its components.

    Args:
        first: scores (seeds, patients) of a network, at least two of both.
        second: of another one on the same patients.
    """
    patients = first.shape[1]
    seeds, rest = [], []
    for scores in (first, second):
        by_seed = scores.mean(1, keepdims=True)
        left = scores - by_seed - scores.mean(0) + scores.mean()
        rest.append(float((left**2).sum()) / ((len(scores) - 1) * (patients - 1)))
        seeds.append(max(0.0, float(by_seed.var(ddof=1)) - rest[-1] / patients))
    differences = first.mean(0) - second.mean(0)
    share = sum(one / len(scores) for one, scores in zip(rest, (first, second), strict=True))
    own = max(0.0, float(differences.var(ddof=1)) - share)
    both = Components(own, (seeds[0], seeds[1]), (rest[0], rest[1]))
    return float(differences.mean()), both


def power(
    parts: Components, seeds: int, patients: int, difference: float, level: float = LEVEL
) -> float:
    """How often, 0..1, a two-sided test finds a true difference, and on the right side.

    Args:
        parts: of the two networks.
        seeds: of each network, at least two.
        patients: that both are tested on, at least two.
        difference: the true one.
        level: how often a difference would be found where there is none.
    """
    from scipy import stats

    # mean squares as they enter the estimate of V, and the degrees of freedom of each
    terms = [((parts.patients + sum(parts.rest) / seeds) / patients, patients - 1)]
    for own, rest in zip(parts.seeds, parts.rest, strict=True):
        terms.append(((own + rest / patients) / seeds, seeds - 1))
        terms.append((rest / patients / seeds, (seeds - 1) * (patients - 1)))
    variance = parts.patients / patients + sum(parts.seeds) / seeds
    variance += sum(parts.rest) / seeds / patients
    if variance == 0:
        return 1.0
    free = variance**2 / sum(value**2 / degrees for value, degrees in terms)
    shift = abs(difference) / sqrt(variance)
    return float(stats.nct.sf(stats.t.isf(level / 2, free), free, shift))


def least(enough: Callable[[int], bool]) -> int | None:
    """The smallest number of 2 or more that is enough, where all larger ones are too."""
    high = 2
    while not enough(high):
        high *= 2
        if high > _MOST:
            return None
    low = max(2, high // 2)
    return low + bisect_left(range(low, high), True, key=enough)


def smallest_difference(parts: Components, seeds: int, patients: int, wanted: float) -> float:
    """The smallest true difference that would be found with the wanted power."""
    steps = least(lambda step: power(parts, seeds, patients, step * _STEP) >= wanted)
    return (steps or _MOST) * _STEP


def patient_scores(first: Entry, second: Entry) -> tuple[Scores, Scores]:
    """Mean foreground Dice (seeds, patients) of two networks, on what all their runs have scored.

    Raises:
        UserError: there are too few seeds or patients.
    """
    tables: list[list[dict[Any, float]]] = []
    for entry in (first, second):
        rows = entry.chosen({}, background=False).values()
        tables.append([
            {(row["patient"], row["case"], row["class"]): value for row in own
             if (value := compared_value(row, _DICE)) is not None} for own in rows
        ])  # fmt: skip
    common = set.intersection(*(set(own) for table in tables for own in table))
    common -= scored(first, _DICE).absent & scored(second, _DICE).absent
    structures: dict[str, list[Any]] = defaultdict(list)
    for structure in sorted(common):
        structures[structure[0]].append(structure)
    if min(map(len, tables)) < 2 or len(structures) < 2:
        raise UserError(
            f"{first.label} and {second.label}: this needs two seeds of each network (seed=1,2,3) "
            "and two patients that all of them have scored"
        )
    found = [
        np.array([[np.mean([own[s] for s in part]) for part in structures.values()]
                  for own in table]) for table in tables
    ]  # fmt: skip
    return found[0], found[1]


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
        raise UserError(f"--networks {','.join(unknown)}: there are {', '.join(sorted(there))}")
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
                note = f"Left out: {counted(left_out, 'pair')} of which one has a single seed."
                needs = replace(needs, notes=[*needs.notes, note])
            grids += [_variation(comparison, found, wanted), needs]
        else:
            without.append(f"No two networks with two seeds each: {comparison.title}.")
    if not grids:
        raise UserError(f"{folder}: {refused or 'there are no two networks to compare'}")
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
    rows = [
        [
            pair.label,
            signed(pair.difference, 4),
            *(
                f"{sqrt(part):.4f}"
                for part in (pair.parts.patients, sum(pair.parts.seeds), sum(pair.parts.rest))
            ),
            f"{smallest_difference(pair.parts, pair.seeds, pair.patients, wanted):.4f}",
        ]
        for pair in pairs
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
        + ("; of unequal numbers of seeds, with the smaller one of each." if unequal else "."),
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
        f"With so many {who}s: seeds of each network that it takes. Last column: {who}s that it "
        f"takes with {first.seeds} seeds of each.",
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
