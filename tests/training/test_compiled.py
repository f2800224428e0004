"""trainer.compile: the same training, other speed; without a compiler the training as it is."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from mambaseg.app.devices import no_compile
from mambaseg.training.compiled import Compiled
from runs import built, composed, trained

TINY = ("model=mamba_unet", "model.depths=[1,1]", "model.embed_dim=8", "trainer=cpu", "test=false")


class StopBefore(Callback):
    """Ends a training before its step 2, as Ctrl+C does."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 2:
            raise KeyboardInterrupt


def test_a_compiled_training_is_the_same_run_and_resumes(small_run, tmp_path, monkeypatch):
    words = (*small_run, *TINY)
    plain = trained(*words)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    words = (*words, "trainer.compile=true", f"outputs={tmp_path}")
    with pytest.raises(SystemExit), built(*words) as run:
        run.trainer.callbacks.append(StopBefore())
        run.fit()
    with built(*words) as run:
        assert (run.key, run.step, run.config["trainer"]["compile"]) == (plain.key, 2, True)
        run.fit()
        assert not isinstance(run.task._compiled.pass_of(run.task.network), partial)
    states = [
        torch.load(one.folder.path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for one in (plain, run)
    ]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_what_cannot_be_compiled_trains_as_it_is(monkeypatch, caplog):
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))

    def failing(forward, **_):
        def call(image):
            forward(image)
            raise torch._dynamo.exc.TorchDynamoException("it cannot\nbecause ...")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    compiled = Compiled([network])
    for count in (1, 2):
        compiled.pass_of(network)(torch.rand(2, 1, 4, 4))
        assert network[1].num_batches_tracked == count
    assert "Sequential cannot be compiled, so the training runs without (it cannot)" in caplog.text
    assert compiled.pass_of(network) is network and compiled.pass_of(len) is len


def test_without_a_compiler_or_with_graphs_the_reason_is_told(monkeypatch):
    cfg = composed("model=unet", "trainer=cpu", "trainer.compile=true")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    assert "needs a C++ compiler" in no_compile(cfg, "cpu")
    cfg.trainer.graph = True
    assert "trainer.graph=true" in no_compile(cfg, "cuda")
