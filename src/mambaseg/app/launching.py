"""Sweeps on any launcher: what cannot start is refused at once, and no job changes the next one."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import warnings
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from mambaseg.app.check import check_targets, checked
from mambaseg.app.words import composition_error, jobs_of, only_targets_know
from mambaseg.errors import UserError

# module of a plugin -> the extra of pyproject.toml that brings it
_EXTRAS = {
    "hydra_joblib_launcher": "launchers",
    "hydra_submitit_launcher": "launchers",
    "hydra_ray_launcher": "ray",
    "hydra_optuna_sweeper": "search",
}
_STUDIES = "hydra_plugins.mambaseg_studies"  # our own sweeper, around hydra_optuna_sweeper


class Launching(Callback):
    """Checks launcher and sweeper of a command before Hydra makes them; tidies up after each job.

    Hydra turns the exceptions of a callback into warnings, so that the command ends by SystemExit,
    with the message on stderr and status 1.
    """

    def __init__(self) -> None:
        self._before: tuple[dict[str, str], list[str], list[Any]] | None = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuses a launcher or a search where a single run would ignore it."""
        _refusing(_check_run, config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuses absent plugins, and jobs that ask for more than there is."""
        _refusing(_check_sweep, config)
        _refusing(_check_jobs, config)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Notes what a job could leave behind for the next one of this process."""
        self._before = dict(os.environ), list(sys.argv), list(warnings.filters)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Restores it: Lightning and the job itself write to the environment and `sys.argv`."""
        if self._before is None:
            return
        environment, sys.argv[:], warnings.filters[:] = self._before  # type: ignore[index]
        for key in {*os.environ, *environment} - set(config.hydra.job.env_set):  # Hydra's own care
            if key not in environment:
                del os.environ[key]
            elif os.environ.get(key) != environment[key]:
                os.environ[key] = environment[key]


def _refusing(check: Any, config: DictConfig) -> None:
    try:
        check(config)
    except UserError as error:
        sys.exit(str(error))


def _check_run(config: DictConfig) -> None:
    if "LOCAL_RANK" in os.environ:  # a process of DDP repeats the words of one job of a sweep
        return
    choices = config.hydra.runtime.choices
    for group, plain in (("hydra/launcher", "basic"), ("hparams_search", None)):
        chosen = choices.get(group)
        if chosen not in (plain, None):
            raise UserError(f"{group}={chosen} is for sweeps: python src/train.py -m ...")


def _check_sweep(config: DictConfig) -> None:
    launcher, sweeper = config.hydra.launcher, config.hydra.sweeper
    needed = "hydra_plugins.hydra_optuna_sweeper" if _STUDIES in sweeper._target_ else ""
    for target in (launcher._target_, sweeper._target_, needed):
        _require(target)
    if "hydra_ray_launcher" in launcher._target_:
        _check_ray(launcher.ray)
    if launcher._target_.endswith("SlurmLauncher") and shutil.which("srun") is None:
        raise UserError(
            "no srun in PATH: a SLURM sweep is typed on a machine of the cluster; "
            "hydra/launcher=slurm_local rehearses it here"
        )
    _check_devices(launcher, config)


def _require(target: str) -> None:
    for module, extra in _EXTRAS.items():
        if module in target and importlib.util.find_spec(f"hydra_plugins.{module}") is None:
            raise UserError(
                f"{module.replace('_', '-')} is not installed: pip install -e '.[{extra}]'"
            )


def _check_jobs(config: DictConfig) -> None:
    """Every value that is swept must be one, before the sweep's folder is there."""
    script, loader = config.hydra.job.config_name, GlobalHydra.instance().config_loader()
    foreign = any(
        source.provider not in ("hydra", "main", "schema")
        for source in config.hydra.runtime.config_sources
    )
    for job in jobs_of(config.hydra.overrides.task):
        try:
            cfg = loader.load_sweep_config(config, job)
        except HydraException as error:
            raise UserError(composition_error(error, script, job) or str(error)) from error
        cfg = checked(cfg, script, job)
        if foreign or any(map(only_targets_know, job)):
            check_targets(cfg)  # seconds, for what is imported


def _check_devices(launcher: DictConfig, config: DictConfig) -> None:
    """Several devices per job need a launcher whose jobs can start processes for them."""
    target, devices = launcher._target_, OmegaConf.select(config, "trainer.devices")
    if devices is None or "hydra_plugins" not in target:
        return
    several = isinstance(devices, int) and devices > 1
    if target.endswith("SlurmLauncher"):
        tasks = launcher.tasks_per_node
        if isinstance(devices, int) and devices > 0 and tasks != devices:
            raise UserError(
                f"trainer.devices={devices} with hydra.launcher.tasks_per_node={tasks}: SLURM "
                f"starts one process per device; add hydra.launcher.tasks_per_node={devices} "
                f"hydra.launcher.gpus_per_node={devices}"
            )
    elif several:
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
    gpus, cpus = ray.remote.get("num_gpus") or 0, ray.remote.get("num_cpus") or 1
    if gpus and ray.init.get("num_gpus") is None:
        import torch

        found = torch.cuda.device_count()
        if gpus > found:
            raise UserError(
                f"hydra.launcher.ray.remote.num_gpus={gpus}: PyTorch sees {found} GPUs here. "
                "hydra.launcher.ray.remote.num_gpus=0 runs without; "
                "hydra.launcher.ray.init.address names a Ray cluster."
            )
    cores = ray.init.get("num_cpus") or os.cpu_count() or 1
    if cpus > cores:
        raise UserError(
            f"hydra.launcher.ray.remote.num_cpus={cpus}: there are {cores}; ask for fewer per job"
        )
