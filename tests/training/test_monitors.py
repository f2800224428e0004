"""What callbacks choose and change is what is tested, recorded and resumed."""

import csv
import json

import pytest
import torch
import yaml

from mambaseg.errors import UserError
from mambaseg.evaluation import metrics
from mambaseg.training.segmentation import SegmentationTask
from runs import stop_before, trained
from sweep_jobs import environment, needs, typed

EARLY = "+callbacks.early={_target_: lightning.pytorch.callbacks.EarlyStopping, patience: 1, "
EMA = "+callbacks.ema={_target_: lightning.pytorch.callbacks.EMAWeightAveraging, decay: 0.5}"


@pytest.fixture
def made(small_run):
    """words -> the small run that they make, as src/train.py would."""

    def make(*words):
        words = [*small_run, "trainer=cpu", *words]
        if not any(word.startswith("model=") for word in words):
            words += ["model=unet", "model.widths=[4,4,8,8,8]"]
        return trained(*words)

    return make


def weights(run, name):
    path = run.folder.path / "checkpoints" / f"{name}.ckpt"
    return torch.load(path, weights_only=True)


def scores_are(monkeypatch, values):
    """Lets the validations have these Dice scores, whatever the network does."""
    left = iter(values)
    whole = SegmentationTask.values

    def told(self, stage, summary):
        found = whole(self, stage, summary)
        return {**found, "val/dice": next(left)} if stage == "val" else found

    monkeypatch.setattr(SegmentationTask, "values", told)


def test_a_distance_as_monitor_has_its_own_name_everywhere(made):
    run = made("callbacks.checkpoint.monitor=val/hd95_mm")
    record, path = run.folder.record, run.folder.path
    logged = [float(row["val/hd95_mm"]) for row in csv.DictReader((path / "metrics.csv").open())
              if row["val/hd95_mm"]]  # fmt: skip
    assert record["val_hd95_mm"] == run.score == pytest.approx(min(logged))
    assert "val_dice" not in record
    summary = json.loads((path / "metrics.json").read_text())
    assert summary["val_hd95_mm"] == run.score and "val_dice" not in summary
    assert summary["checkpoint"] == "best"
    again = made("callbacks.checkpoint.monitor=val/hd95_mm")
    assert again.finished and again.score == run.score
    assert made().folder.path != path


def test_validations_measure_distances_only_for_a_callback_that_chooses_by_them(made, monkeypatch):
    asked = []

    whole = metrics.surface_distances

    def surface_distances(*masks):
        asked.append(masks)
        return whole(*masks)

    monkeypatch.setattr(metrics, "surface_distances", surface_distances)
    run = made("test=false")
    header = (run.folder.path / "metrics.csv").read_text().partition("\n")[0]
    assert "val/dice" in header and "hd95" not in header and not asked
    made("test=false", f"{EARLY}monitor: val/hd95_mm}}")
    assert asked


def test_every_score_that_a_task_says_it_logs_is_logged(made, phantom_root):
    run = made("test=false", "evaluation.val_distances=true")
    assert sorted(type(run.task).logged(run.data)) == sorted(
        name for name in run.trainer.callback_metrics if name.startswith("val/")
    )


def test_another_checkpoint_callback_before_ours_changes_nothing(made, tmp_path):
    other = f"{{_target_: lightning.pytorch.callbacks.ModelCheckpoint, dirpath: {tmp_path / 'x'}}}"
    ours = ("{_target_: mambaseg.training.checkpoints.Checkpoints, monitor: val/dice, "
            "folder: '${run_dir}/checkpoints'}")  # fmt: skip
    run = made("~callbacks.checkpoint", f"+callbacks.other={other}", f"+callbacks.states={ours}")
    assert list((tmp_path / "x").iterdir()) and run.score == run.folder.record["val_dice"] > 0
    assert made().folder.path == run.folder.path


def test_the_averaged_weights_of_best_are_tested(made, monkeypatch):
    """Not those of its last step, which Lightning's callback puts in their place."""
    scores_are(monkeypatch, [0.5, 0.4])
    run = made(EMA, "optim=adamw")
    best = weights(run, "best")
    averaged, current = best["state_dict"], best["current_model_state"]
    name = next(iter(averaged))
    assert not torch.equal(averaged[name], current[name])
    tested = run.task.state_dict()
    assert all(torch.equal(tested[key], averaged[key]) for key in averaged)


def test_two_callbacks_that_average_are_refused(made):
    with pytest.raises(UserError, match=r"callbacks\.ema and callbacks\.more both average"):
        made(EMA, EMA.replace("callbacks.ema", "callbacks.more"), "optim=adamw")


def test_a_run_that_averages_resumes_exactly(made, monkeypatch, tmp_path):
    words = [EMA, "optim=adamw", "callbacks.checkpoint.every=1"]
    whole = made(*words, f"outputs={tmp_path / 'whole'}")
    stop_before(3, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        made(*words)
    monkeypatch.undo()
    resumed = made(*words)
    assert resumed.folder.record["resumed"][0]["step"] == 3
    for name in ("best", "last"):
        one, other = (weights(run, name)["state_dict"] for run in (whole, resumed))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_last_state_is_tested_aloud_where_no_validation_has_a_score(made, monkeypatch, caplog):
    scores_are(monkeypatch, [float("nan")] * 2)
    run = made()
    assert "val/dice was never a number in a validation" in caplog.text
    assert run.folder.summary["checkpoint"] == "last" and run.folder.record["val_dice"] is None


def test_a_score_that_is_not_logged_ends_the_training_at_its_first_validation(made, monkeypatch):
    """A task that logs less than it says."""
    whole = SegmentationTask.values
    monkeypatch.setattr(
        SegmentationTask, "values",
        lambda *a: {k: v for k, v in whole(*a).items() if k != "val/dice"},
    )  # fmt: skip
    with pytest.raises(UserError, match=r"callbacks\.checkpoint\.monitor=val/dice"):
        made()


def test_a_training_that_stops_early_says_so_and_stays_stopped(made, monkeypatch, caplog):
    words = [EARLY + "monitor: val/dice}", "data.steps=6", "data.val_every=1"]
    scores_are(monkeypatch, [0.2, 0.3, 0.1, 0.4, 0.5, 0.6])
    test, calls = SegmentationTask.test_step, []

    def fails_once(self, batch, index):
        calls.append(index)
        if len(calls) == 1:
            raise ZeroDivisionError("on purpose")
        return test(self, batch, index)

    monkeypatch.setattr(SegmentationTask, "test_step", fails_once)
    with pytest.raises(ZeroDivisionError):
        made(*words)
    assert "the training ended after 3 of data.steps=6 steps" in caplog.text
    run = made(*words)
    assert run.folder.record["resumed"] and run.score == pytest.approx(0.3)
    assert weights(run, "last")["global_step"] == 3 and weights(run, "best")["global_step"] == 2
    assert run.folder.summary["val_dice"] == pytest.approx(0.3)


def test_resuming_with_another_scan_backend_says_so(made, monkeypatch, caplog):
    words = ["model=mamba_unet", "model.embed_dim=16", "model.depths=[1,1,1,1]",
             "callbacks.checkpoint.every=1"]  # fmt: skip
    stop_before(2, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        made(*words, "model.scan_backend=torch")
    monkeypatch.undo()
    record = made(*words, "model.scan_backend=numba").folder.record
    assert "scan_backend torch, now numba" in caplog.text
    assert record["scan_backend"] == "torch" and record["resumed"][0]["scan_backend"] == "numba"


def test_a_search_goes_the_way_of_the_monitor(tmp_path):
    needs("search")
    words = ["-m", "hparams_search=optuna", "model=unet", "hydra.sweeper.n_trials=4",
             "hydra.sweeper.sampler.n_startup_trials=4", "data=phantom"]  # fmt: skip
    best = {}
    for way, more in (("max", []), ("min", ["callbacks.checkpoint.monitor=val/hd95_mm"])):
        done = typed(*words, *more, f"outputs={tmp_path / way}", env=environment())
        assert done.returncode == 0, done.stderr
        path = tmp_path / way / "search" / "studies" / "all" / "optimization_results.yaml"
        best[way] = yaml.safe_load(path.read_text())["best_value"]
    assert best["min"] < best["max"]
    done = typed(*words, *more, "hydra.sweeper.direction=maximize", f"outputs={tmp_path}")
    assert done.returncode == 1 and "hydra.sweeper.direction=maximize" in done.stderr
