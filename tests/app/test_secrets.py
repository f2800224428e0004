"""No environment variable ends up in a run folder, W&B's offline files or the report."""

import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mambaseg.reporting.report import write_report
from mambaseg.storage.run_folder import RunFolder, this_host
from runs import small_overrides
from wandb_file import read_run, records

ROOT = Path(__file__).parents[2]
# what a job's environment may hold; SLURM_ and USER are what W&B itself looks at
NAMES = (
    "WANDB_API_KEY",
    "SOME_SECRET",
    "SLURM_COMMENT",
    "USER",
    "LOGNAME",
    "AWS_SECRET_ACCESS_KEY",
)


@pytest.fixture(scope="module")
def experiment(phantom_root, tmp_path_factory):
    """A sweep of one training that ends well and one that fails once W&B runs, with its report."""
    canaries = {name: secrets.token_hex(20) for name in NAMES}
    outputs = tmp_path_factory.mktemp("secrets") / "outputs"
    done = subprocess.run(
        [sys.executable, str(ROOT / "src" / "train.py"), "-m", "model=unet", "name=exp",
         *small_overrides(phantom_root, outputs), "model.widths=[4,8,8,8,8]", "logger=default",
         "optim.optimizer.lr=0.01,1e30"],
        capture_output=True, text=True, timeout=280, stdin=subprocess.DEVNULL, check=False,
        env={**os.environ, **canaries, "WANDB_MODE": "offline"},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr[-2000:]
    folder = outputs / "exp"
    write_report(folder)
    return folder, canaries, done.stdout + done.stderr


def test_no_byte_of_the_folder_is_a_secret(experiment):
    folder, canaries, said = experiment
    files = [file for file in folder.rglob("*") if file.is_file()]
    names = {file.name for file in files}
    assert {"index.html", "config.yaml", "train.log", "last.ckpt", "debug.log"} <= names
    assert sum(file.suffix == ".wandb" for file in files) == 2
    for name, value in canaries.items():
        assert value not in said, name
        for file in files:
            assert value.encode() not in file.read_bytes(), (name, file)
            assert name == "USER" or value not in file.name


def test_wandb_gets_no_description_of_the_process(experiment):
    """Its own would hold SLURM's environment, the command line, host name and local changes."""
    folder, _, _ = experiment
    for path in folder.glob("*/wandb/offline-run-*/*.wandb"):
        for record in records(path):
            assert record.WhichOneof("record_type") != "environment"
            if record.WhichOneof("record_type") == "run":
                assert record.run.host == this_host() and not record.run.git.remote_url
        names = {file.name for file in path.parent.rglob("*") if file.is_file()}
        assert not names & {"wandb-metadata.json", "requirements.txt", "diff.patch", "train.py"}
        if len(socket.gethostname()) > 5:  # shorter ones occur by chance
            assert socket.gethostname().encode() not in path.read_bytes()


def test_wandb_learns_instead_what_the_run_was_made_with(experiment):
    folder, _, _ = experiment
    (path,) = (path for path in folder.glob("*-seed*") if RunFolder(path).trained)
    made_with = read_run(path)["config"]["made_with"]
    assert made_with["versions"]["torch"] and made_with["hardware"]["cores"]
    assert made_with["code"].keys() == {"digest", "commit", "dirty"}
