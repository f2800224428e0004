"""Indices and agreement by hand, and Pearson's r by SciPy."""

import json

import numpy as np
import pytest
from fake_runs import write_run
from scipy import stats

from mambaseg.reporting.clinical import (
    agreement,
    clinical_grid,
    clinical_rows,
    ejection_fraction,
    indices,
)
from mambaseg.reporting.collect import collect

ML = 10 * 1.5 * 1.5 / 1000  # of a voxel


def row(patient, phase, name, voxels, reference, *, spacing=True):
    volumes = (voxels * ML, reference * ML) if spacing else (None, None)
    return {"patient": patient, "phase": phase, "class_name": name, "voxels": voxels,
            "reference_voxels": reference, "volume_ml": volumes[0],
            "reference_volume_ml": volumes[1]}  # fmt: skip


def found(rows):
    return {(i.patient, i.name): (i.prediction, i.reference, i.unit) for i in indices(rows)}


def test_indices_of_one_patient_by_hand():
    rows = [row("p", "ED", "LV", 1000, 1100), row("p", "ES", "LV", 400, 550),
            row("p", "ED", "MYO", 2000, 1600), row("p", "ES", "MYO", 9, 9)]  # fmt: skip
    got = found(rows)
    assert got["p", "LV EDV"] == (pytest.approx(22.5), pytest.approx(24.75), "ml")
    assert got["p", "LV ESV"] == (pytest.approx(9.0), pytest.approx(12.375), "ml")
    assert got["p", "LV SV"] == (pytest.approx(13.5), pytest.approx(12.375), "ml")
    assert got["p", "LV EF"] == (pytest.approx(60.0), pytest.approx(50.0), "%")
    assert got["p", "LV mass"] == (pytest.approx(47.25), pytest.approx(37.8), "g")
    assert len(got) == 5  # no right ventricle, nothing of it


def test_an_ejection_fraction_needs_no_spacing_and_nothing_else_comes_without():
    rows = [row("p", "ED", "RV", 800, 1000, spacing=False),
            row("p", "ES", "RV", 200, 300, spacing=False),
            row("p", "ED", "MYO", 5, 5, spacing=False)]  # fmt: skip
    assert found(rows) == {("p", "RV EF"): (pytest.approx(75.0), pytest.approx(70.0), "%")}


def test_rows_without_voxel_counts_use_volumes():
    rows = [row("p", phase, "LV", size, size) for phase, size in (("ED", 100), ("ES", 25))]
    for part in rows:
        del part["voxels"], part["reference_voxels"]
    assert found(rows)["p", "LV EF"][:2] == (pytest.approx(75.0), pytest.approx(75.0))


def test_an_ejection_fraction_is_that_of_the_volumes_beside_it():
    """ED and ES of two series have voxels of two sizes."""
    rows = [row("p", "ED", "LV", 120, 120), row("p", "ES", "LV", 40, 40)]
    for key in ("volume_ml", "reference_volume_ml"):
        rows[0][key], rows[1][key] = 120.0, 50.0
    assert found(rows)["p", "LV EF"][:2] == (pytest.approx(100 * 70 / 120),) * 2


def test_areas_of_single_slices_are_no_volumes(tmp_path):
    for slices in (5, 1):
        path = write_run(tmp_path / str(slices), patients=(1, 2), size=16)
        summary = json.loads((path / "metrics.json").read_text()) | {"slices": slices}
        (path / "metrics.json").write_text(json.dumps(summary))
        ((comparison,), _, _) = collect(path.parent)
        assert (clinical_grid(comparison) is None) == (slices == 1)
        assert bool(list(clinical_rows(comparison))) == (slices > 1)


def test_rows_without_a_phase_have_no_indices():
    bare = row("p", "ED", "LV", 100, 100)
    del bare["phase"]
    assert not found([bare])


def test_an_empty_ventricle_has_no_ejection_fraction_and_one_phase_is_not_enough():
    rows = [row("p", "ED", "LV", 0, 100), row("p", "ES", "LV", 0, 40), row("q", "ED", "LV", 9, 9)]
    assert found(rows)["p", "LV EF"] == (None, pytest.approx(60.0), "%")
    assert not [key for key in found(rows) if key[0] == "q"]
    assert ejection_fraction(50, 60) == pytest.approx(-20.0)


def test_agreement_by_hand():
    got = agreement([(10.0, 8.0), (12.0, 13.0), (None, 5.0), (20.0, 19.0)])
    assert (got.patients, got.undefined) == (3, 1)
    assert got.bias == pytest.approx(2 / 3)
    assert got.mae == pytest.approx(4 / 3)
    spread = 1.96 * np.std([2, -1, 1], ddof=1)
    assert (got.low, got.high) == (pytest.approx(2 / 3 - spread), pytest.approx(2 / 3 + spread))
    assert got.r == pytest.approx(stats.pearsonr([10, 12, 20], [8, 13, 19]).statistic)


def test_agreement_of_few_pairs():
    none = agreement([(None, 1.0)])
    assert (none.patients, none.undefined, none.bias, none.mae) == (0, 1, None, None)
    one = agreement([(2.0, 1.0)])
    assert (one.bias, one.low, one.r) == (1.0, None, None)
    assert agreement([(1.0, 2.0), (1.0, 3.0)]).r is None
