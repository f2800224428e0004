"""Scores of one case, per class, on the whole volume at native resolution.

Columns of a row, one row per case and class. Undefined values are None, never NaN or 0:

===================================  ========================================================
``dice iou precision sensitivity``   overlap of the class with the rest as background, [0, 1]
``specificity accuracy``             likewise; accuracy is (TP + TN) / N
``hd95 hd asd assd`` + ``_vox``      surface distances in voxels (1 = one pixel in the slice or
                                     one slice), the unit of the published tables
``hd95 hd asd assd`` + ``_mm``       the same in mm; None where spacing is unknown
``nsd_vox nsd_mm``                   normalised surface Dice, [0, 1], at ``tolerance_vox`` or
                                     ``tolerance_mm``; counts border voxels, not their area
``voxels reference_voxels``          how many the prediction and the reference have of the class
``volume_ml reference_volume_ml``    voxels times voxel volume; None where spacing is unknown
``outcome``                          scored, missed (not predicted though there), false_positive
                                     (predicted though not there), both_empty
``policy tolerance_mm``              the convention the row was made under
``tolerance_vox``                    likewise
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

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mambaseg.errors import UserError
from mambaseg.evaluation.surface import Spacing, surface_distances, surface_scores

Policy = Literal["strict", "penalty", "legacy"]
Row = dict[str, Any]

OUTCOMES = ("scored", "missed", "false_positive", "both_empty")
DESCRIBED = ("name", "title", "unit", "higher_is_better", "decimals", "empty")


class Metric:
    """A column of cases.csv, and how tables show it.

    A metric beside the built-in ones is a subclass with `measure`, and a config that names it
    (docs/metrics.md).

    Args:
        name: the column, lower case with underscores.
        title: heading in tables, without the unit.
        unit: empty for numbers without one.
        higher_is_better: None: a quantity, neither good nor bad.
        decimals: digits after the point in tables.
        empty: what an empty mask scores under a policy: as an `overlap`, as a `distance`, or what
            `measure` returns for it (`measured`).

    Raises:
        UserError: a number in ml is to count as a distance, which no policy has in ml.
    """

    def __init__(
        self,
        name: str,
        title: str,
        *,
        unit: Literal["", "vox", "mm", "ml"] = "",
        higher_is_better: bool | None = True,
        decimals: int = 3,
        empty: Literal["overlap", "distance", "measured"] = "overlap",
    ) -> None:
        if unit == "ml" and empty == "distance":
            raise UserError(f"metric {name}: no distance is in ml; choose empty=measured")
        self.name, self.title, self.unit = name, title, unit
        self.higher_is_better, self.decimals, self.empty = higher_is_better, decimals, empty

    def measure(
        self,
        prediction: npt.NDArray[np.bool_],
        reference: npt.NDArray[np.bool_],
        spacing: Spacing | None,
    ) -> float | None:
        """The score of one class in one case, None (or NaN, infinite) if it is undefined.

        Masks are (Z, H, W) at native resolution, and none is empty unless `empty` is `measured`;
        spacing is the voxel size (z, y, x) in mm, None
        if it is unknown.
        """
        raise NotImplementedError(f"{type(self).__name__} does not measure masks")

    def plain(self) -> dict[str, Any]:
        """What tables need to know, for metrics.json."""
        return {key: getattr(self, key) for key in DESCRIBED}


OVERLAP = [
    Metric("dice", "Dice"),
    Metric("iou", "IoU"),
    Metric("accuracy", "accuracy", empty="measured"),
    Metric("precision", "precision"),
    Metric("sensitivity", "sensitivity"),
    Metric("specificity", "specificity", empty="measured"),
]
SURFACE = [
    metric
    for unit in ("vox", "mm")
    for metric in (
        *(
            Metric(f"{name}_{unit}", title, unit=unit, higher_is_better=False, decimals=2,
                   empty="distance")
            for name, title in (("hd95", "HD95"), ("hd", "HD"), ("asd", "ASD"), ("assd", "ASSD"))
        ),
        Metric(f"nsd_{unit}", "NSD", unit=unit),
    )
]  # fmt: skip
VOLUME = [
    Metric(name, title, unit="ml", higher_is_better=None, decimals=1, empty="measured")
    for name, title in (("volume_ml", "volume"), ("reference_volume_ml", "reference volume"))
]
BUILT_IN = [*OVERLAP, *SURFACE, *VOLUME]
"""The metrics that every case gets, in the order of their columns."""


_DIAGONAL = -1.0
# policy -> outcome -> what overlap and distance score; None is undefined
_EMPTY: dict[str, dict[str, tuple[float | None, float | None]]] = {
    "strict": {
        "missed": (0.0, None),
        "false_positive": (0.0, None),
        "both_empty": (None, None),
    },
    "penalty": {
        "missed": (0.0, _DIAGONAL),
        "false_positive": (0.0, _DIAGONAL),
        "both_empty": (1.0, 0.0),
    },
    "legacy": {
        "missed": (0.0, 0.0),
        "false_positive": (0.0, None),
        "both_empty": (0.0, 0.0),
    },
}


def _confusion_matrix(
    prediction: npt.NDArray[Any], reference: npt.NDArray[Any], num_classes: int
) -> npt.NDArray[np.int64]:
    """Voxel counts (K, K): row = reference class, column = predicted class."""
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
    more: Sequence[Metric] = (),
    ignored: npt.NDArray[np.bool_] | None = None,
    regions: Sequence[Sequence[int]] = (),
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
        more: metrics beside the built-in ones.
        ignored: voxels (Z, H, W) that belong to no class on either side, whatever the labels say;
            they are outside no class either, so that no surface lies towards them.
        regions: labels of each region that is scored in place of the classes 1..K-1; the
            background is then what lies in none of them.

    Returns:
        One row per class 0..K-1, with the columns the module lists and ``class``, the index; of
        regions 0 for the background, then 1, 2, ... in their order.

    Raises:
        UserError: shapes differ, a label is out of range, or the policy has no such name.
    """
    if policy not in _EMPTY:
        names = ", ".join(_EMPTY)
        raise UserError(f"There is no policy {policy!r} for empty masks; choose one of {names}.")
    predicted, expected = np.asarray(prediction), np.asarray(reference)
    if ignored is not None and ignored.any():
        predicted, expected = (np.where(ignored, 0, labels) for labels in (predicted, expected))
    counts = _confusion_matrix(predicted, expected, num_classes)
    if ignored is not None:
        counts[0, 0] -= np.count_nonzero(ignored)
    spacings: dict[str, Spacing] = {"vox": (1.0, 1.0, 1.0)}
    if spacing is not None:
        spacings["mm"] = spacing
    tolerances = {"tolerance_mm": tolerance_mm, "tolerance_vox": tolerance_vox}
    metrics = [*OVERLAP, *(SURFACE if surface else ()), *VOLUME, *more]
    columns = [metric.name for metric in metrics]
    rows = []
    for index, labels in enumerate(_scored(num_classes, regions)):
        masks = _members(predicted, labels), _members(expected, labels)
        if ignored is not None and index == 0:
            masks = masks[0] & ~ignored, masks[1] & ~ignored
        voxels = _overlap(counts, labels)
        row: Row = {"class": index, "outcome": _outcome(*voxels), **dict.fromkeys(columns)}
        row |= _counted(int(counts.sum()), *voxels, spacing)
        scored = row["outcome"] == "scored"
        row |= {
            metric.name: _finite(metric.measure(*masks, spacing))
            for metric in more
            if scored or metric.empty == "measured"
        }
        if not scored:
            as_scored = _EMPTY[policy][row["outcome"]]
            row |= _empty(*as_scored, expected.shape, spacings, metrics)
        elif surface:
            unknown = ignored if ignored is not None and ignored.any() else None
            measured = surface_distances(*masks, list(spacings.values()), unknown)
            for unit, found in zip(spacings, measured or (), strict=False):
                scores = surface_scores(found, tolerances[f"tolerance_{unit}"])
                row |= {f"{name}_{unit}": value for name, value in scores.items()}
        rows.append({**row, "policy": policy, **tolerances})
    return rows


def _scored(num_classes: int, regions: Sequence[Sequence[int]]) -> list[list[int]]:
    """Labels of what gets a row each, the background first."""
    if not regions:
        return [[label] for label in range(num_classes)]
    inside = {label for region in regions for label in region}
    outside = [label for label in range(num_classes) if label not in inside]
    return [outside, *(list(region) for region in regions)]


def _members(array: npt.NDArray[Any], labels: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Which voxels have one of some labels."""
    first, *others = labels
    mask: npt.NDArray[np.bool_] = array == first
    for label in others:
        mask |= array == label
    return mask


def _overlap(counts: npt.NDArray[np.int64], labels: Sequence[int]) -> tuple[int, int, int]:
    """Voxels with one of some labels in both, in the prediction, and in the reference."""
    both = counts[np.ix_(labels, labels)]
    return int(both.sum()), int(counts[:, labels].sum()), int(counts[labels].sum())


def _outcome(both: int, voxels: int, reference_voxels: int) -> str:
    if voxels and reference_voxels:
        return "scored"
    if reference_voxels:
        return "missed"
    return "false_positive" if voxels else "both_empty"


def _counted(
    total: int, tp: int, voxels: int, reference_voxels: int, spacing: Spacing | None
) -> dict[str, float | None]:
    """The scores that follow from the numbers of voxels."""
    fp, fn = voxels - tp, reference_voxels - tp
    tn = total - tp - fp - fn
    millilitres = None if spacing is None else float(np.prod(spacing)) / 1000
    return {
        "dice": _ratio(2 * tp, 2 * tp + fp + fn),
        "iou": _ratio(tp, tp + fp + fn),
        "accuracy": _ratio(tp + tn, total),
        "precision": _ratio(tp, tp + fp),
        "sensitivity": _ratio(tp, tp + fn),
        "specificity": _ratio(tn, tn + fp),  # undefined where the class fills the volume
        "voxels": voxels,
        "reference_voxels": reference_voxels,
        "volume_ml": millilitres and voxels * millilitres,
        "reference_volume_ml": millilitres and reference_voxels * millilitres,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _empty(
    overlap: float | None,
    distance: float | None,
    shape: Sequence[int],
    spacings: Mapping[str, Spacing],
    metrics: Sequence[Metric],
) -> dict[str, float | None]:
    """What takes the place of scores where a mask is empty."""
    distances = dict.fromkeys(spacings, distance)
    if distance == _DIAGONAL:
        for unit, spacing in spacings.items():
            distances[unit] = float(np.linalg.norm((np.asarray(shape) - 1) * np.asarray(spacing)))
    scores: dict[str, float | None] = {}
    for metric in metrics:
        unit = "mm" if metric.unit == "ml" else metric.unit or "vox"  # ml need the spacing, too
        if metric.empty != "measured" and unit in distances:
            scores[metric.name] = overlap if metric.empty == "overlap" else distances[unit]
    return scores
