"""Calibration of the runs that `calibration=true` of mambaseg evaluate has measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mambaseg.evaluation.calibration import HOW
from mambaseg.reporting.collect import Comparison, Entry
from mambaseg.reporting.grid import Grid, plus_minus
from mambaseg.reporting.scores import mean_sd

_SHOWN = (("ece", "all"), ("ece", "foreground"), ("nll", "all"))


def calibration_grid(comparison: Comparison) -> Grid | None:
    """A row per entry that has been measured; None where none has."""
    rows, notes = [], []
    for entry in comparison.entries:
        found = [run.calibration for run in entry.runs if run.calibration]
        if not found:
            continue
        cells = [_cell([one["temperature"] for one in found], 2)]
        for score, region in _SHOWN:
            for how in HOW:
                cells.append(_cell([one["test"][region][how][score] for one in found], 4))
        rows.append([entry.label, *cells, str(len(found))])
        notes += [str(one["note"]) for one in found if one.get("note")]
    if not rows:
        return None
    names = ("ECE", "foreground ECE", "NLL")
    header = ["network", "temperature", *(name + end for name in names for end in ("", " with T"))]
    notes = [
        "Expected calibration error over 15 bins of confidence and negative log-likelihood, of all "
        "voxels of the test set; foreground: of those that reference or network call so. T: the "
        "temperature, fitted on the validation set.",
        *dict.fromkeys(notes),
    ]
    return Grid("Calibration", [*header, "runs"], rows, notes)


def _cell(values: Sequence[float | None], digits: int) -> str:
    return plus_minus(*mean_sd([value for value in values if value is not None]), digits)


def reliability(entry: Entry, region: str, how: str) -> npt.NDArray[np.float64]:
    """Confidence and accuracy (n, 2) of the bins that hold voxels, all runs together."""
    found = [run.calibration for run in entry.runs if run.calibration]
    bins = np.sum([one["test"][region][how]["bins"] for one in found] or [[[0, 0, 0]]], axis=0)
    return np.array([(confidence / n, right / n) for n, confidence, right in bins if n])
