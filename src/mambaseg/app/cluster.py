"""What a run has to do with SLURM when a script of the user's starts it: being queued again."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment

log = logging.getLogger(__name__)


def requeue_call() -> Callable[[], None] | None:
    """What queues this SLURM job again; None in other processes than the first of such a job."""
    if not SLURMEnvironment.detect() or os.environ.get("SLURM_PROCID", "0") != "0":
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
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
