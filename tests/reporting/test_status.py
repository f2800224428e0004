"""What became of runs, seen from their records alone."""

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mambaseg.reporting.status import jobs, states, summary
from mambaseg.storage.run_folder import this_host

NOW = datetime.datetime(2026, 11, 24, 12, tzinfo=datetime.UTC)
SCRIPT = Path(__file__).parents[2] / "src" / "report.py"


def write(folder, name, **record):
    (folder / name).mkdir()
    (folder / name / "run.json").write_text(json.dumps(record))
    if "heartbeat" in record:
        written(folder / name / "run.json", record["heartbeat"])


def written(file, moment):
    """Dates a file back."""
    os.utime(file, (datetime.datetime.fromisoformat(moment).timestamp(),) * 2)


def write_job(folder, seed, run, error=None):
    """As `mambaseg.app.jobs` does."""
    (folder / ".jobs").mkdir(exist_ok=True)
    job = {"overrides": ["model=unet", f"seed={seed}"], "run": run, "error": error}
    (folder / ".jobs" / f"{seed}.json").write_text(json.dumps(job))


def heartbeat(minutes):
    return (NOW - datetime.timedelta(minutes=minutes)).isoformat()


def dead_process():
    """Number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def experiment(tmp_path):
    here = this_host()
    started = heartbeat(200)
    code = {"commit": "0123456789abcdef", "dirty": True}
    write(tmp_path, "alive", status="running", started=started, pid=os.getpid(), host=here,
          heartbeat=heartbeat(59), code=code)  # fmt: skip
    write(tmp_path, "silent", status="running", started=started, pid=os.getpid(), host=here,
          heartbeat=heartbeat(61))  # fmt: skip
    write(tmp_path, "gone", status="running", pid=dead_process(), host=here,
          heartbeat=heartbeat(1))  # fmt: skip
    write(tmp_path, "elsewhere", status="running", pid=dead_process(), host="another host",
          heartbeat=heartbeat(1))  # fmt: skip
    write(tmp_path, "failed", status="failed", error="UserError: no data\nmore", started=started,
          ended=heartbeat(195))  # fmt: skip
    write(tmp_path, "stopped", status="interrupted", error="stopped by SIGINT")
    for name in ("untested", "lost"):
        write(tmp_path, name, status="done")
    (tmp_path / "untested" / "config.yaml").write_text("test: false\n")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    write_job(tmp_path, 1, "failed")
    write_job(tmp_path, 2, None)
    write_job(tmp_path, 3, "removed")
    write_job(tmp_path, 4, None, "UserError: no such network\nmore")
    return tmp_path


def test_every_state_is_told_with_its_cause(experiment):
    found = {run.name: (run.state, run.cause) for run in states(experiment, now=NOW)}
    assert found["alive"] == ("running", "")
    assert found["elsewhere"] == ("running", "")
    assert found["silent"] == ("interrupted", "no sign of life for 1 h 1 min")
    assert found["gone"][0] == "interrupted" and "is gone" in found["gone"][1]
    assert found["failed"] == ("failed", "UserError: no data")
    assert found["stopped"] == ("interrupted", "stopped by SIGINT")
    assert found["untested"] == ("done", "no test scores (test=false)")
    assert found["lost"] == ("done", "no test scores: metrics.json is gone")
    assert found["broken"] == ("damaged", "run.json cannot be read")
    assert found["seed=2"] == ("missing", "not started")
    assert found["seed=3"] == ("missing", "no folder removed")
    assert found["seed=4"] == ("failed", "UserError: no such network")
    assert len(found) == 12


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux tells")
def test_a_killed_process_that_nobody_asked_for_yet_is_gone(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, still in the table
    write(tmp_path, "run", status="running", pid=process.pid, host=this_host(),
          heartbeat=heartbeat(1))  # fmt: skip
    assert [run.state for run in states(tmp_path, now=NOW)] == ["interrupted"]
    process.wait()


def test_time_commit_and_overrides_stand_beside(experiment):
    runs = {run.name: run for run in states(experiment, now=NOW)}
    assert runs["failed"].time == "5 min 0 s" and runs["failed"].overrides == "seed=1"
    assert runs["alive"].time == "3 h 20 min" and runs["alive"].commit == "0123456789+"
    assert summary(list(runs.values())) == (
        "2 done, 2 running, 3 interrupted, 2 failed, 1 damaged, 2 missing"
    )


def test_without_a_heartbeat_the_files_tell(tmp_path):
    write(tmp_path, "old", status="running")
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=2)
    assert [run.state for run in states(tmp_path)] == ["running"]
    assert [run.state for run in states(tmp_path, now=later)] == ["interrupted"]


@pytest.mark.parametrize("minutes", [59, 61])
def test_a_run_that_writes_its_log_lives_without_heartbeats(tmp_path, minutes):
    write(tmp_path, "long", status="running", heartbeat=heartbeat(300))
    (tmp_path / "long" / "train.log").write_text("scored 30 of 50 cases\n")
    written(tmp_path / "long" / "train.log", heartbeat(minutes))
    (run,) = states(tmp_path, now=NOW)
    lost = ("interrupted", "no sign of life for 1 h 1 min")
    assert (run.state, run.cause) == (("running", "") if minutes < 60 else lost)


def test_what_one_job_shares_its_neighbours_tell(tmp_path):
    for seed in (1, 2):
        write_job(tmp_path, seed, None)
    (job,) = jobs(tmp_path, {"2.json"})
    assert job.overrides == "seed=2"


def test_a_damaged_list_of_jobs_is_no_obstacle(tmp_path):
    write(tmp_path, "run", status="done")
    write_job(tmp_path, 1, None)
    for number, text in enumerate(("[3]", "{", '{"overrides": 3}')):
        (tmp_path / ".jobs" / f"{number}.json").write_text(text)
    assert [run.state for run in states(tmp_path)] == ["done"]


def typed(*words):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, words)], capture_output=True,
                          text=True, timeout=120)  # fmt: skip


def test_the_command_prints_the_states(experiment):
    done = typed("status", experiment)
    assert done.returncode == 0, done.stderr
    for said in ("interrupted", "seed=2", "UserError: no data", "2 missing"):
        assert said in done.stdout


def test_the_command_explains_itself_and_its_errors(tmp_path):
    done = typed("--help")
    assert done.returncode == 0 and "report status outputs/<experiment>" in done.stdout
    done = typed(tmp_path / "nothing")
    assert done.returncode == 1 and "no such folder" in done.stderr
    assert "Traceback" not in done.stderr
