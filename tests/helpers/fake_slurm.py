#!/usr/bin/env python3
"""As much of SLURM as submitit and Lightning touch, on this machine: sbatch, srun, scontrol, sacct.

The tests install it under these names; FAKE_SLURM names a folder with the state: <job>.sh and
<job>.pid (the task that runs), `commands` (what was called).
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

STATE = Path(os.environ["FAKE_SLURM"])


def start(job: str) -> None:
    """Starts a job `<id>` or `<id>_<index of the array>` in a session of its own."""
    number, _, index = job.partition("_")
    env = {
        **os.environ,
        "SLURM_JOB_ID": str(int(number) + int(index or 0)),
        "SLURM_JOB_NAME": "fake",
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_JOB_NODELIST": "localhost",
        "FAKE_JOB": job,
    }
    if index:
        env |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": index}
    with (STATE / f"{job}.out").open("a") as out:
        subprocess.Popen(
            ["bash", str(STATE / f"{number}.sh")],
            env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip


def main() -> None:
    called, words = Path(sys.argv[0]).name, sys.argv[1:]
    with (STATE / "commands").open("a") as log:
        log.write(" ".join([called, *words]) + "\n")
    if called == "sbatch":
        shutil.copy(words[0], STATE / "100.sh")
        array = re.search(r"--array=0-(\d+)", Path(words[0]).read_text())
        for job in [f"100_{k}" for k in range(int(array[1]) + 1)] if array else ["100"]:
            start(job)
        sys.stdout.write("Submitted batch job 100\n")
    elif called == "srun":
        (STATE / f"{os.environ['FAKE_JOB']}.pid").write_text(str(os.getpid()))
        first = words.index(sys.executable)
        os.execvp(words[first], words[first:])
    elif called == "scontrol":
        assert words[0] == "requeue"
        start(words[1])
    elif called == "sacct":
        jobs = [f"{pid.stem}|RUNNING|localhost" for pid in STATE.glob("*.pid")]
        sys.stdout.write("\n".join(["JobID|State|NodeList", *jobs, ""]))


if __name__ == "__main__":
    main()
