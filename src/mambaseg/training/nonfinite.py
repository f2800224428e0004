"""Ends a training at the first loss or gradient that is not finite, or skips that step."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor
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
from mambaseg.training.methods.method import Method
from mambaseg.training.ranks import gathered, several_processes

log = logging.getLogger(__name__)


class NonFiniteError(UserError):
    """A loss or gradient was not finite; the message says where it began and what to try."""


@dataclass
class _Step:
    """An optimizer step, and all that explains it."""

    number: int
    buffers: list[Tensor]  # running statistics before it
    batches: list[dict[str, Any]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    gradients: dict[torch.nn.Parameter, Tensor] = field(default_factory=dict)
    bad: Tensor | None = None  # the answer of a device; on the CPU once `known` has happened
    known: torch.cuda.Event | None = None


class NonFinite(Callback):
    """Looks at the loss and the gradient of each optimizer step before it is taken.

    All devices decide alike. A bad step leaves weights, optimizer state and running statistics as
    they were before it.

    Reading the answer from the device makes a GPU wait. With `late` the optimizer's own kernels
    read it on the device, where a bad step changes nothing, and it is read here one step later,
    before the next step, a save or a validation: with the same state, files and message.

    With float16 an infinite gradient is usual in the first steps and lowers the scale of the loss;
    such a step (finite loss) is skipped whatever `on_nonfinite` says.

    Args:
        folder: the run folder.
        on_nonfinite: `stop`: the run ends as failed, with `nonfinite.npz` (the step's augmented
            batch) and `nonfinite.json` (what was found) in its folder. `skip`: the step changes
            nothing, but counts: step number, learning-rate schedule and order of the data advance
            as if it had been taken. Skipped steps are listed in run.json and counted in the curve
            `train/skipped`, and both follow the checkpoint when a run is resumed.
        most_in_a_row: with so many skipped steps in a row the run ends all the same.
        late: read one step late; needs `stop`, one process, a fused optimizer, and neither loss
            scaling nor gradient clipping nor a method that does something after each step. `auto`:
            on a CUDA device where all of this is so.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        most_in_a_row: int = 10,
        late: bool | Literal["auto"] = "auto",
    ) -> None:
        self.folder = RunFolder(folder)
        self.on_nonfinite, self.most_in_a_row, self.late = on_nonfinite, most_in_a_row, late
        self.skipped: list[dict[str, Any]] = []
        self._in_a_row = 0
        self._buffers: list[Tensor] = []  # running statistics
        self._step: _Step | None = None  # the current one
        self._asked: _Step | None = None  # the one before, whose answer is still on its way

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the steps skipped so far."""
        return {"skipped": list(self.skipped), "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the count of the checkpoint."""
        self.skipped, self._in_a_row = list(state_dict["skipped"]), state_dict["in_a_row"]

    # ---- Lightning's hooks

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Finds the running statistics, which the forward pass changes already."""
        self._buffers = []
        for module in (pl_module.network, pl_module.method):
            kept = module.state_dict().keys()
            self._buffers += [buffer for name, buffer in module.named_buffers() if name in kept]
        self._step = self._asked = None
        if self.late is True and (why := self._not_late(trainer, pl_module)):
            raise UserError(f"callbacks.nonfinite.late=true: not {why}")
        if trainer.is_global_zero and self.folder.record.get("skipped", []) != self.skipped:
            self.folder.update(skipped=self.skipped)  # without those after the checkpoint

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the micro-batch until its step is over."""
        if self._step is None:
            self._step = _Step(trainer.global_step, [buffer.clone() for buffer in self._buffers])
        self._step.batches.append(batch)

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        """Keeps the loss of the micro-batch, on its device.

        A late answer comes now at the latest, while the forward pass runs: the gradients that it
        is about are not to be held beside those of the next backward pass.
        """
        self._settle(trainer, pl_module)
        assert self._step is not None  # a batch has started
        self._step.losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        """Lets the step pass, takes its gradients away, or raises a NonFiniteError."""
        step, self._step = self._step, None
        assert step is not None
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        step.gradients = {p: p.grad for p in parameters if p.grad is not None}
        bad = _is_bad(step)
        on_cuda = bad.device.type == "cuda"
        late = self.late
        if late == "auto":
            late = on_cuda and not self._not_late(trainer, pl_module)
        if late:
            self._ask(step, bad, optimizer, graph=pl_module.graph)
        elif not bad:
            self._in_a_row = 0
        else:
            found = self._found(trainer, step)
            only_scale = found["loss_finite"] and _loss_scaler(trainer) is not None
            skip = self.on_nonfinite == "skip" or only_scale
            if not skip or self._in_a_row >= self.most_in_a_row:
                raise self._explained(trainer, pl_module, step, found)
            optimizer.zero_grad(set_to_none=True)  # it then changes nothing, not even its state
            pl_module.skipped = True
            self._note_skipped(trainer, found)

    # ---- one step late

    def _not_late(self, trainer: L.Trainer, task: Any) -> str:
        """What forbids it; empty: nothing."""
        if self.on_nonfinite != "stop":
            return "with on_nonfinite=skip"
        if several_processes() or _loss_scaler(trainer) is not None:
            return "with several processes or float16"
        if trainer.gradient_clip_val:
            return "with trainer.gradient_clip_val"
        if type(task.method).after is not Method.after:
            return "with a method that follows its steps"
        fused = all(rule.defaults.get("fused") for rule in trainer.optimizers)
        return "" if fused else "without optim.optimizer.fused=true"

    def _ask(
        self, step: _Step, bad: Tensor, optimizer: torch.optim.Optimizer, *, graph: bool
    ) -> None:
        """Lets the optimizer's kernels leave a bad step; the answer comes to `_settle`."""
        if graph:  # the next launch writes there
            step.gradients = {p: gradient.clone() for p, gradient in step.gradients.items()}
        optimizer.found_inf = bad  # type: ignore[attr-defined]  # as torch.amp.GradScaler does
        step.bad = bad
        if bad.device.type == "cuda":
            step.bad = torch.empty_like(bad, device="cpu", pin_memory=True)
            step.bad.copy_(bad, non_blocking=True)
            step.known = torch.cuda.Event()
            step.known.record()
        self._asked = step

    def _settle(self, trainer: L.Trainer, pl_module: Any, *_: Any, **__: Any) -> None:
        """Reads the answer about the last step; nothing has changed the weights since."""
        step, self._asked = self._asked, None
        if step is None:
            return
        if step.known is not None:
            step.known.synchronize()
        if step.bad:
            for parameter in pl_module.parameters():
                parameter.grad = step.gradients.get(parameter)
            raise self._explained(trainer, pl_module, step, self._found(trainer, step))

    # before anything is scored or written, and at the end
    on_validation_start = on_save_checkpoint = on_train_end = _settle

    # ---- what follows

    def _found(self, trainer: L.Trainer, step: _Step) -> dict[str, Any]:
        """What is not finite over all devices, for nonfinite.json; the step counts as a bad one."""
        self._restore_buffers(step)
        self._in_a_row += 1
        scaler = _loss_scaler(trainer)
        factor = trainer.accumulate_grad_batches / (scaler.get_scale() if scaler else 1.0)
        own = {
            "losses": [float(loss) * factor for loss in step.losses],
            "cases": [name for batch in step.batches for name in names_of_samples(batch)],
            "finite": [bool(gradient.isfinite().all()) for gradient in step.gradients.values()],
        }
        ranks = gathered(own)
        losses, cases, finite = ([one for rank in ranks for one in rank[key]] for key in own)
        return {
            "step": step.number,
            "losses": [f"{loss:.6g}" for loss in losses],
            "cases": cases,
            "loss_finite": all(map(math.isfinite, losses)),
            "gradient_finite": all(finite),
        }

    def _restore_buffers(self, step: _Step) -> None:
        for buffer, before in zip(self._buffers, step.buffers, strict=True):
            buffer.copy_(before)

    def _note_skipped(self, trainer: L.Trainer, found: dict[str, Any]) -> None:
        self.skipped.append({key: found[key] for key in ("step", "losses", "cases")})
        count = len(self.skipped)
        log.warning("step %d skipped: %s, in the batch %s; %d skipped so far",
                    found["step"], _what(found), ", ".join(found["cases"]), count)  # fmt: skip
        for logger in trainer.loggers:
            logger.log_metrics({"train/skipped": float(count)}, step=found["step"])
        if trainer.is_global_zero:
            self.folder.update(skipped=self.skipped)

    def _explained(
        self, trainer: L.Trainer, task: Any, step: _Step, found: dict[str, Any]
    ) -> NonFiniteError:
        """Records what was found: every rank its batch, the first one the rest."""
        ending = f"-rank{trainer.global_rank}" if several_processes() else ""
        batch = self.folder.write_arrays(f"nonfinite{ending}.npz", step_arrays(step.batches))
        with trainer.precision_plugin.train_step_context(), task.module_by_module():
            mine = diagnose(task, step.batches)
        self._restore_buffers(step)  # the diagnosis has run the network again
        ranks: list[Finding] = gathered(mine)
        norms, skipped = gradient_norms(task), self._in_a_row - 1
        if trainer.is_global_zero:
            found = {**found, "skipped_in_a_row": skipped}
            record = {"ranks": [one._asdict() for one in ranks], "gradient_norms": norms}
            self.folder.write_json("nonfinite.json", {**found, **record})
        if several_processes():
            dist.barrier()  # nobody ends the others while they write
        began = min(ranks, key=lambda finding: finding.order)
        last = self.folder.last_checkpoint
        again = f"The same command resumes from {last}." if last else "There is no checkpoint yet."
        tries = ["a lower rate (optim.optimizer.lr)"]
        if trainer.precision != "32-true":
            tries.append("trainer.precision=32-true")
        if self.on_nonfinite == "stop":
            tries.append("callbacks.nonfinite.on_nonfinite=skip")
        return NonFiniteError(
            f"step {step.number}{f', after {skipped} skipped in a row' if skipped else ''}: "
            f"{_what(found)}. The step was not taken. {began.sentence(norms)}\n"
            f"The augmented batch is in {batch}, the gradient norms are in "
            f"{self.folder.path / 'nonfinite.json'}. {again}\n"
            f"Try {', '.join(tries)}; look at "
            f"{' and '.join(began.samples[:3] or found['cases'][:3])}."
        )


def _is_bad(step: _Step) -> Tensor:
    """1.0 where a loss or a gradient is not finite, else 0.0; one answer for all devices."""
    # not the Euclidean norm: a sum of squares of finite numbers may overflow
    gradients = list(step.gradients.values())
    if step.losses[0].device.type == "cuda":
        largest = [get_total_norm(gradients, math.inf)]
    else:  # a tenth of the time
        largest = [end for one in gradients if one.numel() for end in one.aminmax()]
    finite = torch.stack([value.isfinite() for value in (*step.losses, *largest)]).all()
    bad = (~finite).float()
    if several_processes():
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return bad


def _what(found: dict[str, Any]) -> str:
    losses = ", ".join(found["losses"])
    if found["loss_finite"]:
        return f"the gradient is not finite (loss {losses})"
    return f"the loss is not finite ({losses})"


def _loss_scaler(trainer: L.Trainer) -> Any:
    """What scales the loss with float16; None with other precisions."""
    return getattr(trainer.precision_plugin, "scaler", None)
