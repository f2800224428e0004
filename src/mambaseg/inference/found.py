"""The run that somebody means: a folder, a file, `newest`, a pattern, or the best of an experiment.

Every command that takes `run=` finds it here, and says which one it is where that was not typed.
"""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mambaseg.errors import UserError
from mambaseg.reporting.reading import is_other_task, read_identity
from mambaseg.storage.identity import better, monitor_of
from mambaseg.storage.run_folder import RunFolder

NEWEST = "newest"
_DEBUG = "debug"  # the experiment of debug=fast, whose networks have learnt nothing
_LISTED = 10  # matches that an error shows
log = logging.getLogger(__name__)


def find_run(
    named: str | Path, outputs: str | Path = "outputs", *, segmenting: bool = False
) -> Path:
    """The run folder or checkpoint file that is meant.

    Args:
        named: a run folder or a file, which are returned as they are; `newest`: the run that ended
            last, but those of `debug=`; a pattern (`outputs/heart/*mamba*`) that fits one run; or
            the folder of an experiment (`outputs/heart`): its best run by the validation score.
        outputs: folder of the experiments, for `newest`.
        segmenting: whether `newest` is to be one whose network gives label maps.

    Raises:
        UserError: there is no such run, or it is not clear which of several.
    """
    found = find_runs(named, outputs, segmenting=segmenting)
    if len(found) == 1:
        return found[0]
    listed = "".join(f"\n  {path}" for path in found[:_LISTED])
    more = f"\n  ... and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    raise UserError(f"run={named} fits {len(found)} runs; name one of them:{listed}{more}")


def find_runs(
    named: str | Path, outputs: str | Path = "outputs", *, segmenting: bool = False
) -> list[Path]:
    """Like `find_run`, but all runs that a pattern fits, those that ended last first."""
    path = Path(named).expanduser()
    if str(named) == NEWEST:
        found = [_newest(Path(outputs).expanduser(), segmenting=segmenting)]
    elif path.is_dir() and not _is_run(path) and any(path.glob("*/run.json")):
        found = [_best(path)]
    elif not path.exists() and re.search(r"[*?\[]", str(named)):
        matches = map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207 (may be absolute)
        runs = [match for match in matches if _is_run(match) or match.suffix == ".ckpt"]
        found = sorted(filter(_current, runs), key=_ended, reverse=True)
        open_ = [one for one in found if one.is_dir() and not RunFolder(one).trained]
        if open_ and len(open_) < len(found):
            log.warning("run=%s: left out, because their training has not ended: %s",
                        named, ", ".join(map(str, open_)))  # fmt: skip
            found = [one for one in found if one not in open_]
        if not found:
            raise UserError(f"run={named}: no run folder and no .ckpt file has such a name")
    else:
        found = [path]
    if len(found) == 1:
        if found != [path]:
            log.info("run=%s: %s", named, found[0])
        _warn_if_open(found[0])
    return found


def distinct(runs: Iterable[Path]) -> list[Path]:
    """Runs in their order without those whose network came before, which are warned of.

    A run folder and its best.ckpt are one, and so are two ways to the same file.
    """
    found: dict[Path, Path] = {}
    for run in runs:
        best = run / "checkpoints" / "best.ckpt"
        first = found.setdefault((best if best.is_file() else run).resolve(), run)
        if first is not run:
            log.warning("ensemble: %s is left out: %s is the same network", run, first)
    return list(found.values())


def weights_file(path: Path) -> Path:
    """The file of weights of a run folder or a bundle; a file is itself.

    Of a finished run without a best state it is the last one, which was tested.

    Raises:
        UserError: there is none.
    """
    remedy, named = "", path
    if path.is_dir():
        bundled, last = path / "model.safetensors", path / "checkpoints" / "last.ckpt"
        folder, path = path, bundled if bundled.is_file() else last.with_name("best.ckpt")
        if not path.is_file() and last.is_file():
            if RunFolder(folder).trained:
                log.warning("%s has no best state (no validation score was a number): its last one "
                            "is used", folder)  # fmt: skip
                return last
            remedy = f". The training has not ended; its last state is {last}: name that file"
    if not path.is_file():
        several = "; several go into ensemble=[...]" * ("," in named.name)
        raise UserError(
            f"there is no file {path}{remedy}" if remedy
            else f"there is no run folder, checkpoint or bundle {named}{several}"
        )  # fmt: skip
    return path


def _is_run(path: Path) -> bool:
    return (path / "run.json").is_file() or (path / "checkpoints").is_dir()


def _warn_if_open(path: Path) -> None:
    """Warns of a run folder whose network may become a better one; a file says nothing of it."""
    record = RunFolder(path).record if path.is_dir() else {}
    if record and record.get("status") != "done":
        log.warning("the training of %s has not ended (%s): its best state so far is used",
                    path, record.get("status"))  # fmt: skip


def _current(path: Path) -> bool:
    """Whether this is no run that another one has replaced."""
    return path.suffix != ".previous"


def _ended(path: Path) -> str:
    return str(RunFolder(path).record.get("ended", ""))


def _finished(folder: Path, pattern: str) -> list[Path]:
    """Finished runs below a folder that have a checkpoint; a pattern of run folders."""
    paths = {file.parent.parent for file in folder.glob(f"{pattern}/checkpoints/*.ckpt")}
    return sorted(path for path in paths if _current(path) and RunFolder(path).trained)


def _newest(outputs: Path, *, segmenting: bool) -> Path:
    """The finished run that ended last."""
    runs = [path for path in _finished(outputs, "*/*") if path.parent.name != _DEBUG]
    if segmenting:
        runs = [path for path in runs if not is_other_task(path)]
    if not runs:
        raise UserError(
            f"{outputs} holds no finished run: give run=<run folder or .ckpt>, or train one first "
            "(mambaseg train experiment=quickstart does, on the synthetic phantom)"
        )
    return max(runs, key=lambda path: (_ended(path), path))


def _best(experiment: Path) -> Path:
    """The finished run of an experiment with the best validation score, on one data set."""
    runs: dict[Path, tuple[str, str, str]] = {}  # -> what makes scores comparable
    scores: dict[Path, float] = {}
    for path in _finished(experiment, "*"):
        record, config = read_identity(path)
        monitor = monitor_of(config)
        score = record.get(monitor.replace("/", "_"))
        if isinstance(score, float):
            split = str((record.get("split") or {}).get("hash"))
            data: dict[str, Any] = record.get("data") or {}
            mode = ((config.get("callbacks") or {}).get("checkpoint") or {}).get("mode")
            runs[path] = f"{monitor} {mode or better(monitor)}", str(data.get("fingerprint")), split
            scores[path] = score
    if not runs:
        raise UserError(f"run={experiment} holds no finished run with a validation score")
    for index, what in enumerate(("are chosen by different scores", "have different data",
                                  "have different splits")):  # fmt: skip
        if len({known[index] for known in runs.values()}) > 1:
            raise UserError(
                f"run={experiment}: its runs {what}, so their validation scores do not say which "
                "is best. Name a run folder, or a pattern that fits one: "
                f"run='{experiment}/*<part of the name>*'"
            )
    monitor, mode = next(iter(runs.values()))[0].rsplit(" ", 1)  # a name of a class has blanks
    choose: Callable[..., Path] = min if mode == "min" else max
    best = choose(scores, key=scores.__getitem__)
    log.info("of %d finished runs in %s the best by %s (%.4f) is used",
             len(runs), experiment, monitor, scores[best])  # fmt: skip
    return best
