import csv
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from mambaseg.errors import UserError
from mambaseg.reporting.views import SegmentationViews
from mambaseg.training.loggers import MetricsCsv, MLflow, TensorBoard
from mambaseg.training.segmentation import SegmentationTask
from mambaseg.training.wandb_logger import (
    finish_wandb,
    log_cases_to_wandb,
    new_wandb_id,
    wandb_logger,
)
from runs import built


def rows(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_metrics_csv_is_live_and_keeps_rows_when_columns_join(tmp_path):
    logger = MetricsCsv(tmp_path)
    logger.log_metrics({"train/loss": 0.5, "epoch": 0}, step=1)
    assert rows(logger.path) == [{"step": "1", "train/loss": "0.5"}]
    logger.log_metrics({"val/dice": 0.25}, step=2)
    logger.log_metrics({"train/loss": 0.125}, step=3)
    assert [(r["step"], r["train/loss"], r["val/dice"]) for r in rows(logger.path)] == [
        ("1", "0.5", ""),
        ("2", "", "0.25"),
        ("3", "0.125", ""),
    ]


@pytest.mark.parametrize(
    "text", ["train/loss\n1\n", "step,train/loss\nx,1\n", "step,train/loss\n1,1,1\n",
             "step,train/loss\n1,\x00\n", "step,train/loss\n1,low\n"],
)  # fmt: skip
def test_a_damaged_metrics_csv_is_named_and_stays(tmp_path, text):
    logger = MetricsCsv(tmp_path)
    logger.path.write_text(text)
    with pytest.raises(UserError, match=r"metrics\.csv is damaged .*Put back a copy, or delete it"):
        logger.rewind(2)
    assert logger.path.read_text() == text


def test_wandb_runs_offline_in_the_folder_and_each_job_gets_its_own(tmp_path):
    ids = []
    for job in ("a", "b"):
        folder = tmp_path / job
        logger = wandb_logger(save_dir=folder, name=job, tags=["phantom"], mode="offline")
        logger.log_metrics({"x": 1.0}, step=0)
        ids.append(logger.experiment.id)
        finish_wandb(failed=False)
        assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert ids[0] != ids[1]


def test_wandb_goes_offline_when_the_server_does_not_answer(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens on this port
    wandb_logger(save_dir=tmp_path, name="x", mode="online", init_timeout=2)
    finish_wandb(failed=False)
    assert "offline" in caplog.text
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_wandb_takes_no_tags(small_run, tmp_path):
    words = (*small_run, "model=unet", "logger=wandb", "logger.wandb.tags=null", "test=false")
    with built(*words, "data.steps=1") as run:
        (board,) = run.trainer.loggers
        assert board.experiment.tags == ("synthetic phantom, not ACDC",)


def test_wandb_gets_overlays_with_masks_and_the_table_of_cases(tmp_path):
    logger = wandb_logger(save_dir=tmp_path, name="x", mode="offline")
    maps = {name: np.ones((1, 20, 24), np.uint8) for name in ("truth", "prediction")}
    slices = {"image": np.zeros((1, 20, 24), np.float32), "slices": np.array([0]), **maps}
    kept = {"overlay": slices, "aspect": 1.0}
    media = SegmentationViews(("background", "heart")).media(kept)
    results = {
        "rows": [{"case": "patient001_ED", "dice": 0.5}],
        "means": {"dice": {"mean": 0.5}},
    }
    shown = {"best": {"case": "patient001_ED", **media}}
    log_cases_to_wandb([logger], results, shown, title="synthetic")
    finish_wandb(failed=False)
    media = [p for p in tmp_path.rglob("media/*/**/*") if p.is_file() and not p.is_symlink()]
    kinds = {path.relative_to(tmp_path).parts[-3] for path in media}
    assert any(path.name.startswith("best") and path.suffix == ".png" for path in media)
    assert "mask" in kinds and any(path.suffix == ".json" for path in media)


@pytest.mark.parametrize("mode", ["disabled"])
def test_disabled_wandb_writes_nothing(tmp_path, mode):
    logger = wandb_logger(save_dir=tmp_path, name="x", mode=mode)
    logger.log_metrics({"x": 1.0}, step=0)
    finish_wandb(failed=False)
    assert not list(tmp_path.glob("wandb/*run-*"))


def test_of_several_processes_only_the_first_starts_a_wandb_run(tmp_path, monkeypatch):
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    logger = wandb_logger(save_dir=tmp_path, name="x", mode="offline", run_id="1-a")
    logger.log_metrics({"x": 1.0}, step=0)
    finish_wandb(failed=False)
    assert not list(tmp_path.iterdir())


def test_wandb_ids_are_new_under_one_seed_and_say_the_key():
    import random

    random.seed(1)
    first = new_wandb_id("0123abcd")
    random.seed(1)
    assert first.startswith("0123abcd-") and first != new_wandb_id("0123abcd")


# ---- TensorBoard and MLflow: stand-ins for packages that need not be installed


class Writer:
    """Stands in for torch's SummaryWriter, which keeps the points of one process."""

    made: ClassVar[list] = []

    def __init__(self, log_dir, purge_step=None):
        self.log_dir, self.purge_step, self.points = log_dir, purge_step, []
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        self.points.append((name, step, float(value)))

    def flush(self):
        pass

    close = flush


class Client:
    """Stands in for MLflow's client; its store outlives it, as a database does."""

    runs: ClassVar[dict] = {}

    def __init__(self, uri):
        self.uri = uri

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id="1", lifecycle_stage="active")

    def create_run(self, experiment_id, tags):
        self.runs[str(len(self.runs))] = (tags, [])
        return self.get_run(str(len(self.runs) - 1))

    def search_runs(self, experiments, wanted):
        return [self.get_run(key) for key, (tags, _) in self.runs.items()
                if wanted == f"tags.\"mambaseg.run_id\" = '{tags['mambaseg.run_id']}'"]  # fmt: skip

    def get_run(self, key):
        return SimpleNamespace(info=SimpleNamespace(run_id=key, experiment_id="1"))

    def log_batch(self, run_id, metrics):
        self.runs[run_id][1].extend((m.key, m.step, m.value) for m in metrics)

    def set_terminated(self, *_):
        pass


def module(monkeypatch, name, **content):
    made = ModuleType(name)
    made.__dict__.update(content)
    monkeypatch.setitem(sys.modules, name, made)


@pytest.fixture
def packages(monkeypatch):
    """Both packages, as Lightning looks for them."""
    from lightning.pytorch.loggers import mlflow

    monkeypatch.setattr("mambaseg.training.loggers.require", lambda package: None)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", True)
    module(monkeypatch, "torch.utils.tensorboard", SummaryWriter=Writer)
    monkeypatch.setattr(mlflow, "_MLFLOW_AVAILABLE", True)
    monkeypatch.setattr(mlflow, "_get_resolve_tags", lambda: dict)
    module(monkeypatch, "mlflow", set_tracking_uri=lambda uri: None)
    module(monkeypatch, "mlflow.tracking", MlflowClient=Client)
    module(monkeypatch, "mlflow.entities", Metric=SimpleNamespace)
    module(monkeypatch, "mlflow.utils")
    module(monkeypatch, "mlflow.utils.mlflow_tags", MLFLOW_RUN_NAME="mlflow.runName")
    monkeypatch.setattr(Writer, "made", [])
    monkeypatch.setattr(Client, "runs", {})


@pytest.fixture
def resumed(small_run, monkeypatch):
    """words -> the folder of a run that died when step 3 began and was resumed from step 2."""

    def go(words):
        small = ["model=unet", "model.widths=[4,8]", "model.dropout=[0,0]", "test=false"]
        small += ["trainer.log_every_n_steps=1"]
        with built(*small_run, *small, *words) as run:
            run.fit()
        return run.folder

    def twice(*words):
        whole = SegmentationTask.training_step

        def dying(self, batch, index):
            if batch["step"] == 3:
                raise ZeroDivisionError("on purpose")
            return whole(self, batch, index)

        with monkeypatch.context() as patch:
            patch.setattr(SegmentationTask, "training_step", dying)
            with pytest.raises(ZeroDivisionError):
                go(words)
        return go(words)

    return twice


def points(folder):
    """Name, step and value of every cell of metrics.csv."""
    return {
        (name, int(row["step"]), float(text))
        for row in rows(folder.path / "metrics.csv")
        for name, text in row.items()
        if text and name != "step"
    }


def close(one, other):
    assert {point[:2] for point in one} == {point[:2] for point in other}
    values = {point[:2]: point[2] for point in other}
    assert all(value == pytest.approx(values[name, step], nan_ok=True) for name, step, value in one)


def test_tensorboard_gets_the_points_of_metrics_csv_and_drops_those_after_the_checkpoint(
    packages, resumed
):
    folder = resumed("logger=tensorboard")
    first, second = Writer.made
    assert (first.purge_step, second.purge_step) == (None, 2)
    assert first.log_dir == second.log_dir == str(folder.path / "tensorboard")
    close([point for point in first.points if point[1] < 2] + second.points, points(folder))


def test_a_resumed_run_is_one_run_of_mlflow_with_the_points_of_metrics_csv(packages, resumed):
    folder = resumed("logger=mlflow")
    ((tags, found),) = Client.runs.values()
    assert tags["mambaseg.run_id"] == folder.record["wandb_id"]
    assert tags["mlflow.runName"] == folder.path.name and tags["mlflow.user"] == ""
    close(found, points(folder))


def test_a_logger_without_its_package_is_an_error_that_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for package, make in {
        "tensorboard": lambda: TensorBoard(tmp_path),
        "mlflow": lambda: MLflow("sqlite:///x.db", name="x"),
        "wandb": lambda: wandb_logger(save_dir=tmp_path, name="x"),
    }.items():
        with pytest.raises(UserError, match=rf"pip install 'mambaseg\[{package}\]'"):
            make()


OWN = """
from lightning.pytorch.loggers import Logger

class Notes(Logger):
    name = version = "notes"

    def __init__(self, save_dir, run_id):
        super().__init__()
        self.run_id, self.points = run_id, []

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        self.points.append((step, dict(metrics)))
"""


def test_a_logger_is_a_file_and_a_config_from_outside_too(small_run, tmp_path, monkeypatch):
    (tmp_path / "own_logger_file.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "conf" / "logger").mkdir(parents=True)
    (tmp_path / "conf" / "logger" / "notes.yaml").write_text(
        "defaults: [csv]\n"
        "notes: {_target_: own_logger_file.Notes, save_dir: '${run_dir}', run_id: null}\n"
    )
    words = ["model=unet", "model.widths=[4,8]", "model.dropout=[0,0]", "test=false"]
    with built(*small_run, *words, "logger=notes", configs=tmp_path / "conf") as run:
        run.fit()
    csv_logger, own = run.trainer.loggers
    assert own.run_id == run.folder.record["wandb_id"]
    assert [step for step, row in own.points if "val/dice" in row] == [1, 3]
    assert isinstance(csv_logger, MetricsCsv)
