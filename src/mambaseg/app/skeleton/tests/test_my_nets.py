"""The network gives logits for every pixel, and trains as its config describes it."""

from pathlib import Path

import torch

import mambaseg
from my_nets import TinyNet

CONFIGS = Path(__file__).parents[1] / "conf"


def test_every_pixel_gets_a_logit_per_class():
    logits = TinyNet(in_channels=1, num_classes=4)(torch.rand(2, 1, 32, 48))
    assert logits.shape == (2, 4, 32, 48)


def test_two_steps_of_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # data and outputs go there
    run = mambaseg.train(
        "experiment=first", "data.prepare.patients=8", "data.size=32", "data.batch_size=2",
        "data.steps=2", "data.val_every=1", "trainer=cpu", "logger=csv", config_dir=CONFIGS,
    )  # fmt: skip
    assert run.scores.mean is not None and 0 <= run.scores.mean <= 1  # Dice
