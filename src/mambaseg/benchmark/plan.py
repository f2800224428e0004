"""A long measurement in slices: commands one after the other, ended and gone on with by the clock.

For machines that are lent for minutes. A part is a command that may be repeated: a training goes on
from its last state, anything else starts anew. What is done stands in `plan.json` and is not done
again; a part whose command has changed is another part.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mambaseg.errors import UserError
from mambaseg.files import whole_file, writing
from mambaseg.foreign import read_json

GRACE_S = 25.0
"""Before a slice's end, when a part is asked to stop: it finishes its step and saves its state."""
SPARE_S = 3.0
"""Before a slice's end, when a part that has not stopped is killed."""
_OTHERWISE = "choose another folder"
_AGAIN = "Remove it: every part is then done again"
# what does not travel: it is large, of use where the trainings go on only, or drawn from the rest
_LEFT = {"checkpoints", "wandb", ".locks", "report", "figures"}
MOST = 15 << 20  # bytes of a file that is given back by a machine that is lent
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One command of a plan.

    Args:
        name: its key in `plan.json`, and of its log.
        words: the command, behind `python`.
        least_s: it is not begun with less of the slice left.
        environment: variables that it gets besides ours.
    """

    name: str
    words: tuple[str, ...]
    least_s: float = 60.0
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """As one would type it."""
        return shlex.join(["python", *self.words])


class Plan:
    """The parts of a measurement and how far they are.

    Args:
        parts: in the order of their weight: what comes last is left out when time runs out.
        folder: for `plan.json` and a log of each part.
        cwd: where the commands run.
    """

    def __init__(self, parts: Sequence[Part], folder: Path, *, cwd: Path) -> None:
        self.parts, self.folder, self.cwd = list(parts), folder, cwd
        self._record = self._read()
        self._asked = threading.Event()  # to stop, by a signal
        self._process: subprocess.Popen[bytes] | None = None

    def _read(self) -> dict[str, dict[str, Any]]:
        path = self.folder / "plan.json"
        if not path.exists():
            return {}
        try:
            record = read_json(path)
        except ValueError as error:
            raise UserError(f"{path}: {error}. Remove it: every part is then done again") from error
        if not isinstance(record, dict) or not all(isinstance(v, dict) for v in record.values()):
            raise UserError(
                f"{path}: no record of a plan. Remove it: every part is then done again"
            )
        return record

    def state(self, part: Part) -> dict[str, Any]:
        """`status` (waiting, done, stopped, failed), `seconds` and `slices` so far."""
        known = self._record.get(part.name)
        if known is None or known.get("command") != part.command:
            return {"command": part.command, "status": "waiting", "seconds": 0.0, "slices": 0}
        return known

    def left(self) -> list[Part]:
        """The parts that are not done."""
        return [part for part in self.parts if self.state(part)["status"] != "done"]

    def run(self, seconds: float) -> None:
        """Do what fits into one slice; failed parts do not keep the others from their turn.

        Args:
            seconds: length of the slice.
        """
        end = time.monotonic() + seconds
        with self._signals():
            for part in self.left():
                left = end - time.monotonic()
                if self._asked.is_set() or left < part.least_s + GRACE_S:
                    return
                if self._do(part, end) == "stopped":
                    return

    def _do(self, part: Part, end: float) -> str:
        before = self.state(part)
        log.info("%s: %s", part.name, part.command)
        self._note(part, {**before, "status": "stopped"})  # should we be killed ourselves
        started = time.monotonic()
        code, asked = self._call(part, end)
        # a part may end by itself in the moment it is asked to stop
        status = "done" if code == 0 else "stopped" if asked else "failed"
        seconds = round(before["seconds"] + time.monotonic() - started, 1)
        self._note(part, {**before, "status": status, "seconds": seconds, "code": code,
                          "slices": before["slices"] + 1})  # fmt: skip
        log.info("%s: %s after %.0f s", part.name, status, time.monotonic() - started)
        if status == "failed":
            log.warning("the end of %s:\n%s", self.log_of(part), _tail(self.log_of(part)))
        return status

    def _call(self, part: Part, end: float) -> tuple[int, bool]:
        """Exit code, and whether the part was asked to stop."""
        environment = {**os.environ, **part.environment}
        with writing(self.folder, otherwise=_OTHERWISE), self.log_of(part).open("ab") as stream:
            self._process = process = subprocess.Popen(
                [sys.executable, *part.words], cwd=self.cwd, env=environment, stdout=stream,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        try:
            while process.poll() is None and time.monotonic() < end - GRACE_S:
                if self._asked.wait(0.05):
                    end = min(end, time.monotonic() + GRACE_S)
            if process.poll() is not None:
                return process.returncode, False
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(max(0.0, end - SPARE_S - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("%s has not stopped in time: killed", part.name)
            return process.poll() or 0 if process.poll() is not None else _killed(process), True
        finally:
            if process.poll() is None:
                _killed(process)
            self._process = None

    def log_of(self, part: Part) -> Path:
        """What a part has printed, in all its slices."""
        return self.folder / f"{part.name}.log"

    def _note(self, part: Part, state: dict[str, Any]) -> None:
        self._record[part.name] = state
        path = self.folder / "plan.json"
        with whole_file(path, otherwise=_OTHERWISE) as temporary:
            temporary.write_text(json.dumps(self._record, indent=1), encoding="utf-8")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Whoever ends this process lets the part that runs save its state first."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.getsignal(number) for number in numbers}
        try:
            for number in numbers:
                signal.signal(number, lambda *_: self._asked.set())
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _killed(process: subprocess.Popen[bytes]) -> int:
    process.kill()
    return process.wait()


def _tail(path: Path, lines: int = 15) -> str:
    return "\n".join(path.read_text("utf-8", errors="replace").splitlines()[-lines:])


# ---- what travels ---------------------------------------------------------------------------


def pack_results(folder: Path, place: Path) -> list[Path]:
    """What of `folder` is worth a way, as `place`/results-1.zip, -2, ...: files of at most `MOST`.

    Left out are checkpoints and what `report.py` draws anew from the rest. Archives of an earlier
    slice are replaced.
    """
    files = [
        file for file in sorted(folder.rglob("*"))
        if file.is_file() and file.suffix != ".tmp" and place not in file.parents
        and not _LEFT & set(file.relative_to(folder).parts)
    ]  # fmt: skip
    groups: list[list[Path]] = [[]]
    size = 0
    for file in files:
        packed = len(zlib.compress(file.read_bytes())) + 1000  # and its entries in the archive
        if groups[-1] and size + packed > MOST:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += packed
    for old in place.glob("results-*.zip"):
        old.unlink()
    paths = [place / f"results-{number}.zip" for number, _ in enumerate(groups, start=1)]
    for path, group in zip(paths, groups, strict=True):
        with (
            whole_file(path, otherwise=_OTHERWISE) as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive,
        ):
            for file in group:
                archive.write(file, file.relative_to(folder))
    return paths


def unpack_results(place: Path, folder: Path) -> None:
    """Puts back what `pack_results` has packed, on a machine that has nothing yet.

    Raises:
        UserError: one of the files is no archive.
    """
    for path in sorted(place.glob("results-*.zip")):
        try:
            with writing(folder, otherwise=_OTHERWISE), zipfile.ZipFile(path) as archive:
                archive.extractall(folder)  # which leaves no path outside of it
        except (zipfile.BadZipFile, EOFError) as error:
            raise UserError(f"{path}: no results of an earlier slice ({error})") from error
