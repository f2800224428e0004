"""How long the parts of a training take."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback


class Clock(Callback):
    """Notes seconds: of each optimizer step with the making of its batch, and of validations.

    Attributes:
        steps: from the end of a step to the end of the next one; none across a validation.
        validations: from begin to end.
    """

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.validations: list[float] = []
        self._ended: float | None = None
        self._step, self._begun = 0, 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Notes a step when its last micro-batch has ended."""
        if trainer.global_step == self._step:
            return
        now, self._step = time.perf_counter(), trainer.global_step
        if self._ended is not None:
            self.steps.append(now - self._ended)
        self._ended = now

    def on_validation_start(self, *_: Any) -> None:
        """Begins to count."""
        self._begun, self._ended = time.perf_counter(), None

    def on_validation_end(self, *_: Any) -> None:
        """Notes the validation."""
        self.validations.append(time.perf_counter() - self._begun)


def seconds_on(device: torch.device) -> float:
    """Seconds of a clock that waits for what a GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
