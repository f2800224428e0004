"""A loss or gradient that is not finite: the step is not taken, and it is said where it began."""

import csv
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from mambaseg.data.geometry import Preprocessing
from mambaseg.data.slices import SliceDataset
from mambaseg.errors import UserError
from mambaseg.training.diagnosis import diagnose, gradient_norms
from mambaseg.training.methods.method import Method
from mambaseg.training.nonfinite import NonFinite, NonFiniteError
from mambaseg.training.run import Run
from mambaseg.training.segmentation import SegmentationTask
from runs import assert_same, built, stop_before

ROOT = Path(__file__).parents[2]
SKIP = "callbacks.nonfinite.on_nonfinite=skip"
WORDS = ["model=unet", "model.widths=[4,4,8,8,8]", "logger=csv", "test=false", "data.steps=6",
         "trainer.log_every_n_steps=1", "callbacks.progress=null"]  # fmt: skip


class Trained:
    """A training in this process and what it ended with, also where it failed.

    Args:
        words: as on the command line.
        changes: functions of a `MonkeyPatch`, undone afterwards.
    """

    def __init__(self, words, *changes):
        self.error = None
        with pytest.MonkeyPatch.context() as patch:
            for change in changes:
                change(patch)
            try:
                with built(*words) as run:
                    run.fit()
            except (UserError, ZeroDivisionError) as error:
                self.error = error
        self.path, self.record = run.folder.path, run.folder.record
        self.task, self.trainer = run.task, run.trainer
        self.state = run.task.state_dict(), run.trainer.optimizers[0].state_dict()["state"]

    @property
    def rows(self):
        return [row for row in csv.DictReader((self.path / "metrics.csv").open()) if any(row)]


def poisoned(step, position=1):
    """A NaN in the image at one place of one step."""

    def change(patch):
        whole = SliceDataset.__getitem__

        def item(self, key):
            item = whole(self, key)
            if (item.get("step"), item.get("position")) == (step, position):
                item["image"] = item["image"].copy()
                item["image"][::4, ::4] = np.nan
            return item

        patch.setattr(SliceDataset, "__getitem__", item)

    return change


def stopped_before(step):
    return partial(stop_before, step)


def overflowing(step):
    """A finite loss whose gradient is not, in one parameter: sqrt has no slope at 0."""
    whole = SegmentationTask.training_loss

    def training_loss(self, batch):
        loss = whole(self, batch)
        if batch["step"] == step:
            loss = loss + (0 * next(self.network.parameters()).square().sum()).sqrt()
        return loss

    return lambda patch: patch.setattr(SegmentationTask, "training_loss", training_loss)


def test_a_training_ends_before_a_bad_step_and_says_where_it_began(small_run, tmp_path):
    words = [*small_run, *WORDS]
    good = Trained([*words, f"outputs={tmp_path / 'good'}"], stopped_before(3))
    run = Trained(words, poisoned(3))
    said = str(run.error)
    assert isinstance(run.error, NonFiniteError)
    assert run.record["status"] == "failed" and "step 3" in run.record["error"]
    assert_same(good.state, run.state)  # running statistics too
    with np.load(run.path / "nonfinite.npz", allow_pickle=False) as arrays:
        assert int(arrays["step"]) == 3 and arrays["position"].tolist() == [0, 1, 2, 3]
        assert arrays["image"].shape == (4, 1, 32, 32) and arrays["label"].shape == (4, 32, 32)
        assert np.isnan(arrays["image"]).any((1, 2, 3)).tolist() == [False, True, False, False]
        sample = f"{arrays['case'][1]} slice {arrays['slice'][1]}"
    assert f"image is not finite in {sample}." in said
    for words in ("step 3", "nonfinite.npz", "nonfinite.json", "optim.optimizer.lr", SKIP,
                  str(run.path / "checkpoints" / "last.ckpt"), f"look at {sample}"):  # fmt: skip
        assert words in said
    assert "32-true" not in said  # it is that already
    found = json.loads((run.path / "nonfinite.json").read_text())
    assert found["losses"] == ["nan"] and len(found["cases"]) == 4
    assert found["gradient_norms"][0]["nonfinite"] > 0
    assert not list(run.path.glob(".*.tmp"))


@pytest.mark.parametrize(
    "words", [["optim=sgd"], ["optim=adamw"], ["trainer.accumulate_grad_batches=2"]], ids=str
)
def test_a_skipped_step_changes_nothing_and_counts(words, small_run, tmp_path):
    words = [*small_run, *WORDS, *words]
    before = Trained([*words, f"outputs={tmp_path / 'before'}"], stopped_before(3))
    after = Trained([*words, SKIP, f"outputs={tmp_path / 'after'}"], poisoned(3), stopped_before(4))
    assert_same(before.state, after.state)
    assert (before.trainer.global_step, after.trainer.global_step) == (3, 4)
    rates = [run.trainer.lr_scheduler_configs[0].scheduler.last_epoch for run in (before, after)]
    assert rates == [3, 4]


def test_a_training_with_a_skipped_step_resumes_as_if_undisturbed(small_run, tmp_path):
    words = [*small_run, *WORDS, SKIP]
    whole = Trained([*words, f"outputs={tmp_path / 'whole'}"], poisoned(3))
    assert whole.error is None and whole.record["status"] == "done"
    (skipped,) = whole.record["skipped"]
    assert skipped["step"] == 3 and skipped["losses"] == ["nan"] and len(skipped["cases"]) == 4
    rows = [row for row in whole.rows if row["train/skipped"]]
    assert [(row["step"], float(row["train/skipped"])) for row in rows] == [("3", 1.0)]
    for step in (4, 5):  # the checkpoint of step 4 has the skipped step behind it
        folder = f"outputs={tmp_path / str(step)}"
        Trained([*words, folder], poisoned(3), stopped_before(step))
        resumed = Trained([*words, folder], poisoned(3))
        assert resumed.record["resumed"][0]["step"] == 4
        assert_same(whole.state, resumed.state)
        assert resumed.record["skipped"] == whole.record["skipped"]
        assert [str(row) for row in resumed.rows] == [str(row) for row in whole.rows]


def test_a_skipped_step_after_the_checkpoint_is_forgotten_and_found_again(small_run):
    words = [*small_run, *WORDS, SKIP]
    died = Trained(words, poisoned(3), poisoned(4), stopped_before(5))
    assert [skip["step"] for skip in died.record["skipped"]] == [3, 4]
    resumed = Trained(words, poisoned(3))  # step 4 is good this time
    assert [skip["step"] for skip in resumed.record["skipped"]] == [3]


def test_a_stopped_run_goes_on_with_skip_or_with_mended_data(small_run, tmp_path):
    words = [*small_run, *WORDS]
    assert isinstance(Trained(words, poisoned(3)).error, NonFiniteError)
    mended = Trained(words)
    assert_same(Trained([*words, f"outputs={tmp_path / 'other'}"]).state, mended.state)
    assert "error" not in mended.record


def test_too_many_in_a_row_end_it_whatever_is_wanted(small_run):
    """A rate of 1e30 ruins the weights in step 0 of a batch-norm network: nothing ever mends it."""
    limit = "callbacks.nonfinite.most_in_a_row=3"
    run = Trained([*small_run, *WORDS, SKIP, limit, "optim.optimizer.lr=1e30"])
    said = str(run.error)
    assert "step 3, after 2 skipped in a row" in said and SKIP not in said
    assert [skip["step"] for skip in run.record["skipped"]] == [1, 2]
    assert "The first module whose output is not finite is network.network." in said


def test_a_gradient_alone_is_found_too(small_run):
    run = Trained([*small_run, *WORDS], overflowing(2))
    found = json.loads((run.path / "nonfinite.json").read_text())
    name = next(iter(run.task.network.state_dict()))
    assert "step 2: the gradient is not finite" in str(run.error)
    assert f"began in the backward pass. Largest gradient norms: network.{name} (nan" in str(
        run.error
    )
    assert found["ranks"][0]["place"] == "backward"
    norms = found["gradient_norms"]
    assert norms[0]["parameter"] == f"network.{name}" and norms[0]["nonfinite"]
    assert [norm["nonfinite"] for norm in norms[1:]] == [0] * (len(norms) - 1)
    sizes = [float(norm["norm"]) for norm in norms[1:]]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 3


def scaled(patch):
    """float16 with a loss scale that overflows once; Lightning has it for GPUs only."""
    whole = Run.fit

    def fit(self):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100, backoff_factor=2.0**-90)
        self.trainer.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", scaler)
        whole(self)

    patch.setattr(Run, "fit", fit)


def test_a_loss_scale_that_overflows_is_lowered_and_a_bad_loss_still_ends_it(small_run):
    words = [*small_run, *WORDS, "optim.optimizer.fused=false"]  # as `build` has it with float16
    run = Trained(words, scaled)
    assert run.error is None and [skip["step"] for skip in run.record["skipped"]] == [0]
    assert 0.1 < float(run.record["skipped"][0]["losses"][0]) < 10  # not scaled
    assert run.trainer.precision_plugin.scaler.get_scale() == 2.0**10
    run = Trained([*words, "seed=2"], scaled, poisoned(3))
    assert "step 3: the loss is not finite (nan)" in str(run.error)
    assert "trainer.precision=32-true" in str(run.error)


def test_two_processes_decide_alike(small_run, tmp_path):
    """The bad image is on the second one; stopped first, then resumed with skip."""
    words = [*small_run, *WORDS, "trainer=ddp", "trainer.accelerator=cpu"]
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "poisoned.py"), *words]
    typed = partial(subprocess.run, capture_output=True, text=True, timeout=140, check=False)
    done = typed(command)
    folder = next((tmp_path / "outputs" / "default").glob("*/run.json")).parent
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert (
        "step 3: the loss is not finite" in json.loads((folder / "run.json").read_text())["error"]
    )
    found = json.loads((folder / "nonfinite.json").read_text())
    assert [rank["place"] for rank in found["ranks"]] == ["module", "image"]
    assert found["ranks"][0]["name"] == "loss"  # Dice sums over both
    assert found["losses"] == ["nan", "nan"] and len(found["cases"]) == 4
    for rank, positions in enumerate([[0, 1], [2, 3]]):
        with np.load(folder / f"nonfinite-rank{rank}.npz", allow_pickle=False) as arrays:
            assert arrays["position"].tolist() == positions
            assert np.isnan(arrays["image"]).any() == (rank == 1)
    done = subprocess.run(
        [*command, SKIP], capture_output=True, text=True, timeout=140, check=False
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "run.json").read_text())
    (skipped,) = record["skipped"]
    assert record["status"] == "done" and record["resumed"][0]["step"] == 2
    assert skipped["step"] == 3 and len(skipped["cases"]) == 4
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 6
    assert all(value.isfinite().all() for value in last["state_dict"].values())


# ---- where it began


class Break(nn.Module):
    """Divides by the first pixel: infinite where that is zero."""

    def forward(self, x):
        return x / x[:, :1, :1, :1]


class Windows(nn.Module):
    """Two windows of each sample, one after the other, as window attention has them."""

    def __init__(self):
        super().__init__()
        self.inner = Break()

    def forward(self, x):
        windows = x.reshape(len(x) * 2, 1, *x.shape[2:-1], -1)
        return self.inner(windows).reshape(x.shape)


def small_task(*layers):
    network = nn.Sequential(*layers, nn.Conv2d(1, 2, 1))
    network.size_multiple = 1
    return SegmentationTask(
        network, nn.CrossEntropyLoss(), torch.optim.SGD, None,
        preprocessing=Preprocessing("paper", 4), class_names=("background", "heart"),
    )  # fmt: skip


def small_batch():
    image = torch.rand(3, 1, 4, 4) + 1
    image[1, 0, 0, 0] = 0
    return {
        "image": image, "label": torch.zeros(3, 4, 4, dtype=torch.long), "step": 0,
        "position": torch.arange(3), "case": ["a", "b", "c"], "slice": [5, 6, 7],
    }  # fmt: skip


def test_the_innermost_module_and_the_samples_are_named():
    found = diagnose(small_task(nn.Identity(), Windows()), [small_batch()])
    assert (found.name, found.kind, found.samples) == ("network.1.inner", "Break", ("b slice 6",))


def test_the_loss_is_a_module_too_and_finite_outputs_leave_the_backward_pass():
    task = small_task(nn.ReLU())
    assert diagnose(task, [small_batch()]).place == "backward"
    batch = {**small_batch(), "label": torch.full((3, 4, 4), -100)}  # all ignored: 0 / 0
    assert diagnose(task, [batch]).name == "loss"


class Own(Method):
    """A method whose own term is not a number, although the outputs are finite."""

    def terms(self, step):
        logits = step.logits(self.network)
        return {"supervised": step.supervised(logits), "own": logits.sum() * math.inf * 0}


def test_a_term_of_a_method_is_named():
    task = small_task()
    task.method = Own([task.network])
    found = diagnose(task, [small_batch()])
    assert (found.place, found.name) == ("term", "own")
    assert "every module is finite, but the term own of the method's loss is not" in (
        found.sentence([])
    )


def test_ruined_weights_are_named_before_anything_else():
    task = small_task(Break())
    with torch.no_grad():
        task.network[1].bias[0] = math.inf
    found = diagnose(task, [small_batch()])
    assert (found.place, found.name) == ("weights", "network.1.bias")
    assert "were not finite before: network.1.bias" in found.sentence([])


def test_norms_are_those_of_the_gradients():
    task = small_task()
    task.training_loss(small_batch()).backward()
    norms = {row["parameter"]: float(row["norm"]) for row in gradient_norms(task)}
    for name, parameter in task.network.named_parameters(prefix="network"):
        assert norms[name] == pytest.approx(float(parameter.grad.norm()), rel=1e-3)


# ---- one step late

LATE = "callbacks.nonfinite.late=true"


def norms_kept(run):
    return json.loads((run.path / "nonfinite.json").read_text())


@pytest.mark.parametrize(
    "words", [["optim=sgd"], ["optim=adamw"], ["trainer.accumulate_grad_batches=2"]], ids=str
)
def test_a_late_look_trains_the_same_bit_for_bit(words, small_run, tmp_path):
    words = [*small_run, *WORDS, *words]
    now, late = (
        Trained([*words, look, f"outputs={tmp_path / look[-4:]}"])
        for look in ("callbacks.nonfinite.late=false", LATE)
    )
    assert now.error is late.error is None
    assert_same(now.state, late.state)


@pytest.mark.parametrize(
    ("step", "words"),  # before a validation, a save, and the last step
    [(2, ["optim=sgd"]), (3, ["trainer.accumulate_grad_batches=2"]), (5, ["optim=sgd"])],
    ids=str,
)
def test_a_late_look_ends_with_the_same_state_files_and_message(words, step, small_run, tmp_path):
    words = [*small_run, *WORDS, *words, "data.val_every=3", "callbacks.checkpoint.every=2"]
    now, late = (
        Trained([*words, look, f"outputs={tmp_path / look[-4:]}"], poisoned(step))
        for look in ("callbacks.nonfinite.late=false", LATE)
    )
    assert f"step {step}" in str(late.error)
    assert str(late.error).replace(str(late.path), "") == str(now.error).replace(str(now.path), "")
    assert_same(now.state, late.state)  # running statistics and the optimizer's too
    assert norms_kept(now) == norms_kept(late)
    with np.load(now.path / "nonfinite.npz") as one, np.load(late.path / "nonfinite.npz") as other:
        assert all(np.array_equal(one[key], other[key], equal_nan=one[key].dtype.kind == "f")
                   for key in one)  # fmt: skip
    saved = [sorted(path.name for path in (run.path / "checkpoints").iterdir())
             for run in (now, late)]  # fmt: skip
    assert saved[0] == saved[1]


def test_a_late_look_finds_a_gradient_alone_and_lets_a_huge_one_pass(small_run, tmp_path):
    run = Trained([*small_run, *WORDS, LATE], overflowing(2))
    assert "step 2: the gradient is not finite" in str(run.error)
    assert norms_kept(run)["gradient_norms"][0]["nonfinite"]

    def huge(patch):  # each number is finite, their norm is not
        whole = NonFinite.on_before_optimizer_step

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 2:
                for parameter in pl_module.network.parameters():
                    parameter.grad.fill_(1e30)
            whole(self, trainer, pl_module, optimizer)

        patch.setattr(NonFinite, "on_before_optimizer_step", on_before_optimizer_step)

    words = [*small_run, *WORDS, LATE, f"outputs={tmp_path / 'huge'}", "data.steps=3"]
    assert Trained([*words, "data.val_every=3"], huge).error is None


def test_what_a_late_look_needs_is_said(small_run):
    for words, says in (
        ([SKIP], "on_nonfinite=skip"),
        (["optim.optimizer.fused=false"], "fused"),
        (["trainer.gradient_clip_val=1"], "gradient_clip_val"),
    ):
        assert says in str(Trained([*small_run, *WORDS, LATE, *words]).error)
