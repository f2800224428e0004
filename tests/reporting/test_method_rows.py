"""Learning methods in a report: labels, their networks, what they cost, the published tables."""

import csv
from dataclasses import replace

import pytest
from fake_runs import write_run

from mambaseg.errors import UserError
from mambaseg.evaluation.metrics import Metric
from mambaseg.reporting.beside import beside_the_papers
from mambaseg.reporting.cautions import cautions
from mambaseg.reporting.collect import collect
from mambaseg.reporting.costs import cost_grid
from mambaseg.reporting.methods import networks_grid
from mambaseg.reporting.paired import paired_grid, pairs
from mambaseg.reporting.reading import read_run
from mambaseg.reporting.report import write_report
from mambaseg.reporting.tables import compared_metrics, score_grids, settings_grid
from mambaseg.storage.run_folder import RunFolder

SEVEN = {"labelled": 7, "patients": 70, "labels": "dense"}
SCRIBBLES = {"labelled": 80, "patients": 80, "labels": "scribble"}
BOTH = "unet + mamba_unet · semi_mamba_unet"
WHOLE = {"parameters": 21_000_000, "macs": 6_000_000_000, "scan_flops": 900_000_000}


def method(name, kind, partners=(), **more):
    """Settings of a method as config.yaml has them."""
    networks = {"networks": [{"name": one} for one in partners]} if partners else {}
    about = {"name": name, "_target_": f"mambaseg.training.methods.{kind}",
             "_partial_": True, "partner": list(partners), **networks, **more}  # fmt: skip
    return {f"method.{key}": value for key, value in about.items()}


def foreground(dice):
    return {"foreground": {"counts": {"scored": 3}, "dice": {"mean": dice},
                           "hd95_mm": {"mean": None}}}  # fmt: skip


def write_semi(place, seed, chosen, dice, **more):
    """A run of two networks with these scores."""
    networks = {name: foreground(one) for name, one in dice.items()}
    path = write_run(
        place, seed=seed, size=16, name="semi", network=chosen, networks=networks,
        config=method("semi_mamba_unet", "SemiMambaUNet", ["mamba_unet"], weight=0.1),
        supervision=SEVEN, **more,
    )  # fmt: skip
    cost = RunFolder(path).record["cost"]
    RunFolder(path).update(cost={**cost, "parameters": 19_000_000, "method": WHOLE,
                                 "step_seconds": 1.25})  # fmt: skip


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Labels alone and two methods, with labels of 7 of 70 patients."""
    place = tmp_path_factory.mktemp("methods")
    split = {"name": "ssl4mis", "hash": "b659", "note": ""}
    for seed in (1, 2):
        common = {"seed": seed, "size": 16, "supervision": SEVEN, "title": "ACDC", "split": split}
        write_run(place, name="own", error=0.5, **common)
        write_run(place, name="mt", config=method("mean_teacher", "MeanTeacher"), **common)
    same = {"title": "ACDC", "split": split, "error": 0.2}
    write_semi(place, 1, "unet", {"unet": 0.9, "mamba_unet": 0.5}, **same)
    write_semi(place, 2, "mamba_unet", {"unet": 0.7, "mamba_unet": 0.8}, **same)
    return place


@pytest.fixture(scope="module")
def comparison(experiment):
    (found,), _, problems = collect(experiment)
    assert not problems
    return found


def test_methods_are_entries_named_by_what_trains(comparison):
    labels = [entry.label for entry in comparison.entries]
    assert labels == ["unet · supervised", "unet · mean_teacher", BOTH]
    assert [len(entry.runs) for entry in comparison.entries] == [2, 2, 2]
    keys = settings_grid(comparison).header[1:]
    assert "method" in keys and not {"method._target_", "method.networks"} & set(keys)


def test_runs_without_a_method_keep_their_names(tmp_path):
    write_run(tmp_path, size=16)
    write_run(tmp_path, "mamba_unet", size=16, config=method("supervised", "Supervised"))
    (found,), _, _ = collect(tmp_path)
    assert [entry.label for entry in found.entries] == ["unet", "mamba_unet"]
    assert networks_grid(found, found.metrics) is None
    assert score_grids(found)[0].header[:2] == ["network", "seeds"]


def test_the_score_table_says_which_labels_and_which_network(comparison):
    grid = score_grids(comparison)[0]
    assert grid.header[:4] == ["network", "labels", "result of", "seeds"]
    assert [row[:4] for row in grid.rows] == [
        ["unet · supervised", "7 of 70", "", "2"],
        ["unet · mean_teacher", "7 of 70", "", "2"],
        [BOTH, "7 of 70", "unet (1), mamba_unet (1)", "2"],
    ]
    (told,) = [line for line in cautions(comparison) if "not the same in all runs" in line]
    assert told.startswith(BOTH) and "unet: 1, mamba_unet: 1" in told


def test_each_network_of_a_method_and_their_mean_are_rows(comparison):
    rows = {(row[0], row[1]): row[2:] for row in networks_grid(comparison, comparison.metrics).rows}
    assert rows[BOTH, "unet"][:2] == ["1 of 2", "0.800 ± 0.141"]
    assert rows[BOTH, "mamba_unet"][:2] == ["1 of 2", "0.650 ± 0.212"]
    assert rows[BOTH, "mean of both"][:3] == ["", "0.725 ± 0.035", "–"]
    assert rows["unet · mean_teacher", "unet"][0] == "2 of 2"
    assert len(rows) == 5


def test_a_metric_from_outside_is_in_the_table_of_networks_too(comparison):
    own = replace(comparison)
    vars(own)["metrics"] = [*comparison.metrics, Metric("own", "own score")]
    main, networks = score_grids(own)[:2]
    assert networks.title == "Networks of each method"
    assert "own score" in main.header and "own score" in networks.header


def test_a_networks_folds_are_averaged_and_this_is_said(tmp_path):
    semi = {"config": method("cps", "Peers", ["b"]), "network": "unet", "size": 16,
            "networks": {"unet": foreground(0.8), "b": foreground(0.7)}}  # fmt: skip
    for fold in (0, 1):
        write_run(tmp_path, fold=fold, **semi)
    (found,), _, _ = collect(tmp_path)
    assert "mean of their means" in networks_grid(found, found.metrics).notes[-1]
    assert score_grids(found)[0].rows[0][2] == "1 × 2 folds"


def test_methods_are_compared_in_pairs_by_their_results(comparison):
    found = pairs(comparison, compared_metrics(comparison)[0])
    assert {(pair.first, pair.second) for pair in found} == {
        ("unet · supervised", BOTH), ("unet · supervised", "unet · mean_teacher"),
        ("unet · mean_teacher", BOTH),
    }  # fmt: skip
    grid = paired_grid(comparison, compared_metrics(comparison)[0], found)
    assert grid.rows[2][0] == f"unet · mean_teacher − ({BOTH})"


def test_a_method_costs_what_it_trains_and_what_predicts(comparison):
    rows = {row[0]: row[1:] for row in cost_grid(comparison).rows}
    assert rows[f"{BOTH}, training"][:3] == ["21,000,000", "6.00", "0.90"]
    assert rows[f"{BOTH}, training"][8] == "1.250 ± 0.000"
    assert rows[f"{BOTH}, prediction (mamba_unet)"][:2] == ["19,000,000", "2.00"]
    assert f"{BOTH}, prediction (unet)" in rows
    assert rows["unet · mean_teacher"][:2] == ["1,000,004", "2.00"]


def test_published_rows_stand_beside_runs_with_as_many_labels(comparison, tmp_path):
    titles = [grid.title for grid in beside_the_papers(comparison)]
    assert titles == [
        "Beside the paper's table, 7 labelled patients",
        "Beside the paper's pairs of networks, 7 labelled patients",
    ]
    grid, of_pairs = beside_the_papers(comparison)
    assert {row[0] for row in of_pairs.rows if "quoted" not in row[0]} == {BOTH}
    assert grid.rows[-1][0] == "Semi-Mamba-UNet (quoted)" and grid.rows[-1][2] == ".9114"
    assert all(len(row) == len(grid.header) for row in grid.rows)
    split = {"name": "wsl4mis-fold0", "hash": "c", "note": ""}
    config = method("partial_ce", "Supervised")
    write_run(tmp_path, size=16, title="ACDC", supervision=SCRIBBLES, split=split, config=config)
    config = method("dmpls", "DMPLS", weight=0.5)
    common = {"title": "ACDC", "supervision": SCRIBBLES, "split": split}
    write_run(tmp_path, size=16, name="dmpls", config=config, **common)
    (found,), _, _ = collect(tmp_path)
    (grid,) = beside_the_papers(found)
    assert grid.title == "Beside the paper's table, scribbles"
    assert [row[:2] for row in score_grids(found)[0].rows] == [
        ["unet · partial_ce", "scribbles of 80"], ["unet · dmpls", "scribbles of 80"],
    ]  # fmt: skip


def test_different_numbers_of_labels_are_named(tmp_path):
    write_run(tmp_path, size=16, name="few", supervision=SEVEN, config={"data.labelled": 7})
    write_run(tmp_path, size=16)
    (found,), _, _ = collect(tmp_path)
    assert any("learnt from different labels" in line for line in cautions(found))
    assert {entry.runs[0].supervision for entry in found.entries} == {"7 of 70", "all"}


def test_the_report_of_methods_is_written_whole(experiment):
    text = write_report(experiment).read_text()
    assert "Networks of each method" in text and "Semi-Mamba-UNet (quoted)" in text
    with (experiment / "report" / "paired.csv").open(newline="") as stream:
        assert BOTH in {row["second"] for row in csv.DictReader(stream)}


@pytest.mark.parametrize(
    "broken",
    [
        {"networks": ["unet"], "network": "unet"},
        {"networks": {"unet": {}, "mamba_unet": {}}, "network": "unet"},
        {"networks": {"unet": foreground(0.9), "b": foreground(1e300)}, "network": "unet"},
        {"networks": {"unet": foreground(0.9), "b": foreground(0.1)}, "network": "c"},
        {"supervision": {"labelled": 7}},
        {"supervision": {"labelled": "7", "patients": 70, "labels": "dense"}},
    ],
)
def test_damaged_descriptions_of_methods_are_refused(tmp_path, broken):
    path = write_run(tmp_path, size=16, patients=(1,), **broken)
    with pytest.raises(UserError, match=r"metrics\.json"):
        read_run(path)
