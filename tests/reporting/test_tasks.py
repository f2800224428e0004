"""Runs of other tasks than segmentation in a report, also damaged and lying ones."""

import json

import pytest
import yaml

from mambaseg.evaluation.metrics import Metric
from mambaseg.reporting.collect import collect
from mambaseg.reporting.report import write_report
from mambaseg.reporting.tasks import other_grids

DB = Metric("psnr", "PSNR dB", decimals=1).plain()
METRICS = ("psnr", "ssim", "psnr_hazy", "ssim_hazy")


def write_run(folder, seed=1):
    config = {
        "seed": seed,
        "model": {"name": "unet"},
        "data": {"title": "haze", "task": "restoration", "class_names": ["hazy", "clear"]},
    }
    summary = {
        "task": "restoration",
        "data": "haze",
        "cases": 3,
        "split": {"name": "random", "hash": "abc"},
        "scores": {metric: {"mean": 20.0, "sd": 1.0} for metric in METRICS},
    }
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"status": "done", "parameters": 5}))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.json").write_text(json.dumps(summary))
    return summary


def change(summary, path, value):
    *parts, last = path.split(".")
    place = summary
    for part in parts:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value


def test_a_whole_run_is_read(tmp_path):
    write_run(tmp_path / "one")
    _, runs, problems = collect(tmp_path)
    assert [run.summary["cases"] for run in runs] == [3] and not problems


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("scores.psnr.mean", "20"),
        ("scores.psnr.mean", 1e300),
        ("scores.ssim_hazy.sd", True),
        ("scores.ssim.mean", None),
        ("scores", [1]),
        ("split.hash", {"a": 1}),
        ("split", None),
        ("data", 7),
        ("cases", "3"),
        ("metrics", [{"name": "psnr"}]),
        ("metrics", [{**DB, "decimals": "2"}]),
        ("metrics", [{**DB, "decimals": 1 << 30}]),
        ("note", ["a"]),
    ],
)
def test_a_run_whose_summary_lies_is_left_out_and_named(tmp_path, path, value):
    write_run(tmp_path / "good")
    summary = write_run(tmp_path / "bad")
    change(summary, path, value)
    (tmp_path / "bad" / "metrics.json").write_text(json.dumps(summary))
    _, runs, problems = collect(tmp_path)
    assert [run.path.name for run in runs] == ["good"]
    assert len(problems) == 1 and str(tmp_path / "bad" / "metrics.json") in problems[0]


def test_a_run_without_its_configuration_is_left_out_and_named(tmp_path):
    write_run(tmp_path / "bad")
    write_run(tmp_path / "good")
    (tmp_path / "bad" / "config.yaml").write_text("seed: [")
    _, runs, problems = collect(tmp_path)
    assert [run.path.name for run in runs] == ["good"]
    assert len(problems) == 1 and "config.yaml" in problems[0]


def test_a_copy_of_a_run_does_not_count_twice(tmp_path):
    for name in ("one", "two"):
        write_run(tmp_path / name)
    _, runs, problems = collect(tmp_path)
    assert len(runs) == 1 and "left out: one has the setting" in problems[0]


def test_the_table_shows_what_the_summary_says_of_itself_and_else_its_names(tmp_path):
    summary = write_run(tmp_path / "new")
    summary |= {"title": "Fog", "metrics": [DB], "note": "Not rounded."}
    (tmp_path / "new" / "metrics.json").write_text(json.dumps(summary))
    table = (write_report(tmp_path).parent / "table.md").read_text()
    assert "## Fog" in table and "| PSNR dB | ssim |" in table and "| 20.0 | 20.0000 |" in table
    assert "Not rounded." in table
    for key in ("title", "metrics", "note"):  # as runs of before
        del summary[key]
    (tmp_path / "new" / "metrics.json").write_text(json.dumps(summary))
    table = (write_report(tmp_path).parent / "table.md").read_text()
    assert "## restoration" in table and "| psnr | ssim |" in table


def test_the_table_has_the_mean_over_seeds(tmp_path):
    for seed, score in ((1, 20.0), (2, 21.0), (3, 25.0)):
        summary = write_run(tmp_path / str(seed), seed)
        summary["scores"]["psnr"]["mean"] = score
        (tmp_path / str(seed) / "metrics.json").write_text(json.dumps(summary))
    (grid,) = other_grids(collect(tmp_path)[1])
    (row,) = grid.rows
    cells = dict(zip(grid.header, row, strict=True))
    assert (cells["psnr"], cells["runs"]) == ("22.0000 ± 2.6458", "3")  # √((4 + 1 + 9) / 2)
    assert cells["ssim"] == "20.0000 ± 0.0000"
