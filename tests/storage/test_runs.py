import errno
import importlib
import json
import math
import os
import subprocess
import time

import numpy as np
import pytest
from torch.backends import cpu

from mambaseg.errors import UserError
from mambaseg.storage import files, run_folder
from mambaseg.storage.identity import identity
from mambaseg.storage.run_folder import RunFolder, code_changed, code_state, environment, slug

CONFIG = {
    "name": "default",
    "outputs": "outputs",
    "seed": 1,
    "model": {"name": "unet"},
    "data": {"root": "a", "size": 64, "num_workers": 0},
    "trainer": {"devices": 1, "precision": "32-true", "max_time": None},
}


def key(config=CONFIG, split="s", data="d"):
    return identity(config, split=split, data=data)


def changed(group, **values):
    return {**CONFIG, group: {**CONFIG[group], **values}}


def test_identity_ignores_what_cannot_change_a_result():
    assert key({**CONFIG, "name": "other", "outputs": "/elsewhere", "rerun": True}) == key()
    assert key(changed("data", root="b", num_workers=7, cache_dir="x")) == key()
    assert key(changed("trainer", devices=4, strategy="ddp", accelerator="gpu")) == key()


@pytest.mark.parametrize(
    "config",
    [
        {**CONFIG, "seed": 2},
        changed("model", name="swin_unet"),
        changed("data", size=96),
        changed("trainer", precision="bf16-mixed"),
        changed("trainer", anything_we_do_not_know=1),
    ],
)
def test_identity_follows_what_can(config):
    assert key(config) != key()


def test_identity_follows_split_and_data():
    assert len({key(), key(split="t"), key(data="e")}) == 3


def test_slug_needs_no_quoting():
    assert slug("synthetic phantom, not ACDC = ünsafe/..") == "synthetic-phantom-not-acdc-nsafe"


def test_folder_goes_from_start_to_done(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.start(key="1")
    assert folder.record["status"] == "running" and not folder.finished
    folder.write_json("metrics.json", {"x": math.nan, "y": (1, 2)})
    folder.finish("done", extra=3)
    assert folder.finished and folder.record["extra"] == 3 and folder.record["key"] == "1"
    assert folder.summary == {"x": None, "y": [1, 2]}
    assert not list(folder.path.glob("*.tmp"))


def test_a_repeated_start_keeps_what_was_there(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.start()
    (folder.path / "precious").write_text("x")
    folder.start()
    assert (tmp_path / "run.previous" / "precious").read_text() == "x"
    assert not (folder.path / "precious").exists()


def test_attempts_to_repeat_a_finished_run_do_not_cost_its_result(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.start()
    (folder.path / "precious").write_text("x")
    folder.finish("done")
    for status in ("running", "failed", "interrupted"):
        folder.start()
        folder.update(status=status)
    folder.start()
    assert (tmp_path / "run.previous" / "precious").read_text() == "x"
    folder.finish("done")
    folder.start()
    assert not (tmp_path / "run.previous" / "precious").exists()


def test_damaged_record_counts_as_unfinished(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "run.json").write_text('{"status": "do')
    assert folder.record == {} and not folder.finished


@pytest.mark.parametrize("fault", [OSError(errno.EIO, "Input/output error"), ValueError("no JSON")])
def test_a_record_that_cannot_be_read_is_not_written_over(tmp_path, monkeypatch, caplog, fault):
    folder = RunFolder(tmp_path / "run")
    folder.start(key="1")
    folder.finish("done")
    before = folder.record

    def read_json(path):
        raise fault

    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "read_json", read_json)
        assert folder.record == {}
        for write in (folder.update, folder.resume, lambda: folder.finish("failed")):
            with pytest.raises(UserError, match=r"cannot read .*run\.json"):
                write()
        folder.beat(steps=3)
        assert "cannot read" in caplog.text
        if isinstance(fault, OSError):  # it may be there, and finished
            with pytest.raises(UserError, match="Input/output error"):
                folder.start()
    assert folder.record == before and not (tmp_path / "run.previous").exists()


def test_rows_have_the_union_of_columns(tmp_path):
    path = RunFolder(tmp_path).write_rows("cases.csv", [{"a": 1}, {"a": 2, "b": "x,y"}])
    assert path.read_text().splitlines() == ["a,b", "1,", '2,"x,y"']


def test_a_failed_write_leaves_the_old_file(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_json("metrics.json", {"a": 1})
    with pytest.raises(TypeError):
        folder.write_json("metrics.json", {"a": object()})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": 1}


def test_a_file_is_synchronised_as_windows_asks_for(tmp_path, monkeypatch):
    opened = []  # there a file must be open for writing, and a folder cannot be opened at all
    monkeypatch.setattr(files.os, "fsync", lambda handle: opened.append(os.write(handle, b"")))
    with files.whole_file(tmp_path / "a", durable=True) as temporary:
        temporary.write_bytes(b"x")
        monkeypatch.setattr(files.os, "name", "nt")
    monkeypatch.undo()
    assert opened == [0] and (tmp_path / "a").read_bytes() == b"x"


def test_environment_holds_versions_and_hardware_but_no_variables(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret-value")
    record = environment()
    assert record["versions"]["torch"] and record["hardware"]["cores"] >= 1
    assert record["hardware"]["instructions"] == cpu.get_cpu_capability()
    assert "secret-value" not in json.dumps(record)


def test_code_change_is_said():
    now = code_state()
    assert code_changed(now, now) == ""
    sentence = code_changed({"digest": "other", "commit": "abcdef1234567", "dirty": True}, now)
    assert "abcdef1234 with local changes" in sentence and "rerun=true" in sentence
    assert "made by other code (unknown commit;" in code_changed({"digest": "other"}, now)


@pytest.mark.parametrize(
    ("name", "layout"),
    [("own_a", "own_a.py"), ("own_b", "own_b/__init__.py"), ("own_c", "own_c/d.py")],
)
def test_a_change_of_the_users_own_code_is_said(name, layout, tmp_path, monkeypatch):
    """Of a module, a package, and a folder without __init__.py."""
    source = tmp_path / layout
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("def net(): pass")
    targets = ("torch.nn.ReLU", "mambaseg.training.losses.DiceCE", "functools.partial")
    config = {"a": {"_target_": f"{name}.net"}, "b": [{"_target_": one} for one in targets]}
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(name)
    now = code_state(config)
    assert set(now["own"]) == {name} and "own" not in code_state()
    assert not code_changed(now, code_state(config)) and not code_changed(code_state(), now)
    source.write_text("def net(): return 1")
    assert code_changed(now, code_state(config)) == (
        f"made by other code ({name}): rerun=true makes it again"
    )


def test_the_commit_of_a_repository_that_mambaseg_is_installed_below_is_not_its_own(
    tmp_path, monkeypatch
):
    package = tmp_path / ".venv/lib/mambaseg/storage"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()

    def git(*words):
        name = ["-c", "user.name=x", "-c", "user.email=x"]
        subprocess.run(["git", "-C", tmp_path, *name, *words], check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "x")
    monkeypatch.setattr(run_folder, "__file__", str(package / "run_folder.py"))
    assert code_state()["commit"] is None
    git("add", ".")
    git("commit", "-m", "y")
    assert code_state()["commit"] is None  # as it was when this process began
    run_folder._package_state.cache_clear()
    assert len(code_state()["commit"]) == 40 and code_state()["dirty"] is False


def test_the_code_of_a_process_is_that_of_its_first_run(tmp_path, monkeypatch):
    """A sweep runs what it has imported, whatever is written to the files meanwhile."""
    package = tmp_path / "mambaseg/storage"
    package.mkdir(parents=True)
    (package / "a.py").write_text("x = 1")
    monkeypatch.setattr(run_folder, "__file__", str(package / "run_folder.py"))
    before = code_state()
    (package / "a.py").write_text("x = 2")
    assert code_state() == before
    run_folder._package_state.cache_clear()
    assert code_state()["digest"] != before["digest"]


def test_a_record_survives_a_power_cut_as_checkpoints_do(tmp_path, monkeypatch):
    synchronised = []
    monkeypatch.setattr(files, "synchronise", lambda path: synchronised.append(path.parent.name))
    folder = RunFolder(tmp_path / "run")
    for write in (folder.start, lambda: folder.resume(step=1), folder.beat, folder.update):
        write()
        assert "run" in synchronised
        synchronised.clear()


def test_a_heartbeat_that_cannot_be_written_ends_no_training(tmp_path, monkeypatch, caplog):
    folder = RunFolder(tmp_path / "run")
    folder.start()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
    folder.beat(steps=3)
    assert "No space left on device" in caplog.text and "steps" not in folder.record
    with pytest.raises(UserError, match="No space left"):  # nor does a run begin without a record
        RunFolder(tmp_path / "other").start()


@pytest.mark.parametrize("number", [math.inf, -math.inf, np.float32("nan"), np.float64("inf")])
def test_what_json_does_not_have_is_null(tmp_path, number):
    path = RunFolder(tmp_path).write_json("metrics.json", {"x": [number, np.float32(0.5)]})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"x": [None, 0.5]}


@pytest.mark.parametrize("length", [1, 250])
def test_any_name_that_fits_can_be_written(tmp_path, length):
    path = tmp_path / ("ü" * (length // 2) + "x" * (length % 2))
    files.write_whole(path, "text")
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_temporary_names_differ_where_the_process_ids_do_not(tmp_path, monkeypatch):
    """Two containers have a process 1 each, and may share a folder."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with files.whole_file(tmp_path / "a") as one, files.whole_file(tmp_path / "a") as other:
        assert one != other and one.match(".*.tmp")
        one.touch(), other.touch()


def test_an_unfinished_folder_in_which_somebody_writes_stays(tmp_path):
    for name, age in (("live", 0), ("left", 2)):
        file = tmp_path / name / "inside" / "file"
        file.parent.mkdir(parents=True)
        file.touch()
        old = time.time() - 48 * 3600
        for path in (file.parent, file.parent.parent):
            os.utime(path, (old, old))
        os.utime(file, (old, old) if age else None)
    files.remove_abandoned(tmp_path, "*")
    assert [path.name for path in tmp_path.iterdir()] == ["live"]


def test_what_an_editor_leaves_beside_the_sources_is_none_of_them(tmp_path, monkeypatch):
    """Emacs locks a file by a link to nowhere; Jupyter keeps copies."""
    package = tmp_path / "own_e"
    (package / ".ipynb_checkpoints").mkdir(parents=True)
    (package / "__init__.py").write_text("def net(): pass")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("own_e")
    config = {"a": {"_target_": "own_e.net"}}
    before = code_state(config)["own"]
    (package / ".#nets.py").symlink_to("user@host.1234:1")
    (package / "gone.py").symlink_to("nowhere.py")
    (package / ".ipynb_checkpoints" / "nets-checkpoint.py").write_text("x")
    assert code_state(config)["own"] == before
