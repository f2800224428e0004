"""What a run leaves behind: scores, figures and media, written by callbacks that `build` makes."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback, RichProgressBar

from mambaseg.loggers import log_cases_to_wandb
from mambaseg.runs import RunFolder

log = logging.getLogger(__name__)


class ProgressBar(RichProgressBar):
    """Lightning's progress bar without the loggers' version numbers."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """What stands behind the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num"}


class RunRecorder(Callback):
    """Writes the run's results: cases.csv, metrics.json, figures, and the same to W&B.

    Args:
        folder: the run folder.
        title: said in every figure and table, e.g. `synthetic phantom, not ACDC`.
        header: plain data that stands at the head of metrics.json (split, notes, preprocessing).
    """

    def __init__(self, folder: RunFolder, *, title: str, header: dict[str, Any]) -> None:
        self.folder, self.title, self.header = folder, title, header
        self.figures: list[Path] = []
        self._cases: dict[str, dict[str, Any]] = {}
        self._started = 0.0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._started = time.monotonic()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Records the time and that the last checkpoint is the true last state."""
        if trainer.is_global_zero:
            seconds = round(time.monotonic() - self._started, 1)
            self.folder.update(steps=trainer.global_step, fit_seconds=seconds)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says the score in the log, where a progress bar leaves nothing."""
        score = trainer.callback_metrics.get("val/dice")
        if score is not None and not trainer.sanity_checking:
            log.info("step %d: val/dice %.4f", trainer.global_step, float(score))

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps each case's label maps until it is known which ones are shown."""
        self._cases[batch["case"].id] = {
            "image": batch["image"].cpu().numpy(),
            "truth": batch["label"].cpu().numpy().astype(np.uint8),
            "prediction": outputs["prediction"].cpu().numpy(),
            "spacing": batch["spacing"],
        }

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Writes everything the test part gave."""
        results = pl_module.results
        if trainer.is_global_zero:
            self.folder.write_rows("cases.csv", results["rows"])
            self.folder.write_json("metrics.json", {**self.header, **results["summary"]})
            self.figures = self._draw(results, pl_module.class_names)
            shown = {
                place: {"case": case, **self._cases[case]}
                for place, case in self._shown(results).items()
            }
            log_cases_to_wandb(
                trainer.loggers, results, shown, title=self.title, class_names=pl_module.class_names
            )
        self._cases.clear()

    def _shown(self, results: dict[str, Any]) -> dict[str, str]:
        """Best, median and worst of this rank's cases by mean foreground Dice."""
        dice: dict[str, list[float]] = {}
        for row in results["rows"]:
            if row["class"] and row["dice"] is not None and row["case"] in self._cases:
                dice.setdefault(row["case"], []).append(float(row["dice"]))
        ranked = sorted(dice, key=lambda case: (np.mean(dice[case]), case))
        if not ranked:
            return {}
        return {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}

    def _draw(self, results: dict[str, Any], class_names: tuple[str, ...]) -> list[Path]:
        from mambaseg.reporting.figures import case_figure

        paths = []
        for place, case in self._shown(results).items():
            paths.append(
                case_figure(
                    **self._cases[case],
                    class_names=class_names,
                    title=f"{case} ({place} of the test part) · {self.title}",
                    path=self.folder.path / "figures" / f"{place}_{case}.png",
                )
            )
        return paths
