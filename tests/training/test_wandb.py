"""What W&B gets, read back from the files of offline runs."""

import csv
import json

import pytest

from runs import built, entered
from wandb_file import curves, read_run

BOTH = ("logger=default", "model=unet")  # CSV and W&B


def csv_by_step(folder):
    """Step -> cells of metrics.csv; a cell that stands there twice is an error."""
    found = {}
    with (folder / "metrics.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            cells = found.setdefault(int(row.pop("step")), {})
            for name, text in row.items():
                if text:
                    assert name not in cells, (name, cells)
                    cells[name] = float(text)
    return found


# ---- one run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(shared_run):
    """One finished run with both loggers; tests only read it."""
    with built(*BOTH, *shared_run, "trainer.log_every_n_steps=1", "name=some_sweep") as run:
        run.fit()
        run.evaluate()
    return run


def test_an_offline_run_says_who_it_is(run):
    said = read_run(run.folder.path)
    assert said["run"].run_id == run.folder.record["wandb_id"]
    assert said["run"].run_id.startswith(run.key)
    assert said["run"].run_group == "some_sweep" and said["run"].project == "mambaseg"
    assert said["run"].display_name == run.folder.path.name
    assert set(said["run"].tags) == {"unet", "phantom", "synthetic phantom, not ACDC"}
    assert said["exit_code"] == 0


def test_an_offline_run_holds_the_configuration(run):
    config = read_run(run.folder.path)["config"]
    for group in ("data", "model", "optim", "evaluation"):
        assert config[group] == json.loads(json.dumps(run.config[group]))


def test_the_history_is_metrics_csv_row_for_row(run):
    said = curves(read_run(run.folder.path))
    assert [step for step, _ in said] == [0, 1, 2, 3, 4]
    rows = csv_by_step(run.folder.path)
    for step, row in said:
        assert row.pop("trainer/global_step") == step
        curve = {name: value for name, value in row.items() if not isinstance(value, dict)}
        assert curve == rows[step]
    assert {"train/loss", "lr-SGD", "val/dice"} <= rows[3].keys() and "val/dice" not in rows[2]


def test_the_step_is_the_axis_of_every_curve(run):
    from wandb_file import records

    (path,) = run.folder.path.glob("wandb/offline-run-*/*.wandb")
    metrics = [r.metric for r in records(path) if r.WhichOneof("record_type") == "metric"]
    axes = {m.glob_name or m.name: m.step_metric for m in metrics}
    assert axes["*"] == "trainer/global_step"


def test_images_table_and_summary_of_the_test_part_arrive(run):
    said = read_run(run.folder.path)
    step, row = curves(said)[-1]
    assert step == 4 and "test/dice" in row
    assert row["test/cases"]["_type"] == "table-file"
    assert row["test/cases"]["nrows"] == len((run.folder.path / "cases.csv").open().readlines()) - 1
    for place in ("worst", "median", "best"):
        image = row[f"test/{place}"]
        assert image["_type"] == "image-file" and image["masks"].keys() == {"truth", "prediction"}
        (files,) = run.folder.path.glob("wandb/offline-run-*/files")
        assert (files / image["path"]).is_file()
        assert "synthetic phantom, not ACDC" in image["caption"]
    assert said["summary"]["data"] == "synthetic phantom, not ACDC"
    dice = run.folder.summary["foreground"]["dice"]["mean"]
    assert said["summary"]["test"]["dice"]["mean"] == pytest.approx(dice)


# ---- a sweep -------------------------------------------------------------------------------------


def test_every_job_of_a_sweep_is_a_run_of_its_group_and_a_failed_one_says_so(
    small_run, tmp_path, capfd
):
    words = ["-m", *BOTH, *small_run, "data.batch_size=2,3,4",  # 3 cannot be halved
             "trainer.accumulate_grad_batches=2", "test=false", "name=halves"]  # fmt: skip
    assert entered("train.py", *words) == 1
    told = capfd.readouterr().err
    assert "batch_size" in told and "Traceback" not in told
    folders = sorted((tmp_path / "outputs" / "halves").glob("*-seed*"))
    records = [json.loads((folder / "run.json").read_text()) for folder in folders]
    assert sorted(record["status"] for record in records) == ["done", "done", "failed"]
    for folder, record in zip(folders, records, strict=True):
        failed = record["status"] == "failed"
        assert ("batch_size" in record.get("error", "")) == failed
        assert ("Traceback" in (folder / "train.log").read_text()) == failed
    said = {read_run(p)["config"]["data"]["batch_size"]: read_run(p) for p in folders}
    assert {size: one["exit_code"] for size, one in said.items()} == {2: 0, 3: 1, 4: 0}
    assert {one["run"].run_group for one in said.values()} == {"halves"}
    assert len({one["run"].run_id for one in said.values()}) == 3
    assert not said[3]["history"] and all(len(said[size]["history"]) == 2 for size in (2, 4))


def test_a_job_that_fails_before_it_has_a_trainer_finishes_its_run(small_run, tmp_path):
    with (
        pytest.raises(Exception, match="gradient_clip"),
        built(*BOTH, *small_run, "trainer.gradient_clip_val=abc"),
    ):
        pass
    (folder,) = (tmp_path / "outputs" / "default").glob("unet-*")
    assert read_run(folder)["exit_code"] == 1
