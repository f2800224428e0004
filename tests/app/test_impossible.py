"""Values that no optimizer, trainer or machine can have: a line that names the key."""

import os

import pytest

from mambaseg.app.entry import explained_errors
from mambaseg.data.validation import checked_label_map
from mambaseg.errors import UserError
from runs import UNET, built

NESTEROV = "+optim.optimizer.nesterov=true"


@pytest.mark.parametrize("words", [
    [NESTEROV, "optim.optimizer.momentum=0"],
    ["optim=adamw", "+optim.optimizer.betas=[2,3]"],
    ["optim=adamw", "+optim.optimizer.eps=-1"],
])  # fmt: skip
def test_a_number_that_an_optimizer_refuses_is_told_with_its_key(words, small_run):
    run = built(*UNET, *small_run, "trainer=cpu", *words)
    with run, pytest.raises(UserError, match=r"^optim\.optimizer: "):
        run.task.configure_optimizers()


@pytest.mark.parametrize("devices", ["0", "-1", "[0]"])
def test_devices_that_a_cpu_does_not_have_are_refused_before_data_are_read(devices, small_run):
    with pytest.raises(UserError, match=r"^trainer\.devices=.* such as trainer\.devices=1$"):
        built(*UNET, *small_run, "trainer=cpu", f"trainer.devices={devices}", "data.root=/nowhere")


@pytest.mark.parametrize(("word", "why"), [
    ("data.size=1000000", r"its size \(1 to 8192 pixels\)"),
    ("data.neighbours=1000", r"its neighbours \(1 to 64 slices\)"),
])  # fmt: skip
def test_a_run_whose_checkpoints_nothing_could_read_is_refused(word, why, small_run):
    run = built(*UNET, *small_run, "trainer=cpu", word)
    with pytest.raises(UserError, match=f"checkpoint of this run, for {why}: give shorter"), run:
        pass


@pytest.mark.parametrize("word", ["max_time", "profiler"])
def test_a_value_that_lightning_refuses_is_told_without_its_stack_trace(word, small_run):
    run = built(*UNET, *small_run, "trainer=cpu", f"+trainer.{word}=foo")
    with pytest.raises(UserError, match=r"^trainer: .*(DD:HH:MM:SS|profiler)"), run:
        pass


@pytest.mark.parametrize(("word", "said"), [
    ("max_time=00:00:00:00", "stopped the training before its first step: nothing was learnt"),
    ("limit_val_batches=0.0001", "trainer: You requested to check 0.0001"),
])  # fmt: skip
def test_a_training_that_its_trainer_does_not_let_begin_says_so(word, said, small_run):
    run = built(*UNET, *small_run, "trainer=cpu", f"+trainer.{word}")
    with run, pytest.raises(UserError, match=said), explained_errors(UserError):
        run.fit()


@pytest.mark.parametrize("mapping", ["abc", [1, 2]])
def test_a_label_map_that_is_no_mapping_is_refused(mapping):
    with pytest.raises(UserError, match=r"^data\.label_map=.*: must be a mapping, such as"):
        checked_label_map(mapping, 2)


def test_an_empty_mode_of_wandb_is_none(small_run, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "")
    built(*UNET, *small_run)
    assert "WANDB_MODE" not in os.environ
