"""Trains the first steps of a finished run again, scores its checkpoint again, and compares.

A result made by earlier code is still a result of the present code if the first steps give the same
losses, and the stored weights the same scores. Nothing is written to the run's folder.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from mambaseg.app.api import composed, our_hydra
from mambaseg.app.build import build
from mambaseg.app.entry import explained_errors
from mambaseg.app.overrides import arranged, key_of
from mambaseg.errors import UserError
from mambaseg.reporting.labels import flatten
from mambaseg.reporting.reading import read_identity, reading
from mambaseg.storage.files import keep_caches
from mambaseg.storage.identity import scientific
from mambaseg.storage.untrusted import read_table

_OWN = ("name", "outputs", "run_dir", "rerun", "test", "logger")
_BUDGET = ("data.minutes", "data.steps", "data.val_every")
_QUIET = ("logger=csv", "callbacks.progress=null", "name=replay")
Table = dict[tuple[str, ...], str]  # what a number is of -> its text in the file
log = logging.getLogger(__name__)


class Compared(NamedTuple):
    """Numbers of a run and of its replay."""

    values: int
    difference: float  # the largest, relative to numbers above 1; 0.0 only for the same digits


class Replay(NamedTuple):
    """What came of a run."""

    path: Path
    steps: Compared  # losses, rates and validations of the first steps
    scores: Compared | str  # cases.csv of best.ckpt; or why there is nothing to compare
    since: str  # what has changed: code, versions, machine; empty: nothing


def replay(
    path: Path, words: Sequence[str] = (), *, steps: int, config_dir: str | Path | None = None
) -> Replay:
    """Replays one finished run.

    Args:
        path: its run folder, or what `mambaseg report pack` has kept of it.
        words: overrides for this machine, such as `data.root=...`.
        steps: how many optimizer steps.
        config_dir: as `--config-dir` when it was trained.

    Raises:
        UserError: it is no finished training, its overrides or data make another run now, or
            the file that has its losses is missing, or a table is damaged.
    """
    record, config = read_identity(path)
    before, cases = _of_steps(path, steps), _of_cases(path)
    test = f"test={str(cases is not None).lower()}"  # nothing is scored that the run left unseen
    keep_caches()
    with TemporaryDirectory(prefix="mambaseg-replay-") as place, _threads(record.get("threads")):
        kept = _overrides(path, record, config)
        _, own = arranged([*kept, *_QUIET, f"outputs={place}", *words, test])
        with (
            explained_errors(UserError),
            our_hydra(config_dir),
            build(composed("config", own)) as run,
        ):
            _require_same(path, record, config, run)
            run.trainer.fit_loop.epoch_loop.max_steps = min(steps, config["data"]["steps"])
            run.trainer.fit(run.task, datamodule=run.data)
            found = _compare(before, _of_steps(run.folder.path, steps))
            best = path / "checkpoints" / "best.ckpt"
            scores: Compared | str = "no best.ckpt" if cases else "not tested"
            if cases and best.is_file():
                shutil.copy(best, run.folder.path / "checkpoints" / "best.ckpt")
                run.evaluate()
                scores = _compare(cases, _of_cases(run.folder.path) or {})
            return Replay(path, found, scores, _since(record, run.folder.record))


def _overrides(path: Path, record: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    """The overrides of the run's command that are about the training; its time as its steps."""
    budget = {key: config["data"].get(key.partition(".")[2]) for key in _BUDGET[1:]}
    if (
        record.get("status") != "done"
        or not isinstance(record.get("overrides"), list)
        or not all(isinstance(number, int) for number in budget.values())
    ):
        raise UserError(f"{path} is not the folder of a finished training that has its overrides")
    for word in record["overrides"]:
        if (key := key_of(word)).partition(".")[0] in _OWN or key in _BUDGET:
            continue
        if "_target_" in word or "${" in word:  # a run folder may come from anybody
            raise UserError(
                f"{path}/run.json: {word} asks for an object or a value of the machine. Such "
                "overrides are not taken from a run folder."
            )
        yield word
    if "minutes" in config["data"]:  # an experiment may have given the time
        yield "data.minutes=null"
    yield from (f"{key}={number}" for key, number in budget.items())


@contextmanager
def _threads(count: Any) -> Iterator[None]:
    """As many threads as the run had, for the same rounding."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count if isinstance(count, int) and count > 0 else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _require_same(
    path: Path, record: Mapping[str, Any], config: Mapping[str, Any], run: Any
) -> None:
    """Refuses where the same words make another run now."""
    old, new = (flatten(scientific(one)) for one in (config, run.config))
    changed = [
        f"{key} was {old.get(key)}, is {new.get(key)}" for key in sorted({*old, *new})
        if json.dumps(old.get(key), default=str) != json.dumps(new.get(key), default=str)
    ]  # fmt: skip
    for what, value in (("fingerprint", run.data.fingerprint), ("split", run.data.split.hash)):
        part = record.get("split" if what == "split" else "data") or {}
        if (was := part.get("hash" if what == "split" else what)) != value:
            changed.append(f"the {what} of the data was {was}, is {value}")
    if changed:
        raise UserError(f"{path}: its overrides make another run now: {'; '.join(changed[:5])}")


def _of_steps(path: Path, steps: int) -> Table:
    """What metrics.csv has of the first steps, the test aside."""
    with reading(path / "metrics.csv") as file:
        rows = read_table(file, growing=True)[1]
        early = [row for row in rows if int(row["step"]) < steps]
    found: Table = {
        (row["step"], key): text
        for row in early
        for key, text in row.items() if text and key != "step" and not key.startswith("test/")
    }  # fmt: skip
    if not any("loss" in key for _, key in found):
        raise UserError(
            f"{path / 'metrics.csv'} has no loss of its first steps, as it logs every "
            f"trainer.log_every_n_steps: give more than --steps {steps}"
        )
    return found


def _of_cases(path: Path) -> Table | None:
    """The scores of cases.csv; None: the run has scored no test set."""
    names = ("case", "class", "class_name")  # a restoration has the first of them only
    if not any((path / name).is_file() for name in ("cases.csv", "metrics.json")):
        return None
    with reading(path / "cases.csv") as file:
        scores: Table = {
            (row["case"], row.get("class", ""), key): text
            for row in read_table(file)[1]
            for key, text in row.items() if key not in names
        }  # fmt: skip
        if not scores:
            raise ValueError("it holds no scores")
    return scores


def _compare(before: Table, now: Table) -> Compared:
    """The largest difference of what the run has; infinite where the replay has no such number."""
    worst = 0.0
    for key, text in before.items():
        if (other := now.get(key)) != text:
            try:
                a, b = float(text), float(other or "")
                found = abs(a - b) / max(1.0, abs(a))
                worst = max(worst, found if math.isfinite(found) else math.inf)
            except ValueError:
                worst = math.inf
    return Compared(len(before), worst)


def _since(record: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Code, packages and machine that are not those of the run."""
    changed = []
    for group, names in {
        "code": ("digest",), "versions": ("torch", "numpy", "numba", "monai"),
        "hardware": ("cpu", "instructions"),
    }.items():  # fmt: skip
        was, there = record.get(group) or {}, now.get(group) or {}
        changed += [
            "code" if name == "digest" else f"{name} {was.get(name)} → {there.get(name)}"
            for name in names
            if was.get(name) != there.get(name) and (name != "instructions" or name in was)
        ]  # fmt: skip
    return ", ".join(changed)
