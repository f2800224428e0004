"""The recorder of scores, figures and costs in the run folder."""

from __future__ import annotations

import logging
import statistics
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from mambaseg.errors import optional
from mambaseg.evaluation.costs import count_operations, peak, start_peak
from mambaseg.reporting.grid import duration
from mambaseg.storage.run_folder import RunFolder, file_name
from mambaseg.training.checkpoints import states_of
from mambaseg.training.progress import seconds_left
from mambaseg.training.ranks import gathered_cases
from mambaseg.training.wandb_logger import log_cases_to_wandb

PACE = 50
"""Optimizer steps of a window over which the training's pace is measured."""
FIRST = 10
"""Optimizer steps after the first one, from which a training says how long it will take."""
LONG = 2 * 3600
"""Seconds from which it also says how to take less."""
BEAT = 600
"""Seconds after which a record says again that its run is alive; `mambaseg status` waits longer."""
log = logging.getLogger(__name__)


class RunRecorder(Callback):
    """Writes the run's results: cases.csv, metrics.json, overlays.npz, figures, and W&B's copy.

    The `title` is in every figure and table, e.g. `synthetic phantom, not ACDC`; `views` are the
    task's (`mambaseg.reporting.views`).
    """

    def __init__(self, folder: RunFolder, *, title: str, views: Any) -> None:
        self.folder, self.title, self.views = folder, title, views
        self.header: dict[str, Any] = {}  # plain data at the head of metrics.json
        self._cases: dict[str, dict[str, Any]] = {}
        self._beaten = time.monotonic()  # when the record said last that the run is alive
        self._started = 0.0
        self._begun, self._done = 0.0, 0  # when this session began, and the step it began with
        self._stepped = False  # this session has taken a step, so that its memory is a training's
        self.validating = 0.0  # s so far; during a validation minus the moment of its start
        self.steps: list[float] = []  # s from the end of a step to that of the next; no validation
        self._ended: float | None = None  # when the last one did; None: none spans the first step
        self._gap = 0  # how many were noted before the last validation
        self._paces: list[float] = []  # s per step
        self._passes: list[int] = []  # of a slice of each case through the network

    # ---- training

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock; a resumed training adds to the time in its record."""
        record, self._stepped = self.folder.record, False
        self._started = time.monotonic() - record.get("fit_seconds", 0.0)
        self.validating = record.get("cost", {}).get("validation_seconds") or 0.0
        self.steps, self._ended, self._gap, self._paces = [], None, 0, []
        start_peak(pl_module.device)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes where this session begins: the pace of an earlier one says nothing of its own."""
        self._begun, self._done = time.monotonic(), trainer.global_step

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Records the time behind a state, from which a killed training resumes."""
        # not in the checkpoint, which is the same whatever happened on the way
        self._beat(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Measures the pace between saves and validations, without waiting for the device."""
        self._live(trainer, steps=trainer.global_step)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        now, before = time.monotonic(), self._ended
        self._ended, self._stepped = now, True
        if before is None:  # the first step pays for compilation and memory
            return
        self.steps.append(now - before)
        whole = len(self.steps) - self._gap
        if whole == len(self.steps) == FIRST:
            on_cpu = pl_module.device.type == "cpu"
            self._foretell(trainer, statistics.fmean(self.steps), on_cpu)
        if trainer.global_step % PACE == 0 and whole >= PACE - 1:
            self._paces.append(statistics.fmean(self.steps[1 - PACE :]))

    def _foretell(self, trainer: L.Trainer, pace: float, on_cpu: bool) -> None:
        """Says how long the steps will take; validations come on top."""
        steps = trainer.max_steps - trainer.global_step
        less = ". data.minutes=60 trains for an hour" if on_cpu and steps * pace > LONG else ""
        if steps:
            log.info("%.2f s a step: %s for the %d that are left%s",
                     pace, duration(steps * pace), steps, less)  # fmt: skip

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Records the time of a training that a signal has stopped, for when it is resumed."""
        if isinstance(exception, SystemExit) and trainer.training:
            self._beat(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the validation's clock when the steps before it are done; no window spans it."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._ended, self._gap = None, len(self.steps)
        self.validating -= time.monotonic()

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Says that the run is alive."""
        self._live(trainer)

    on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Logs the score and how it compares with the best, because a bar leaves nothing there."""
        self.validating += time.monotonic()
        score = trainer.callback_metrics.get(pl_module.monitor)
        if score is not None and not trainer.sanity_checking:
            left = seconds_left(trainer, self._begun, self._done)
            log.info("step %d of %d: %s %.4f%s%s", trainer.global_step, trainer.max_steps,
                     pl_module.monitor, float(score), _rank(trainer, pl_module.monitor),
                     f", {duration(left)} left" if left else "")  # fmt: skip
            self._beat(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Records time and memory of the whole training."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        cost = {"images_per_step": data.batch_size}
        if self._stepped:  # otherwise it is the memory of what loads the last state
            earlier = self.folder.record.get("cost", {}).get("peak_memory_bytes")
            cost["peak_memory_bytes"] = max(peak(pl_module.device) or 0, earlier or 0) or None
        self._beat(trainer, **cost)

    def _beat(self, trainer: L.Trainer, **cost: Any) -> None:
        if not trainer.is_global_zero:
            return
        cost["validation_seconds"] = round(self.validating, 1)
        if self._paces:
            cost["step_seconds"] = statistics.median(self._paces)
        seconds = round(time.monotonic() - self._started, 1)
        cost = {**self.folder.record.get("cost", {}), **cost}
        self.folder.beat(steps=trainer.global_step, fit_seconds=seconds, cost=cost)

    def _live(self, trainer: L.Trainer, **fields: Any) -> None:
        if time.monotonic() - self._beaten > BEAT and trainer.is_global_zero:
            self._beaten = time.monotonic()
            self.folder.beat(**fields)

    # ---- test

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any,
        batch_idx: int, dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Keeps what may be shown of a case."""
        self._live(trainer)
        self._cases[batch["case"].id] = self.views.keep(batch, outputs)
        self._passes.append(outputs.get("passes", 1))

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Writes all results of the test set; what only shows them may fail with a warning."""
        results, main = pl_module.results, trainer.is_global_zero
        if main:
            self.folder.write_rows("cases.csv", results["rows"])
            for name, rows in results.get("others", {}).items():
                self.folder.write_rows(f"cases_{file_name(name)}.csv", rows)
            self.folder.write_json("metrics.json", {**self.header, **results["summary"]})
        overlays = self._gather_overlays()
        chosen = self._shown(results["rows"])
        kept = gathered_cases({c: self._cases[c] for c in chosen.values() if c in self._cases})
        self._cases.clear()
        if not main:
            return
        with optional("overlays.npz"):
            if overlays:
                self.folder.write_arrays("overlays.npz", overlays)
        with optional("counting the network's operations"):
            self._record_cost(trainer, pl_module)
        with optional("drawing the figures"):
            for place, case in chosen.items():
                title = f"{case} ({place} of the test set) · {self.title}"
                path = self.folder.path / "figures" / f"{place}_{file_name(case)}.png"
                self.views.draw(kept[case], title=title, path=path)
        with optional("sending the cases to W&B"):
            shown = {
                place: {"case": case, **self.views.media(kept[case])}
                for place, case in chosen.items()
            }
            log_cases_to_wandb(trainer.loggers, results, shown, title=self.title)

    def _record_cost(self, trainer: L.Trainer, task: Any) -> None:
        """Adds the network's cost per image and per case; its parameters are known before."""
        shape = list(trainer.datamodule.image_shape)  # type: ignore[attr-defined]
        like = next(task.network.parameters(), torch.zeros(()))
        networks, image = task.method.networks, like.new_zeros(1, *shape)
        costs = [_cost(network, image) for network in networks]
        chosen, parameters = costs[task.chosen], _parameters(networks[task.chosen])
        passes, self._passes = self._passes, []
        cost = {
            **self.folder.record.get("cost", {}),
            "image": shape,
            "passes": statistics.fmean(passes) if passes else None,
            **chosen,
            "seconds_per_case": task.results.get("seconds_per_case"),
        }
        if (everything := _parameters(task)) != parameters:
            whole = {key: sum(one[key] for one in costs) for key in chosen}
            cost |= {"parameters": parameters, "method": {"parameters": everything, **whole}}
        self.folder.update(cost=cost)

    def _gather_overlays(self) -> dict[str, Any]:
        """Slices of the cases of all ranks; every rank has to call this."""
        cases = gathered_cases({case: kept["overlay"] for case, kept in self._cases.items()})
        return {
            f"{case}/{name}": array
            for case, arrays in sorted(cases.items())
            for name, array in arrays.items()
        }

    def _shown(self, rows: list[dict[str, Any]]) -> dict[str, str]:
        """Best, median and worst of the cases of all ranks, by their rows."""
        ranking = self.views.ranking(rows)
        ranked = sorted(ranking, key=lambda case: (ranking[case], case))
        if not ranked:
            return {}
        return {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}


def _cost(network: Any, image: torch.Tensor) -> dict[str, int]:
    """Operations of a network on an image."""
    counted = count_operations(network, image)
    macs = counted["layer_macs"] + counted["other_macs"]
    return {"macs": macs, "scan_flops": counted["scan_flops"]}


def _parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _rank(trainer: L.Trainer, monitor: str) -> str:
    """` (best)`, or which validation was better, where this score chooses the checkpoint."""
    states = states_of(trainer)
    if states is None or states.monitor != monitor:
        return ""
    if states.best_step in (None, trainer.global_step):
        return " (best)" if states.best_step else ""
    return f" (best {states.best_score:.4f} at step {states.best_step})"
