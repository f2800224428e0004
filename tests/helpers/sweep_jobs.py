"""What the tests of sweeps share: engines that may be absent, and a way to type a sweep."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

from typed import typed as typed_anywhere

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "src" / "train.py"
LIGHT = ROOT / "tests" / "helpers" / "light_jobs.py"
PLUGINS = {
    "joblib": "hydra_joblib_launcher",
    "submitit_slurm": "hydra_submitit_launcher",
    "submitit_local": "hydra_submitit_launcher",
    "ray": "hydra_ray_launcher",
    "search": "hydra_optuna_sweeper",
}
CHEAP = {  # words that let an engine run anywhere
    "basic": [],
    "joblib": ["hydra/launcher=joblib"],
    "submitit_local": ["hydra/launcher=submitit_local"],
    "ray": [
        "hydra/launcher=ray",
        "hydra.launcher.ray.remote.num_gpus=0",
        "hydra.launcher.ray.remote.num_cpus=1",
    ],
}


def needs(launcher):
    plugin = PLUGINS.get(launcher)
    if plugin and importlib.util.find_spec(f"hydra_plugins.{plugin}") is None:
        pytest.skip(f"needs {plugin}: make setup-launchers")


def environment(**changes):
    env = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    env |= {
        "RAY_raylet_start_wait_time_s": "200",
        "RAY_agent_register_timeout_ms": "200000",
    }  # a busy machine is slow to start Ray
    return {**env, **changes}


def typed(*words, script=LIGHT, env=None):
    return typed_anywhere(*words, script=script, env=env or environment())


def notes(outputs):
    found = [json.loads(path.read_text()) for path in (outputs / "notes").glob("*.json")]
    return sorted(found, key=lambda note: (note["model"], note["seed"]))
