"""A training that is killed again and again ends as one that was left alone, bit for bit."""

import csv
import json
import os
import signal

import numpy as np
import pytest
import torch

from forked_runs import run_forked
from runs import assert_same

SMALL = [
    "model=unet", "model.widths=[4,4,8,8,8]", "data.steps=16", "data.val_every=5",
    "data.num_workers=1", "trainer.accumulate_grad_batches=2", "trainer.log_every_n_steps=1",
    "trainer=cpu", "callbacks.progress=null", "+trainer.enable_progress_bar=false", "logger=csv",
    "callbacks.checkpoint.every=2",
]  # fmt: skip


def ended(outputs):
    """Everything that a run leaves, but times."""
    (folder,) = (path.parent for path in outputs.glob("*/*/metrics.json"))
    states = {
        name: torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
        for name in ("last", "best")
    }
    assert {path.name for path in folder.glob("checkpoints/*")} == {"last.ckpt", "best.ckpt"}
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "callbacks")
    arrays = np.load(folder / "overlays.npz")
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "done" and "error" not in record
    return {
        **{f"{name} {key}": state[key] for name, state in states.items() for key in kept},
        "rows": list(csv.reader((folder / "metrics.csv").open())),
        "cases": (folder / "cases.csv").read_text(),
        "scores": json.loads((folder / "metrics.json").read_text()),
        "overlays": {name: arrays[name] for name in arrays.files},
        "score": record["val_dice"],
    }


def slurm(folder):
    """The environment of a job that `srun` started, with an scontrol that notes its words."""
    folder.mkdir()
    tool = folder / "scontrol"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {folder}/called\n')
    tool.chmod(0o755)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
        "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_JOB_NUM_NODES": "1",
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(shared_run, tmp_path_factory):
    """Runs of one small network, and what happened to their processes."""
    folder = tmp_path_factory.mktemp("kills")
    words = [word for word in shared_run if not word.startswith(("outputs=", "data.steps="))]

    def run(name, **what):
        return {"words": [*words, *SMALL, f"outputs={folder / name}"], **what}

    signals = [["step 3 ", "SIGTERM"], ["step 6 ", "SIGINT"], ["val 10", "SIGUSR1"],
               ["step 12 ", "SIGUSR2"], ["step 14 ", "SIGHUP"], ["test", "SIGTERM"]]  # fmt: skip
    attempts = run_forked(
        {
            "undisturbed": run("undisturbed"),
            "killed": run("killed", kills=12, seed=1),
            "asked": run("asked", signals=signals),
            "slurm": run("slurm", signals=[["step 7 ", "SIGUSR1"]], env=slurm(folder / "tools")),
        }
    )
    return folder, attempts


@pytest.mark.timeout(1000)  # a minute on an idle machine; the fixture runs in here
def test_twelve_kills_leave_no_trace(runs):
    folder, attempts = runs
    assert [one["code"] for one in attempts["killed"]] == [-signal.SIGKILL] * 12 + [0]
    hit = {one["event"].split()[0] for one in attempts["killed"][:-1]}
    assert {"step", "save", "val", "test"} <= hit, hit
    assert attempts["killed"][-1]["step"] == 16  # all of the training was done before the last
    assert_same(ended(folder / "undisturbed"), ended(folder / "killed"))


def test_signals_that_ask_let_the_step_end_and_save_it(runs):
    folder, attempts = runs
    *asked, last = attempts["asked"]
    saved = [one["step"] for one in attempts["asked"][1:]]
    assert saved == [4, 7, 10, 13, 15, 16] and last["code"] == 0
    for one, name in zip(asked, ("TERM", "INT", "USR1", "USR2", "HUP", "TERM"), strict=True):
        assert one["code"] == 128 + signal.Signals[f"SIG{name}"], one
        assert (one["status"], one["error"]) == ("interrupted", f"stopped by SIG{name}")
    assert_same(ended(folder / "undisturbed"), ended(folder / "asked"))


def test_a_job_of_slurm_is_queued_again_and_leaves_nothing_of_lightning(runs):
    folder, attempts = runs
    stopped, last = attempts["slurm"]
    assert stopped["code"] == 128 + signal.SIGUSR1 and stopped["status"] == "interrupted"
    assert (folder / "tools" / "called").read_text() == "requeue 77\n"
    assert last["step"] == 8 and not list((folder / "slurm").rglob("hpc_ckpt*"))
    assert_same(ended(folder / "undisturbed"), ended(folder / "slurm"))


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("network", ["unet", "swin_unet", "mamba_unet"])
def test_twenty_kills_leave_no_trace_at_full_size(network, shared_run, tmp_path):
    """Published widths and depths, dropout and drop path; small images."""
    words = [word for word in shared_run if not word.startswith(("outputs=", "data.size="))]
    words += ["data.size=64", "data.batch_size=2", "data.steps=12", "data.val_every=4",
              "data.num_workers=2", "trainer.log_every_n_steps=1", "trainer=cpu", "logger=csv",
              "callbacks.progress=null", "+trainer.enable_progress_bar=false",
              "callbacks.checkpoint.every=1",
              f"model={network}"]  # fmt: skip

    def run(name, **what):
        return {"words": [*words, f"outputs={tmp_path / name}"], **what}

    attempts = run_forked(
        {"undisturbed": run("undisturbed"), "killed": run("killed", kills=20, seed=2)}, timeout=2900
    )
    assert [one["code"] for one in attempts["killed"]] == [-signal.SIGKILL] * 20 + [0]
    assert_same(ended(tmp_path / "undisturbed"), ended(tmp_path / "killed"))
