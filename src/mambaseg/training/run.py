"""One training from the empty run folder to the table at its end."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only
from rich import get_console
from torch import nn

from mambaseg.errors import UserError, optional
from mambaseg.reporting.reading import training_of
from mambaseg.reporting.tables import headline, table_of
from mambaseg.storage.files import writing
from mambaseg.storage.identity import RULE, made_from_other_data, monitor_of
from mambaseg.storage.lock import RunLock
from mambaseg.storage.run_folder import RunFolder, code_changed, code_name, code_state, environment
from mambaseg.training import checkpoints
from mambaseg.training.averaging import averaging
from mambaseg.training.callbacks import RunRecorder
from mambaseg.training.checkpoints import CheckedIO
from mambaseg.training.loggers import MetricsCsv
from mambaseg.training.overview import overview
from mambaseg.training.parameters import has_batch_norms
from mambaseg.training.post_processing import choose_for, told
from mambaseg.training.signals import Interrupted, Interruption
from mambaseg.training.wandb_logger import describe_to_wandb, finish_wandb, new_wandb_id

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a run is: settled, complete, plain data."""

    config: dict[str, Any] = field(hash=False)  # resolved, every `auto` a value; in config.yaml
    key: str  # identity of the run, eight hex digits
    design: str  # the same without the data
    configs: dict[str, str] = field(hash=False)  # of conf/data and conf/model, for the record
    config_dirs: list[str] = field(hash=False)  # of --config-dir: where else configs come from
    weights: dict[str, str] = field(hash=False)  # digests of the files of weights it names
    seen: dict[str, Any] = field(hash=False)  # test cases that it was trained or chosen on

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return RunFolder(self.config["run_dir"])


class Run:
    """A planned run; a context manager that leaves a record however it ends.

    `parts` makes network, task and trainer (`mambaseg.app.build.Assembly`). `overrides` are those
    of its command line, for the record. `requeue` queues the job again that this is on a cluster.
    """

    def __init__(
        self,
        plan: Plan,
        data: Any,
        parts: Any,
        *,
        overrides: Sequence[str] = (),
        requeue: Callable[[], None] | None = None,
    ) -> None:
        self.plan, self.config, self.key, self.folder = plan, plan.config, plan.key, plan.folder
        self.data, self._parts, self._overrides = data, parts, overrides
        self.finished = self._has_result()
        self._monitor = monitor_of(plan.config)  # val/dice; empty: nothing is trained
        self._score_name = self._monitor.replace("/", "_")  # in the record: val_dice
        self._lock = RunLock(self.folder.path)
        self._interruption = Interruption(requeue)
        self._log_file: logging.Handler | None = None
        self.score: float | None = None
        self._last: Path | None = None  # the checkpoint that the training resumes from
        self.step = 0  # optimizer steps behind it
        self._ended = False  # it is the last state of a training that has come to its end
        self._begun = False  # whether the record in the folder is of this process
        self.task: Any = None
        self.trainer: L.Trainer
        self.recorder: RunRecorder

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return getattr(rank_zero_only, "rank", 0) == 0

    def _has_result(self) -> bool:
        done = self.folder.finished if self.config["test"] else self.folder.trained
        return done and not self.config["rerun"]

    # ---- beginning and end ----------------------------------------------------------------------

    def __enter__(self) -> Run:
        if self.finished:
            self._take_result()
            return self
        L.seed_everything(self.config["seed"], workers=True, verbose=False)
        network, pretrained = self._parts.network()
        if self.main:
            self._lock.acquire()
            if self._has_result():  # another job has finished it meanwhile
                self._lock.release()
                self._take_result()
                return self
        try:
            self._find_last_checkpoint()
            if self.main:
                self._open_folder(network, pretrained)
            self._prepare(network)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _take_result(self) -> None:
        """Takes the score of a finished run from its record, and says whose it is."""
        self.finished = True
        record = self.folder.record
        score, code = record.get(self._score_name, record.get("val_dice")), record.get("code")
        self.score = score if isinstance(score, float) else None
        code = code if isinstance(code, dict) else {}
        again = "scores" if self.config.get("checkpoint") else "trains"
        log.info("already finished: %s, made by %s (rerun=true %s again)",
                 self.folder.path, code_name(code), again)  # fmt: skip
        if changed := code_changed(code, code_state(self.config)):
            log.warning(changed)
        if skipped := record.get("skipped"):
            log.warning("%d of its steps were skipped (callbacks.nonfinite.on_nonfinite=skip)",
                        len(skipped))  # fmt: skip

    def _find_last_checkpoint(self) -> None:
        """Looks for the state that an unfinished run in this folder resumes from.

        A rerun resumes only a rerun by the same code that was interrupted: its job queued again.
        """
        record = self.folder.record
        if self.config.get("rerun") and (
            not record.get("rerun")
            or record.get("status") not in ("running", "interrupted")
            or code_changed(record["code"], code_state(self.config))
        ):
            return
        last = checkpoints.newest(self.folder.path / "checkpoints")
        if last and not record:
            log.warning("%s/run.json is missing or damaged: the training begins anew; what was "
                        "there is kept beside it as .previous", self.folder.path)  # fmt: skip
            return
        progress = checkpoints.read_progress(last) if last else None
        if progress:
            self._last, self.step, self._ended = last, progress.step, progress.ended

    def _open_folder(self, network: nn.Module, pretrained: dict[str, Any] | None) -> None:
        if self.step:
            self._resume_folder(network)
            return
        config, split, fingerprint = self.config, self.data.split, self.data.fingerprint
        other = made_from_other_data(self.folder.path, self.key, self.plan.design, fingerprint)
        if other:
            log.warning("the data have changed since %s was made: this is another run", other)
        data = {"title": config["data"]["title"], "config": self.plan.configs["data"]}
        self.folder.start(
            rule=RULE,
            key=self.key,
            design=self.plan.design,
            weights=self.plan.weights,
            overrides=list(self._overrides),
            wandb_id=new_wandb_id(self.key),
            data={
                **data,
                "fingerprint": fingerprint,
                "scored": self.data.scored or fingerprint,
                "images": self.data.images or fingerprint,
            },
            split={"name": split.name, "hash": split.hash, "note": split.note},
            counts=self.data.counts,
            **({"labelled": self.data.labelled} if self.data.labelled else {}),
            **({"training": how} if (how := training_of(config.get("checkpoint"))) else {}),
            parameters=sum(p.numel() for p in network.parameters()),
            pretrained=pretrained,
            config_dirs=self.plan.config_dirs,
            code=code_state(self.config),
            rerun=self.config["rerun"] and self.config["name"] != "debug",  # which is for one go
            **self._places(),
            **environment(),
        )
        self._begun = True
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        self.folder.write_text("config.yaml", text)
        self._log_to_folder()
        for what, line in overview(config, self.folder.record).items():
            log.info("%-8s%s", f"{what}:", line)
        if pretrained and (said := pretrained.get("said")):
            log.log(logging.WARNING if pretrained["missing"] else logging.INFO, said)
        if split.note:
            log.warning("split %s: %s", split.name, split.note)

    def _resume_folder(self, network: nn.Module) -> None:
        code, record = code_state(self.config), self.folder.record
        if changed := code_changed(record.get("code", {}), code):
            log.warning(changed)
        places = self._places()
        self.folder.resume(step=self.step, code=code, **places, **environment())
        self._begun = True
        self._log_to_folder()
        before = [record, *record.get("resumed", [])][-1]
        changes = [f"{what} {before[what]}, now {now}" for what, now in places.items()
                   if before.get(what, now) != now]  # fmt: skip
        if changes:
            said = "the same batches, but not the same rounding as without the pause"
            if changes[0].startswith("devices") and has_batch_norms(network):
                said += ", nor the same statistics of batch norms that are not synchronised"
            log.warning("%s: %s", "; ".join(changes), said)
        log.info("resuming from step %d: %s", self.step, self.folder.path)

    def _places(self) -> dict[str, Any]:
        """What may change when a run resumes, and decides whether its bits stay the same."""
        return {
            "devices": self.config["trainer"]["devices"],
            "threads": torch.get_num_threads(),
            "scan_backend": self.config["model"].get("scan_backend"),
        }

    def _prepare(self, network: nn.Module) -> None:
        self._interruption.take()
        self.task, self.trainer = self._parts.task_and_trainer(network, self.folder)
        title = self.config["data"]["title"] + ", SEEN CASES" * bool(self.plan.seen["cases"])
        self.recorder = RunRecorder(self.folder, title=title, views=self.task.views)
        # Lightning sets the list in Trainer.__init__ without declaring it
        own = [self.recorder, self._interruption]
        self.trainer.callbacks.extend(own)  # type: ignore[attr-defined]
        if self.main:
            with optional("describing the run to W&B"):
                describe_to_wandb(self.trainer.loggers, self.config, self.folder.record)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if self._begun:
                self._record_end(error)
        finally:  # the next job of this process inherits nothing
            if self._begun:
                finish_wandb(failed=error is not None)
            self._interruption.give_back()
            if self._log_file:
                logging.getLogger().removeHandler(self._log_file)
                self._log_file.close()
            self._lock.release()
            _leave_process_group()

    def _record_end(self, error: BaseException | None) -> None:
        """Writes how the run ended; on a full disk an error that came first is the one to tell."""
        if error is None:
            checkpoints.clear(self.folder.path / "checkpoints", keep=set())
            self.folder.finish("done")
            return
        stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
        cause = str(error) if isinstance(error, Interrupted) else f"{type(error).__name__}: {error}"
        if self._log_file and not stopped:  # the terminal gets what Hydra makes of it
            trace = (type(error), error, error.__traceback__)
            fields = {"levelname": "ERROR", "msg": "the run failed", "exc_info": trace}
            self._log_file.handle(logging.makeLogRecord(fields))
        try:
            self.folder.finish("interrupted" if stopped else "failed", error=cause)
        except UserError as second:
            log.warning("run.json still says that the run is running: %s", second)

    def _log_to_folder(self) -> None:
        with writing(self.folder.path):
            self._log_file = _LogFile(
                self.folder.path / "train.log", encoding="utf-8", errors="backslashreplace"
            )
        self._log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger().addHandler(self._log_file)

    # ---- the steps of a run ---------------------------------------------------------------------

    def fit(self) -> None:
        """Trains, and leaves best.ckpt and last.ckpt (the true last state) in the folder."""
        if self.step:
            for logger in self.trainer.loggers:
                if isinstance(logger, MetricsCsv):
                    logger.rewind(self.step)
        last = str(self._last) if self._last else None
        if self._ended:  # nothing is left of a training that was stopped early
            self.trainer.fit_loop.epoch_loop.max_steps = self.step
        self.trainer.fit(self.task, datamodule=self.data, ckpt_path=last, weights_only=True)
        self._interruption.obey_late(self.trainer)
        states = checkpoints.states_of(self.trainer)
        self.score = states.best_score if states else None
        if self.main:
            self.folder.update(**{self._score_name: self.score})
        steps, planned = self.trainer.global_step, self.config["data"]["steps"]
        if not steps:
            raise UserError("a callback (or trainer.max_time) stopped the training before its "
                            "first step: nothing was learnt")  # fmt: skip
        if steps < planned:
            log.warning("the training ended after %d of data.steps=%d steps: a callback (or "
                        "trainer.max_time) stopped it", steps, planned)  # fmt: skip
        if self.config["evaluation"].get("keep_largest") == "auto" and self._segments:
            chosen = choose_for(self.task, self.trainer, self.data, self._load_best())
            if self.main:
                self.folder.update(post_processing=chosen)

    def evaluate(self) -> None:
        """Scores the test set with this run's best checkpoint, or the weights it was given."""
        if not self.config["test"]:
            return
        given, split = self.config.get("checkpoint"), self.data.split
        tested = given or self._load_best().stem
        views = getattr(self.task, "tested_in", "none")
        header = {
            "data": self.config["data"]["title"],
            "model": self.config["model"]["name"],
            "task": self.config["data"].get("task"),
            "split": {"name": split.name, "hash": split.hash, "note": split.note},
            "seen": self.plan.seen,
            "supervision": self._supervision() or None,
            "preprocessing": self.data.describe(),
            "checkpoint": tested,
            "keep_largest": told(self.task),
            "views": None if views == "none" else views,
            "averaged": averaging(self.config),
        }
        self.recorder.header = {key: value for key, value in header.items() if value is not None}
        if self._score_name:
            self.recorder.header[self._score_name] = self.score
        self.trainer.test(self.task, datamodule=self.data, verbose=False)

    def _load_best(self) -> Path:
        """Gives the task the best state; where there is none the last one. Returns its file."""
        best = self.folder.path / "checkpoints" / "best.ckpt"
        chosen = best if best.exists() else best.with_name("last.ckpt")
        if chosen != best:
            log.warning("%s was never a number in a validation, so there is no best state: the "
                        "last one is tested", self._monitor)  # fmt: skip
        # not by ckpt_path: callbacks would take part, and one that averages weights puts those of
        # the last step in place of the averaged ones
        state = CheckedIO().load_checkpoint(chosen, map_location="cpu", weights_only=True)
        self.task.on_load_checkpoint(state)
        self.task.load_state_dict(state["state_dict"])
        return chosen

    @property
    def _segments(self) -> bool:
        return bool(self.config["data"].get("task", "segmentation") == "segmentation")

    def _supervision(self) -> dict[str, Any] | None:
        """Which labels the training read; None: nobody knows, or it needs none."""
        scored = self._parts.checkpoint
        return scored.supervision if scored else getattr(self.data, "supervision", None)

    def report(self) -> None:
        """Prints the score table, the folder, a picture, and what can be typed next."""
        if not self.main:
            return
        if (self.folder.path / "metrics.json").is_file():
            summary = self.folder.summary
            with optional("printing the table"):  # say, in a terminal without its characters
                get_console().print(table_of(summary, self.config))
                log.info("test: %s, checkpoint %s", headline(summary)[0], summary["checkpoint"])
        log.info("run folder: %s", self.folder.path)
        for picture in sorted(self.folder.path.glob("figures/median_*.png")):
            log.info("picture:    %s", picture)
        if self._segments and not self.config.get("checkpoint"):
            own = (f"--config-dir={shlex.quote(place)} " for place in self.plan.config_dirs)
            log.info("predict:    mambaseg predict %srun=%s input=<images> output=<folder>",
                     "".join(own), shlex.quote(str(self.folder.path)))  # fmt: skip


def _leave_process_group() -> None:
    """Ends DDP so that the next job of a sweep starts its own children."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        with optional("leaving the process group"):
            torch.distributed.destroy_process_group()
        for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)


class _LogFile(logging.FileHandler):
    """A log file that gives up on a full disk, rather than with a stack trace for every line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Stops the logging to this file."""
        logging.getLogger().removeHandler(self)

    def close(self) -> None:
        """Closes the file, whatever is left in its buffer."""
        with contextlib.suppress(OSError):
            super().close()
