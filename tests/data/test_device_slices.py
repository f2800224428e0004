"""Slices in the device's memory: the same batches, bit for bit, as through the loader."""

from functools import partial

import lightning as L
import pytest
import torch
from fake_cases import find_fakes, write_cases
from test_datamodule import (
    as_rank,
    assert_same,
    module_on,
    read_two_channels,
    training_batches,
)

from mambaseg.data import slices as slices_module
from mambaseg.data.batches import Draw
from mambaseg.data.slices import DeviceSlices
from mambaseg.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("fakes") / "data"
    write_cases(root, patients=10)
    return root


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"augmentation": "none"},
        {"preprocessing": "modern", "augmentation": "modern"},
        {"accumulate": 2},
        {"in_channels": 2, "find_cases": partial(find_fakes, reader=read_two_channels)},
        {"num_workers": 1},
    ],
)
def test_batches_are_equal_bit_for_bit(root, options):
    expected = training_batches(module_on(root, on_device=False, **options))
    module = module_on(root, on_device=True, **options)
    assert_same(training_batches(module), expected)
    # and they were gathered: no pixel goes through the loader
    assert "image" not in next(iter(module.train_dataloader()))


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_and_resumed_trainings_get_the_same_too(root, rank):
    one, other = (
        as_rank(module_on(root, on_device=choice), rank, 2, step=3) for choice in (False, True)
    )
    expected = training_batches(one)
    assert expected[0]["step"] == 3
    assert_same(training_batches(other), expected)


def test_what_is_beyond_a_slice_is_zero_and_no_slice_is_mixed_up(root):
    module = module_on(root)
    module.load()
    slices, _ = module.training_data()
    kept = DeviceSlices(slices, torch.device("cpu"))
    shapes = torch.tensor([slices[Draw(i, 0, i)]["shape"] for i in range(len(slices))])
    padded = tuple(shapes.amax(0).tolist())
    assert len(shapes.unique(dim=0)) > 3  # slices of several sizes in one batch
    image, label = kept.gather(torch.arange(len(slices)), shapes, padded)
    for i, (height, width) in enumerate(shapes.tolist()):
        item = slices[Draw(i, 0, i)]
        assert (image[i, :, :height, :width].numpy() == item["image"]).all()
        assert (label[i, :height, :width].numpy() == item["label"]).all()
        assert not image[i, :, height:].any() and not image[i, :, :, width:].any()
        assert not label[i, height:].any() and not label[i, :, width:].any()
    assert DeviceSlices.size(slices) == 4 * (kept.image.numel() - 1) + kept.label.numel() - 1


def test_auto_wants_a_gpu_with_room(root, monkeypatch):
    module = module_on(root)
    module.load()
    slices, _ = module.training_data()
    assert not DeviceSlices.fit(slices, torch.device("cpu"))
    needed = DeviceSlices.size(slices)
    for free, wanted in ((needed / slices_module.SHARE + 1, True), (needed, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2 * free))
        assert DeviceSlices.fit(slices, torch.device("cuda")) is wanted


def test_the_memory_is_given_back_when_the_training_is_over(root):
    class Task(L.LightningModule):
        seen = None

        def training_step(self, batch, batch_index):
            self.seen = batch["image"].shape
            return self.weight.sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    task = Task()
    task.weight = torch.nn.Parameter(torch.zeros(1))
    module = module_on(root, on_device=True, steps=2)
    L.Trainer(
        accelerator="cpu", max_steps=2, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, val_check_interval=2, check_val_every_n_epoch=None,
    ).fit(task, datamodule=module)  # fmt: skip
    assert task.seen == (8, 1, 32, 32)
    assert module._device_slices is None


def test_another_value_is_a_clear_error(root):
    with pytest.raises(UserError, match=r"data\.on_device=maybe"):
        module_on(root, on_device="maybe")
