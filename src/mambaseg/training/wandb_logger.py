"""Weights & Biases: a run of it per run folder, one row per step, whole after a resume."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from mambaseg.errors import optional
from mambaseg.storage.run_folder import this_host
from mambaseg.training.loggers import read_history, require, scalars

log = logging.getLogger(__name__)
_MODES: tuple[Any, ...] = ("online", "offline", "disabled")  # where one fails, the next is tried
_open: list[StepRows] = []  # started and not finished, whatever happened to their trainer
_moved: list[str] = []  # variables that point into the folder of the open run


class StepRows(WandbLogger):
    """A W&B run whose history has one row per step, and the step as its number.

    Lightning logs rate, loss and scores of a step one after the other, and W&B would number these
    calls. Here they are joined, and sent once the next step begins, so that a row which a resumed
    training repeats is the same row under the same number.
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
        self._row.update(scalars(metrics))

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
        """Ends the run; a failed one without its last row."""
        if not failed:  # half a row would keep a resumed training from sending the whole one
            with optional("sending the last row to W&B"):
                self.flush()
        with optional("ending the W&B run"):
            self.experiment.finish(exit_code=int(failed))


def new_wandb_id(key: str) -> str:
    """An id for the curves of a new run folder (kept in run.json) of the identity `key`."""
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
    is moved to `<save_dir>/wandb/superseded`, out of reach of `wandb sync`. Online, W&B continues
    the run of that id, and only the rows that its server lacks are sent.

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
    require("wandb")
    folder = Path(save_dir, "wandb")
    folder.mkdir(parents=True, exist_ok=True)  # or W&B falls back to /tmp
    _keep_in(folder)
    for old in sorted(folder.glob("offline-run-*")) if resume_step is not None else ():
        (folder / "superseded").mkdir(exist_ok=True)
        old.rename(folder / "superseded" / old.name)
    chosen = {"name": name, "project": project, "group": group, "tags": tags or [], "id": run_id}
    board = StepRows(_started(folder, mode, init_timeout, chosen), save_dir)
    _open.append(board)
    if resume_step is not None and history is not None:
        for step, row in read_history(Path(history), before=resume_step).items():
            board.log_metrics(row, step)
    return board


def _started(folder: Path, mode: str, init_timeout: float, chosen: dict[str, Any]) -> Any:
    """The W&B run, in the first mode from the wanted one on in which it starts."""
    import wandb

    settings = wandb.Settings(
        init_timeout=init_timeout, silent=True, console="off",
        # W&B's own description of the process holds SLURM's environment, the command line, the
        # host's name and uncommitted changes; `describe_to_wandb` says what a run was made with
        x_disable_meta=True, disable_git=True, disable_code=True, x_save_requirements=False,
        host=this_host(),
    )  # fmt: skip
    for possible in _MODES[_MODES.index(mode) :]:
        try:
            return wandb.init(
                dir=str(folder.parent), mode=possible, settings=settings,
                resume="allow" if chosen["id"] and possible == "online" else None,
                reinit="finish_previous", **chosen,
            )  # fmt: skip
        except Exception as error:  # no answer, a key or a .netrc that cannot be read, ...
            if possible == "disabled":
                raise
            after = "this run is logged offline" if possible == "online" else "it is left out"
            log.warning("W&B did not start %s (%s): %s",
                        possible, str(error).split("\n")[0], after)  # fmt: skip
            with optional("ending W&B's service"):
                wandb.teardown()
    raise AssertionError(mode)


def _keep_in(folder: Path) -> None:
    """Lets W&B keep beside the run what it would keep in the home folder; set variables stay.

    That includes an offline run's tables, which `wandb sync` sends later.
    """
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        if name not in os.environ or name in _moved:
            place = folder / name.split("_")[1].lower()
            place.mkdir(exist_ok=True)
            os.environ[name] = str(place.absolute())
            _moved.append(name)


def finish_wandb(*, failed: bool) -> None:
    """Ends the W&B run, or the next job of a sweep would write into it."""
    while _open:
        _open.pop().finish(failed=failed)
    while _moved:
        os.environ.pop(_moved.pop(), None)


def describe_to_wandb(
    loggers: Sequence[Logger], config: Mapping[str, Any], record: Mapping[str, Any]
) -> None:
    """Sends the configuration, and from run.json code, versions and hardware, to those of W&B."""
    made_with = {key: record[key] for key in ("code", "versions", "hardware") if key in record}
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            described = {**config, "made_with": made_with}
            logger.experiment.config.update(described, allow_val_change=True)


def log_cases_to_wandb(
    loggers: Sequence[Logger],
    results: Mapping[str, Any],
    shown: Mapping[str, Mapping[str, Any]],
    *,
    title: str,
) -> None:
    """Sends a test's `rows` and `means`, and the images `shown`, to those loggers that are W&B.

    `shown`: key -> `case` (id), `image` (H, W) or (H, W, 3), `masks` as W&B takes them, or None.
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
