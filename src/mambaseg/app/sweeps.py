"""Sweeps on any launcher: what cannot start is refused, jobs are listed, none changes the next.

A sweep keeps one small file per job in `<outputs>/<experiment>/.jobs/`, so that a report can tell
what is missing: the job's overrides, its run folder, and the error if it failed before it had one.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from mambaseg.app.check import check_targets, checked
from mambaseg.app.overrides import (
    composition_error,
    given_overrides,
    jobs_of,
    key_of,
    parsed,
    typed,
)
from mambaseg.app.sources import require_sources
from mambaseg.app.terminal import announce_synthetic
from mambaseg.errors import NotInstalledError, UserError, optional
from mambaseg.storage.files import write_whole
from mambaseg.storage.untrusted import read_json

# module of a plugin -> the extra of pyproject.toml that brings it
_EXTRAS = {
    "hydra_joblib_launcher": "launchers",
    "hydra_submitit_launcher": "launchers",
    "hydra_ray_launcher": "ray",
    "hydra_optuna_sweeper": "search",
}
log = logging.getLogger(__name__)


class Sweeps(Callback):
    """Checks launcher, sweeper and jobs before Hydra starts them; tidies up after each job.

    Hydra turns the exceptions of a callback into warnings, hence `sys.exit`.
    """

    def __init__(self) -> None:
        self._before: tuple[dict[str, str], list[str], list[Any]] | None = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuses a launcher or a search where a single run would ignore it."""
        if "LOCAL_RANK" in os.environ:  # a process of DDP repeats the overrides of a sweep's job
            return
        for group, plain in (("hydra/launcher", "basic"), ("hparams_search", None)):
            chosen = config.hydra.runtime.choices.get(group)
            if chosen not in (plain, None):
                sys.exit(f"{group}={chosen} is for sweeps: mambaseg train -m ...")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuses absent plugins and impossible jobs; lists the jobs."""
        try:
            _check_launcher(config)
            _list_jobs(config, _check_jobs(config))
        except UserError as error:
            sys.exit(str(error))

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Notes what a job could leave behind for the next one of this process."""
        if config.hydra.mode == RunMode.MULTIRUN:
            with contextlib.suppress(Exception):  # libraries add warning filters at import
                check_targets(config)
        self._before = dict(os.environ), list(sys.argv), list(warnings.filters)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Restores it: Lightning and the job itself write to the environment and `sys.argv`."""
        if job_return.status == JobStatus.FAILED and config.hydra.mode == RunMode.MULTIRUN:
            _note_failure(config, str(job_return._return_value))
        if self._before is None:
            return
        environment, sys.argv[:], warnings.filters[:] = self._before  # type: ignore[index]
        for key in {*os.environ, *environment} - set(config.hydra.job.env_set):  # Hydra's own care
            if key not in environment:
                del os.environ[key]
            elif os.environ.get(key) != environment[key]:
                os.environ[key] = environment[key]


# ---- what can start -----------------------------------------------------------------------------


def _check_launcher(config: DictConfig) -> None:
    launcher, sweeper = config.hydra.launcher._target_, config.hydra.sweeper._target_
    if "mambaseg_studies" in sweeper:  # our own sweeper, around the plugin
        sweeper = "hydra_optuna_sweeper"
    for module, extra in _EXTRAS.items():
        used = module in launcher or module in sweeper
        if used and importlib.util.find_spec(f"hydra_plugins.{module}") is None:
            name = module.replace("_", "-")
            raise UserError(f"{name} is not installed: pip install 'mambaseg[{extra}]'")
    for override in parsed(typed(config.hydra.overrides.task)):
        ranged = override.is_sweep_override() and not override.is_discrete_sweep()
        if ranged and sweeper.endswith("BasicSweeper"):
            raise UserError(
                f"{override.input_line}: a range is searched, not swept: add hparams_search=optuna,"
                f" or list the values, {override.get_key_element()}=1,2"
            )
    devices = OmegaConf.select(config, "trainer.devices")
    if "hydra_ray_launcher" in launcher:
        _check_ray(config.hydra.launcher.ray)
    if launcher.endswith("SlurmLauncher"):
        if shutil.which("srun") is None:
            raise UserError(
                "no srun in PATH: a SLURM sweep is typed on a machine of the cluster; "
                "hydra/launcher=submitit_local rehearses it here"
            )
        tasks = config.hydra.launcher.tasks_per_node
        if isinstance(devices, int) and devices > 0 and tasks != devices:
            raise UserError(
                f"trainer.devices={devices} with hydra.launcher.tasks_per_node={tasks}: SLURM "
                f"starts one process per device; add hydra.launcher.tasks_per_node={devices} "
                f"hydra.launcher.gpus_per_node={devices}"
            )
    elif "hydra_plugins" in launcher and isinstance(devices, int) and devices > 1:
        raise UserError(
            f"trainer.devices={devices}: jobs side by side take one device each; leave "
            "hydra/launcher out for jobs of several devices, one after the other"
        )


def _check_ray(ray: DictConfig) -> None:
    """Ray waits for ever for resources that this machine does not have."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anybody
    # Ray 2.60 would otherwise announce a change of its defaults in every job without a GPU
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.init.get("address") or os.environ.get("RAY_ADDRESS"):
        return  # a cluster knows best what it has
    there = {"num_cpus": os.cpu_count() or 1}
    if ray.remote.get("num_gpus"):
        import torch

        there["num_gpus"] = torch.cuda.device_count()
    for what, number in there.items():
        wanted, known = ray.remote.get(what) or 0, ray.init.get(what)
        number = number if known is None else known
        if wanted > number:
            raise UserError(
                f"hydra.launcher.ray.remote.{what}={wanted}: there are {number} here, so no job "
                f"could start. Ask for fewer per job (num_gpus=0 runs without GPUs), or name a Ray "
                "cluster with hydra.launcher.ray.init.address=..."
            )


def _check_jobs(config: DictConfig) -> set[Path]:
    """Every value that is swept must be one; returns the experiments, none of other scripts."""
    script, configurations = config.hydra.job.config_name, []
    for job in jobs_of(typed(config.hydra.overrides.task)):
        configurations.append(checked(_composed(config, job), script, job))
        if "basic_launcher" in config.hydra.launcher._target_:  # others may run on other machines
            require_sources(configurations[-1], script)
    if "checkpoint" not in config and "data" in config:  # else only a job knows its data
        announce_synthetic(cfg.data for cfg in configurations)
    absent = []
    for cfg in configurations:
        try:
            check_targets(cfg)  # seconds, for what is imported
        except NotInstalledError as error:  # such a job is skipped in its turn
            absent.append(error)
    if len(absent) == len(configurations):
        raise absent[0]
    return {folder for cfg in configurations if (folder := _experiment(cfg))}


def _composed(config: DictConfig, job: list[str]) -> DictConfig:
    """The configuration of a job; Hydra composes that of its sweep without what is swept."""
    try:
        return GlobalHydra.instance().config_loader().load_sweep_config(config, job)
    except (HydraException, YAMLError, AssertionError) as error:
        said = composition_error(error, config.hydra.job.config_name, job)
        raise UserError(said or str(error)) from error


# ---- the list of jobs ---------------------------------------------------------------------------

# the sweeps that have begun in this process: experiment, the files of their jobs (of a search none
# are known), and all files at that time
_BEGUN: list[tuple[Path, set[str], dict[str, int]]] = []
# overrides with which a repeated sweep leads to the same runs
_SAME_RUN = ("rerun", "logger", "evaluation.batch_size", "data.num_workers", "data.cache_dir",
             "data.on_device", "trainer.devices")  # fmt: skip


def in_sweep() -> bool:
    """Whether the present job is one of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def compare_jobs() -> None:
    """Prints the jobs of a sweep that has ended, well or not, side by side; else does nothing."""
    while _BEGUN:
        experiment, own, before = _BEGUN.pop(0)
        now = _listed(experiment)
        files = own or {name for name, time in now.items() if before.get(name) != time}
        if not files:
            continue
        from rich import get_console

        from mambaseg.reporting.jobs import jobs_grid

        with optional("comparing the jobs"):
            get_console().print(jobs_grid(experiment, files).terminal())
        scored = any(experiment.glob("*/metrics.json"))  # without test scores there is no report
        log.info("report:     mambaseg report %s%s", "" if scored else "status ",
                 shlex.quote(str(experiment)))  # fmt: skip


def _listed(experiment: Path) -> dict[str, int]:
    """The files that list an experiment's jobs, and when each was written."""
    return {file.name: file.stat().st_mtime_ns for file in (experiment / ".jobs").glob("*.json")}


def note_run(folder: Path) -> None:
    """Notes which run folder the present job leads to; does nothing outside of a sweep."""
    if in_sweep():
        _note(folder.parent, given_overrides(), run=folder.name)


def skipped(config: DictConfig, error: NotInstalledError) -> bool:
    """Notes a job of a sweep as skipped; False where it is none, or a search needs its score."""
    if not in_sweep() or "BasicSweeper" not in HydraConfig.get().sweeper._target_:
        return False
    log.warning("skipped: %s", error)
    if experiment := _experiment(config):
        words = given_overrides()
        _note(experiment, words, error=str(error), skipped=True)
    return True


def _list_jobs(config: DictConfig, experiments: set[Path]) -> None:
    """Lists the jobs where the sweep is a plain product; a search knows only the next one."""
    listed: list[tuple[Path, list[str]]] = []
    if experiments and str(config.hydra.sweeper._target_).endswith("BasicSweeper"):
        words = parsed(typed(config.hydra.overrides.task))
        (jobs,) = BasicSweeper.split_arguments(words, max_batch_size=None)
        only = next(iter(experiments)) if len(experiments) == 1 else None
        places = ((only or _experiment(_composed(config, job)), typed(job)) for job in jobs)
        listed = [(place, job) for place, job in places if place]
    for experiment in sorted(experiments.union(place for place, _ in listed)):
        own = {_file(place, job).name for place, job in listed if place == experiment}
        _BEGUN.append((experiment, own, _listed(experiment)))
    for experiment, job in listed:
        if not _file(experiment, job).exists():
            _note(experiment, job)


def _note_failure(config: DictConfig, error: str) -> None:
    """Notes the error of a job that has no run folder to keep it in."""
    experiment, job = _experiment(config), typed(config.hydra.overrides.task)
    if experiment:
        path = _file(experiment, job)
        if not path.exists() or not read_json(path)["run"]:
            _note(experiment, job, error=error)


def _experiment(config: DictConfig) -> Path | None:
    """The folder of the runs of a training or evaluation; None for other scripts."""
    name = OmegaConf.select(config, "name")
    return Path(config.outputs).expanduser() / name if name else None


def _file(experiment: Path, job: Sequence[str]) -> Path:
    words = sorted(word for word in job if key_of(word) not in _SAME_RUN)
    digest = hashlib.blake2b(json.dumps(words).encode(), digest_size=8).hexdigest()
    return experiment / ".jobs" / f"{digest}.json"


def _note(
    experiment: Path, job: Sequence[str], *, run: str = "", error: str = "", skipped: bool = False
) -> None:
    content: dict[str, Any] = {"overrides": list(job), "run": run or None, "error": error or None}
    content |= {"skipped": True} if skipped else {}
    write_whole(_file(experiment, job), json.dumps(content, indent=2) + "\n")


# ---- a SLURM job of the user's own script -------------------------------------------------------


def requeue_call() -> Callable[[], None] | None:
    """What queues this SLURM job again; None in other processes than the first of such a job."""
    if not cluster_plugins() or os.environ.get("SLURM_PROCID", "0") != "0":
        return None
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"

    def requeue() -> None:
        try:
            code = subprocess.run(["scontrol", "requeue", job], check=False).returncode
        except OSError as error:
            log.warning("job %s is not queued again: scontrol: %s", job, error.strerror)
        else:
            log.warning("scontrol requeue %s ended with exit code %d", job, code)

    return requeue


def cluster_plugins() -> list[Any]:
    """Lightning's SLURM without its own requeueing, which saves amid a step; else nothing."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    try:
        return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
    except RuntimeError as error:  # of its look at the variables that sbatch has set
        raise UserError(f"SLURM: {error}") from error
