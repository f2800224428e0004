"""On a Mac: what `auto` chooses, and no float64 where the GPU has none. Simulated on the CPU."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mambaseg.app.devices import device_type
from mambaseg.data import sampling
from mambaseg.errors import UserError
from runs import built
from small_networks import SMALL

APPLE = "lightning.fabric.accelerators.mps.MPSAccelerator.is_available"


@pytest.fixture
def mac(monkeypatch):
    """Lightning and PyTorch find a GPU of Apple, and none of NVIDIA."""
    monkeypatch.setattr(APPLE, staticmethod(lambda: True))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(("trainer", "device", "backend"), [
    ("auto", "mps", "torch"), ("gpu", "mps", "torch"), ("cpu", "cpu", "numba"),
])  # fmt: skip
def test_on_a_mac_the_scan_runs_where_the_trainer_runs(mac, small_run, trainer, device, backend):
    run = built(*small_run, "model=mamba_unet", f"trainer={trainer}")
    assert run.config["model"]["scan_backend"] == backend
    assert run.config["trainer"]["precision"] == "32-true"
    assert device_type(run.config["trainer"]["accelerator"]) == device


def test_a_named_backend_that_cannot_run_on_a_mac_is_refused(mac, small_run):
    with pytest.raises(UserError, match="it runs on cpu but the tensors are on mps"):
        built(*small_run, "model=mamba_unet", "model.scan_backend=numba")


def test_without_a_mac_the_choice_is_as_before(small_run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = built(*small_run, "model=mamba_unet")
    assert run.config["model"]["scan_backend"] == "numba"
    with pytest.raises(UserError, match="no GPU of Apple"):
        built(*small_run, "trainer.accelerator=mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [device_type(name) for name in ("auto", "gpu", "cuda", "cpu")] == [
        "cuda", "cuda", "cuda", "cpu"
    ]  # fmt: skip


@pytest.mark.parametrize("accelerator", ["auto", "gpu"])
def test_the_choice_is_lightnings(mac, accelerator):
    from lightning.pytorch.trainer.connectors import accelerator_connector as lightning

    connector = lightning._AcceleratorConnector
    chosen = {"auto": connector._choose_auto_accelerator,
              "gpu": connector._choose_gpu_accelerator_backend}[accelerator]()  # fmt: skip
    assert device_type(accelerator) == chosen == "mps"


class WithoutFloat64(TorchDispatchMode):
    """Refuses float64 as an Apple GPU does; numbers on the CPU may be wide while `free`."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64 and value.ndim:
                raise TypeError(f"MPS has no float64: {function}")
        return result


def as_on_mps(batch):
    """What `transfer_batch_to_device` makes of a batch's numbers."""
    return {
        key: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else
        value
        for key, value in batch.items()
    }  # fmt: skip


@pytest.mark.parametrize(("model", "preprocessing"), [
    ("unet", "paper"), ("mamba_unet", "modern"), ("swin_unet", "native"),
])  # fmt: skip
def test_training_and_scoring_use_no_float64_on_the_device(
    small_run, model, preprocessing, monkeypatch
):
    small = [f"model.{key}={value}" for key, value in SMALL[model].items()]
    words = [f"model={model}", *small, "trainer=cpu", "augmentation=modern"]
    words += ["model.scan_backend=torch"] if "mamba" in model else []
    words.append(f"data.preprocessing={preprocessing}")
    with built(*small_run, *words) as run:
        run.data.trainer = run.trainer
        batch = next(iter(run.data.train_dataloader()))
        case = next(iter(run.data.val_dataloader()))
        for name in ("sampling", "augmentation", "geometry"):
            monkeypatch.setattr(f"mambaseg.data.{name}.precision", lambda device: torch.float32)
        assert sampling.precision(torch.device("cpu")) == torch.float32
        # what is dropped is drawn on the CPU, in float64, and only then goes to the device
        monkeypatch.setattr("mambaseg.training.task.drawing", lambda *_: contextlib.nullcontext())
        batch, case = as_on_mps(batch), as_on_mps(case)
        with WithoutFloat64():
            batch = run.data.on_after_batch_transfer(batch, 0)
            run.task.training_loss(batch).backward()
            case = run.data.on_after_batch_transfer(case, 0)
            run.task.eval()
            labels = run.task.predict(case, run.task.network)
            run.task.score(case, labels, run.task.scores["val"])


def test_scores_of_restored_images_are_those_of_the_cpu(monkeypatch):
    """They are computed in float64, so not on such a GPU."""
    from types import SimpleNamespace

    from mambaseg.restoration.scores import image_scores

    clear, noise = torch.rand(1, 3, 40, 40), torch.rand(1, 3, 40, 40)
    image = (0.9 * clear + 0.1 * noise).clamp(0, 1)
    expected = image_scores(image, clear)

    class OnApple:
        """A tensor that is there: only its way to the CPU is open."""

        def __init__(self, tensor):
            self.tensor, self.device = tensor, SimpleNamespace(type="mps")

        def cpu(self):
            return self.tensor

    assert image_scores(OnApple(image), OnApple(clear)) == expected
