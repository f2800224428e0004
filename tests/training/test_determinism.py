"""`trainer.deterministic=true`: PyTorch refuses what does not repeat its bits; for one run only."""

import pytest
import torch

from mambaseg.errors import UserError
from mambaseg.training.segmentation import SegmentationTask
from runs import built

TINY = {
    "unet": ["model=unet", "model.widths=[4,4,4,4,4]"],
    "swin_unet": ["model=swin_unet", "model.embed_dim=24", "model.depths=[1,1,1,1]"],
    "mamba_unet": ["model=mamba_unet", "model.embed_dim=16", "model.depths=[1,1,1,1]"],
}


@pytest.mark.parametrize("network", TINY)
def test_the_networks_train_under_the_switch_and_it_ends_with_the_run(
    network, small_run, monkeypatch
):
    seen = []
    step = SegmentationTask.training_step

    def training_step(self, batch, index):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return step(self, batch, index)

    monkeypatch.setattr(SegmentationTask, "training_step", training_step)
    words = [*TINY[network], *small_run, "data.steps=1", "rerun=true", "test=false"]
    paths = set()
    for switch in ("true", "false"):
        with built(*words, f"trainer.deterministic={switch}") as run:
            run.fit()
        paths.add(run.folder.path)
    assert seen == [True, False] and len(paths) == 1


def test_a_scan_that_cannot_keep_the_promise_is_refused(small_run, monkeypatch):
    monkeypatch.setattr("mambaseg.scan.choose_backend", lambda *_: "mamba_ssm")
    with pytest.raises(UserError, match=r"mamba_ssm.*scan_backend=triton"):
        built("model=mamba_unet", *small_run, "trainer.deterministic=true")
