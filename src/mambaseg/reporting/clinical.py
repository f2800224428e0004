"""Clinical indices of the heart from its voxels: volumes, ejection fraction, mass; and agreement.

    volume (ml)       voxels x voxel volume, the sum of discs; needs the spacing
    SV (ml)           EDV - ESV
    EF (%)            100 (EDV - ESV) / EDV; without spacing a ratio of voxel counts on one grid
    LV mass (g)       myocardial volume at ED x 1.05 g/ml (Bernard et al., TMI 2018; Myerson 2002)

Agreement of prediction and reference follows Bland and Altman (Lancet 1986): bias is the mean of
prediction - reference, the limits are bias ± 1.96 sample standard deviations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from statistics import StatisticsError, correlation, fmean, stdev
from typing import Any, NamedTuple

from mambaseg.reporting.collect import Comparison, Entry
from mambaseg.reporting.grid import UNDEFINED, Grid, of_seeds, plus_minus, signed
from mambaseg.reporting.scores import mean_sd

DENSITY = 1.05  # g/ml, of myocardium
VENTRICLES = ("LV", "RV")
MYOCARDIUM = "MYO"
UNITS = {"EF": "%", "EDV": "ml", "ESV": "ml", "SV": "ml", "mass": "g"}  # in the order of tables


class Index(NamedTuple):
    """One index of one patient."""

    patient: str
    name: str  # such as `LV EDV`
    unit: str  # `ml`, `%` or `g`
    prediction: float | None  # None where undefined: an ejection fraction of an empty ventricle
    reference: float | None


class Agreement(NamedTuple):
    """Prediction against reference over patients."""

    patients: int  # with both values
    undefined: int  # patients without one of them
    bias: float | None = None  # mean of prediction - reference, None without any pair
    low: float | None = None  # 95 % limits of agreement, None with fewer than two pairs
    high: float | None = None
    mae: float | None = None  # mean absolute error, None without any pair
    r: float | None = None  # Pearson's correlation, None where it is undefined


def indices(rows: Iterable[Mapping[str, Any]]) -> list[Index]:
    """Indices of every patient with an ED and an ES case; `rows` are of one run, or of one seed.

    From volumes where both rows have them, otherwise from voxel counts: then only the EF.
    """
    table: dict[str, dict[tuple[str, str | None], Mapping[str, Any]]] = defaultdict(dict)
    for row in rows:
        table[row["patient"]][row["class_name"], row.get("phase")] = row
    found: list[Index] = []
    for patient, own in sorted(table.items()):
        for ventricle in VENTRICLES:
            phases = own.get((ventricle, "ED")), own.get((ventricle, "ES"))
            predicted, expected = _ventricle(*phases, ""), _ventricle(*phases, "reference_")
            for name, value in predicted.items():
                named = f"{ventricle} {name}", UNITS[name]
                found.append(Index(patient, *named, value, expected[name]))
        muscle = own.get((MYOCARDIUM, "ED"))
        if muscle is not None and muscle.get("volume_ml") is not None:
            masses = (DENSITY * muscle["volume_ml"], DENSITY * muscle["reference_volume_ml"])
            found.append(Index(patient, "LV mass", "g", *masses))
    return found


def _ventricle(
    diastole: Mapping[str, Any] | None, systole: Mapping[str, Any] | None, prefix: str
) -> dict[str, float | None]:
    """Indices of the prediction, or with the prefix of the columns of the reference."""
    if diastole is None or systole is None:
        return {}
    found: dict[str, float | None] = {}
    edv, esv = (row.get(f"{prefix}volume_ml") for row in (diastole, systole))
    if edv is not None and esv is not None:
        found = {"EDV": edv, "ESV": esv, "SV": edv - esv}
    else:
        edv, esv = (row.get(f"{prefix}voxels") for row in (diastole, systole))
    if edv is not None and esv is not None:
        found["EF"] = ejection_fraction(edv, esv)
    return found


def ejection_fraction(edv: float, esv: float) -> float | None:
    """100 (EDV - ESV) / EDV in %, negative where ES is larger; None for an empty ED."""
    return 100 * (edv - esv) / edv if edv else None


def agreement(pairs: Sequence[tuple[float | None, float | None]]) -> Agreement:
    """Agreement of (prediction, reference) pairs; all None without a complete pair."""
    known = [(p, r) for p, r in pairs if p is not None and r is not None]
    if not known:
        return Agreement(0, len(pairs))
    errors = [p - r for p, r in known]
    bias, mae = fmean(errors), fmean(abs(error) for error in errors)
    found = Agreement(len(known), len(pairs) - len(known), bias, mae=mae)
    if len(known) > 1:
        spread = 1.96 * stdev(errors)
        found = found._replace(low=bias - spread, high=bias + spread)
        with suppress(StatisticsError):  # without variation there is no correlation
            found = found._replace(r=correlation(*zip(*known, strict=True)))
    return found


def clinical_grid(comparison: Comparison) -> Grid | None:
    """Agreement of clinical indices; None where no patient has volumes of both phases."""
    found = {entry.label: agreements_of(entry) for entry in comparison.entries}
    known = {name for own in found.values() for name in own}
    names = (f"{part} {name}" for name in UNITS for part in VENTRICLES)
    rows = [
        [f"{name} ({UNITS[name.rsplit(' ', 1)[-1]]})", label, *_cells(own[name])]
        for name in names
        if name in known
        for label, own in found.items()
        if name in own
    ]
    if not rows:
        return None
    header = [
        "index", "network", "patients", "bias", "95 % limits of agreement", "MAE", "Pearson r",
        "undefined",
    ]  # fmt: skip
    notes = [
        "Prediction − reference per patient; numbers of each seed, averaged over seeds (± standard "
        "deviation). EF is a ratio of volumes or, without spacing, of voxel counts on one grid; "
        "volumes and mass (myocardium at ED × 1.05 g/ml) need the spacing.",
        "Limits: bias ± 1.96 standard deviations (Bland and Altman). undefined: an EF of a "
        "ventricle that is empty at ED, over all seeds.",
    ]
    return Grid("Clinical indices", header, rows, notes, wide=2)


def indices_of(entry: Entry) -> dict[int, list[Index]]:
    """Seed -> indices of all its patients; none of single slices, whose areas are no volumes."""
    if any(run.summary.get("slices") == 1 for run in entry.runs):
        return {}
    return {seed: indices(rows) for seed, rows in entry.by_seed.items()}


def agreements_of(entry: Entry) -> dict[str, list[Agreement]]:
    """Index -> agreement of each seed (all its folds together)."""
    found: dict[str, list[Agreement]] = defaultdict(list)
    for own in indices_of(entry).values():
        for name in dict.fromkeys(index.name for index in own):
            pairs = [(i.prediction, i.reference) for i in own if i.name == name]
            found[name].append(agreement(pairs))
    return found


def over_seeds(seeds: Sequence[Agreement], name: str) -> list[float]:
    """A number of each seed that has it: `bias`, `low`, `high`, `mae` or `r`."""
    return [value for seed in seeds if (value := getattr(seed, name)) is not None]


def _cells(seeds: Sequence[Agreement]) -> list[str]:
    def mean(name: str, digits: int, *, sign: bool = False) -> str:
        values = over_seeds(seeds, name)
        text = plus_minus(*mean_sd(values), digits, sign=sign)
        return text + of_seeds(len(values), len(seeds))

    lows, highs = over_seeds(seeds, "low"), over_seeds(seeds, "high")
    return [
        str(max(seed.patients for seed in seeds)),
        mean("bias", 1, sign=True),
        f"{signed(fmean(lows), 1)} … {signed(fmean(highs), 1)}" if lows else UNDEFINED,
        mean("mae", 1),
        mean("r", 3),
        str(sum(seed.undefined for seed in seeds)),
    ]


def clinical_rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """Every patient's indices, for clinical.csv."""
    for entry in comparison.entries:
        for seed, found in indices_of(entry).items():
            about = {"comparison": comparison.title, "network": entry.label, "seed": seed}
            yield from ({**about, **index._asdict()} for index in found)
