"""The callback that saves a training's state, and where a training goes on from it.

A state is saved between two optimizer steps only: when the next one begins, after everything about
the last one has been logged, validated and judged. All that Lightning counts is then a function of
the number of steps, and a resumed training is set to it (`_set_loops`) rather than to what
Lightning infers from half-counted batches: it validates and logs at the same steps.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mambaseg.errors import UserError
from mambaseg.training import checkpoint_files as files


def better(monitor: str) -> Literal["max", "min"]:
    """Which way a logged value is better: `min` for losses and distances, `max` for scores."""
    return "min" if any(word in monitor for word in ("loss", "hd95", "assd")) else "max"


class CheckedIO(TorchCheckpointIO):
    """How Lightning writes and reads checkpoints here: atomically, and never a damaged one."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Writes one; `UserError` where that fails, see `checkpoint_files.write`."""
        files.write(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Reads one.

        Raises:
            UserError: its bytes are not those that were written.
        """
        if reason := files.damage(Path(path)):
            raise UserError(
                f"checkpoint: {path} is damaged ({reason}). Put a good copy there, or train again "
                "(rerun=true)."
            )
        return super().load_checkpoint(path, *args, **kwargs)


class Checkpoints(Checkpoint):
    """Saves the state of a training: every so many steps, after each validation, and at its end.

    Args:
        folder: for the files, see `checkpoint_files`.
        monitor: the logged value that makes a state the best; nan never does.
        mode: whether more of it is better (`max`) or less (`min`); None: see `better`.
        every: optimizer steps between two states; None: only validations and the end save one.
        keep: the newest states that are kept, and the best one of each of them.

    Attributes:
        best_score: of the best validation so far; None: there was none.
        best_step: optimizer steps behind it.
        ended: the training has come to its end, which may be before its last step.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        monitor: str = "val/dice",
        mode: Literal["max", "min"] | None = None,
        every: int | None = 100,
        keep: int = 2,
    ) -> None:
        mode = better(monitor) if mode is None else mode
        if mode not in ("max", "min"):
            raise UserError(f"callbacks.checkpoint.mode={mode!r}: choose max or min")
        if every is not None and every < 1:
            raise UserError(f"callbacks.checkpoint.every={every}: at least 1, or null")
        if keep < 1:
            raise UserError(f"callbacks.checkpoint.keep={keep}: at least 1")
        self.folder = Path(folder)
        self.monitor, self.mode, self.every, self.keep = monitor, mode, every, keep
        self.best_score: float | None = None
        self.best_step: int | None = None
        self.ended = False
        self._validated = False
        self._saved = 0  # step of the newest state
        self._best_of: dict[int, int | None] = {}  # step of a state -> that of its best one
        self._generators: dict[str, Any] | None = None  # to be set at the first step

    # ---- what is saved

    @property
    def state_key(self) -> str:
        """Under which a checkpoint holds this state."""
        return files.STATE_KEY

    def state_dict(self) -> dict[str, Any]:
        """The best validation, and torch's generators for networks that draw from them."""
        generators = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            generators["cuda"] = torch.cuda.get_rng_state()
        return {
            "best_score": self.best_score,
            "best_step": self.best_step,
            "ended": self.ended,
            "generators": generators,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them up again; the generators once the loaders have drawn their seeds."""
        self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]
        self._generators = state_dict["generators"]

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Sets Lightning's counters, before it reads them."""
        step = self._saved = checkpoint["global_step"]
        if step < trainer.max_steps:
            _set_loops(checkpoint["loops"]["fit_loop"], step, trainer.accumulate_grad_batches)

    # ---- when

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves in the folder what the state refers to that the training goes on from.

        Not when the training starts: it does not where no step is left, and the process may have
        died before the last state had its names.
        """
        if self._saved and trainer.is_global_zero:
            self._arrange()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Judges the validation; its state is saved when the next step begins."""
        if trainer.sanity_checking:
            return
        self._validated = True
        if self.monitor not in trainer.callback_metrics:
            raise UserError(
                f"callbacks.checkpoint.monitor={self.monitor}: the validation logged no such "
                f"score, only {', '.join(trainer.callback_metrics)}"
            )
        score = float(trainer.callback_metrics[self.monitor])
        sign = 1 if self.mode == "max" else -1
        known = -math.inf if self.best_score is None else sign * self.best_score
        if sign * score > known:
            self.best_score, self.best_step = score, trainer.global_step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Saves the state between two steps."""
        if batch_idx % trainer.accumulate_grad_batches:
            return  # amid a step
        if self._generators:
            torch.set_rng_state(self._generators["cpu"])
            if "cuda" in self._generators and torch.cuda.is_initialized():
                torch.cuda.set_rng_state(self._generators["cuda"])
            self._generators = None
        if self._validated or (self.every and trainer.global_step % self.every == 0):
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the true last state."""
        self.ended = True
        self.save(trainer)

    # ---- how

    def save(self, trainer: L.Trainer) -> None:
        """Saves the state, between two steps; every rank has to call this."""
        step, self._validated = trainer.global_step, False
        if step == self._saved:
            return
        for logger in trainer.loggers:  # no state is on the disk before the rows that lead to it
            if hasattr(logger, "sync"):
                logger.sync()
        trainer.save_checkpoint(files.step_file(self.folder, step))
        self._saved, self._best_of[step] = step, self.best_step
        if trainer.is_global_zero:
            self._name()

    def _arrange(self) -> None:
        """Drops what came after the state that is loaded, and finds what the older ones refer to.

        The names of the loaded state and of its best one may be all that is left of them.
        """
        self._best_of = {self._saved: self.best_step}
        for step, path in files.step_files(self.folder).items():
            progress = files.read_progress(path) if step <= self._saved else None
            if progress:
                self._best_of[step] = progress.best_step
            else:
                path.unlink()
        for name, needed in (("last.ckpt", self._saved), ("best.ckpt", self.best_step)):
            if needed is not None and not files.step_file(self.folder, needed).exists():
                files.give_name(self.folder / name, files.step_file(self.folder, needed))
        self._name()

    def _name(self) -> None:
        """Gives newest and best state their names and removes those that nothing refers to."""
        if self.best_step is not None:
            files.give_name(files.step_file(self.folder, self.best_step), self.folder / "best.ckpt")
        files.give_name(files.step_file(self.folder, self._saved), self.folder / "last.ckpt")
        newest = sorted(self._best_of)[-self.keep :]
        best_ones = {best for step in newest if (best := self._best_of[step]) is not None}
        files.clear(self.folder, keep={*newest, *best_ones})
        self._best_of = {step: self._best_of[step] for step in newest}


def _set_loops(fit_loop: dict[str, Any], step: int, accumulate: int) -> None:
    """Sets what Lightning counts to what it is after the hooks of the last batch of a step.

    Lightning then counts that batch as done, a validation after it as past, and trains the next.
    """
    batches = step * accumulate
    done = {"ready": batches, "started": batches, "processed": batches, "completed": batches - 1}
    begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    for key, counts in (("epoch_progress", begun), ("epoch_loop.batch_progress", done)):
        fit_loop[key].update(total=dict(counts), current=dict(counts))
    fit_loop["epoch_loop.batch_progress"]["is_last_batch"] = False
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1
