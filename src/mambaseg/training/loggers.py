"""Where curves go: a CSV file in the run folder, and Weights & Biases.

Lightning's CSVLogger deletes an earlier file of the folder it is pointed at; a run folder that is
resumed must keep its rows, so the file is ours.

Lightning numbers what belongs to the n-th optimizer step (rate, loss, scores of a validation after
it) n - 1. A checkpoint with `global_step` s has s steps behind it and goes on with row number s: so
when a run is resumed, rows below s stay and the others go.
"""

from __future__ import annotations

import csv
import functools
import io
import logging
import os
import secrets
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from mambaseg.errors import UserError, optional
from mambaseg.storage.files import whole_file, writing
from mambaseg.storage.run_folder import this_host

log = logging.getLogger(__name__)
_OTHERWISE = "choose another folder with outputs=..."
_CALLED = (
    "log_metrics",
    "log_hyperparams",
    "log_graph",
    "after_save_checkpoint",
    "save",
    "finalize",
)  # by Lightning's trainer


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
        with (
            writing(self.path, otherwise=_OTHERWISE),
            self.path.open("a", newline="", encoding="utf-8") as stream,
        ):
            csv.DictWriter(stream, self._columns).writerow(row)

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Goes back to a checkpoint: drops what was logged after it, and appends from there on.

        The file is replaced whole or not at all. A line that was cut when the process died goes.

        Args:
            step: the checkpoint's `global_step` s; rows numbered below s stay (see the module).
        """
        self._columns, rows = _read_rows(self.path)
        if self._columns:
            self._replace([row for row in rows if int(row["step"]) < step])

    @rank_zero_only
    def sync(self) -> None:
        """Returns once all rows are on the disk: a failure of the machine does not take them."""
        if self.path.is_file():
            with self.path.open("rb") as stream:
                os.fsync(stream.fileno())

    def _widen(self, new: list[str]) -> None:
        rows = _read_rows(self.path)[1] if self._columns else []
        self._columns += new
        self._replace(rows)

    def _replace(self, rows: list[dict[str, str]]) -> None:
        with (
            whole_file(self.path, otherwise=_OTHERWISE) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as stream,
        ):
            writer = csv.DictWriter(stream, self._columns)
            writer.writeheader()
            writer.writerows(rows)


def _read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a metrics.csv, without a line that a killed process left half written."""
    if not path.is_file():
        return [], []
    with path.open(newline="", encoding="utf-8") as stream:
        text = stream.read()
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    rows = list(reader)
    return list(reader.fieldnames or []), rows


def read_history(path: Path, *, before: int) -> dict[int, dict[str, float]]:
    """What a metrics.csv says about the steps below `before`: step -> name -> value, in order."""
    history: dict[int, dict[str, float]] = {}
    for row in _read_rows(path)[1]:
        step = int(row.pop("step"))
        if step < before:
            values = {name: float(text) for name, text in row.items() if text}
            history.setdefault(step, {}).update(values)
    return dict(sorted(history.items()))


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


class StepRows(WandbLogger):
    """A W&B run whose history has one row per step, and the step as its number.

    Lightning logs rate, loss and scores of a step one after the other, and W&B would number these
    calls. Here they are joined, and sent once the next step begins. The history is thus a function
    of the training: a row that a resumed training repeats is the same row under the same number.

    Args:
        run: the started W&B run.
        save_dir: the run folder.
    """

    def __init__(self, run: Any, save_dir: str | Path) -> None:
        super().__init__(experiment=run, save_dir=str(save_dir))
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        # W&B drops rows below the last that its server has; so does this, without its warnings
        self._first = run.starting_step
        self._step, self._row = 0, dict[str, Any]()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Adds to the row of a step; a step before the last one's counts as the last one's."""
        step = max(self._step, step or 0)
        if step > self._step:
            self.flush()
        self._step = step
        self._row.update({name: value for name, value in metrics.items() if name != "epoch"})

    @rank_zero_only
    def flush(self) -> None:
        """Sends the row; W&B takes no more under its number."""
        if self._row and self._step >= self._first:
            row = {**self._row, "trainer/global_step": self._step}
            self.experiment.log(row, step=self._step, commit=True)
        if self._row:
            self._step, self._row = self._step + 1, {}

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Ends a fit or a test: its last row is whole."""
        if status == "success":
            self.flush()
        super().finalize(status)

    @rank_zero_only
    def finish(self, *, failed: bool) -> None:
        """Ends the run; of a failed one without its last row.

        That row may lack its other half, and W&B would not take the whole one under the same number
        when the training is resumed.
        """
        if not failed:
            with optional("sending the last row to W&B"):
                self.flush()
        with optional("ending the W&B run"):
            self.experiment.finish(exit_code=int(failed))


_open: list[StepRows] = []  # started and not finished, whatever became of their trainer
_moved: list[str] = []  # variables that point into the folder of the open run


def _keep_in(folder: Path) -> None:
    """Lets W&B keep beside the run what it would keep in the home folder.

    Of an offline run that holds its tables, which `wandb sync` sends later. What the user has set
    stays; its settings are still read from the home folder.
    """
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        if name not in os.environ or name in _moved:
            place = folder / name.split("_")[1].lower()
            place.mkdir(exist_ok=True)
            os.environ[name] = str(place.absolute())
            _moved.append(name)


def new_wandb_id(key: str) -> str:
    """A W&B run id for a new run folder, to be kept in its run.json.

    So a resumed run finds its W&B run again, and a repeated one (`rerun=true`) gets another.

    Args:
        key: identity of the run.
    """
    return f"{key}-{secrets.token_hex(4)}"  # not from `random`: that has the run's seed


def wandb_logger(
    *,
    save_dir: str | Path,
    name: str,
    project: str = "mambaseg",
    group: str | None = None,
    tags: list[str] | None = None,
    mode: str = "offline",
    init_timeout: float = 15,
    run_id: str | None = None,
    resume_step: int | None = None,
    history: str | Path | None = None,
) -> WandbLogger:
    """A started W&B run; online falls back to offline when the server does not answer in time.

    A resumed run tells its history from the start: offline, W&B begins another directory with the
    same id, which gets the rows that the folder has, and the directory of the interrupted training
    is moved to `<save_dir>/wandb/superseded`, out of reach of `wandb sync`. Online, W&B goes on
    with the run of that id, and only the rows that its server lacks are sent.

    Args:
        save_dir: the run folder; W&B writes to `<save_dir>/wandb`.
        name: the run's name on the dashboard.
        project: W&B project.
        group: W&B group, the experiment's name.
        tags: W&B tags.
        mode: `online`, `offline` or `disabled`.
        init_timeout: seconds to wait for the server.
        run_id: W&B run id, `new_wandb_id`; None: W&B makes one.
        resume_step: `global_step` of the checkpoint that the training resumes from.
        history: metrics.csv of the run folder, rewound or not; read when `resume_step` is given.

    Raises:
        UserError: wandb is not installed.
    """
    if getattr(rank_zero_only, "rank", 0):
        return WandbLogger(save_dir=str(save_dir))  # one process per run speaks to W&B
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "logger: wandb is not installed: pip install wandb, or logger=csv"
        ) from error

    def started(mode: Literal["online", "offline", "disabled"]) -> StepRows:
        settings = wandb.Settings(
            init_timeout=init_timeout, silent=True, console="off",
            # W&B's own description of the process holds SLURM's environment, the command line, the
            # host's name and uncommitted changes; `describe_to_wandb` says what a run was made with
            x_disable_meta=True, disable_git=True, disable_code=True, x_save_requirements=False,
            host=this_host(),
        )  # fmt: skip
        run = wandb.init(
            dir=str(save_dir), name=name, project=project, group=group, tags=tags or [],
            mode=mode, settings=settings, reinit="finish_previous",
            id=run_id, resume="allow" if run_id and mode == "online" else None,
        )  # fmt: skip
        return StepRows(run, save_dir)

    folder = Path(save_dir, "wandb")
    folder.mkdir(parents=True, exist_ok=True)  # or W&B falls back to /tmp
    _keep_in(folder)
    if resume_step is not None:
        _set_aside(folder)
    board: StepRows | None = None
    if mode == "online":
        try:
            board = started("online")
        except Exception as error:  # no answer, a key or a .netrc that cannot be read, ...
            log.warning(
                "W&B did not answer (%s): this run is logged offline", str(error).split("\n")[0]
            )
            with optional("ending W&B's service"):
                wandb.teardown()
    if board is None and mode != "disabled":
        with optional("starting W&B offline"):
            board = started("offline")
    board = board or started("disabled")
    _open.append(board)
    if resume_step is not None and history is not None:
        for step, row in read_history(Path(history), before=resume_step).items():
            board.log_metrics(row, step)
    return board


def _set_aside(folder: Path) -> None:
    for old in sorted(folder.glob("offline-run-*")):
        (folder / "superseded").mkdir(exist_ok=True)
        old.rename(folder / "superseded" / old.name)


def log_cases_to_wandb(
    loggers: Sequence[Logger],
    results: Mapping[str, Any],
    shown: Mapping[str, Mapping[str, Any]],
    *,
    title: str,
) -> None:
    """Sends test results to those of the loggers that are W&B: table of cases, images, summary.

    Args:
        loggers: of the trainer.
        results: `rows` per case, and the `means` that stand for them.
        shown: key -> case (id), image (H, W) or (H, W, 3), masks as W&B takes them, or None.
        title: what the data are.
    """
    boards = [logger for logger in loggers if isinstance(logger, StepRows)]
    if not boards:
        return
    import wandb

    images = {}
    for key, media in shown.items():
        caption = f"{media['case']}, {title}"
        # a key each: W&B wants equal sizes under one key
        images[f"test/{key}"] = wandb.Image(media["image"], masks=media["masks"], caption=caption)
    rows = results["rows"]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for board in boards:
        table = wandb.Table(columns=columns, data=[[row.get(c) for c in columns] for row in rows])
        board.log_metrics({**images, "test/cases": table})  # into the row of the test
        board.experiment.summary.update({"data": title, "test": results["means"]})


def describe_to_wandb(
    loggers: Sequence[Logger], config: Mapping[str, Any], record: Mapping[str, Any]
) -> None:
    """Sends configuration, code, versions and hardware to those of the loggers that are W&B.

    Args:
        loggers: of the trainer.
        config: the resolved configuration.
        record: of the run folder.
    """
    made_with = {key: record[key] for key in ("code", "versions", "hardware") if key in record}
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            described = {**config, "made_with": made_with}
            logger.experiment.config.update(described, allow_val_change=True)


def finish_wandb(*, failed: bool) -> None:
    """Ends the W&B run, or the next job of a sweep would write into it.

    It knows the started runs itself: a job may fail before it has a trainer with loggers.
    """
    while _open:
        _open.pop().finish(failed=failed)
    while _moved:
        os.environ.pop(_moved.pop(), None)
