"""What all data modules share: batches that are a function of seed and step, and their loaders."""

import signal
import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mambaseg.data.batches import Draw, Required, StepSampler, TwoStreams, share_of
from mambaseg.data.seen import Known
from mambaseg.data.sizes import Size, sides_of
from mambaseg.data.splits import Split
from mambaseg.errors import UserError

Batch = dict[str, Any]
_GRACE = 60  # s from a SIGTERM to the end of a worker whose parent has not ended it


class StepDataModule(L.LightningDataModule):
    """Batches of optimizer steps for training, one case at a time for evaluation.

    The whole training is one epoch of Lightning: `steps * accumulate` micro-batches. The loader
    starts at the trainer's optimizer step, and what a step holds is a function of (seed, step), so
    a checkpoint needs no state from here; it must be made at the end of an optimizer step. The
    trainer needs `max_steps=steps`, `accumulate_grad_batches=accumulate`,
    `val_check_interval=val_every * accumulate`, `check_val_every_n_epoch=None` and
    `use_distributed_sampler=False` (the samplers here know the ranks).

    Worker processes only read and copy with NumPy. On Linux they are forked: joblib's processes
    know no other way to start them, and fork is safe here because no worker ever enters an OpenMP
    region or touches a GPU.

    A data module adds `load`, `known`, `training_data`, `evaluation_data` and, where more than
    `image` goes to the device, `transferred`.
    """

    split: Split  # who is in which set; after `load`, like the next one
    fingerprint: str  # of what the files hold
    scored: str = ""  # of what those of the cases hold that are scored; empty: not told
    images: str = ""  # of what the images of all patients of the split show; empty: not told
    labelled: tuple[str, ...] | None = None  # after `load`: whose labels train, if not everybody's
    views: str | None = None  # made alike by training, see `Augmentation`; None: unknown

    def __init__(
        self,
        *,
        name: str = "data",
        in_channels: int = 1,
        size: Size = 224,  # of what the network sees in training
        batch_size: int = 24,  # samples per optimizer step, over all devices and micro-batches
        steps: int = 10_000,  # optimizer steps of the whole training
        val_every: int = 200,  # optimizer steps between validations
        num_workers: int = 0,  # worker processes per loader
        accumulate: int = 1,  # micro-batches per optimizer step
        seed: int = 1337,  # of the order and of the augmentation
        unlabelled: bool = False,  # a batch is a labelled and an unlabelled half; the method's wish
    ) -> None:
        super().__init__()
        counts = {"data.steps": steps, "data.val_every": val_every, "data.batch_size": batch_size}
        for key, value in {**counts, "trainer.accumulate_grad_batches": accumulate}.items():
            if value < 1:
                raise UserError(f"{key}={value}: at least 1 is needed")
        self.name, self.in_channels, self.size = name, in_channels, size
        self.batch_size, self.accumulate, self.seed = batch_size, accumulate, seed
        self.steps, self.val_every, self.num_workers = steps, val_every, num_workers
        self.unlabelled = unlabelled

    @abstractmethod
    def load(self) -> None:
        """Find and split the data; later calls do nothing."""

    @property
    @abstractmethod
    def counts(self) -> dict[str, dict[str, int]]:
        """What the parts hold."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The way from a file to the network as plain data: `name`, `size`, ..."""

    @abstractmethod
    def known(self, part: str) -> list[Known]:
        """The cases of a part, each with the fingerprints by which it is recognised."""

    def for_task(self) -> dict[str, Any]:
        """What a task must know of the data, as keyword arguments."""
        return {}

    @abstractmethod
    def training_data(self) -> tuple[Dataset[Any], Callable[[Sequence[Any]], Batch]]:
        """The training samples, asked for by `Draw`, and what makes a batch of them."""

    def required(self, dataset: Dataset[Any]) -> Required | None:
        """Samples that every batch must have."""
        return None

    @abstractmethod
    def evaluation_data(self, part: str) -> Dataset[Any]:
        """The cases of a part."""

    def transferred(self, batch: Batch) -> Sequence[str]:
        """Keys of the tensors that the device needs."""
        return ("image",)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a training image."""
        return self.in_channels, *sides_of(self.size)

    def train_dataloader(self) -> "StepLoader":
        """Return this rank's micro-batches from the trainer's optimizer step on."""
        self.load()
        if self.trainer and self.trainer.accumulate_grad_batches != self.accumulate:
            raise UserError(
                f"the trainer accumulates {self.trainer.accumulate_grad_batches} micro-batches per "
                f"step, the data are cut into {self.accumulate}: give both the same number"
            )
        dataset, collate = self.training_data()
        rank, world_size = self._rank()
        length = len(dataset)  # type: ignore[arg-type]  # torch leaves the length to its subclasses
        options: dict[str, Any] = {
            "batch_size": self.batch_size,
            "steps": self.steps,
            "seed": self.seed,
            "rank": rank,
            "world_size": world_size,
            "accumulate": self.accumulate,
            "start_step": self.trainer.global_step if self.trainer else 0,
            "required": self.required(dataset),
        }
        sampler: Sampler[list[Draw]] = StepSampler(length, **options)
        if self.unlabelled:
            labelled = dataset.labelled  # type: ignore[attr-defined]  # has what this asks for
            sampler = TwoStreams(length, labelled=labelled, **options)
        return StepLoader(
            dataset, batch_sampler=sampler, collate_fn=collate, **self._process_options()
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return this rank's validation cases, one per batch."""
        return self._case_loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return this rank's test cases, one per batch."""
        return self._case_loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the validation cases again, on which post-processing is chosen."""
        return self._case_loader("val")

    def _case_loader(self, part: str) -> DataLoader[Batch]:
        self.load()
        dataset = self.evaluation_data(part)
        rank, world_size = self._rank()
        own = share_of(rank, len(dataset), world_size)  # type: ignore[arg-type]  # as above
        options = self._process_options()
        return DataLoader(dataset, batch_size=None, sampler=own, collate_fn=_as_it_is, **options)

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Move what the device needs; the rest stays where it is."""
        batch = dict(batch)
        for key in self.transferred(batch):
            value: torch.Tensor = batch[key]
            if device.type == "mps" and value.dtype == torch.float64:
                value = value.float()  # MPS has no float64
            batch[key] = value.to(device, non_blocking=True)
        return batch

    def _rank(self) -> tuple[int, int]:
        """Return this process's rank and the number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _process_options(self) -> dict[str, Any]:
        on_cuda = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        # A generator of their own: a loader draws a seed, and networks may draw from torch's.
        generator = torch.Generator().manual_seed(self.seed)
        options: dict[str, Any] = {"num_workers": self.num_workers, "pin_memory": on_cuda}
        if self.num_workers:
            options["persistent_workers"] = True
            options["worker_init_fn"] = _leave_signals_to_the_parent
            options["multiprocessing_context"] = "fork" if sys.platform == "linux" else None
        return {**options, "generator": generator}


class StepLoader(DataLoader[Batch]):
    """A loader that Lightning may resume in mid-epoch: its sampler starts at the trainer's step.

    Lightning warns of other samples after a resume unless a loader keeps a state; this needs none.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: there is no state beyond the trainer's step."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""


def _leave_signals_to_the_parent(worker: int) -> None:
    """Let a worker outlive the signals that ask a run to end: its parent still finishes the step.

    They reach all processes of a terminal or of a cluster's job. SIGTERM is obeyed late, because
    the parent's own way to end a worker is the same signal.
    """
    for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_GRACE))


def _as_it_is(item: Any) -> Any:
    """Collate nothing: one case is one batch (torch's own conversion makes lists of tuples)."""
    return item
