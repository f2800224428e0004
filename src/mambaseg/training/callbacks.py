"""What a run leaves behind: scores, figures and media, written by callbacks that `build` makes."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, RichProgressBar

from mambaseg.errors import optional
from mambaseg.evaluation.costs import count_operations, peak, start_peak
from mambaseg.storage.run_folder import RunFolder, file_name
from mambaseg.training.wandb_logger import log_cases_to_wandb

PACE = 50
"""Optimizer steps of a window over which the training's pace is measured."""
log = logging.getLogger(__name__)


class ProgressBar(RichProgressBar):
    """Lightning's progress bar without the loggers' version numbers.

    What stands behind the bar is read from the device once a second at most: each reading waits for
    the step to end.
    """

    _seen: dict[str, Any] | None = None
    _read = 0.0

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """What stands behind the bar."""
        if self._seen is None or not trainer.training or time.monotonic() - self._read > 1.0:
            metrics = super().get_metrics(trainer, pl_module)
            self._seen = {name: value for name, value in metrics.items() if name != "v_num"}
            self._read = time.monotonic()
        return dict(self._seen)


class RunRecorder(Callback):
    """Writes the run's results: cases.csv, metrics.json, overlays.npz, figures, and W&B's copy.

    Args:
        folder: the run folder.
        title: said in every figure and table, e.g. `synthetic phantom, not ACDC`.
        views: of the task (`mambaseg.reporting.views`).
        header: plain data that stands at the head of metrics.json (split, notes, preprocessing).
    """

    def __init__(
        self, folder: RunFolder, *, title: str, header: dict[str, Any], views: Any
    ) -> None:
        self.folder, self.title, self.header, self.views = folder, title, header, views
        self.figures: list[Path] = []
        self._cases: dict[str, dict[str, Any]] = {}
        self._started = 0.0
        self._validating = 0.0  # s so far, or the moment before it where one goes on
        self._paces: list[float] = []  # s per step
        self._window: float | None = None  # when the one that goes on began

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock; a resumed training adds to the time that its record has."""
        record = self.folder.record
        self._started = time.monotonic() - record.get("fit_seconds", 0.0)
        self._validating = record.get("cost", {}).get("validation_seconds") or 0.0
        self._paces, self._window = [], None
        start_peak(pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Measures the pace between the saves and validations, which come with whole windows.

        Nothing waits for the device: over many steps its pace is that of the loop.
        """
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        place = trainer.global_step % PACE
        if place == 1:
            self._window = time.monotonic()
        elif place == 0 and self._window is not None:
            self._paces.append((time.monotonic() - self._window) / (PACE - 1))
            self._window = None

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Records the time of a training that a signal has stopped: it goes on from there."""
        if isinstance(exception, SystemExit) and trainer.training and trainer.is_global_zero:
            self._beat(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the validation's clock when the steps before it are done; no window spans it."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._window = None
        self._validating -= time.monotonic()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Records the time and that the last checkpoint is the true last state."""
        if trainer.is_global_zero:
            self._beat(trainer)
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            cost = {
                **self.folder.record.get("cost", {}),
                "peak_memory_bytes": peak(pl_module.device),
                "images_per_step": data.batch_size,
            }
            self.folder.update(cost=cost)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Says the score in the log, where a progress bar leaves nothing."""
        self._validating += time.monotonic()
        score = trainer.callback_metrics.get(pl_module.monitor)
        if score is not None and not trainer.sanity_checking:
            step, name = trainer.global_step, pl_module.monitor
            log.info("step %d: %s %.4f", step, name, float(score))
            if trainer.is_global_zero:
                self._beat(trainer)

    def _beat(self, trainer: L.Trainer) -> None:
        seconds = round(time.monotonic() - self._started, 1)
        spent = {"validation_seconds": round(self._validating, 1)}
        if self._paces:
            spent["step_seconds"] = statistics.median(self._paces)
        cost = {**self.folder.record.get("cost", {}), **spent}
        self.folder.beat(steps=trainer.global_step, fit_seconds=seconds, cost=cost)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps what may be shown of a case."""
        self._cases[batch["case"].id] = self.views.keep(batch, outputs)

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Writes everything the test part gave."""
        results = pl_module.results
        if trainer.is_global_zero:
            self.folder.write_rows("cases.csv", results["rows"])
            self.folder.write_json("metrics.json", {**self.header, **results["summary"]})
        overlays = self._gather_overlays()
        chosen = self._shown(results["rows"])
        kept = _of_all_ranks({c: self._cases[c] for c in chosen.values() if c in self._cases})
        if trainer.is_global_zero:
            # the result is there: nothing that only shows it may turn it into a failure
            with optional("overlays.npz"):
                if overlays:
                    self.folder.write_arrays("overlays.npz", overlays)
            with optional("counting the network's operations"):
                self._record_cost(trainer, pl_module)
            with optional("drawing the figures"):
                self.figures = [
                    self._draw(place, case, kept[case]) for place, case in chosen.items()
                ]
            with optional("sending the cases to W&B"):
                shown = {
                    place: {"case": case, **self.views.media(kept[case])}
                    for place, case in chosen.items()
                }
                log_cases_to_wandb(trainer.loggers, results, shown, title=self.title)
        self._cases.clear()

    def _record_cost(self, trainer: L.Trainer, task: Any) -> None:
        """Adds what the network costs per image and per case; its parameters are known before."""
        shape = list(trainer.datamodule.image_shape)  # type: ignore[attr-defined]
        like = next(task.network.parameters(), torch.zeros(()))
        counted = count_operations(task.network, like.new_zeros(1, *shape))
        cost = {
            **self.folder.record.get("cost", {}),
            "image": shape,
            "macs": counted["layer_macs"] + counted["other_macs"],
            "scan_flops": counted["scan_flops"],
            "seconds_per_case": task.results.get("seconds_per_case"),
        }
        self.folder.update(cost=cost)

    def _gather_overlays(self) -> dict[str, np.ndarray]:
        """Slices of the cases of all ranks; every rank has to call this."""
        cases = _of_all_ranks({case: kept["overlay"] for case, kept in self._cases.items()})
        return {
            f"{case}/{name}": array
            for case, arrays in sorted(cases.items())
            for name, array in arrays.items()
        }

    def _shown(self, rows: Sequence[dict[str, Any]]) -> dict[str, str]:
        """Best, median and worst of the cases of all ranks, by their rows."""
        ranking = self.views.ranking(rows)
        ranked = sorted(ranking, key=lambda case: (ranking[case], case))
        if not ranked:
            return {}
        return {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}

    def _draw(self, place: str, case: str, kept: dict[str, Any]) -> Path:
        title = f"{case} ({place} of the test part) · {self.title}"
        path = self.folder.path / "figures" / f"{place}_{file_name(case)}.png"
        return self.views.draw(kept, title=title, path=path)


def _of_all_ranks(own: dict[str, Any]) -> dict[str, Any]:
    """Case -> what is kept of it, of all ranks; every rank has to call this.

    By id, as the scores: a case that a sampler handed to two ranks is kept once.
    """
    ranks: list[Any] = [own]
    if dist.is_available() and dist.is_initialized():
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
    return {case: kept for rank in ranks for case, kept in rank.items()}
