"""callbacks=ema: what is validated, tested, saved and exported is the average of the weights."""

import json

import pytest
import torch

from mambaseg.app.networks import restore_network
from mambaseg.errors import UserError
from mambaseg.inference.bundle import write_bundle
from mambaseg.inference.trained import read_checkpoint
from mambaseg.training import averaging
from mambaseg.training.segmentation import SegmentationTask
from mambaseg.training.task import Task
from runs import UNET, assert_same, trained

EMA = ("callbacks=ema", "callbacks.ema.decay=0.6", "callbacks.progress=null")


def states(run):
    return {content["global_step"]: content for content in (
        torch.load(path, weights_only=True)
        for path in run.folder.path.glob("checkpoints/*.ckpt"))}  # fmt: skip


@pytest.fixture
def kept(monkeypatch):
    """Step -> the weights after it, and what the validation ran with, of the next training."""
    weights, validated = {}, []
    step, predict = Task.optimizer_step, SegmentationTask.predict

    def optimizer_step(self, *arguments, **how):
        step(self, *arguments, **how)
        weights[self._step] = copied(self.network)

    def predicted(self, batch, network):
        validated.append(copied(network))
        return predict(self, batch, network)

    monkeypatch.setattr(Task, "optimizer_step", optimizer_step)
    monkeypatch.setattr(SegmentationTask, "predict", predicted)
    return weights, validated


def copied(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def test_the_average_is_validated_tested_and_exported(small_run, kept, tmp_path, caplog):
    caplog.set_level("INFO")
    run = trained(*UNET, *small_run, *EMA, "test=true")
    weights, used = kept
    average = {name: one for name, one in weights[0].items() if one.is_floating_point()}
    for step, decay in ((1, 1 / 2), (2, 0.6), (3, 0.6)):
        average = {name: decay * average[name] + (1 - decay) * weights[step][name]
                   for name in average}  # fmt: skip
        if step in (1, 3):  # after two steps, and after four
            validation = used[step - 1]  # of two cases each
            for name, value in average.items():
                torch.testing.assert_close(validation[name], value, rtol=1e-5, atol=1e-7)
    assert not torch.equal(used[0]["network.head.weight"], weights[1]["network.head.weight"])
    best = torch.load(run.folder.path / "checkpoints" / "best.ckpt", weights_only=True)
    tested = {f"network.{name}": value for name, value in used[-1].items()}
    assert_same({name: best["state_dict"][name] for name in tested}, tested)
    checkpoint = read_checkpoint(run.folder.path)
    network, _ = restore_network(run.folder.path)
    folder = write_bundle(network, checkpoint, tmp_path / "bundle")
    assert_same(dict(read_checkpoint(folder).weights), dict(checkpoint.weights))
    assert_same(copied(network), used[-1])
    said = "averaged over the steps of the training, decay 0.6"
    assert said in (folder / "README.md").read_text()
    assert json.loads((run.folder.path / "metrics.json").read_text())["averaged"] == 0.6
    assert "weights averaged over steps with decay 0.6" in caplog.text


def test_a_skipped_step_leaves_the_average(small_run, monkeypatch):
    whole = Task.training_loss

    def training_loss(self, batch):
        return whole(self, batch) * (float("nan") if batch["step"] == 2 else 1)

    monkeypatch.setattr(Task, "training_loss", training_loss)
    words = [*UNET, *small_run, *EMA, "callbacks.nonfinite.on_nonfinite=skip", "test=false"]
    monkeypatch.setattr("mambaseg.training.checkpoints.clear", lambda *_, **__: None)
    found = states(trained(*words, "callbacks.checkpoint.every=1"))
    assert_same(found[2]["state_dict"], found[3]["state_dict"])
    assert str(found[3]["state_dict"]) != str(found[4]["state_dict"])
    assert str(found[4]["state_dict"]) != str(found[4]["current_model_state"])


def test_sixteen_bits_hold_no_average(small_run):
    with pytest.raises(UserError, match="cannot hold an average"):
        trained(*UNET, *small_run, *EMA, "trainer=cpu", "trainer.precision=bf16-true")
    with pytest.raises(Exception, match=r"callbacks\.ema\.decay=1\.0: must be 0 or more"):
        trained(*UNET, *small_run, *EMA, "callbacks.ema.decay=1.0")


def test_counters_are_taken_and_not_averaged():
    assert averaging.EMA()._averaged(torch.tensor(3), torch.tensor(4), 5) == 4
