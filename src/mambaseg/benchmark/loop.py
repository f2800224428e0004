"""What the loop adds to a step: a training's own pace, and in between the same step alone."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from torch import nn

from mambaseg.benchmark.measure import Call
from mambaseg.evaluation.costs import seconds_on

EVERY, ALONE = 12, 3  # steps of the loop between two measurements, and steps in one of these
StepOf = Callable[[nn.Module, Mapping[str, Any]], Call]  # a network and a batch -> its bare step


class Paces(L.Callback):
    """Times the steps of a training and, taking turns with them, bare steps on a batch of it.

    A step of the loop is all between the ends of two batches: the next batch is prepared, dropout
    is drawn, the step is checked and logged. A bare step is forward, loss, backward and optimizer
    of a copy of the network. Both end when the device has finished.
    """

    def __init__(self, step_of: StepOf) -> None:
        self.step_of, self.loop, self.bare = step_of, list[float](), list[float]()
        self._ended: float | None = None
        self._step: Call | None = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes a step; now and then measures bare ones, which no step of the loop includes."""
        now = seconds_on(pl_module.device)
        if self._ended is not None:
            self.loop.append(now - self._ended)
        self._ended = now
        if batch_idx % EVERY == EVERY - 1:
            if self._step is None:
                self._step = self.step_of(copy.deepcopy(pl_module.network), batch)
                self._step()
            for _ in range(ALONE):
                start = seconds_on(pl_module.device)
                self._step()
                self.bare.append(seconds_on(pl_module.device) - start)
            self._ended = None

    def row(self, network: str) -> dict[str, Any]:
        """The medians in seconds, and the share that the loop adds."""
        loop, bare = statistics.median(self.loop), statistics.median(self.bare)
        return {"network": network, "loop_s": loop, "bare_s": bare, "added": loop / bare - 1,
                "steps": len(self.loop)}  # fmt: skip
