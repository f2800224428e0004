"""For `debug=overfit`: one batch again and again."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from mambaseg.data.loaders import StepLoader

ENOUGH = 0.5
"""The share of its first value below which the loss of a sound training ends."""
log = logging.getLogger(__name__)


class Overfit(Callback):
    """Trains on the images of the first step in every step, and says how far the loss has fallen.

    The images stay the same to the last pixel: their augmentation is that of the first step. All
    else goes by the true step: ramps, an encoder that waits, what is dropped.
    """

    def __init__(self) -> None:
        self._losses: list[Any] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Puts a loader of the same batch in place of the data module's."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit":
            loader = data.train_dataloader

            def repeated() -> StepLoader:
                whole = loader()
                step = list(itertools.islice(whole.batch_sampler, data.accumulate))
                batches: Any = list(itertools.chain.from_iterable([step] * data.steps))
                return StepLoader(whole.dataset, batch_sampler=batches, collate_fn=whole.collate_fn)

            data.train_dataloader = repeated

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Gives a batch, which is augmented by now, the number of its step."""
        batch["step"] = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Keeps the first loss and the last, without waiting for the device."""
        self._losses[1:] = [trainer.callback_metrics["train/loss"].detach().clone()]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says whether the batch was learnt."""
        first, last = float(self._losses[0]), float(self._losses[-1])
        log.info("overfit: loss %.4f -> %.4f in %d steps on one batch", first, last,
                 trainer.global_step)  # fmt: skip
        if not last < ENOUGH * first:
            log.warning("overfit: the loss has hardly fallen. Look at the labels (mambaseg check), "
                        "the learning rate (optim=adamw), the loss and the network, or take more "
                        "data.steps.")  # fmt: skip
