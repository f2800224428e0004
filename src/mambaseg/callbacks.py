"""What a run leaves behind: scores, figures and media, written by callbacks that `build` makes."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, RichProgressBar

from mambaseg.costs import count_operations, peak, start_peak
from mambaseg.loggers import log_cases_to_wandb
from mambaseg.runs import RunFolder, file_name

log = logging.getLogger(__name__)


class ProgressBar(RichProgressBar):
    """Lightning's progress bar without the loggers' version numbers."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """What stands behind the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num"}


def overlay_slices(
    image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, **_: Any
) -> dict[str, np.ndarray]:
    """The slices of a case that a report shows, small enough to keep for every case.

    They stand at a quarter, half and three quarters of the slices that hold foreground in the
    truth (where it is empty: in the prediction, then of all slices); fewer where there are fewer.

    Args:
        image: (Z, H, W) intensities on any scale.
        truth: (Z, H, W) labels.
        prediction: (Z, H, W) labels.

    Returns:
        `image`, `truth`, `prediction`: uint8 (S, H, W) with S <= 3, the image's 1st to 99th
        percentile of the volume spread over 0..255; `slices`: their indices (S,).
    """
    for labels in (truth, prediction, np.ones_like(truth)):
        used = np.flatnonzero((labels > 0).any(axis=(1, 2)))
        if used.size:
            break
    chosen = np.unique(used[[int(share * used.size) for share in (0.25, 0.5, 0.75)]])
    low, high = np.percentile(image, (1, 99))
    grey = np.clip((image[chosen] - low) / max(high - low, 1e-9), 0, 1)
    return {
        "image": np.round(255 * grey).astype(np.uint8),
        "truth": truth[chosen].astype(np.uint8),
        "prediction": prediction[chosen].astype(np.uint8),
        "slices": chosen.astype(np.int16),
    }


def shown_slices(
    image: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    spacing: tuple[float, float, float] | None,
) -> dict[str, Any]:
    """All that a run may show of a case: `overlay` for reports, `view` for its picture, `middle`.

    Args:
        image: (Z, H, W) intensities.
        truth: (Z, H, W) labels.
        prediction: (Z, H, W) labels.
        spacing: mm (z, y, x), None when unknown.

    Returns:
        Copies of at most seven slices; `middle` has the middle one of each volume, (1, H, W).
    """
    from mambaseg.reporting.figures import case_view

    volumes = {"image": image, "truth": truth, "prediction": prediction}
    middle = len(image) // 2
    return {
        "overlay": overlay_slices(**volumes),
        "view": case_view(**volumes, spacing=spacing),
        "middle": {kind: volume[middle : middle + 1].copy() for kind, volume in volumes.items()},
    }


class RunRecorder(Callback):
    """Writes the run's results: cases.csv, metrics.json, overlays.npz, figures, and W&B's copy.

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
        """Starts the clock; a resumed training adds to the time that its record has."""
        self._started = time.monotonic() - self.folder.record.get("fit_seconds", 0.0)
        start_peak(pl_module.device)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Records the time and that the last checkpoint is the true last state."""
        if trainer.is_global_zero:
            self._beat(trainer)
            self.folder.update(cost={"peak_memory_bytes": peak(pl_module.device)})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says the score in the log, where a progress bar leaves nothing."""
        score = trainer.callback_metrics.get("val/dice")
        if score is not None and not trainer.sanity_checking:
            log.info("step %d: val/dice %.4f", trainer.global_step, float(score))
            if trainer.is_global_zero:
                self._beat(trainer)

    def _beat(self, trainer: L.Trainer) -> None:
        seconds = round(time.monotonic() - self._started, 1)
        self.folder.beat(steps=trainer.global_step, fit_seconds=seconds)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps what may be shown of a case: a few slices, or large volumes would fill memory."""
        self._cases[batch["case"].id] = shown_slices(
            batch["image"].cpu().numpy(),
            batch["label"].cpu().numpy().astype(np.uint8),
            outputs["prediction"].cpu().numpy(),
            batch["spacing"],
        )

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Writes everything the test part gave."""
        results = pl_module.results
        overlays = self._gather_overlays()
        if trainer.is_global_zero:
            self.folder.write_rows("cases.csv", results["rows"])
            self.folder.write_json("metrics.json", {**self.header, **results["summary"]})
            self.folder.write_arrays("overlays.npz", overlays)
            self._record_cost(trainer, pl_module)
            self.figures = self._draw(results, pl_module.class_names)
            shown = {
                place: {"case": case, **self._cases[case]["middle"]}
                for place, case in self._shown(results).items()
            }
            log_cases_to_wandb(
                trainer.loggers, results, shown, title=self.title, class_names=pl_module.class_names
            )
        self._cases.clear()

    def _record_cost(self, trainer: L.Trainer, task: Any) -> None:
        """Adds what the network costs per image and per case; its parameters are known before."""
        side = task.preprocessing.size
        shape = [trainer.datamodule.in_channels, side, side]  # type: ignore[attr-defined]
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
        own = {case: kept["overlay"] for case, kept in self._cases.items()}
        ranks: list[Any] = [own]
        if dist.is_available() and dist.is_initialized():
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, own)
        # by id, as the scores: a case that a sampler handed to two ranks is kept once
        cases = {case: arrays for rank in ranks for case, arrays in rank.items()}
        return {
            f"{case}/{name}": array
            for case, arrays in sorted(cases.items())
            for name, array in arrays.items()
        }

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
        from mambaseg.reporting.figures import view_figure

        paths = []
        for place, case in self._shown(results).items():
            paths.append(
                view_figure(
                    self._cases[case]["view"],
                    class_names=class_names,
                    title=f"{case} ({place} of the test part) · {self.title}",
                    path=self.folder.path / "figures" / f"{place}_{file_name(case)}.png",
                )
            )
        return paths
