"""What makes the difference of two networks vary: patients, seeds and the rest.

The score of network k, trained with seed i, on patient j is taken as

    mean of k  +  patient j on k  +  seed i of k  +  rest

with random parts that do not depend on each other. Everything is paired by patient, so of the
patients only how differently they favour the two networks counts. With n seeds of each network and
m patients, the difference of the two means then varies by

    V = patients / m + (seeds of the one + seeds of the other) / n + (their rests) / (n m)

The components are those of an analysis of variance (method of moments, negative ones are 0). A
difference is tested by a t test against V as it is estimated, with Satterthwaite's degrees of
freedom (Biometrics Bulletin 2, 1946): few seeds tell little about how seeds vary, which counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]  # (seeds, patients)
_NOTHING = 1e-24  # a variance that rounding makes of equal scores


class Components(NamedTuple):
    """Variances of a pair of networks, in squares of the score's unit, or arrays of such."""

    patients: Any  # by how much patients favour one of the two, whatever the seed
    seeds: tuple[Any, Any]  # between trainings of each network
    rest: tuple[Any, Any]  # of one training on one patient, of each network


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
        rest.append((left**2).sum() / ((len(scores) - 1) * (patients - 1)))
        seeds.append(by_seed.var(ddof=1))
    differences = first.mean(0) - second.mean(0)
    counts = (len(first), len(second))
    parts = estimated(differences.var(ddof=1), seeds, rest, counts, patients)
    return float(differences.mean()), parts


def estimated(
    paired: Any, by_seed: Sequence[Any], rest: Sequence[Any], seeds: Sequence[int], patients: int
) -> Components:
    """The components that variances between means tell; arrays of such give arrays.

    Args:
        paired: variance of the patients' differences, each a mean over the seeds.
        by_seed: variance of the seeds' means over the patients, of each network.
        rest: mean square of what seeds and patients leave, of each network.
        seeds: how many there are of each network.
        patients: how many there are.
    """
    share = sum(one / count for one, count in zip(rest, seeds, strict=True))
    own = [np.maximum(0.0, mean - one / patients) for mean, one in zip(by_seed, rest, strict=True)]
    return Components(np.maximum(0.0, paired - share), (own[0], own[1]), (rest[0], rest[1]))


def spread(parts: Components, seeds: Sequence[int], patients: int) -> tuple[Any, Any]:
    """V and its degrees of freedom, with so many seeds of each network and patients (2 or more)."""
    # mean squares as they enter the estimate of V, and the degrees of freedom of each
    rests = [rest / count for rest, count in zip(parts.rest, seeds, strict=True)]
    terms = [((parts.patients + sum(rests)) / patients, patients - 1)]
    variance = parts.patients / patients
    for own, rest, count in zip(parts.seeds, rests, seeds, strict=True):
        terms.append((own / count + rest / patients, count - 1))
        terms.append((rest / patients, (count - 1) * (patients - 1)))
        variance += own / count + rest / patients
    nothing = variance < _NOTHING
    doubt = sum(value**2 / degrees for value, degrees in terms)
    free = np.where(nothing, 1.0, variance**2) / np.where(nothing, 1.0, doubt)
    return np.where(nothing, 0.0, variance), free


def p_and_share(first: Scores, second: Scores) -> tuple[float, float]:
    """Two-sided p of the difference of two networks' means, and what seeds make of its doubt.

    That is the share of V that more seeds would lessen, seeds and rests; 0 where nothing varies.
    Arguments are as of `components`.
    """
    from scipy import stats

    difference, parts = components(first, second)
    patients = first.shape[1]
    variance, free = spread(parts, (len(first), len(second)), patients)
    if variance == 0:
        return float(round(difference, 12) == 0), 0.0
    p = 2 * stats.t.sf(abs(difference) / sqrt(variance), free)
    return float(p), float(1 - parts.patients / patients / variance)
