"""Ends a training at the first loss or gradient that is not finite, or steps over that step.

Either way the step is not taken: weights, optimizer state and running statistics stay as they were
before it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from mambaseg.errors import UserError
from mambaseg.storage.run_folder import RunFolder
from mambaseg.training.diagnosis import (
    Finding,
    diagnose,
    gradient_norms,
    names_of_samples,
    step_arrays,
)

log = logging.getLogger(__name__)


class NonFiniteError(UserError):
    """A loss or gradient was not finite; the message says where it began and what to try."""


@dataclass(frozen=True)
class _Pending:
    """A step whose answer is still on its way from the device, and all that explains it."""

    step: int
    batches: list[dict[str, Any]]
    losses: list[Tensor]
    before: list[Tensor]
    gradients: list[tuple[nn.Parameter, Tensor]]
    bad: Tensor  # on the CPU, once `known` has come to pass
    known: torch.cuda.Event | None


class NonFinite(Callback):
    """Looks at the loss and the gradient of each optimizer step before it is taken.

    All devices decide alike. One number per step is read back from the device, after the backward
    pass: without it the step would be taken before anybody knows, and neither the weights nor the
    module where it began could be had any more.

    Waiting for that number costs a GPU the time in which nothing is queued for it. With `late` the
    optimizer's own kernels read it on the device, where a bad step changes nothing, and it is read
    here one step later, before the next step is taken and before anything is saved or validated:
    the training ends with the same state, files and message.

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
        late: read one step late; needs `stop`, one process, a fused optimizer, and neither loss
            scaling nor gradient clipping. `auto`: on a CUDA device where all of this is so.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        most_in_a_row: int = 10,
        late: bool | Literal["auto"] = "auto",
    ) -> None:
        if on_nonfinite not in ("stop", "skip"):
            raise UserError(
                f"callbacks.nonfinite.on_nonfinite={on_nonfinite!r}: choose stop or skip"
            )
        if most_in_a_row < 1:
            raise UserError(f"callbacks.nonfinite.most_in_a_row={most_in_a_row}: at least 1")
        if late not in (True, False, "auto"):
            raise UserError(f"callbacks.nonfinite.late={late!r}: choose auto, true or false")
        self.late = late
        self._pending: _Pending | None = None
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
        self._pending = None
        if self.late is True and (why := self._not_late(trainer)):
            raise UserError(f"callbacks.nonfinite.late=true: not {why}")
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
        on_cuda = pl_module.device.type == "cuda"
        if self.late is True or (self.late == "auto" and on_cuda and not self._not_late(trainer)):
            self._settle(trainer, pl_module)
            self._ask(trainer, optimizer)
            return
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

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Settles the last step before anything is scored."""
        self._settle(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Likewise before anything is written."""
        self._settle(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Likewise at the end."""
        self._settle(trainer, pl_module)

    # ---- one step late

    def _not_late(self, trainer: L.Trainer) -> str:
        """What forbids it, in words; empty where nothing does."""
        if self.on_nonfinite != "stop":
            return "with on_nonfinite=skip"
        if _several_processes() or _loss_scaler(trainer) is not None:
            return "with several processes or float16"
        if trainer.gradient_clip_val:
            return "with trainer.gradient_clip_val"
        fused = all(rule.defaults.get("fused") for rule in trainer.optimizers)
        return "" if fused else "without optim.optimizer.fused=true"

    def _ask(self, trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Lets the optimizer's kernels leave a bad step, and asks whether it was one."""
        gradients = [(p, p.grad) for group in optimizer.param_groups for p in group["params"]
                     if p.grad is not None]  # fmt: skip
        if trainer.lightning_module.graph:  # the next launch writes there
            gradients = [(parameter, gradient.clone()) for parameter, gradient in gradients]
        tensors = [gradient for _, gradient in gradients]
        # not finite: the largest is infinite, or a sum of squares, which may overflow, is NaN
        largest, norm = get_total_norm(tensors, math.inf), get_total_norm(tensors)
        finite = torch.stack([value.isfinite() for value in (*self._losses, largest)])
        bad = (~finite.all() | norm.isnan()).float()
        optimizer.found_inf = bad  # type: ignore[attr-defined]  # as torch.amp.GradScaler does
        host, known = bad, None
        if bad.device.type == "cuda":
            host = torch.empty_like(bad, device="cpu", pin_memory=True)
            host.copy_(bad, non_blocking=True)
            known = torch.cuda.Event()
            known.record()
        self._pending = _Pending(
            trainer.global_step, self._batches, self._losses, self._before, gradients, host, known
        )
        self._batches, self._losses = [], []

    def _settle(self, trainer: L.Trainer, task: Any) -> None:
        """Reads the answer about the last step; nothing has changed the weights since.

        Raises:
            NonFiniteError: it was a bad one.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.known is not None:
            pending.known.synchronize()
        if not pending.bad:
            return
        task.network.zero_grad(set_to_none=True)
        for parameter, gradient in pending.gradients:
            parameter.grad = gradient
        self._batches, self._losses = pending.batches, pending.losses
        self._before = pending.before
        found = self._confirm(trainer, trainer.optimizers[0], step=pending.step)
        assert found is not None  # the device has looked at the same numbers
        self._restore_buffers()
        self._in_a_row += 1
        raise self._explained(trainer, task, found)

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
        self, trainer: L.Trainer, optimizer: torch.optim.Optimizer, *, step: int | None = None
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
            "step": trainer.global_step if step is None else step,
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
        with trainer.precision_plugin.train_step_context(), task.module_by_module():
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
