"""Clinical indices of the heart from voxel counts: volumes, ejection fraction, mass; and agreement.

    volume (ml)       voxels x voxel volume, the sum of discs; needs the spacing
    SV (ml)           EDV - ESV
    EF (%)            100 (EDV - ESV) / EDV: a ratio on one grid, needs no spacing
    LV mass (g)       myocardial volume at ED x 1.05 g/ml (Bernard et al., TMI 2018; Myerson 2002)

Agreement of prediction and reference follows Bland and Altman (Lancet 1986): bias is the mean of
prediction - reference, the limits are bias ± 1.96 sample standard deviations.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

DENSITY = 1.05  # g/ml, of myocardium
VENTRICLES = ("LV", "RV")
MYOCARDIUM = "MYO"
UNITS = {"EDV": "ml", "ESV": "ml", "SV": "ml", "EF": "%", "mass": "g"}


@dataclass(frozen=True)
class Index:
    """One index of one patient.

    Attributes:
        patient: whom.
        name: such as `LV EDV`.
        unit: `ml`, `%` or `g`.
        prediction: None where it is undefined (an ejection fraction of an empty ventricle).
        reference: likewise.
    """

    patient: str
    name: str
    unit: str
    prediction: float | None
    reference: float | None


@dataclass(frozen=True)
class Agreement:
    """Prediction against reference over patients.

    Attributes:
        patients: pairs with both values.
        undefined: patients without one of them.
        bias: mean of prediction - reference, None without any pair.
        low: lower 95 % limit of agreement, None with fewer than two pairs.
        high: upper limit.
        mae: mean absolute error, None without any pair.
        r: Pearson's correlation, None where it is undefined.
    """

    patients: int
    undefined: int
    bias: float | None
    low: float | None
    high: float | None
    mae: float | None
    r: float | None


def indices(rows: Iterable[Mapping[str, Any]]) -> list[Index]:
    """Indices of every patient with an ED and an ES case.

    Args:
        rows: of a cases.csv: one run, or all folds of one seed. Volumes are used where the rows
            have them, voxel counts otherwise; then only ejection fractions come out.
    """
    table: dict[str, dict[tuple[str, str], Mapping[str, Any]]] = defaultdict(dict)
    for row in rows:
        table[row["patient"]][row["class_name"], row["phase"]] = row
    found: list[Index] = []
    for patient, own in sorted(table.items()):
        for ventricle in VENTRICLES:
            diastole, systole = own.get((ventricle, "ED")), own.get((ventricle, "ES"))
            if diastole is not None and systole is not None:
                found += _ventricle(patient, ventricle, diastole, systole)
        muscle = own.get((MYOCARDIUM, "ED"))
        if muscle is not None and muscle.get("volume_ml") is not None:
            masses = (DENSITY * muscle["volume_ml"], DENSITY * muscle["reference_volume_ml"])
            found.append(Index(patient, "LV mass", "g", *masses))
    return found


def _ventricle(
    patient: str, name: str, diastole: Mapping[str, Any], systole: Mapping[str, Any]
) -> list[Index]:
    found = []
    sizes = [_sizes(row, "volume_ml") for row in (diastole, systole)]
    if None not in (*sizes[0], *sizes[1]):
        pairs = list(zip(*sizes, strict=True))  # (EDV, ESV) of prediction, of reference
        found = [
            Index(patient, f"{name} EDV", "ml", pairs[0][0], pairs[1][0]),
            Index(patient, f"{name} ESV", "ml", pairs[0][1], pairs[1][1]),
            Index(patient, f"{name} SV", "ml", *(edv - esv for edv, esv in pairs)),
        ]
    counts = [_sizes(row, "voxels") for row in (diastole, systole)]
    if None in (*counts[0], *counts[1]):
        counts = sizes  # rows written before voxels were counted
    if None not in (*counts[0], *counts[1]):
        fractions = [ejection_fraction(*pair) for pair in zip(*counts, strict=True)]
        found.append(Index(patient, f"{name} EF", "%", fractions[0], fractions[1]))
    return found


def _sizes(row: Mapping[str, Any], column: str) -> tuple[Any, Any]:
    return row.get(column), row.get(f"reference_{column}")


def ejection_fraction(edv: float, esv: float) -> float | None:
    """100 (EDV - ESV) / EDV in %, negative where ES is larger; None for an empty ED."""
    return 100 * (edv - esv) / edv if edv else None


def agreement(pairs: Sequence[tuple[float | None, float | None]]) -> Agreement:
    """Agreement of (prediction, reference) pairs; all None without a complete pair."""
    known = [(p, r) for p, r in pairs if p is not None and r is not None]
    if not known:
        return Agreement(0, len(pairs), None, None, None, None, None)
    errors = [p - r for p, r in known]
    bias = fmean(errors)
    spread = 1.96 * stdev(errors) if len(errors) > 1 else None
    return Agreement(
        patients=len(known),
        undefined=len(pairs) - len(known),
        bias=bias,
        low=None if spread is None else bias - spread,
        high=None if spread is None else bias + spread,
        mae=fmean(abs(error) for error in errors),
        r=pearson(known),
    )


def pearson(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Pearson's correlation; None with fewer than two pairs or without variation."""
    if len(pairs) < 2:
        return None
    first, second = fmean(a for a, _ in pairs), fmean(b for _, b in pairs)
    together = sum((a - first) * (b - second) for a, b in pairs)
    alone = [sum((pair[i] - m) ** 2 for pair in pairs) for i, m in ((0, first), (1, second))]
    if alone[0] <= 0 or alone[1] <= 0:
        return None
    return together / math.sqrt(alone[0] * alone[1])
