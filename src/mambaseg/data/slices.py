"""Slices for training, whole cases for evaluation, and which slices make up which step."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from mambaseg.data.augmentation import Augmentation
from mambaseg.data.case import Case
from mambaseg.data.counter import ORDER, draws
from mambaseg.data.volume_cache import VolumeCache
from mambaseg.errors import UserError


class Draw(NamedTuple):
    """One sample of one training step."""

    item: int  # number of the slice in the data set
    step: int  # optimizer step, from 0
    position: int  # in the global batch of that step, 0..batch_size-1


class SliceDataset(Dataset[dict[str, Any]]):
    """All slices of some cases, at native size.

    An item is `image` (C, H, W) float32, `label` (H, W) uint8, `shape` (H, W), `pixel` (its height
    and width in mm, or None), `case` (id) and `slice` (number from 0); one asked for by a `Draw`
    carries its `step` and `position` too.

    Args:
        cache: Of the cases.
        cases: Ids.
        arrays: False gives `item` (the number of the slice) in place of image and label, for
            `DeviceSlices` to find them.
    """

    def __init__(self, cache: VolumeCache, cases: Sequence[str], *, arrays: bool = True) -> None:
        self.cache, self.arrays = cache, arrays
        if not cases:
            raise UserError("there is no case to train on")
        numbers = [cache.position(case) for case in cases]
        depths = [cache.entries[number].shape[0] for number in numbers]
        self.case_numbers = np.repeat(numbers, depths)
        self.slice_numbers = np.concatenate([np.arange(depth) for depth in depths])

    def __len__(self) -> int:
        return len(self.case_numbers)

    def __getitem__(self, key: int | Draw) -> dict[str, Any]:
        index = key.item if isinstance(key, Draw) else key
        number, z = int(self.case_numbers[index]), int(self.slice_numbers[index])
        entry = self.cache.entries[number]
        item: dict[str, Any] = {
            "shape": entry.shape[2:], "pixel": entry.pixel, "case": entry.case, "slice": z
        }  # fmt: skip
        if self.arrays:
            item |= {"image": self.cache.image(number)[z], "label": self.cache.label(number)[z]}
        else:
            item["item"] = index
        return (
            item | {"step": key.step, "position": key.position} if isinstance(key, Draw) else item
        )


class CaseDataset(Dataset[dict[str, Any]]):
    """Whole cases at native size.

    An item is `case` (the `Case`), `image` (Z, C, H, W) float32, intensity-scaled, `label`
    (Z, H, W) uint8 and `spacing` in mm (z, y, x) or None.
    """

    def __init__(self, cache: VolumeCache, cases: Sequence[Case]) -> None:
        self.cache, self.cases = cache, list(cases)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> dict[str, Any]:
        case = self.cases[index]
        number = self.cache.position(case.id)
        return {
            "case": case,
            "image": torch.from_numpy(self.cache.image(number).copy()),
            "label": torch.from_numpy(self.cache.label(number).copy()),
            "spacing": self.cache.entries[number].spacing,
        }


class StepSampler(Sampler[list[Draw]]):
    """Which slices make up each training step: a pure function of (seed, step).

    The global order is one endless row of epochs, each a permutation keyed by (seed, epoch); step
    s takes the next `batch_size` of it. Ranks take consecutive equal parts of that batch, and
    micro-batches consecutive equal parts of a rank's part, so W devices and A micro-batches see
    together what one device sees at once.

    Difference to the original code, which ends each epoch with a short batch (16 of 24 slices on
    the SSL4MIS split): here a batch may span two epochs, so that all of them are full.

    Args:
        length: Number of slices.
        batch_size: Slices per optimizer step, over all ranks and micro-batches.
        steps: Optimizer steps of the whole training.
        seed: Seed of the run.
        rank: This process.
        world_size: Number of processes.
        accumulate: Micro-batches per optimizer step and process.
        start_step: Step to begin with, after a resume. The length stays that of the whole
            training, because Lightning goes on counting where the checkpoint stopped.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        steps: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        start_step: int = 0,
    ) -> None:
        if length < 1:
            raise UserError("there is no slice to train on")
        if batch_size < 1 or batch_size % (world_size * accumulate):
            raise UserError(
                f"batch_size={batch_size} is the global batch and must be a multiple of devices × "
                f"accumulate = {world_size} × {accumulate}: change one of the three"
            )
        self.length, self.batch_size, self.steps, self.seed = length, batch_size, steps, seed
        self.rank, self.accumulate, self.start_step = rank, accumulate, start_step
        self.micro_batch_size = batch_size // (world_size * accumulate)
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def __len__(self) -> int:
        """Return the number of micro-batches of the whole training, on this rank."""
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yield this rank's micro-batches, step after step."""
        size = self.micro_batch_size
        first = self.rank * self.accumulate * size
        for step in range(self.start_step, self.steps):
            batch = self.batch(step)
            for start in range(first, first + self.accumulate * size, size):
                yield batch[start : start + size]

    def batch(self, step: int) -> list[Draw]:
        """Return the global batch of a step."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [
            Draw(int(self._permutation(place // self.length)[place % self.length]), step, position)
            for position, place in enumerate(places)
        ]

    def _permute(self, epoch: int) -> NDArray[np.int64]:
        raw = draws(self.seed, ORDER, step=epoch, count=self.length)
        return np.argsort(raw, kind="stable")


class Collate:
    """Makes a training batch of slices, still at native size, with its augmentation drawn.

    NumPy only: it runs in forked worker processes.
    """

    def __init__(self, augmentation: Augmentation) -> None:
        self.augmentation = augmentation

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Join the items of one (part of a) step.

        Returns:
            `image` (B, C, H, W) float32 and `label` (B, H, W) uint8, padded with zeros at the
            bottom and right to the largest slice; `shape` (B, 2): their true sizes; `augmentation`
            (B, 11): what `Augmentation` is to do; `step` (int) and `position` (B,): the places in
            the global batch; `case` (list of ids) and `slice` (list of numbers). Of items without
            arrays, `item` (B,) and `padded` (the size of the padded batch) in place of both.
        """
        shapes = np.array([item["shape"] for item in items])
        step = items[0]["step"]
        positions = [item["position"] for item in items]
        pixels = [item["pixel"] for item in items]
        return {
            **(_padded(items, shapes) if "image" in items[0] else _numbered(items, shapes)),
            "shape": torch.from_numpy(shapes),
            "augmentation": torch.from_numpy(
                self.augmentation.draw(step, positions, shapes, pixels)
            ),
            "step": step,
            "position": torch.tensor(positions),
            "case": [item["case"] for item in items],
            "slice": [item["slice"] for item in items],
        }


def _padded(items: Sequence[dict[str, Any]], shapes: NDArray[np.int64]) -> dict[str, Any]:
    height, width = shapes.max(axis=0)
    images = np.zeros((len(items), len(items[0]["image"]), height, width), np.float32)
    labels = np.zeros((len(items), height, width), np.uint8)
    for i, (item, (rows, columns)) in enumerate(zip(items, shapes, strict=True)):
        images[i, :, :rows, :columns] = item["image"]
        labels[i, :rows, :columns] = item["label"]
    return {"image": torch.from_numpy(images), "label": torch.from_numpy(labels)}


def _numbered(items: Sequence[dict[str, Any]], shapes: NDArray[np.int64]) -> dict[str, Any]:
    numbers = torch.tensor([item["item"] for item in items])
    return {"item": numbers, "padded": tuple(map(int, shapes.max(axis=0)))}
