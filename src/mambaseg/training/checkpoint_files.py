"""Checkpoints on disk: written whole or not at all, checked before they are believed, found again.

In `<run folder>/checkpoints` stand, while a training goes on,

    step-00000200.ckpt   the last few states, and the best ones that they refer to
    last.ckpt            another name (hard link) of the newest
    best.ckpt            another name of the one with the best validation score

and after its end the last two. A .ckpt file is torch's zip archive, which holds a CRC-32 of each of
its records; torch does not look at them when it reads, `damage` does. Nothing here executes
anything of a file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mambaseg.storage.files import whole_file

_NAME = re.compile(r"step-(\d+)\.ckpt")
STATE_KEY = "Checkpoints"  # in a checkpoint's `callbacks`
_AGAIN = (
    "choose another folder with outputs=...; with more space the same command goes on from the "
    "checkpoint before"
)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a training was.

    Attributes:
        step: optimizer steps behind it.
        best_step: those behind the best validation; None: there was none yet.
        ended: it had come to its end, which may be before its last step.
    """

    step: int
    best_step: int | None
    ended: bool = False


def step_file(folder: Path, step: int) -> Path:
    """Where the state after so many steps stands."""
    return folder / f"step-{step:08d}.ckpt"


def step_files(folder: Path) -> dict[int, Path]:
    """All states of a folder by step, the newest first."""
    found = {int(m[1]): p for p in folder.glob("step-*.ckpt") if (m := _NAME.fullmatch(p.name))}
    return dict(sorted(found.items(), reverse=True))


def write(content: Mapping[str, Any], path: Path) -> None:
    """Writes a checkpoint; when this returns it is on the disk, also if the machine then fails.

    Raises:
        UserError: it could not be written, e.g. the disk is full; what stood there still does.
    """
    with whole_file(path, otherwise=_AGAIN) as temporary, temporary.open("wb") as stream:
        try:
            torch.save(dict(content), stream)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch hides a full disk behind its own
                raise error.__context__ from error
            raise
        stream.flush()
        os.fsync(stream.fileno())
    _sync(path.parent)


def give_name(path: Path, name: Path) -> None:
    """Gives a file another name, in place of what has it; a copy where there are no hard links."""
    if name.exists() and name.samefile(path):
        return
    with whole_file(name, otherwise=_AGAIN) as temporary:
        try:
            temporary.hardlink_to(path)
        except OSError:
            with path.open("rb") as source, temporary.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
                target.flush()
                os.fsync(target.fileno())
    _sync(name.parent)


def damage(path: Path) -> str:
    """Why a checkpoint's bytes cannot be what was written; empty: they are.

    Reads the whole file: about half a second per gigabyte where it is in memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    except Exception as error:  # zipfile and zlib have a zoo of types for damaged files
        return (str(error) or type(error).__name__).splitlines()[0]
    return f"wrong checksum of {record}" if record else ""


def read_progress(path: Path) -> Progress | None:
    """How far the training of a checkpoint was; None: it is damaged, or no training left it so."""
    if damage(path):
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state = content["callbacks"][STATE_KEY]
        best, ended = state["best_step"], bool(state.get("ended"))
        return Progress(int(content["global_step"]), None if best is None else int(best), ended)
    except Exception:  # torch raises a zoo of types for files it cannot read
        return None


def newest(folder: Path) -> Path | None:
    """The newest state that a training can go on from exactly; None: there is none.

    That is one which is intact, as is the best one it refers to. What had to be left aside is said.
    """
    states = list(step_files(folder).values())
    last = folder / "last.ckpt"
    if last.is_file() and not any(last.samefile(path) for path in states):
        states.insert(0, last)  # the training had come to its end
    aside: list[str] = []
    for path in states:
        progress = read_progress(path)
        if progress and best_file(folder, progress, path):
            if aside:
                log.warning("%s: going on from %s instead", "; ".join(aside), path)
            return path
        missing = f"the best checkpoint of {path} is damaged or gone"
        aside.append(missing if progress else f"{path} is damaged")
    if aside:
        log.warning("%s: there is no other, the training starts anew", "; ".join(aside))
    return None


def best_file(folder: Path, progress: Progress, path: Path) -> Path | None:
    """The intact file of the best state up to a checkpoint; the checkpoint itself if none counts.

    Args:
        folder: with the checkpoints.
        progress: of the checkpoint.
        path: its file.
    """
    if progress.best_step in (None, progress.step):
        return path
    for file in (step_file(folder, progress.best_step), folder / "best.ckpt"):
        found = read_progress(file) if file.is_file() else None
        if found and found.step == progress.best_step:
            return file
    return None


def clear(folder: Path, *, keep: set[int]) -> None:
    """Removes what killed processes left half-written, and all states but those of some steps.

    A file that cannot be removed costs room and nothing else.
    """
    old = [path for step, path in step_files(folder).items() if step not in keep]
    for path in (*folder.glob(".*.tmp"), *old):
        with contextlib.suppress(OSError):
            path.unlink()


def _sync(folder: Path) -> None:
    """Lets a new name survive a failure of the machine, where folders can be synchronised."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems refuse
        pass
    finally:
        os.close(handle)
