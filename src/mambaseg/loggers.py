"""Where curves go: a CSV file in the run folder, and Weights & Biases.

Lightning's CSVLogger deletes an earlier file of the folder it is pointed at; a run folder that is
resumed must keep its rows, so the file is ours.
"""

from __future__ import annotations

import csv
import logging
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger(__name__)


class MetricsCsv(Logger):
    """Appends one row per logged step to `<save_dir>/metrics.csv` while the run goes on.

    Args:
        save_dir: the run folder.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__()
        self.path = Path(save_dir) / "metrics.csv"
        self._columns: list[str] = []

    @property
    def name(self) -> str:
        """Lightning asks for a name; it appears nowhere."""
        return "csv"

    @property
    def version(self) -> str:
        """Likewise."""
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """The configuration has its own file."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Writes one row; a new column rewrites the file once, whole or not at all."""
        row = {"step": step, **{k: v for k, v in metrics.items() if k != "epoch"}}
        new = [key for key in row if key not in self._columns]
        if new:
            self._widen(new)
        with self.path.open("a", newline="", encoding="utf-8") as stream:
            csv.DictWriter(stream, self._columns).writerow(row)

    def _widen(self, new: list[str]) -> None:
        rows = []
        if self._columns:
            with self.path.open(newline="", encoding="utf-8") as stream:
                rows = list(csv.DictReader(stream))
        self._columns += new
        temporary = self.path.with_suffix(".csv.tmp")
        with temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self.path)


def wandb_logger(
    *,
    save_dir: str | Path,
    name: str,
    project: str = "mambaseg",
    group: str | None = None,
    tags: list[str] | None = None,
    mode: str = "offline",
    init_timeout: float = 15,
) -> WandbLogger:
    """A started W&B run; online falls back to offline when the server does not answer in time.

    Args:
        save_dir: the run folder; W&B writes to `<save_dir>/wandb`.
        name: the run's name on the dashboard.
        project: W&B project.
        group: W&B group, the experiment's name.
        tags: W&B tags.
        mode: `online`, `offline` or `disabled`.
        init_timeout: seconds to wait for the server.

    Raises:
        UserError: wandb is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        from mambaseg.errors import UserError

        raise UserError(
            "logger: wandb is not installed: pip install wandb, or logger=csv"
        ) from error

    def started(mode: Literal["online", "offline", "disabled"]) -> WandbLogger:
        settings = wandb.Settings(init_timeout=init_timeout, silent=True, console="off")
        run = wandb.init(
            dir=str(save_dir), name=name, project=project, group=group, tags=tags or [],
            mode=mode, settings=settings, reinit="finish_previous",
        )  # fmt: skip
        return WandbLogger(experiment=run, save_dir=str(save_dir))

    Path(save_dir, "wandb").mkdir(parents=True, exist_ok=True)  # or W&B falls back to /tmp
    if mode == "online":
        try:
            return started("online")
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            log.warning(
                "W&B did not answer (%s): this run is logged offline", str(error).split("\n")[0]
            )
            wandb.teardown()
    return started("disabled" if mode == "disabled" else "offline")


def log_cases_to_wandb(
    loggers: Sequence[Logger],
    results: Mapping[str, Any],
    shown: Mapping[str, Mapping[str, Any]],
    *,
    title: str,
    class_names: Sequence[str],
) -> None:
    """Sends test results to those of the loggers that are W&B: table of cases, overlays, summary.

    Args:
        loggers: of the trainer.
        results: `rows` per case and class, and their `summary`.
        shown: key -> case (id), image (Z, H, W), truth, prediction; the middle slice is shown.
        title: what the data are.
        class_names: of all labels, background first.
    """
    boards = [logger for logger in loggers if isinstance(logger, WandbLogger)]
    if not boards:
        return
    import wandb

    names = dict(enumerate(class_names))
    images = {}
    for key, arrays in shown.items():
        middle = len(arrays["image"]) // 2
        masks = {
            kind: {"mask_data": arrays[kind][middle], "class_labels": names}
            for kind in ("truth", "prediction")
        }
        caption = f"{arrays['case']}, {title}"
        # a key each: W&B wants equal sizes under one key
        images[f"test/{key}"] = wandb.Image(arrays["image"][middle], masks=masks, caption=caption)
    rows = results["rows"]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for board in boards:
        table = wandb.Table(columns=columns, data=[[row.get(c) for c in columns] for row in rows])
        board.experiment.log({**images, "test/cases": table})
        board.experiment.summary.update({"data": title, "test": results["summary"]["foreground"]})


def describe_to_wandb(loggers: Sequence[Logger], config: Mapping[str, Any]) -> None:
    """Sends the resolved configuration to those of the loggers that are W&B."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.config.update(dict(config), allow_val_change=True)


def finish_wandb(loggers: Sequence[Logger], *, failed: bool) -> None:
    """Ends the W&B run, or the next job of a sweep would write into it."""
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        import wandb

        wandb.finish(exit_code=int(failed))
