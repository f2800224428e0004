"""Where curves go: a CSV file in the run folder, TensorBoard, MLflow (W&B: `wandb_logger`).

Lightning's CSVLogger deletes an earlier file of its folder; a run folder that is resumed must keep
its rows, so the file is ours.

Lightning numbers what belongs to the n-th optimizer step (rate, loss, scores of a validation after
it) n - 1. A checkpoint with `global_step` s has s steps behind it and resumes with row number s: so
when a run is resumed, rows below s stay and the others go.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import logging
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from mambaseg.errors import UserError, optional
from mambaseg.storage.files import synchronise, write_table, writing
from mambaseg.storage.untrusted import read_table

log = logging.getLogger(__name__)
_CALLED = ("log_metrics", "log_hyperparams", "log_graph", "after_save_checkpoint", "save",
           "finalize")  # by Lightning's trainer  # fmt: skip


def require(package: str) -> None:
    """Makes sure that a logger's package is installed; its extra has the same name."""
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"logger: {package} is not installed: pip install 'mambaseg[{package}]', or logger=csv"
        )


def forgiving(logger: Logger) -> Logger:
    """A logger that cannot end a run: where it fails, it says so once and logs no more.

    Not so `MetricsCsv`, which is part of the run's record.
    """
    if isinstance(logger, MetricsCsv):
        return logger
    failed = False

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal failed
            if failed:
                return None
            try:
                return method(*arguments, **named)
            except Exception as error:  # whatever a library raises
                failed = True
                log.warning("the logger %s failed (%s: %s): from here on the curves are in "
                            "metrics.csv only", type(logger).__name__, type(error).__name__,
                            error)  # fmt: skip

        return call

    for name in _CALLED:
        setattr(logger, name, guarded(getattr(logger, name)))
    return logger


def scalars(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What Lightning logs, without the number of the epoch: a training is one."""
    return {name: value for name, value in metrics.items() if name != "epoch"}


# ---- metrics.csv


class MetricsCsv(Logger):
    """Appends one row per logged step to `<save_dir>/metrics.csv` during the run."""

    name = "csv"  # Lightning asks for both; they appear nowhere
    version = ""

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__()
        self.path = Path(save_dir) / "metrics.csv"
        self._columns: list[str] = []

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """The configuration has its own file."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Writes one row; a new column rewrites the file once, whole or not at all."""
        row = {"step": step, **scalars(metrics)}
        if new := [key for key in row if key not in self._columns]:
            rows = _read_rows(self.path)[1] if self._columns else []
            self._columns += new
            write_table(self.path, self._columns, rows)
        with writing(self.path), self.path.open("a", newline="", encoding="utf-8") as stream:
            csv.DictWriter(stream, self._columns).writerow(row)

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drops what was logged after a checkpoint's `global_step`, and a line that was cut."""
        self._columns, rows = _read_rows(self.path)
        if self._columns:
            kept = [row for row in rows if int(row["step"]) < step]
            write_table(self.path, self._columns, kept)

    @rank_zero_only
    def sync(self) -> None:
        """Returns once all rows are on the disk: a failure of the machine does not take them."""
        if self.path.is_file():
            synchronise(self.path)


def _read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a metrics.csv, without a line that a killed process left half written."""
    if not path.is_file():
        return [], []
    try:
        columns, rows = read_table(path, growing=True)
        for row in rows:
            int(row["step"])
            [float(cell) for cell in row.values() if cell]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is damaged ({error}). Put back a copy, or delete it: the run then resumes "
            "without the curves of its first steps"
        ) from error
    return columns, rows


def read_history(path: Path, *, before: int) -> dict[int, dict[str, float]]:
    """What a metrics.csv says about the steps below `before`: step -> name -> value, in order."""
    history: dict[int, dict[str, float]] = {}
    for row in _read_rows(path)[1]:
        step = int(row.pop("step"))
        if step < before:
            values = {name: float(text) for name, text in row.items() if text}
            history.setdefault(step, {}).update(values)
    return dict(sorted(history.items()))


# ---- TensorBoard and MLflow


class TensorBoard(TensorBoardLogger):
    """The curves of metrics.csv as event files; points after `resume_step` are dropped."""

    def __init__(self, save_dir: str | Path, resume_step: int | None = None) -> None:
        require("tensorboard")
        super().__init__(save_dir, name="", version="tensorboard", purge_step=resume_step)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Writes the values of a step."""
        super().log_metrics(scalars(metrics), step)


class MLflow(MLFlowLogger):
    """The curves of metrics.csv as a run of MLflow, which a resumed training continues.

    Points that it trains again are in MLflow twice under their step, with equal values. MLflow's
    tags with the user's name and the path of the script are left empty. The tag `mambaseg.run_id`
    is that by which the run is found again.
    """

    def __init__(
        self,
        tracking_uri: str,
        *,
        name: str,
        run_id: str | None = None,
        resume_step: int | None = None,
        experiment: str = "mambaseg",
    ) -> None:
        require("mlflow")
        tags = {"mambaseg.run_id": run_id, "mlflow.user": "", "mlflow.source.name": "mambaseg"}
        super().__init__(experiment, run_name=name, tracking_uri=tracking_uri, tags=tags)
        if resume_step is not None and not getattr(rank_zero_only, "rank", 0):
            with optional("finding the run in MLflow"):
                known = self._mlflow_client.get_experiment_by_name(experiment)
                wanted = f"tags.\"mambaseg.run_id\" = '{run_id}'"
                runs = self._mlflow_client.search_runs([known.experiment_id], wanted)
                self._run_id = runs[0].info.run_id

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Sends the values of a step."""
        super().log_metrics(scalars(metrics), step)
