"""Signals that ask a training to end: it ends between two steps, with its state saved."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from mambaseg.training.checkpoints import states_of

_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")  # Windows has two of them
_AGAIN = 1.0  # s after which a second signal is meant; wrappers forward the first one twice
log = logging.getLogger(__name__)


class Interrupted(SystemExit):
    """A signal ended the run; the exit code is 128 and its number, as in shells.

    Not an `Exception`: it ends a whole sweep, not just a job.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name

    def __str__(self) -> str:
        """The cause in run.json."""
        return f"stopped by {self.name}"


class Interruption(Callback):
    """Takes SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 during a run.

    In a training the first of them lets the step (or the validation) finish and saves the state; a
    second one, and any outside a training, ends at once. Then the handler that was there before
    gets it (submitit's queues the job again; if that returns, so does the training); without one
    the run ends with `Interrupted`. A signal that is ignored (nohup) stays so. `requeue` is called
    at the end after a SIGUSR1.
    """

    def __init__(self, requeue: Callable[[], None] | None = None) -> None:
        self._requeue = requeue
        self._before: dict[int, Any] = {}
        self._received: int | None = None
        self._at = 0.0

    def take(self) -> None:
        """Takes the signals; `give_back` is to follow."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python delivers signals to the main thread only
        for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
            before = signal.getsignal(number)
            if before not in (signal.SIG_IGN, None):
                self._before[number] = before
                signal.signal(number, self._end)

    def give_back(self) -> None:
        """Restores the earlier handlers."""
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Waits for ends of steps from now on, instead of Lightning, which does not save."""
        for number in self._before:
            signal.signal(number, self._note)  # Lightning restores `_end` when the fit is over

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ends the training if it was asked to, on all ranks at the same step."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._obey(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Likewise after the last step."""
        self._obey(trainer)

    def obey_late(self, trainer: L.Trainer) -> None:
        """Likewise after the fit: a signal came while Lightning put the saved training away."""
        self._obey(trainer, save=False)

    def _obey(self, trainer: L.Trainer, *, save: bool = True) -> None:
        asked = self._received is not None
        if not trainer.strategy.reduce_boolean_decision(asked, all=False):
            return
        states = states_of(trainer)
        if states and trainer.global_step:
            if save:
                states.save(trainer)
            log.warning("Stopped and saved at step %d. Run the same command to resume.",
                        trainer.global_step)  # fmt: skip
        number, self._received = self._received, None
        self._end(signal.SIGTERM if number is None else number, None)  # None: another rank has it

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Handler during a training."""
        if self._received is not None and time.monotonic() - self._at > _AGAIN:
            self._end(number, frame)
        elif self._received is None:
            self._received, self._at = number, time.monotonic()
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            log.warning("%s: finishing and saving the current step. Press Ctrl-C again (or repeat "
                        "the signal) to quit now without saving.", name)  # fmt: skip

    def _end(self, number: int, frame: FrameType | None) -> None:
        """Handler outside a training."""
        if self._requeue and number == getattr(signal, "SIGUSR1", None):
            self._requeue()
        before = self._before.get(number)
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)
            return
        raise Interrupted(number)
