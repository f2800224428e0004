"""State of an experiment's runs: done, running, interrupted, failed, missing, damaged."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from mambaseg.reporting.grid import UNDEFINED, Grid, duration
from mambaseg.reporting.reading import run_folders
from mambaseg.storage.run_folder import RunFolder, this_host
from mambaseg.storage.untrusted import read_json, read_yaml

STATES = ("done", "running", "interrupted", "failed", "damaged", "missing", "skipped")
SILENT = 3600.0  # s without a heartbeat or a written file until a run counts as interrupted


class RunState(NamedTuple):
    """State of one run."""

    name: str  # its folder, or the overrides of a job that has none
    state: str  # one of `STATES`
    cause: str = ""  # why it is not done; for a done run what is missing
    time: str = ""  # how long it took, or has been running
    commit: str = ""  # of the code, `+` for local changes
    overrides: str = ""  # of the job in a sweep, empty where no sweep lists it


def states(folder: str | Path, *, now: datetime.datetime | None = None) -> list[RunState]:
    """All runs of an experiment, in the order of `STATES`, then by name.

    Jobs that a sweep has listed (`mambaseg.app.sweeps`) and that have no run folder are `missing`,
    `failed` where their error is known, or `skipped` where an optional package is not installed.

    `folder` is `outputs/<experiment>`, `now` an aware time to compare heartbeats with.

    Raises:
        UserError: no such folder, or nothing in it.
    """
    folder = Path(folder)
    now = now or datetime.datetime.now(datetime.UTC)
    listed = jobs(folder)
    overrides = {job.run: job.overrides for job in listed if job.run}
    found = [state_of(path, overrides.get(path.name, ""), now) for path in run_folders(folder)]
    known = {run.name for run in found}
    for job in listed:
        if job.run not in known:
            cause = job.error or (f"no folder {job.run}" if job.run else "not started")
            found.append(RunState(job.overrides, job.state, cause, overrides=job.overrides))
    return sorted(found, key=lambda run: (STATES.index(run.state), run.name))


class Job(NamedTuple):
    """A job of a sweep, as its file in `.jobs` tells."""

    overrides: str  # without those that all jobs share
    run: str  # name of its run folder, empty where it has none
    error: str
    state: str  # where it has no run folder


def jobs(folder: Path, files: Collection[str] | None = None) -> list[Job]:
    """The jobs of the sweeps; none without a sweep.

    Overrides that all jobs share are left out: an experiment's table shows what differs. `files`
    are the names of those in `<folder>/.jobs` that are asked for; None: all. Where that is one, it
    is compared with all jobs of the experiment.
    """
    found: dict[str, tuple[list[str], str, str, str]] = {}
    for file in sorted((folder / ".jobs").glob("*.json")):
        try:
            job = read_json(file)
            run, error = (str(job[key] or "") for key in ("run", "error"))
            state = "skipped" if job.get("skipped") else "failed" if error else "missing"
            words = [str(word) for word in job["overrides"]]
            found[file.name] = (words, run, _first_line(error), state)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged list must not hide the runs
    asked = [job for name, job in found.items() if files is None or name in files]
    compared = [set(words) for words, *_ in (asked if len(asked) > 1 else found.values())]
    shared = set.intersection(*compared) if len(compared) > 1 else set()
    return [
        Job(" ".join(word for word in words if word not in shared), run, error, state)
        for words, run, error, state in asked
    ]


def state_of(path: Path, overrides: str, now: datetime.datetime) -> RunState:
    """State of one run folder; `overrides` are those of its job."""
    record = RunFolder(path).record
    state, cause = str(record.get("status", "damaged")), ""
    error = _first_line(str(record.get("error") or "").strip())[:1000]
    if state == "running":
        state, cause = _alive(path, record, now)
    elif state in ("failed", "interrupted"):
        cause = error or ("no error recorded" if state == "failed" else "")
    elif state == "done":
        cause = "" if RunFolder(path).finished else _untested(path)
    else:
        state, cause = "damaged", "run.json cannot be read"
    code = record["code"] if isinstance(record.get("code"), Mapping) else {}
    commit = str(code.get("commit") or "")[:10] + ("+" if code.get("dirty") else "")
    return RunState(path.name, state, cause, _time(record, now), commit, overrides)


def _untested(path: Path) -> str:
    """Why a finished run has no test scores."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if read_yaml(path / "config.yaml").get("test") is False:
            return "no test scores (test=false)"
    return "no test scores: metrics.json is gone"


def _first_line(error: str) -> str:
    """Of an error, and the next one after a colon: `Error in call to ...:` alone says little."""
    first, *rest = error.splitlines() or [""]
    return f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first


def _alive(path: Path, record: Mapping[str, Any], now: datetime.datetime) -> tuple[str, str]:
    pid, host = record.get("pid"), record.get("host")
    single = isinstance(pid, int) and 0 < pid < 1 << 31  # others mean groups of processes
    if single and host == this_host() and not _process_lives(int(pid or 0)):
        return "interrupted", f"process {pid} is gone"
    files = [path / name for name in ("run.json", "metrics.csv", "train.log")]
    written = max(file.stat().st_mtime for file in files if file.is_file())
    last = datetime.datetime.fromtimestamp(written, datetime.UTC)
    silence = (now - max(last, _parse(record.get("heartbeat")) or last)).total_seconds()
    if silence > SILENT:
        return "interrupted", f"no sign of life for {duration(silence)}"
    step = record.get("steps")
    return "running", f"step {step}" if isinstance(step, int) else ""


def _process_lives(pid: int) -> bool:
    if os.name != "posix":
        return True  # os.kill would end the process there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:  # killed, but its parent has not asked for it yet
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True


def _parse(text: Any) -> datetime.datetime | None:
    try:
        moment = datetime.datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)


def _time(record: Mapping[str, Any], now: datetime.datetime) -> str:
    started, ended = _parse(record.get("started")), _parse(record.get("ended"))
    if ended is None and record.get("status") == "running":
        ended = now
    return duration((ended - started).total_seconds()) if started and ended else ""


def summary(runs: Sequence[RunState]) -> str:
    """`4 done, 1 failed`."""
    counts = {state: sum(run.state == state for run in runs) for state in STATES}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count)


def status_grid(runs: Sequence[RunState]) -> Grid:
    """For the page and table.md."""
    rows = [[cell or UNDEFINED for cell in run[:5]] for run in runs]
    notes = [f"{summary(runs)}. +: with local changes."]
    header = ["run", "state", "cause", "time", "commit"]
    marks = {index: f"state-{run.state}" for index, run in enumerate(runs)}
    return Grid("Runs", header, rows, notes, wide=5, marks=marks)


def status_table(runs: Sequence[RunState], *, title: str) -> Table:
    """For the terminal: a colour per state; overrides and cause below the name, in full."""
    rows = []
    for run in runs:
        lines = [run.overrides if run.overrides != run.name else "", run.cause]
        name = "\n".join([run.name, *(f"  {line}" for line in lines if line)])
        rows.append([run.state, name, run.time, run.commit])
    header = ["state", "run", "time", "commit"]
    marks = status_grid(runs).marks
    return Grid(title, header, rows, [summary(runs)], wide=2, marks=marks).terminal()
