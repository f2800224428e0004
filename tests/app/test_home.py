"""A home folder that is absent, read-only or full, and boards that fail, cost no result."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from lightning.pytorch.loggers import Logger

from mambaseg.app.resolvers import wandb_mode
from mambaseg.errors import UserError
from mambaseg.storage import files
from mambaseg.storage.files import keep_caches
from mambaseg.storage.run_folder import RunFolder
from mambaseg.training.wandb_logger import StepRows, finish_wandb, wandb_logger
from runs import built, small_overrides
from small_disk import fill, small_disk
from wandb_file import read_run

ROOT = Path(__file__).parents[2]
TINY = ["model=unet", "model.widths=[2,4]", "model.dropout=[0,0]", "callbacks.progress=null"]
CACHES = ("MPLCONFIGDIR", "NUMBA_CACHE_DIR", "TRITON_HOME", "XDG_CACHE_HOME",
          "TORCHINDUCTOR_CACHE_DIR")  # fmt: skip
# a user of no name and no rights but to read; Python may lie in another user's home folder
NOBODY = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups",
          "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]  # fmt: skip


# ---- a training from the first to the last line --------------------------------------------------


def train(home, phantom_root, place, *words, before=()):
    """Trains in a process of its own; returns its run folder and what it said."""
    env = {key: value for key, value in os.environ.items()
           if not key.startswith(("WANDB", "XDG")) and key not in (*CACHES, "HOME")}  # fmt: skip
    env |= {"WANDB_MODE": "offline", "PYTHONPATH": str(ROOT / "src")}
    env |= {} if home is None else {"HOME": str(home)}
    small = [*small_overrides(phantom_root, place / "outputs"), f"data.cache_dir={place}/cache"]
    ended = subprocess.run(
        [*before, sys.executable, "src/train.py", *TINY, *small, "data.steps=2", *words],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    said = ended.stdout + ended.stderr
    assert ended.returncode == 0, said
    (record,) = place.glob("outputs/*/*/run.json")
    assert json.loads(record.read_text())["status"] == "done"
    assert list(record.parent.glob("figures/median_*.png"))
    return record.parent, said


def tables_of(folder):
    """The staged tables of an offline run, and that all of W&B's lies in the run folder."""
    assert read_run(folder)["exit_code"] == 0
    return list((folder / "wandb" / "data").rglob("artifacts/staging/*"))


def test_a_home_folder_that_cannot_exist(phantom_root, tmp_path):
    folder, said = train("/proc/nope", phantom_root, tmp_path)
    assert tables_of(folder)
    assert "The home folder is not writable" in said and "failed" not in said


def test_a_home_folder_is_left_as_it_is(phantom_root, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    folder, said = train(home, phantom_root, tmp_path)
    assert tables_of(folder) and "home folder" not in said
    left = {path.relative_to(home).parts[:2] for path in home.rglob("*") if path.is_file()}
    assert not [parts for parts in left if "wandb" in "/".join(parts)]


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0 or shutil.which("setpriv") is None,
    reason="only root can become somebody else",
)
@pytest.mark.parametrize("home", ["none", "read-only"])
def test_a_user_without_a_name_and_without_a_home(home, phantom_root):
    # every pytest that starts takes its own folder from all other users, also one of this moment
    with tempfile.TemporaryDirectory(prefix="nobody-") as made:
        place = Path(made)
        place.chmod(0o777)
        (place / "home").mkdir(mode=0o555)
        where = None if home == "none" else place / "home"
        folder, said = train(where, phantom_root, place, before=NOBODY)
        assert tables_of(folder) and "failed" not in said


# ---- where the caches go -------------------------------------------------------------------------


@pytest.fixture
def bare(monkeypatch):
    """No variable says where a cache is; what the test sets is undone."""
    for name in CACHES:
        monkeypatch.setenv(name, "set")  # so that it is restored, whatever the code does
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize("home", ["absent", "a file", "full", "unknown user"])
def test_caches_leave_a_home_that_takes_no_files(home, bare, tmp_path):
    place = tmp_path / "home"
    with small_disk(tmp_path / "disk", kibibytes=64) as disk:
        if home == "a file":
            place.touch()
        elif home == "full":
            fill(disk)
            place = disk
        bare.setenv("HOME", str(place))
        if home == "unknown user":
            bare.setattr(files, "home_file", lambda name: None)
        keep_caches()
        folders = {Path(os.environ[name]) for name in CACHES}
        assert len(folders) == len(CACHES) and all(folder.is_dir() for folder in folders)
        assert (os.environ["HOME"] == str(place)) == (home != "unknown user")


def test_caches_stay_in_a_home_that_takes_files_and_where_they_were_sent(bare, tmp_path):
    bare.setenv("HOME", str(tmp_path))
    keep_caches()
    assert not set(CACHES) & set(os.environ)
    bare.setenv("HOME", str(tmp_path / "absent"))
    bare.setenv("TRITON_HOME", "/somewhere")
    keep_caches()
    assert os.environ["TRITON_HOME"] == "/somewhere"


@pytest.mark.parametrize("content", [
    b"machine api.wandb.ai login user password k\xe9y\n", b"\xff\xfe\x00m", b"", None,
])  # fmt: skip
def test_a_netrc_in_any_encoding_is_looked_through(content, monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if content is not None:
        (tmp_path / ".netrc").write_bytes(content)
    online = content is not None and b"api.wandb.ai" in content
    assert wandb_mode() == ("online" if online else "offline")
    monkeypatch.setenv("NETRC", "~nobody-of-this-name/netrc")
    assert wandb_mode() == "offline"


def test_a_mode_of_wandb_that_no_run_can_have_is_refused(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_MODE", "shared")
    with pytest.raises(UserError, match="WANDB_MODE=shared: must be one of online"):
        wandb_mode()


def test_wandb_keeps_what_the_user_has_set(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "mine"))
    monkeypatch.delenv("WANDB_CACHE_DIR", raising=False)
    for name in ("one", "two"):
        wandb_logger(save_dir=tmp_path / name, name=name, mode="disabled")
        assert os.environ["WANDB_DATA_DIR"] == str(tmp_path / "mine")
        assert os.environ["WANDB_CACHE_DIR"] == str(tmp_path / name / "wandb" / "cache")
        finish_wandb(failed=False)
        assert "WANDB_CACHE_DIR" not in os.environ


# ---- what fails once the result is there ---------------------------------------------------------


def broken(*_, **__):
    raise RuntimeError("out of order")


@pytest.mark.parametrize(("logger", "places"), [
    ("csv", {
        "mambaseg.storage.run_folder.RunFolder.write_arrays": "overlays.npz",
        "mambaseg.training.callbacks.count_operations": "counting the network's operations",
        "mambaseg.reporting.views.SegmentationViews.draw": "drawing the figures",
        "mambaseg.training.callbacks.log_cases_to_wandb": "sending the cases to W&B",
        "mambaseg.training.run.table_of": "printing the table",
    }),
    ("default", {
        "mambaseg.training.run.describe_to_wandb": "describing the run to W&B",
        "wandb.sdk.wandb_run.Run.log": "the logger StepRows",
        "wandb.sdk.wandb_run.Run.finish": "ending the W&B run",
    }),
    ("default", {
        "mambaseg.reporting.views.SegmentationViews.media": "sending the cases to W&B",
        "wandb.init": "W&B did not start offline",
    }),
])  # fmt: skip
def test_what_only_shows_a_result_cannot_lose_it(logger, places, small_run, monkeypatch, caplog):
    import wandb

    run, start = built(*TINY, *small_run, "data.steps=2", f"logger={logger}"), wandb.init
    for place in places:
        monkeypatch.setattr(place, broken)
    if "wandb.init" in places:
        monkeypatch.setattr(
            wandb, "init", lambda **how: (start if how["mode"] == "disabled" else broken)(**how)
        )
    with run:
        run.fit()
        run.evaluate()
        run.report()
    folder = RunFolder(run.folder.path)
    assert folder.finished and folder.summary["foreground"]["dice"]
    said = [line for line in caplog.text.splitlines() if "out of order" in line]
    assert all(any(message in line for line in said) for message in places.values()), said


def test_a_checkpoint_that_cannot_be_removed_costs_room_only(small_run, monkeypatch):
    removed, unlink = [], Path.unlink

    def refusing(path, missing_ok=False):
        if path.suffix == ".ckpt":
            removed.append(path)
            raise OSError(errno.EBUSY, "busy")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refusing)
    with built(*TINY, *small_run, "logger=csv") as run:
        run.fit()
        run.evaluate()
    assert removed and RunFolder(run.folder.path).finished


def test_a_board_that_fails_in_the_training_is_said_once(small_run, monkeypatch, caplog):
    monkeypatch.setattr("wandb.sdk.wandb_run.Run.log", broken)
    with built(*TINY, "logger=default", *small_run, "trainer.log_every_n_steps=1") as run:
        run.fit()
    assert caplog.text.count("the curves are in metrics.csv only") == 1
    assert "StepRows failed (RuntimeError: out of order)" in caplog.text
    assert any(isinstance(logger, StepRows) for logger in run.trainer.loggers)
    assert RunFolder(run.folder.path).trained


class Grumpy(Logger):
    """Somebody's logger, which fails at one of the calls of Lightning."""

    name = version = "grumpy"

    def __init__(self, at):
        super().__init__()
        self.at = at

    def break_at(self, *calls):
        if self.at in calls:
            raise RuntimeError(f"no {self.at}")

    def log_metrics(self, metrics, step=None):
        self.break_at("log_metrics", *metrics)

    def log_hyperparams(self, *_, **__):
        self.break_at("log_hyperparams")

    def finalize(self, status):
        self.break_at("finalize")

    def save(self):
        self.break_at("save")


def test_no_logger_of_anybody_ends_a_run(small_run, caplog):
    calls = {"first": "log_metrics", "second": "test/dice", "third": "finalize", "fourth": "save"}
    mine = [f"+logger.{name}={{_target_: test_home.Grumpy, at: {at}}}"
            for name, at in calls.items()]  # fmt: skip
    with built(*TINY, *small_run, "data.steps=2", "logger=csv", *mine) as run:
        run.fit()
        run.evaluate()
    assert RunFolder(run.folder.path).finished
    for at in calls.values():
        assert caplog.text.count(f"the logger Grumpy failed (RuntimeError: no {at})") == 1
