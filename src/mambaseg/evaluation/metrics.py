"""Scores of one case, per class, on the whole volume at native resolution; and their summary.

Columns of a row, one row per case and class. Undefined values are None, never NaN or 0:

===================================  ========================================================
``dice iou precision sensitivity     overlap of the class with the rest as background, [0, 1];
specificity accuracy``               accuracy is (TP + TN) / N
``hd95 hd asd assd`` + ``_vox``      surface distances in voxels (1 = one pixel in the slice or
                                     one slice), the unit of the published tables
``hd95 hd asd assd`` + ``_mm``       the same in mm; None where spacing is unknown
``nsd_vox nsd_mm``                   normalised surface Dice, [0, 1], at ``tolerance_vox`` or
                                     ``tolerance_mm``; counts border voxels, not their area
``voxels reference_voxels``          how many the prediction and the reference have of the class
``volume_ml reference_volume_ml``    voxels times voxel volume; None where spacing is unknown
``outcome``                          scored, missed (not predicted though there), false_positive
                                     (predicted though not there), both_empty
``policy tolerance_mm                the convention the row was made under
tolerance_vox``
===================================  ========================================================

Definitions of overlap and distances are medpy 0.5.2's (`mambaseg.evaluation.surface` states them).

Policies: what an empty mask scores. Overlap means Dice, IoU, precision, sensitivity and NSD;
accuracy, specificity and volume need no policy. Outcomes are counted under every policy.

==============  =======================  =======================  =============================
outcome         strict                   penalty                  legacy
==============  =======================  =======================  =============================
missed          overlap 0,               overlap 0,               overlap 0,
                distances undefined      distances = diagonal     distances 0 (*perfect*)
false_positive  overlap 0,               overlap 0,               overlap 0,
                distances undefined      distances = diagonal     distances undefined
both_empty      all undefined            overlap 1, distances 0   overlap 0, distances 0
==============  =======================  =======================  =============================

*strict* never invents a distance: its distance means are over fewer values, as ``count`` shows,
and read together with the number missed. *penalty* gives every case a number, for rankings: the
diagonal is the distance between the centres of the volume's opposite corner voxels, so no real
distance is larger. *legacy* is the validation code released with Mamba-UNet, for comparison with
published numbers only: it returns Dice 0 and HD95 0 for an empty prediction, and would stop with
an error on a false positive (no ACDC volume lacks a class).
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mambaseg.errors import UserError
from mambaseg.evaluation.surface import Spacing, surface_distances, surface_scores

Policy = Literal["strict", "penalty", "legacy"]
Row = dict[str, Any]
Scores = dict[str, float | None]

OVERLAP = ("dice", "iou", "accuracy", "precision", "sensitivity", "specificity")
SURFACE = ("hd95", "hd", "asd", "assd", "nsd")
VOLUME = ("volume_ml", "reference_volume_ml")
METRICS = (
    *OVERLAP,
    *(f"{name}_vox" for name in SURFACE),
    *(f"{name}_mm" for name in SURFACE),
    *VOLUME,
)
OUTCOMES = ("scored", "missed", "false_positive", "both_empty")
CONVENTION = ("policy", "tolerance_mm", "tolerance_vox")

UNDEFINED_IF_EMPTY = ("dice", "iou", "precision", "sensitivity")


class Empty(NamedTuple):
    """What an outcome with an empty mask scores; None is undefined."""

    overlap: float | None
    distance: float | Literal["diagonal"] | None


class Scale(NamedTuple):
    """A unit to measure surfaces in: voxel size (z, y, x) and the tolerance of NSD."""

    unit: Literal["vox", "mm"]
    spacing: Spacing
    tolerance: float


EMPTY: dict[str, dict[str, Empty]] = {
    "strict": {
        "missed": Empty(0.0, None),
        "false_positive": Empty(0.0, None),
        "both_empty": Empty(None, None),
    },
    "penalty": {
        "missed": Empty(0.0, "diagonal"),
        "false_positive": Empty(0.0, "diagonal"),
        "both_empty": Empty(1.0, 0.0),
    },
    "legacy": {
        "missed": Empty(0.0, 0.0),
        "false_positive": Empty(0.0, None),
        "both_empty": Empty(0.0, 0.0),
    },
}


def confusion_matrix(
    prediction: npt.NDArray[Any], reference: npt.NDArray[Any], num_classes: int
) -> npt.NDArray[np.int64]:
    """Voxel counts (K, K): row = reference class, column = predicted class.

    Raises:
        UserError: shapes differ, or a label is not in 0..K-1.
    """
    if prediction.shape != reference.shape:
        raise UserError(
            f"Prediction and reference differ in shape: {prediction.shape} and {reference.shape}. "
            "Scores need both on the same native grid."
        )
    for name, labels in (("prediction", prediction), ("reference", reference)):
        if labels.min() < 0 or labels.max() >= num_classes:
            raise UserError(
                f"The {name} has labels from {labels.min()} to {labels.max()}, "
                f"but with {num_classes} classes they must be within 0..{num_classes - 1}."
            )
    counts = np.zeros(num_classes**2, np.int64)
    for predicted, expected in zip(prediction, reference, strict=True):  # a slice at a time
        pairs = expected.astype(np.int64) * num_classes + predicted
        counts += np.bincount(pairs.ravel(), minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def score_case(
    prediction: npt.ArrayLike,
    reference: npt.ArrayLike,
    *,
    num_classes: int,
    spacing: Spacing | None = None,
    tolerance_mm: float = 2.0,
    tolerance_vox: float = 1.0,
    policy: Policy = "strict",
    surface: bool = True,
) -> list[Row]:
    """Score one case.

    Args:
        prediction: labels (Z, H, W), integers 0..K-1, at native resolution.
        reference: labels of the same shape.
        num_classes: K, background included.
        spacing: voxel size (z, y, x) in mm, None when unknown.
        tolerance_mm: tolerance of ``nsd_mm``.
        tolerance_vox: tolerance of ``nsd_vox``.
        policy: what empty masks score; see the module's table.
        surface: False leaves the surface columns out, for a quick look.

    Returns:
        One row per class 0..K-1, with the columns the module lists and ``class``, the index.

    Raises:
        UserError: shapes differ, a label is out of range, or the policy has no such name.
    """
    if policy not in EMPTY:
        names = ", ".join(EMPTY)
        raise UserError(f"There is no policy {policy!r} for empty masks; choose one of {names}.")
    predicted, expected = np.asarray(prediction), np.asarray(reference)
    counts = confusion_matrix(predicted, expected, num_classes)
    convention = {"policy": policy, "tolerance_mm": tolerance_mm, "tolerance_vox": tolerance_vox}
    scales = [Scale("vox", (1.0, 1.0, 1.0), tolerance_vox)]
    if spacing is not None:
        scales.append(Scale("mm", spacing, tolerance_mm))
    columns = METRICS if surface else (*OVERLAP, *VOLUME)
    rows = []
    for index in range(num_classes):
        outcome = _outcome(counts, index)
        row: Row = {"class": index, "outcome": outcome, **dict.fromkeys(columns)}
        row |= _overlap(counts, index)
        row |= _voxels(counts, index)
        if outcome != "scored":
            row |= dict.fromkeys(UNDEFINED_IF_EMPTY, EMPTY[policy][outcome].overlap)
        if surface and outcome == "scored":
            row |= _surface(predicted == index, expected == index, scales)
        elif surface:
            row |= _empty_surface(EMPTY[policy][outcome], expected.shape, scales)
        if spacing is not None:
            row |= _volumes(counts, index, spacing)
        rows.append(row | convention)
    return rows


def _outcome(counts: npt.NDArray[np.int64], index: int) -> str:
    is_predicted, is_there = bool(counts[:, index].any()), bool(counts[index].any())
    if is_predicted and is_there:
        return "scored"
    if is_there:
        return "missed"
    return "false_positive" if is_predicted else "both_empty"


def _overlap(counts: npt.NDArray[np.int64], index: int) -> Scores:
    total = int(counts.sum())
    tp = int(counts[index, index])
    fp = int(counts[:, index].sum()) - tp
    fn = int(counts[index].sum()) - tp
    tn = total - tp - fp - fn
    return {
        "dice": _ratio(2 * tp, 2 * tp + fp + fn),
        "iou": _ratio(tp, tp + fp + fn),
        "accuracy": _ratio(tp + tn, total),
        "precision": _ratio(tp, tp + fp),
        "sensitivity": _ratio(tp, tp + fn),
        "specificity": _ratio(tn, tn + fp),  # undefined where the class fills the volume
    }


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _surface(
    prediction: npt.NDArray[np.bool_], reference: npt.NDArray[np.bool_], scales: Sequence[Scale]
) -> Scores:
    scores: Scores = {}
    measured = surface_distances(prediction, reference, [scale.spacing for scale in scales])
    for scale, distances in zip(scales, measured, strict=True):
        values = surface_scores(distances, scale.tolerance)
        scores |= {f"{name}_{scale.unit}": values[name] for name in SURFACE}
    return scores


def _empty_surface(empty: Empty, shape: Sequence[int], scales: Sequence[Scale]) -> Scores:
    scores: Scores = {}
    for scale in scales:
        diagonal = float(np.linalg.norm((np.asarray(shape) - 1) * np.asarray(scale.spacing)))
        distance = diagonal if empty.distance == "diagonal" else empty.distance
        scores |= {f"{name}_{scale.unit}": distance for name in SURFACE}
        scores[f"nsd_{scale.unit}"] = empty.overlap  # a share, not a distance
    return scores


def _voxels(counts: npt.NDArray[np.int64], index: int) -> dict[str, int]:
    return {
        "voxels": int(counts[:, index].sum()),
        "reference_voxels": int(counts[index].sum()),
    }


def _volumes(counts: npt.NDArray[np.int64], index: int, spacing: Spacing) -> Scores:
    millilitres = float(np.prod(spacing)) / 1000
    return {
        "volume_ml": int(counts[:, index].sum()) * millilitres,
        "reference_volume_ml": int(counts[index].sum()) * millilitres,
    }


def distance_unit(summary: Mapping[str, Any]) -> Literal["mm", "vox"]:
    """The unit in which a summary's distances are shown: one for all of a run."""
    unit = summary["convention"].get("distances")
    if unit is None:  # written before it was recorded
        known = summary["foreground"].get("volume_ml", {}).get("count", 0)
        foreground = len(summary["classes"]) - 1
        unit = "mm" if known == summary["cases"] * foreground else "vox"
    return "mm" if unit == "mm" else "vox"


def summarise(
    rows: Iterable[Mapping[str, Any]],
    class_names: Sequence[str],
    *,
    distances: Literal["mm", "vox"] | None = None,
) -> dict[str, Any]:
    """Averages over cases and classes, each beside the number of values it is made of.

    ``classes[name][metric]`` is mean, sample sd, median and count over cases. ``foreground`` (all
    classes but 0) and ``all`` average those means over classes, and say over how many classes and
    values. Undefined values are left out, so a count below the number of cases says that some
    were; ``counts`` says why (missed, false positive, both empty). ``by_phase`` and ``by_group``
    hold the same three parts per phase and group, where rows carry them.

    Args:
        rows: of `score_case`, of any number of cases, all under one convention.
        class_names: name of class 0, 1, ..., K-1; class 0 is the background.
        distances: unit in which distances are to be shown; None: mm where every case's spacing is
            known.

    Returns:
        Plain dicts, strings, numbers and None, ready for JSON.

    Raises:
        ValueError: no rows, or rows of different conventions.
    """
    table = list(rows)
    conventions = {tuple(row[key] for key in CONVENTION) for row in table}
    if len(conventions) != 1:
        raise ValueError(f"rows must share one convention, but have {sorted(conventions)}")
    if distances is None:
        distances = "mm" if all(row.get("volume_ml") is not None for row in table) else "vox"
    summary: dict[str, Any] = {
        "convention": {
            **dict(zip(CONVENTION, conventions.pop(), strict=True)),
            "distances": distances,
            "average": "per class over cases, then over classes",
            "units": "_vox in voxels, _mm in mm, _ml in ml, everything else in [0, 1]",
        },
        **_parts(table, class_names),
    }
    for key in ("phase", "group"):
        values = sorted({row[key] for row in table if row.get(key) is not None})
        if values:
            summary[f"by_{key}"] = {
                value: _parts([row for row in table if row.get(key) == value], class_names)
                for value in values
            }
    return summary


def _parts(rows: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> dict[str, Any]:
    metrics = [name for name in METRICS if name in rows[0]]
    classes: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(class_names):
        own = [row for row in rows if row["class"] == index]
        classes[name] = {"counts": _count_outcomes(own)}
        for metric in metrics:
            classes[name][metric] = _describe([row[metric] for row in own])
    foreground = [classes[name] for name in class_names[1:]]
    return {
        "cases": sum(row["class"] == 0 for row in rows),
        "classes": classes,
        "foreground": _average(foreground, metrics),
        "all": _average(list(classes.values()), metrics),
    }


def _count_outcomes(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in OUTCOMES}


def _describe(values: Sequence[float | None]) -> dict[str, float | int | None]:
    known = [float(value) for value in values if value is not None]
    return {
        "mean": fmean(known) if known else None,
        "sd": stdev(known) if len(known) > 1 else None,
        "median": median(known) if known else None,
        "count": len(known),
    }


def _average(classes: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> dict[str, Any]:
    average: dict[str, Any] = {
        "counts": {key: sum(part["counts"][key] for part in classes) for key in OUTCOMES}
    }
    for metric in metrics:
        means = [part[metric]["mean"] for part in classes if part[metric]["count"]]
        average[metric] = {
            "mean": fmean(means) if means else None,
            "classes": len(means),
            "count": sum(part[metric]["count"] for part in classes),
        }
    return average
