"""Ends a training at the first loss or gradient that is not finite, or steps over that step.

Either way the step is not taken: weights, optimizer state and running statistics stay as they were
before it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.utils import get_total_norm

from mambaseg.diagnosis import Finding, diagnose, gradient_norms, names_of_samples, step_arrays
from mambaseg.errors import UserError
from mambaseg.runs import RunFolder

log = logging.getLogger(__name__)


class NonFiniteError(UserError):
    """A loss or gradient was not finite; the message says where it began and what to try."""


class NonFinite(Callback):
    """Looks at the loss and the gradient of each optimizer step before it is taken.

    All devices decide alike. One number per step is read back from the device, after the backward
    pass: without it the step would be taken before anybody knows, and neither the weights nor the
    module where it began could be had any more.

    With float16 and its loss scaling an infinite gradient is usual in the first steps and lowers
    the scale; such a step (finite loss) is stepped over whatever `on_nonfinite` says.

    Args:
        folder: the run folder.
        on_nonfinite: `stop`: the run ends as failed, with `nonfinite.npz` (the step's augmented
            batch) and `nonfinite.json` (what was found) in its folder. `skip`: the step changes
            nothing, but counts: step number, learning-rate schedule and order of the data go on as
            if it had been taken. Skipped steps are listed in run.json and counted in the curve
            `train/skipped`, and both follow the checkpoint when a run is resumed.
        most_in_a_row: with so many skipped steps in a row the run ends all the same.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        most_in_a_row: int = 10,
    ) -> None:
        if on_nonfinite not in ("stop", "skip"):
            raise UserError(
                f"callbacks.nonfinite.on_nonfinite={on_nonfinite!r}: choose stop or skip"
            )
        if most_in_a_row < 1:
            raise UserError(f"callbacks.nonfinite.most_in_a_row={most_in_a_row}: at least 1")
        self.folder = RunFolder(folder)
        self.on_nonfinite, self.most_in_a_row = on_nonfinite, most_in_a_row
        self.skipped: list[dict[str, Any]] = []
        self._in_a_row = 0
        self._batches: list[dict[str, Any]] = []  # micro-batches of the step
        self._losses: list[Tensor] = []
        self._buffers: list[Tensor] = []
        self._before: list[Tensor] = []  # the buffers at the start of the step

    # ---- Lightning's hooks

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the steps skipped so far."""
        return {"skipped": list(self.skipped), "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the count where the checkpoint was made."""
        self.skipped = list(state_dict["skipped"])
        self._in_a_row = state_dict["in_a_row"]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Finds the running statistics, which a forward pass changes before any optimizer does."""
        network = pl_module.network
        kept = network.state_dict().keys()
        self._buffers = [buffer for name, buffer in network.named_buffers() if name in kept]
        self._batches.clear()
        self._losses.clear()
        if trainer.is_global_zero and self.folder.record.get("skipped", []) != self.skipped:
            self.folder.update(skipped=self.skipped)  # without those after the checkpoint

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the micro-batch until its step is over."""
        if not self._batches:
            self._before = [buffer.clone() for buffer in self._buffers]
        self._batches.append(batch)

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        """Keeps the loss of the micro-batch, on its device."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        """Lets the step pass, takes its gradients away, or ends the training.

        Raises:
            NonFiniteError: the loss or the gradient is not finite, and the step is not skipped.
        """
        if self._looks_finite(optimizer) or (found := self._confirm(trainer, optimizer)) is None:
            self._in_a_row = 0
        else:
            self._restore_buffers()
            self._in_a_row += 1
            only_scale = found["loss_finite"] and _loss_scaler(trainer) is not None
            skip = self.on_nonfinite == "skip" or only_scale
            if not skip or self._in_a_row >= self.most_in_a_row:
                raise self._explained(trainer, pl_module, found)
            self._skip(trainer, optimizer, found)
        self._batches.clear()
        self._losses.clear()

    # ---- is it finite

    def _looks_finite(self, optimizer: torch.optim.Optimizer) -> bool:
        """One answer for all devices. The norm of finite gradients may overflow: see `_confirm`."""
        norm = get_total_norm(_gradients(optimizer))
        finite = torch.stack([value.isfinite() for value in (*self._losses, norm)]).all()
        if _several_processes():
            finite = finite.to(torch.int32)
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return bool(finite)

    def _confirm(
        self, trainer: L.Trainer, optimizer: torch.optim.Optimizer
    ) -> dict[str, Any] | None:
        """What is not finite, number by number; None: everything is."""
        scaler = _loss_scaler(trainer)
        factor = trainer.accumulate_grad_batches / (scaler.get_scale() if scaler else 1.0)
        ranks = _gathered(
            {
                "losses": [float(loss) * factor for loss in self._losses],
                "gradient_finite": all(bool(g.isfinite().all()) for g in _gradients(optimizer)),
                "cases": [name for batch in self._batches for name in names_of_samples(batch)],
            }
        )
        losses = [loss for rank in ranks for loss in rank["losses"]]
        found = {
            "step": trainer.global_step,
            "losses": [f"{loss:.6g}" for loss in losses],
            "cases": [case for rank in ranks for case in rank["cases"]],
            "loss_finite": all(map(math.isfinite, losses)),
            "gradient_finite": all(rank["gradient_finite"] for rank in ranks),
        }
        return None if found["loss_finite"] and found["gradient_finite"] else found

    # ---- what follows

    def _restore_buffers(self) -> None:
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(before)

    def _skip(
        self, trainer: L.Trainer, optimizer: torch.optim.Optimizer, found: Mapping[str, Any]
    ) -> None:
        """Leaves the optimizer no gradient: it then changes neither weights nor its own state."""
        optimizer.zero_grad(set_to_none=True)
        self.skipped.append({key: found[key] for key in ("step", "losses", "cases")})
        batch, count = ", ".join(found["cases"]), len(self.skipped)
        log.warning("step %d skipped: %s, in the batch %s; %d skipped so far",
                    found["step"], _what(found), batch, count)  # fmt: skip
        for logger in trainer.loggers:
            logger.log_metrics({"train/skipped": float(count)}, step=found["step"])
        if trainer.is_global_zero:
            self.folder.update(skipped=self.skipped)

    def _explained(self, trainer: L.Trainer, task: Any, found: Mapping[str, Any]) -> NonFiniteError:
        """Writes down what was found; every rank its batch, the first one the rest."""
        ending = f"-rank{trainer.global_rank}" if _several_processes() else ""
        arrays = f"nonfinite{ending}.npz"
        self.folder.write_arrays(arrays, step_arrays(self._batches))
        with trainer.precision_plugin.train_step_context():
            mine = diagnose(task, self._batches)
        self._restore_buffers()  # the diagnosis has run the network again
        ranks: list[Finding] = _gathered(mine)
        norms = gradient_norms(task)
        began = min(ranks, key=lambda finding: finding.order)
        if trainer.is_global_zero:
            self.folder.write_json(
                "nonfinite.json",
                {
                    **found,
                    "skipped_in_a_row": self._in_a_row - 1,
                    "ranks": [finding.as_dict() for finding in ranks],
                    "gradient_norms": norms,
                },
            )
        if _several_processes():
            dist.barrier()  # nobody ends the others while they write
        return NonFiniteError(self._message(trainer, found, began, norms, arrays))

    def _message(
        self,
        trainer: L.Trainer,
        found: Mapping[str, Any],
        began: Finding,
        norms: list[dict[str, Any]],
        arrays: str,
    ) -> str:
        last = self.folder.last_checkpoint
        again = f"The same command goes on from {last}." if last else "There is no checkpoint yet."
        row = f", after {self._in_a_row - 1} skipped in a row" if self._in_a_row > 1 else ""
        tries = ["a lower rate (optim.optimizer.lr)"]
        if trainer.precision != "32-true":
            tries.append("trainer.precision=32-true")
        if self.on_nonfinite == "stop":
            tries.append("callbacks.nonfinite.on_nonfinite=skip")
        look = " and ".join(began.samples[:3] or found["cases"][:3])
        return (
            f"step {found['step']}{row}: {_what(found)}. The step was not taken. "
            f"{began.sentence(norms)}\n"
            f"The augmented batch is in {self.folder.path / arrays}, the gradient norms are in "
            f"{self.folder.path / 'nonfinite.json'}. {again}\n"
            f"Try {', '.join(tries)}; look at {look}."
        )


def _what(found: Mapping[str, Any]) -> str:
    if not found["loss_finite"]:
        return f"the loss is not finite ({', '.join(found['losses'])})"
    return f"the gradient is not finite (loss {', '.join(found['losses'])})"


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return [p.grad for p in parameters if p.grad is not None]


def _loss_scaler(trainer: L.Trainer) -> Any:
    """What scales the loss with float16; None with other precisions."""
    return getattr(trainer.precision_plugin, "scaler", None)


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _gathered(own: Any) -> list[Any]:
    """The values of all ranks, in order; every rank has to call this."""
    ranks = [own]
    if _several_processes():
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
    return ranks
