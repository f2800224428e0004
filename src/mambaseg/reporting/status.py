"""What became of an experiment's runs: done, running, interrupted, failed, missing, damaged."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambaseg.reporting.collect import run_folders
from mambaseg.reporting.other_tables import duration
from mambaseg.reporting.tables import UNDEFINED, Grid
from mambaseg.storage.run_folder import RunFolder, this_host
from mambaseg.storage.untrusted import printable, read_json

if TYPE_CHECKING:
    from rich.table import Table

STATES = ("done", "running", "interrupted", "failed", "damaged", "missing")
SILENT = 3600.0  # s without a heartbeat after which a run counts as interrupted


@dataclass(frozen=True)
class RunState:
    """What became of one run.

    Attributes:
        name: its folder, or the overrides of a job that has none.
        state: one of `STATES`.
        cause: why it is not done; for a done run what is missing of it.
        time: how long it took, or has been running.
        commit: of the code, `+` for local changes.
        overrides: the job's words in a sweep, empty where no sweep lists it.
    """

    name: str
    state: str
    cause: str
    time: str
    commit: str
    overrides: str = ""


def states(folder: str | Path, *, now: datetime.datetime | None = None) -> list[RunState]:
    """All runs of an experiment, in the order of `STATES`, then by name.

    Jobs that a sweep has listed (`mambaseg.app.jobs`) and that have no run folder are `missing`, or
    `failed` where their error is known.

    Args:
        folder: `outputs/<experiment>`.
        now: the time to compare heartbeats with, aware; the present by default.

    Raises:
        UserError: no such folder, or nothing in it.
    """
    folder = Path(folder)
    now = now or datetime.datetime.now(datetime.UTC)
    jobs = _jobs(folder)
    overrides = {job["run"]: " ".join(job["overrides"]) for job in jobs if job["run"]}
    found = [_state(path, overrides.get(path.name, ""), now) for path in run_folders(folder)]
    known = {run.name for run in found}
    for job in jobs:
        if job["run"] not in known:
            words, error = " ".join(job["overrides"]), _first_line(str(job["error"] or ""))
            cause = error or (f"no folder {job['run']}" if job["run"] else "not started")
            found.append(RunState(words, "failed" if error else "missing", cause, "", "", words))
    return sorted(found, key=lambda run: (STATES.index(run.state), run.name))


def _jobs(folder: Path) -> list[dict[str, Any]]:
    """What sweeps noted of each job: `overrides`, `run`, `error`; nothing without a sweep.

    Words that all jobs share are left out: an experiment's table shows what differs.
    """
    jobs: list[dict[str, Any]] = []
    for file in sorted((folder / ".jobs").glob("*.json")):
        try:
            job = read_json(file)
            run, error = (None if job[key] is None else str(job[key]) for key in ("run", "error"))
            jobs.append({"overrides": [str(w) for w in job["overrides"]], "run": run,
                         "error": error})  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a list in pieces must not hide the runs
    if len(jobs) > 1:
        shared = set.intersection(*(set(job["overrides"]) for job in jobs))
        for job in jobs:
            job["overrides"] = [word for word in job["overrides"] if word not in shared]
    return jobs


def _state(path: Path, overrides: str, now: datetime.datetime) -> RunState:
    record = RunFolder(path).record
    state, cause = str(record.get("status", "damaged")), ""
    if state == "running":
        state, cause = _alive(path, record, now)
    elif state == "failed":
        cause = _first_line(str(record.get("error") or "no error recorded").strip())[:1000]
    elif state == "interrupted":
        cause = _first_line(str(record.get("error") or "").strip())[:1000]
    elif state == "done":
        cause = "" if RunFolder(path).finished else "no test scores (test=false)"
    elif state not in STATES or not record:
        state, cause = "damaged", "run.json cannot be read"
    return RunState(path.name, state, cause, _time(record, now), _commit(record), overrides)


def _first_line(error: str) -> str:
    """Of an error, and the next one after a colon: `Error in call to ...:` alone says little."""
    first, *rest = error.splitlines() or [""]
    return f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first


def _alive(path: Path, record: Mapping[str, Any], now: datetime.datetime) -> tuple[str, str]:
    pid, host = record.get("pid"), record.get("host")
    single = isinstance(pid, int) and 0 < pid < 1 << 31  # others mean groups of processes
    if single and host == this_host() and not _process_lives(int(pid or 0)):
        return "interrupted", f"process {pid} is gone"
    beat = _parse(record.get("heartbeat")) or _last_change(path)
    silence = (now - beat).total_seconds()
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


def _last_change(path: Path) -> datetime.datetime:
    """Of the files a run writes while it goes on: for records without a heartbeat."""
    files = [path / name for name in ("run.json", "metrics.csv", "train.log")]
    newest = max(file.stat().st_mtime for file in files if file.is_file())
    return datetime.datetime.fromtimestamp(newest, datetime.UTC)


def _parse(text: Any) -> datetime.datetime | None:
    try:
        moment = datetime.datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)


def _time(record: Mapping[str, Any], now: datetime.datetime) -> str:
    started = _parse(record.get("started"))
    if started is None:
        return ""
    ended = _parse(record.get("ended"))
    if ended is None:
        ended = now if record.get("status") == "running" else None
    return duration((ended - started).total_seconds()) if ended else ""


def _commit(record: Mapping[str, Any]) -> str:
    code = record.get("code")
    code = code if isinstance(code, dict) else {}
    return str(code.get("commit") or "")[:10] + ("+" if code.get("dirty") else "")


def counted(runs: list[RunState]) -> str:
    """`4 done, 1 failed`."""
    counts = {state: sum(run.state == state for run in runs) for state in STATES}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count)


def status_grid(runs: list[RunState]) -> Grid:
    """For the page and table.md."""
    rows = [
        [
            run.name,
            run.state,
            run.cause or UNDEFINED,
            run.time or UNDEFINED,
            run.commit or UNDEFINED,
        ]
        for run in runs
    ]
    header = ["run", "state", "cause", "time", "commit"]
    return Grid("Runs", header, rows, [f"{counted(runs)}. +: with local changes."], wide=5)


def status_table(runs: list[RunState], *, title: str) -> Table:
    """For the terminal: states in colour; overrides and cause below the name, in full."""
    from rich import box
    from rich.table import Table

    colours = dict(zip(STATES, ("green", "cyan", "yellow", "red", "red", "magenta"), strict=True))
    table = Table(title=_plain(title), caption=counted(runs), box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("state", "run", "time", "commit"):
        table.add_column(heading, overflow="fold", no_wrap=heading != "run")
    for run in runs:
        overrides = run.overrides if run.overrides != run.name else ""
        lines = [run.name, *(f"  {line}" for line in (overrides, run.cause) if line)]
        state = f"[{colours[run.state]}]{run.state}[/]"
        table.add_row(state, _plain("\n".join(lines)), run.time, _plain(run.commit))
    return table


def _plain(text: str) -> str:
    """Brackets of overrides are not rich's markup."""
    from rich.markup import escape

    return escape(printable(text))
