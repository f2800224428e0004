"""The list of a sweep's jobs, so that a report can tell what is missing.

A sweep keeps one small file per job in `<outputs>/<experiment>/.jobs/`: the job's words, the run
folder it led to and, where it failed before it had one, the error. They are written by a Hydra
callback (conf/config.yaml, `hydra.callbacks`), so that every launcher does it alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from mambaseg.storage.files import whole_file
from mambaseg.storage.untrusted import read_json

FOLDER = ".jobs"


def note_run(experiment: Path, run: str) -> None:
    """Notes which run folder the present job leads to; does nothing outside of a sweep."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        _write(experiment, list(HydraConfig.get().overrides.task), run=run)


class JobList(Callback):
    """Lists the jobs before a sweep starts, and notes those that fail without a run folder."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Lists the jobs, where the sweep is a plain product; a search knows only the next one."""
        words = list(config.hydra.overrides.task)
        if not str(config.hydra.sweeper._target_).endswith("BasicSweeper"):
            return
        try:
            parsed = OverridesParser.create().parse_overrides(words)
            (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
        except HydraException:
            return  # Hydra itself says what is wrong with them
        for job in jobs:
            if not _file(_experiment(config), job).exists():
                _write(_experiment(config), job)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Notes the error of a job that has no run folder to keep it in."""
        if job_return.status != JobStatus.FAILED or config.hydra.mode != RunMode.MULTIRUN:
            return
        words = list(config.hydra.overrides.task)
        path = _file(_experiment(config), words)
        if not path.exists() or not read_json(path)["run"]:
            _write(_experiment(config), words, error=str(job_return._return_value))


def _experiment(config: DictConfig) -> Path:
    outputs = str(OmegaConf.select(config, "outputs"))
    return Path(outputs).expanduser() / str(OmegaConf.select(config, "name"))


def _file(experiment: Path, words: Sequence[str]) -> Path:
    text = json.dumps(sorted(words))
    return (
        experiment / FOLDER / (hashlib.blake2b(text.encode(), digest_size=8).hexdigest() + ".json")
    )


def _write(experiment: Path, words: Sequence[str], *, run: str = "", error: str = "") -> None:
    path = _file(experiment, words)
    content = {"overrides": list(words), "run": run or None, "error": error or None}
    with whole_file(path, otherwise="choose another folder with outputs=...") as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
