"""One job per run folder, with real processes."""

import errno
import fcntl
import multiprocessing
import os
import platform
import re
import signal
import time
from pathlib import Path

import pytest

from mambaseg.errors import UserError
from mambaseg.storage.lock import RunLock
from runs import built

processes = multiprocessing.get_context("fork")


def hold(folder, ready, *, child=False):
    """Take the lock and keep it; `child`: leave a forked process behind, as a loader does."""
    lock = RunLock(folder)
    lock.acquire()
    if child and os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    ready.set()
    time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Start a process that holds the lock of tmp_path / "run"; ended with the test."""
    started = []

    def start(**options):
        ready = processes.Event()
        process = processes.Process(target=hold, args=(tmp_path / "run", ready), kwargs=options)
        process.start()
        started.append(process)
        assert ready.wait(20)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def test_a_second_job_is_refused_at_once_and_told_who_has_the_folder(holder, tmp_path, monkeypatch):
    first = holder()
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))
    with pytest.raises(UserError) as refused:
        RunLock(tmp_path / "run").acquire()
    said = str(refused.value)
    assert str(tmp_path / "run") in said and f"process {first.pid} on {platform.node()}" in said
    assert f"kill {first.pid}" in said and "same command" in said
    RunLock(tmp_path / "other").acquire()


def test_a_killed_process_leaves_no_lock(holder, tmp_path):
    first = holder()
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    assert lock.path.read_text().split() == [str(os.getpid()), platform.node()]
    lock.release()
    assert lock.path.read_text() == ""


def test_a_forked_loader_does_not_keep_the_lock_of_its_dead_parent(holder, tmp_path):
    first = holder(child=True)
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children")
    if not children.exists():
        pytest.skip("needs /proc to find the child")
    (child,) = map(int, children.read_text().split())
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    try:
        os.kill(child, 0)  # it lives
        RunLock(tmp_path / "run").acquire()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_can_be_taken_again_in_the_same_process(tmp_path):
    for _ in range(2):
        lock = RunLock(tmp_path / "run")
        lock.acquire()
        with pytest.raises(UserError, match=str(os.getpid())):
            RunLock(tmp_path / "run").acquire()
        lock.release()
        lock.release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):  # the first one killed: it never releases
        lock = RunLock(tmp_path / "run")
        lock.acquire()
        assert not lock.held
        assert "without locks" in caplog.text and str(tmp_path / "run") in caplog.text
        caplog.clear()
    lock.release()


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / ".locks").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=re.escape(str(tmp_path / ".locks"))):
        RunLock(tmp_path / "run").acquire()


# ---- runs


def configured(words):
    return built("model=unet", *words)


def go(run):
    with run:
        if not run.finished:
            run.fit()
            run.evaluate()
    return run


def test_two_jobs_of_one_folder(small_run):
    """The second is refused and changes nothing; built early, it takes the first one's result."""
    words = [*small_run, "data.steps=2"]
    first, second = configured(words), configured(words)
    refused = processes.SimpleQueue()

    def intrude():
        try:
            go(configured(words))
            refused.put("not refused")
        except UserError as error:
            refused.put(str(error))

    with first:
        before = first.folder.record
        intruder = processes.Process(target=intrude)
        intruder.start()
        assert f"process {os.getpid()} on" in refused.get()
        intruder.join()
        assert intruder.exitcode == 0
        assert first.folder.record == before
        first.fit()
        first.evaluate()
    assert not second.finished
    result = go(second)
    assert result.finished and result.score == first.score and result.task is None


def test_a_failed_run_lets_go(small_run, monkeypatch):
    words = [*small_run, "data.steps=2", "test=false"]
    for stage in ("_open_folder", "_prepare"):
        broken = configured(words)
        monkeypatch.setattr(broken, stage, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            broken.__enter__()
    run = go(configured(words))
    assert run.folder.trained
