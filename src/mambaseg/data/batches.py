"""Which samples make up which batch, for any number of processes and after any resume."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from mambaseg.data.counter import ORDER, draws
from mambaseg.errors import UserError


class Draw(NamedTuple):
    """One sample of one training step."""

    item: int  # number of the slice in the data set
    step: int  # optimizer step, from 0
    position: int  # in the global batch of that step, 0..batch_size-1
    about: tuple[int, int] | None = None  # the pixel (row, column) that it is to show


class Required(Protocol):
    """Samples that every batch must have: the last `count` ones (`data.oversampling`)."""

    def count(self, batch_size: int, step: int) -> int:
        """How many of the batch of a step; of more than one sample always as many."""

    def draw(self, step: int, position: int) -> Draw:
        """The sample at a position."""


class StepSampler(Sampler[list[Draw]]):
    """Which slices make up each training step: a pure function of (seed, step).

    The global order is one endless row of epochs, each a permutation keyed by (seed, epoch); step
    s takes the next `batch_size` of it. Ranks take consecutive equal parts of that batch, and
    micro-batches consecutive equal parts of a rank's part, so W devices and A micro-batches see
    together what one device sees at once. `required` samples take the last places of each batch.

    Difference to the original code, which ends each epoch with a short batch (16 of 24 slices on
    the SSL4MIS split): here a batch may span two epochs, so that all of them are full.

    `batch_size` counts slices over all ranks and micro-batches, `accumulate` the micro-batches of a
    step on each rank. Samplers of another `stream` draw other orders. After a resume it begins with
    `start_step`. Its length stays that of the
    whole training, because Lightning continues to count where the checkpoint stopped.
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
        stream: int = 0,
        required: Required | None = None,
    ) -> None:
        if batch_size < 1 or batch_size % (world_size * accumulate):
            raise UserError(
                f"batch_size={batch_size} is the global batch and must be a multiple of devices × "
                f"accumulate = {world_size} × {accumulate}: change one of the three"
            )
        self.length, self.batch_size, self.steps, self.seed = length, batch_size, steps, seed
        self.rank, self.accumulate, self.start_step = rank, accumulate, start_step
        self.stream, self.required = stream, required
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
        free = self.batch_size
        if self.required:
            free -= self.required.count(self.batch_size, step)
        places = range(step * free, (step + 1) * free)
        batch = [
            Draw(int(self._permutation(place // self.length)[place % self.length]), step, position)
            for position, place in enumerate(places)
        ]
        if self.required:
            rest = range(free, self.batch_size)
            batch += [self.required.draw(step, position) for position in rest]
        return batch

    def _permute(self, epoch: int) -> NDArray[np.int64]:
        raw = draws(self.seed, ORDER, step=epoch, position=self.stream, count=self.length)
        return np.argsort(raw, kind="stable")


class TwoStreams(Sampler[list[Draw]]):
    """Batches of a labelled half, which comes first, and an unlabelled one, each a `StepSampler`.

    Of `length` slices the first `labelled` have labels. Every micro-batch on every rank has both
    halves, and the two are together what one device sees at once. `batch_size` counts both.

    Difference to the published code (SSL4MIS), in which an epoch of the labelled slices ends with
    the last full half: here a half may span two epochs.
    """

    def __init__(
        self,
        length: int,
        *,
        labelled: int,
        batch_size: int,
        required: Required | None = None,  # of the labelled half
        **options: Any,
    ) -> None:
        half = batch_size // 2
        share = options.get("world_size", 1) * options.get("accumulate", 1)
        if batch_size % (2 * share):
            raise UserError(
                f"data.batch_size={batch_size}: half of it has labels and half has none, on each "
                f"device and in each micro-batch, so it must be a multiple of {2 * share}"
            )
        self.labelled, self.half = labelled, half
        self.with_labels = StepSampler(labelled, batch_size=half, required=required, **options)
        self.without = StepSampler(length - labelled, batch_size=half, stream=1, **options)

    def __len__(self) -> int:
        """Return the number of micro-batches of the whole training, on this rank."""
        return len(self.with_labels)

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yield this rank's micro-batches, step after step."""
        for known, unknown in zip(self.with_labels, self.without, strict=True):
            yield [
                *known,
                *(Draw(one.item + self.labelled, one.step, one.position + self.half)
                  for one in unknown),
            ]  # fmt: skip


def share_of(rank: int, length: int, world_size: int) -> list[int]:
    """Every `world_size`-th index, from `rank` on: each is drawn once over all ranks.

    A rank beyond the last index draws one that another rank has too, because Lightning leaves out
    the hooks of a rank without a batch, in which the others wait for it. Scores know a case by its
    id and count it once.
    """
    own = list(range(rank, length, world_size))
    return [rank % length] if length and not own else own
