"""Curves of trainings: one band of several runs, and how fast they still rose."""

import pytest
from fake_runs import write_run

from mambaseg.reporting.collect import collect
from mambaseg.reporting.curves import band, rise
from mambaseg.reporting.plots import _costs, _curves, _styled
from mambaseg.reporting.tables import score_grids


def test_a_band_has_mean_and_range_where_any_curve_has_a_point():
    found = band([[(10, 0.2), (20, 0.6), (30, 0.7)], [(10, 0.4), (30, 0.8)]])
    assert found.steps == [10, 20, 30]
    assert found.mean == pytest.approx([0.3, 0.6, 0.75])
    assert (found.low, found.high) == ([0.2, 0.6, 0.7], [0.4, 0.6, 0.8])


def test_a_band_ends_where_a_run_ends_lest_its_mean_rise_though_no_run_does():
    found = band([[(10, 0.5), (20, 0.5)], [(10, 0.9), (20, 0.9), (30, 0.9)], []])
    assert found.steps == [10, 20] and found.mean == pytest.approx([0.7, 0.7])


def test_the_rise_is_the_slope_over_the_last_third_per_thousand_steps():
    early = [(100.0, 0.0), (1900.0, 0.9)]  # before the last third: does not count
    assert rise([*early, (2000.0, 0.70), (2500.0, 0.72), (3000.0, 0.74)]) == pytest.approx(0.04)
    assert rise([(1000.0, 0.5), (3000.0, 0.9)]) is None and rise([]) is None


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    for seed in (1, 2):
        write_run(folder, "unet", seed=seed, error=0.2 * seed, patients=(1,), size=16)
    path = write_run(folder, "swin_unet", patients=(1,), size=16)
    (path / "metrics.csv").unlink()  # logger=none
    ((found,), _, _) = collect(folder)
    return found


def test_the_scores_say_how_fast_each_validation_curve_still_rose(comparison):
    grid = score_grids(comparison)[0]
    assert grid.header[-1] == "rise" and "per 1,000 steps" in grid.notes[-1]
    # the fake curve rises by error / 100 per step, with errors of 0.2 and 0.4
    assert [row[-1] for row in grid.rows] == ["+3.000 ± 1.414", "–"]


def test_a_network_has_one_line_with_a_band_of_its_seeds(comparison):
    for axis in _styled(lambda: _curves(comparison.entries)).axes:
        assert [len(line.get_xdata()) > 0 for line in axis.lines] == [True, False]
        assert len(axis.collections) == 1
    (_, dice) = _styled(lambda: _curves(comparison.entries)).axes
    low, high = 1 - 0.4 * (1.2 - 0.99), 1 - 0.2 * (1.2 - 0.99)
    assert dice.lines[0].get_ydata()[-1] == pytest.approx((low + high) / 2)


def test_dice_is_drawn_against_parameters_multiply_adds_and_seconds(comparison):
    axes = _styled(lambda: _costs(comparison.entries)).axes
    names = [axis.get_xlabel() for axis in axes]
    assert names == ["parameters", "multiply-adds per pass", "s per case"]
    (x,) = axes[1].lines[0].get_xdata()
    assert x == 2e9 + 0.5e9 / 2


def test_a_slice_costs_as_many_passes_as_it_takes(tmp_path):
    for network, passes in (("unet", 9.0), ("swin_unet", 1.0)):
        cost = {"macs": 1e9, "scan_flops": None, "passes": passes, "seconds_per_case": 1.0,
                "parameters": 10, "image": [1, 32, 32]}  # fmt: skip
        hardware = {"record": {"cost": cost, "threads": int(passes)}}
        write_run(tmp_path, network, patients=(1,), size=16, **hardware)
    entries = collect(tmp_path)[0][0].entries
    axes = _styled(lambda: _costs(entries)).axes
    # times are not drawn: one of the two had more threads
    assert [axis.get_xlabel() for axis in axes] == ["parameters", "multiply-adds per slice"]
    assert {line.get_xdata()[0] for line in axes[1].lines} == {1e9, 9e9}
