"""The progress bar: one line at the bottom of a terminal while a run trains, validates, is tested.

Log lines appear above it, because both go through rich's console. It leaves nothing behind.
"""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar as Bar
from rich import get_console
from rich.console import RenderableType
from rich.constrain import Constrain
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from mambaseg.reporting.grid import duration
from mambaseg.training.checkpoints import states_of


def seconds_left(trainer: L.Trainer, begun: float, done: int) -> float:
    """Seconds until the last step, at the mean pace since `begun`, which was at step `done`."""
    steps = trainer.global_step - done
    return (time.monotonic() - begun) / max(steps, 1) * (trainer.max_steps - trainer.global_step)


class _Line(Progress):
    """A bar with room for the `^C` that a terminal adds: on another line, it would stay there."""

    def get_renderable(self) -> RenderableType:
        """The line."""
        return Constrain(super().get_renderable(), get_console().width - 4)


class ProgressBar(Bar):
    """Steps, time left, pace, loss, and the best validation score so far.

    Nothing is drawn where the output is not a terminal, and on other ranks than the first.

    Args:
        refresh_rate: optimizer steps between two updates; 0: no bar.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__()
        self._every = refresh_rate
        self._line: Progress | None = None
        self._begun, self._done = 0.0, 0  # when this training began, and at which step
        self._read, self._loss = 0.0, ""  # a value of a GPU is waited for, so once a second

    def disable(self) -> None:
        """Draws nothing from now on, as Lightning asks for on other ranks."""
        self._every = 0

    # ---- training

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows the bar, at the step that a resumed training begins with."""
        self._begun, self._done, self._loss = time.monotonic(), trainer.global_step, ""
        self._show_steps(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Shows a finished optimizer step."""
        if self._line is None or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if trainer.global_step % self._every == 0 or trainer.global_step == trainer.max_steps:
            self._show_steps(trainer)

    def _show_steps(self, trainer: L.Trainer) -> None:
        step, steps = trainer.global_step, trainer.max_steps
        self._show(f"step {step}/{steps}", steps, step, " · ".join(self._told(trainer)))

    def _told(self, trainer: L.Trainer) -> list[str]:
        if trainer.global_step == self._done:
            return []
        left = seconds_left(trainer, self._begun, self._done)
        if time.monotonic() - self._read > 1.0:
            loss = trainer.callback_metrics.get("train/loss")
            self._read = time.monotonic()
            self._loss = "" if loss is None else f"loss {float(loss):.3f}"
        states, best = states_of(trainer), ""
        if states is not None and states.best_score is not None:
            best = f"best {states.monitor} {states.best_score:.4f}"
        return [told for told in (f"{duration(left)} left", self._loss, best) if told]

    # ---- evaluation

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows the cases of the validation in place of the steps."""
        if not trainer.sanity_checking:
            self._show_cases("validation", trainer.num_val_batches)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows the cases of the test set."""
        self._show_cases("test", trainer.num_test_batches)

    def _show_cases(self, what: str, batches: Any) -> None:
        total = int(sum(batches)) if isinstance(batches, list) else int(batches)
        self._show(what, total, told=f"{total} cases")

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        """Shows a finished case."""
        if self._line is not None:
            self._line.advance(self._line.task_ids[0])

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows the steps again."""
        if self._line is not None and trainer.state.fn == "fit":
            self._show_steps(trainer)

    # ---- the line

    def _show(self, what: str, total: int, completed: int = 0, told: str = "") -> None:
        console = get_console()
        if not self._every or not console.is_interactive:
            return
        if self._line is None:
            self._line = _Line(
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
                BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=8)),
                TextColumn("{task.fields[told]}", markup=False, table_column=Column(no_wrap=True)),
                console=console,
                transient=True,
                expand=True,
                refresh_per_second=4,
            )
            self._line.add_task(what, total=total, told=told)
            self._line.start()
        line = self._line.task_ids[0]
        self._line.update(line, description=what, total=total, completed=completed, told=told)

    def teardown(self, *_: Any, **__: Any) -> None:
        """Takes the bar away: at the end, and before anything is said about an error."""
        if self._line is not None:
            self._line.stop()
        self._line = None

    on_exception = on_test_end = teardown
