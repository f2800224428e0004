import csv

import numpy as np
import pytest

from mambaseg.reporting.views import SegmentationViews
from mambaseg.training.loggers import (
    MetricsCsv,
    finish_wandb,
    log_cases_to_wandb,
    new_wandb_id,
    wandb_logger,
)


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


def test_wandb_gets_overlays_with_masks_and_the_table_of_cases(tmp_path):
    logger = wandb_logger(save_dir=tmp_path, name="x", mode="offline")
    maps = {name: np.ones((1, 20, 24), np.uint8) for name in ("truth", "prediction")}
    kept = {"middle": {"image": np.zeros((1, 20, 24), np.float32), **maps}}
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
