"""Curves of trainings: their points, their spread over runs, and whether they still rose."""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, linear_regression
from typing import NamedTuple

from mambaseg.reporting.reading import SIZE
from mambaseg.reporting.runs import RunData
from mambaseg.storage.untrusted import read_table

LOSS, DICE = "train/loss", "val/dice"
_PER = 1000  # steps of a slope
log = logging.getLogger(__name__)

Curve = list[tuple[float, float]]  # step and value


def read_curves(run: RunData) -> dict[str, Curve]:
    """The points of a run's training loss and validation Dice; none without a metrics.csv."""
    try:
        rows = read_table(run.path / "metrics.csv", growing=True)[1]
    except FileNotFoundError:
        rows = []  # logger=none
    except (OSError, ValueError) as error:
        log.warning("no curves of %s: metrics.csv: %s", run.path, error)
        rows = []
    return {key: points(rows, key) for key in (LOSS, DICE)}


def points(rows: Sequence[Mapping[str, str]], key: str) -> Curve:
    """Points of a column of a metrics.csv, whose steps are counted from 0."""
    found = []
    for row in rows:
        with contextlib.suppress(ValueError, KeyError):  # a cell that is no number has no point
            if row.get(key):
                found.append((float(row["step"]) + 1, float(row[key])))
    return [point for point in found if all(abs(value) <= SIZE for value in point)]


class Band(NamedTuple):
    """Several runs' curves as one, at the steps where any has a point, until the first ends."""

    steps: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def band(curves: Sequence[Curve]) -> Band:
    """Mean and range of curves.

    Beyond the end of one the mean would be of others, and could rise where none of them does.
    """
    end = min((curve[-1][0] for curve in curves if curve), default=0.0)
    values: dict[float, list[float]] = defaultdict(list)
    for curve in curves:
        for step, value in curve:
            values[step].append(value)
    steps = sorted(step for step in values if step <= end)
    kept = [values[step] for step in steps]
    return Band(steps, list(map(fmean, kept)), list(map(min, kept)), list(map(max, kept)))


def rise(curve: Curve) -> float | None:
    """Slope over the last third of the steps, per 1,000 steps; None with fewer than two points."""
    last = max((step for step, _ in curve), default=0.0)
    end = [point for point in curve if 3 * point[0] >= 2 * last]
    if len({step for step, _ in end}) < 2:
        return None
    return _PER * linear_regression(*zip(*end, strict=True)).slope
