"""An average of the weights over the steps of a training, beside any method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from mambaseg.errors import UserError


class EMA(WeightAveraging):
    """Averages weights exponentially; what is validated, tested and exported is the average.

    After each optimizer step: average <- d average + (1 - d) weights, where d is min(1 - 1 / n,
    decay) at the n-th, so that the first step is copied, as `terms.Teacher` does. Running
    statistics of norms are averaged likewise. A skipped step leaves the average as it is.

    A checkpoint has the average as its `state_dict`; `current_model_state` is what training
    resumes from. `WeightAveraging` also averages what else a task holds, such as a teacher.

    Args:
        decay: d after the first steps: 0.999 looks back over about a thousand.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"callbacks.ema.decay={decay}: must be 0 or more and below 1")
        super().__init__(avg_fn=self._averaged)
        self.decay = decay

    def _averaged(self, average: Tensor, now: Tensor, count: Tensor | int) -> Tensor:
        if not average.is_floating_point():
            return now  # how many batches a norm has seen
        return average.lerp(now, 1.0 - min(self.decay, 1.0 - 1.0 / (int(count) + 1)))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Makes the average where the training will be; UserError: 16 bits cannot hold it."""
        if any(one.is_floating_point() and one.itemsize < 4 for one in pl_module.parameters()):
            raise UserError(
                "callbacks.ema: weights in 16 bits (trainer.precision=bf16-true or 16-true) cannot "
                "hold an average. Use 32-true or bf16-mixed."
            )
        self._device = trainer.strategy.root_device  # the weights get there later
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *batch: Any) -> None:
        """Takes the weights in, unless the step was skipped."""
        if pl_module.skipped:
            self._latest_update_step = trainer.global_step
        super().on_train_batch_end(trainer, pl_module, *batch)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves the weights as they are: the last state is a true one, its file has both."""


def averaging(config: Mapping[str, Any]) -> float | None:
    """The decay with which a run's weights are averaged; None: they are not."""
    callbacks = (config.get("callbacks") or {}).values()
    name = f"{EMA.__module__}.{EMA.__name__}"
    decays = [one.get("decay", 0.999) for one in callbacks if one and one.get("_target_") == name]
    return decays[0] if decays else None
