"""The data of one run: cases, split, decoded cache and loaders, for any data set with a reader."""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Sampler

from mambaseg.data.augment import Augmentation
from mambaseg.data.cache import open_cache
from mambaseg.data.case import Case
from mambaseg.data.fingerprint import fingerprint, patients_with_same_files, source_digests
from mambaseg.data.foreground import require_foreground
from mambaseg.data.geometry import Preprocessing
from mambaseg.data.slices import CaseDataset, Collate, SliceDataset, StepSampler
from mambaseg.data.splits import Split, make_split
from mambaseg.data.volume_cache import VolumeCache
from mambaseg.errors import UserError

PARTS = ("train", "val", "test")
Batch = dict[str, Any]

log = logging.getLogger(__name__)


class SegmentationDataModule(L.LightningDataModule):
    """Training batches on the network's grid, evaluation cases at native size.

    A training batch is, after the transfer to the device, `image` (B, 1, S, S) float32, `label`
    (B, S, S) int64, `case` (list of ids), `slice` (list of numbers), `step` (int) and `position`
    (B,): the places in the global batch of that step. An evaluation batch is one case: `case` (the
    `Case`), `image` (Z, H, W) float32, intensity-scaled, on the device, `label` (Z, H, W) uint8 on
    the CPU (where it is scored), `spacing` in mm (z, y, x) or None.

    The whole training is one epoch of Lightning: `steps * accumulate` micro-batches. The loader
    starts at the trainer's optimizer step, and what a step holds is a function of (seed, step), so
    a checkpoint needs no state from here; it must be made at the end of an optimizer step. The
    trainer needs `max_steps=steps`, `accumulate_grad_batches=accumulate`,
    `val_check_interval=val_every * accumulate`, `check_val_every_n_epoch=None` and
    `use_distributed_sampler=False` (the samplers here know the ranks).

    Worker processes only copy with NumPy. On Linux they are forked: joblib's processes know no
    other way to start them, and fork is safe here because no worker ever enters an OpenMP region
    or touches a GPU.

    Args:
        name: Name of the data set, for results.
        find_cases: Lists the cases of a root folder.
        root: Folder of the data set.
        prepare: Makes the data set in `root` on first use; None where it is just there.
        split: Name of the split, see `make_split`.
        fold: Fold of a cross-validation.
        split_seed: Seed of the random split; the run's seed does not change who is tested.
        preprocessing: Preset of `Preprocessing`.
        augmentation: Preset of `Augmentation`.
        size: Side S of the network's grid.
        batch_size: Slices per optimizer step, over all devices and micro-batches.
        steps: Optimizer steps of the whole training.
        val_every: Optimizer steps between validations.
        num_workers: Worker processes per loader; the cache is memory-mapped, few are enough.
        accumulate: Micro-batches per optimizer step.
        seed: Seed of the order and of the augmentation.
        class_names: One per class, background first.
        num_classes: K; labels must lie in 0..K-1.
        in_channels: Channels of an image; every reader gives one.
        cache_dir: Folder for decoded caches.
    """

    # With more devices than validation cases some have nothing to do.
    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(
        self,
        *,
        name: str,
        find_cases: Callable[[Path], list[Case]],
        root: str | Path,
        cache_dir: str | Path,
        class_names: Sequence[str],
        num_classes: int,
        prepare: Callable[[Path], object] | None = None,
        split: str = "ssl4mis",
        fold: int = 0,
        split_seed: int = 0,
        preprocessing: str = "paper",
        augmentation: str = "paper",
        size: int = 224,
        batch_size: int = 24,
        steps: int = 10_000,
        val_every: int = 200,
        num_workers: int = 0,
        accumulate: int = 1,
        seed: int = 1337,
        in_channels: int = 1,
    ) -> None:
        super().__init__()
        if len(class_names) != num_classes:
            raise UserError(
                f"data.class_names has {len(class_names)} names for num_classes={num_classes}: "
                "name every class, background first"
            )
        counts = {"steps": steps, "val_every": val_every, "batch_size": batch_size}
        for key, value in {**counts, "accumulate": accumulate}.items():
            if value < 1:
                key = "trainer.accumulate_grad_batches" if key == "accumulate" else f"data.{key}"
                raise UserError(f"{key}={value}: at least 1 is needed")
        if in_channels != 1:
            raise UserError(f"data.in_channels={in_channels}: the readers give 1 channel")
        self.name, self.root, self.cache_dir = name, Path(root), Path(cache_dir)
        self.class_names, self.num_classes, self.in_channels = class_names, num_classes, in_channels
        self.preprocessing = Preprocessing(preprocessing, size)
        self.augmentation = Augmentation(augmentation, self.preprocessing, seed)
        self.batch_size, self.accumulate, self.seed = batch_size, accumulate, seed
        self.steps, self.val_every, self.num_workers = steps, val_every, num_workers
        self._find_cases, self._prepare = find_cases, prepare
        self._split_name, self._fold, self._split_seed = split, fold, split_seed
        self._cache: VolumeCache | None = None

    # ---- once, before the trainer exists

    def load(self) -> None:
        """Find the data, split it, and open (or build) the decoded cache; later calls do nothing.

        Afterwards `split`, `fingerprint` (of the split's cases), `cases` (part -> list of `Case`)
        and `counts` are there. Cases of patients outside the split are neither read nor hashed.

        Raises:
            UserError: The data or the split cannot be used.
        """
        if self._cache is not None:
            return
        if self._prepare is not None:
            self._prepare(self.root)
        found = self._find_cases(self.root)
        patients = {case.patient for case in found}
        split = partial(
            make_split, self._split_name, patients, fold=self._fold, seed=self._split_seed
        )
        self.split: Split = split()
        members = {*self.split.train, *self.split.val, *self.split.test}
        used = sorted((c for c in found if c.patient in members), key=lambda case: case.id)
        digests = source_digests(used)
        copies = patients_with_same_files(used, digests)
        if copies:
            self.split = split(duplicates=copies)
            log.warning(
                "the same files belong to more than one patient: %s. %s",
                "; ".join(", ".join(group) for group in copies),
                self.split.note,
            )
        self.cases: Mapping[str, list[Case]] = {
            part: [case for case in used if case.patient in getattr(self.split, part)]
            for part in PARTS
        }
        self.fingerprint = fingerprint(used, digests)
        self._cache = open_cache(
            used,
            self.preprocessing,
            cache_dir=self.cache_dir,
            num_classes=self.num_classes,
            digests=digests,
        )
        for part, counts in self.counts.items():
            log.info("%s: %s", part, ", ".join(f"{n} {what}" for what, n in counts.items()))

    @property
    def cache(self) -> VolumeCache:
        """The decoded cache; loads the data if that has not been done."""
        self.load()
        assert self._cache is not None
        return self._cache

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Numbers of patients, cases and slices of each part."""
        cache = self.cache
        return {
            part: {
                "patients": len({case.patient for case in cases}),
                "cases": len(cases),
                "slices": sum(cache.entries[cache.position(case.id)].shape[0] for case in cases),
            }
            for part, cases in self.cases.items()
        }

    # ---- Lightning's hooks

    def setup(self, stage: str) -> None:
        """Load the data, if `load` was not called before, and see what the parts hold.

        Raises:
            UserError: A part that will be used has no foreground, or the training part lacks a
                class.
        """
        cache = self.cache
        used = {"fit": PARTS, "validate": ("val",), "test": ("test",)}.get(stage, ())
        require_foreground(
            {part: self.cases[part] for part in used},
            cache,
            split=self.split,
            class_names=self.class_names,
        )

    def train_dataloader(self) -> "StepLoader":
        """Return this rank's micro-batches from the trainer's optimizer step on."""
        cache = self.cache
        if self.trainer and self.trainer.accumulate_grad_batches != self.accumulate:
            raise UserError(
                f"the trainer accumulates {self.trainer.accumulate_grad_batches} micro-batches per "
                f"step, the data are cut into {self.accumulate}: give both the same number"
            )
        dataset = SliceDataset(cache, [case.id for case in self.cases["train"]])
        rank, world_size = self._rank()
        sampler = StepSampler(
            len(dataset),
            batch_size=self.batch_size,
            steps=self.steps,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            accumulate=self.accumulate,
            start_step=self.trainer.global_step if self.trainer else 0,
        )
        return StepLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=Collate(self.augmentation),
            **self._process_options(),
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return this rank's validation cases, one per batch."""
        return self._case_loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return this rank's test cases, one per batch."""
        return self._case_loader("test")

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Move what the network needs; labels of evaluation cases stay where they are scored."""
        evaluating = isinstance(batch["case"], Case)
        moved = ("image",) if evaluating else ("image", "label", "shape", "augmentation")
        batch = dict(batch)
        for key in moved:
            value: torch.Tensor = batch[key]
            if device.type == "mps" and value.dtype == torch.float64:
                value = value.float()  # MPS has no float64
            batch[key] = value.to(device, non_blocking=True)
        return batch

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment a training batch on its device and bring it onto the grid."""
        if "augmentation" not in batch:
            return batch
        rest = dict(batch)
        image, label, shape, parameters = (
            rest.pop(key) for key in ("image", "label", "shape", "augmentation")
        )
        image, label = self.augmentation(image, label, shape, parameters)
        return {"image": image, "label": label, **rest}

    # ---- loaders

    def _rank(self) -> tuple[int, int]:
        """Return this process's rank and the number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _process_options(self) -> dict[str, Any]:
        on_cuda = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        options: dict[str, Any] = {"num_workers": self.num_workers, "pin_memory": on_cuda}
        if self.num_workers:
            options["persistent_workers"] = True
            options["multiprocessing_context"] = "fork" if sys.platform == "linux" else None
        return options

    def _case_loader(self, part: str) -> DataLoader[Batch]:
        dataset = CaseDataset(self.cache, self.cases[part])
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=RankSampler(len(dataset), *self._rank()),
            collate_fn=_as_it_is,
            **self._process_options(),
        )


class StepLoader(DataLoader[Batch]):
    """A loader that Lightning may resume in mid-epoch.

    Lightning warns that training goes on with other samples unless a loader keeps its own state.
    This one needs none: its sampler starts at the trainer's step.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: there is no state beyond the trainer's step."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""


class RankSampler(Sampler[int]):
    """Every `world_size`-th index, from `rank` on: each is drawn once over all ranks, unpadded."""

    def __init__(self, length: int, rank: int = 0, world_size: int = 1) -> None:
        self._indices = range(rank, length, world_size)

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)


def _as_it_is(item: Any) -> Any:
    """Collate nothing: one case is one batch (torch's own conversion makes lists of tuples)."""
    return item
