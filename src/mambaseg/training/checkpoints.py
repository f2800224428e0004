"""Checkpoints: when a training saves its state, how the file is written, which one is resumed.

A state is saved when the next optimizer step begins, after everything about the last one has been
logged, validated and judged. All that Lightning counts is then a function of the number of steps,
and a resumed training is set to it (`_set_loops`): it validates and logs at the same steps.

During a training `<run folder>/checkpoints` holds

    step-00000200.ckpt   the last few states, and the best ones that they refer to
    last.ckpt            another name (hard link) of the newest
    best.ckpt            another name of the one with the best validation score

and after its end the last two. A .ckpt file is torch's zip archive with a CRC-32 of each record;
torch does not look at them when it reads, `damage` does. Nothing here executes anything of a file.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import math
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mambaseg.errors import UserError, out_of_memory
from mambaseg.storage.files import whole_file
from mambaseg.storage.identity import better

STATE_KEY = "Checkpoints"  # of the callback's state in a checkpoint, as Lightning names it
_AGAIN = (
    "choose another folder with outputs=...; once there is space, the same command resumes from "
    "the checkpoint before"
)
_PLAIN = "numbers and texts of Python, lists, dictionaries and tensors"
log = logging.getLogger(__name__)


# ---- the callback


class Checkpoints(Checkpoint):
    """Saves the state of a training: every so many steps, after each validation, and at its end.

    Args:
        folder: for the files.
        monitor: the logged value that makes a state the best; nan never does.
        mode: whether more of it is better (`max`) or less (`min`); None: see `better`.
        every: optimizer steps between two states; None: only validations and the end save one.
        keep: the newest states that are kept, and the best one of each of them.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        monitor: str = "val/dice",
        mode: Literal["max", "min"] | None = None,
        every: int | None = 100,
        keep: int = 2,
    ) -> None:
        self.folder = Path(folder)
        self.monitor, self.mode = monitor, mode or better(monitor)
        self.every, self.keep = every, keep
        self.best_score: float | None = None  # of the best validation so far
        self.best_step: int | None = None  # optimizer steps behind it
        self.ended = False  # the training has, which may be before its last step
        self._validated = False
        self._saved = 0  # step of the newest state
        self._best_of: dict[int, int | None] = {}  # step of a state -> that of its best one
        self._generators: dict[str, Any] | None = None  # to be set at the first step

    def state_dict(self) -> dict[str, Any]:
        """The best validation, and torch's generators for networks that draw from them."""
        generators = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            generators["cuda"] = torch.cuda.get_rng_state()
        return {
            "best_score": self.best_score,
            "best_step": self.best_step,
            "ended": self.ended,
            "generators": generators,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores them; the generators once the loaders have drawn their seeds."""
        self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]
        self._generators = state_dict["generators"]

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Sets Lightning's counters before it reads them."""
        step = self._saved = checkpoint["global_step"]
        if step < trainer.max_steps:
            _set_loops(checkpoint["loops"]["fit_loop"], step, trainer.accumulate_grad_batches)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves in the folder only what the loaded state refers to."""
        # not in `on_train_start`: that is not called where no step is left, and the process may
        # have died before the last state had its names
        if self._saved and trainer.is_global_zero:
            self._arrange()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Judges the validation; its state is saved when the next step begins."""
        if trainer.sanity_checking:
            return
        self._validated = True
        if self.monitor not in trainer.callback_metrics:
            raise UserError(
                f"callbacks.checkpoint.monitor={self.monitor}: the validation logged no such "
                f"score, only {', '.join(trainer.callback_metrics)}"
            )
        score = float(trainer.callback_metrics[self.monitor])
        sign = 1 if self.mode == "max" else -1
        known = -math.inf if self.best_score is None else sign * self.best_score
        if sign * score > known:
            self.best_score, self.best_step = score, trainer.global_step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Saves the state between two steps."""
        if batch_idx % trainer.accumulate_grad_batches:
            return  # within a step
        if self._generators:
            torch.set_rng_state(self._generators["cpu"])
            if "cuda" in self._generators and torch.cuda.is_initialized():
                torch.cuda.set_rng_state(self._generators["cuda"])
            self._generators = None
        if self._validated or (self.every and trainer.global_step % self.every == 0):
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the true last state."""
        self.ended = True
        self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Saves the state, between two steps; every rank has to call this."""
        step, self._validated = trainer.global_step, False
        if step == self._saved:
            return
        for logger in trainer.loggers:  # no state is on the disk before the rows that lead to it
            if hasattr(logger, "sync"):
                logger.sync()
        trainer.save_checkpoint(step_file(self.folder, step))
        self._saved, self._best_of[step] = step, self.best_step
        if trainer.is_global_zero:
            self._name()

    def _arrange(self) -> None:
        """Drops what came after the loaded state, and finds what the older ones refer to."""
        self._best_of = {self._saved: self.best_step}
        for step, path in step_files(self.folder).items():
            progress = read_progress(path) if step <= self._saved else None
            if progress:
                self._best_of[step] = progress.best_step
            else:
                path.unlink()
        # the names of the loaded state and of its best one may be all that is left of them
        for name, needed in (("last.ckpt", self._saved), ("best.ckpt", self.best_step)):
            if needed is not None and not step_file(self.folder, needed).exists():
                give_name(self.folder / name, step_file(self.folder, needed))
        self._name()

    def _name(self) -> None:
        """Gives newest and best state their names and removes those that nothing refers to."""
        if self.best_step is not None:
            give_name(step_file(self.folder, self.best_step), self.folder / "best.ckpt")
        give_name(step_file(self.folder, self._saved), self.folder / "last.ckpt")
        newest = sorted(self._best_of)[-self.keep :]
        self._best_of = {step: self._best_of[step] for step in newest}
        clear(self.folder, keep={*newest, *self._best_of.values()})


def states_of(trainer: L.Trainer) -> Checkpoints | None:
    """What saves the states of a training; None: nothing does."""
    return next((one for one in trainer.checkpoint_callbacks if isinstance(one, Checkpoints)), None)


def _set_loops(fit_loop: dict[str, Any], step: int, accumulate: int) -> None:
    """Sets Lightning's counters to their values after the hooks of the last batch of a step."""
    batches = step * accumulate
    done = {"ready": batches, "started": batches, "processed": batches, "completed": batches - 1}
    begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    for key, counts in (("epoch_progress", begun), ("epoch_loop.batch_progress", done)):
        fit_loop[key].update(total=dict(counts), current=dict(counts))
    fit_loop["epoch_loop.batch_progress"]["is_last_batch"] = False
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1


# ---- files


class CheckedIO(TorchCheckpointIO):
    """How Lightning writes and reads checkpoints here: atomically, and never a damaged one."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Writes one, see `write`."""
        write(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Reads one; UserError: it is damaged, holds more than plain data, or cannot be read."""
        if reason := damage(Path(path)):
            raise UserError(
                f"checkpoint: {path} is damaged ({reason}). Put a good copy there, or train again "
                "(rerun=true)."
            )
        with _reading(path):
            return super().load_checkpoint(path, *args, **kwargs)


def write(content: Mapping[str, Any], path: Path) -> None:
    """Writes a checkpoint that can be read again, or none; when this returns it is on the disk."""
    with whole_file(path, otherwise=_AGAIN, durable=True) as temporary:
        with temporary.open("wb") as stream:
            try:
                torch.save(dict(content), stream)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # torch hides a full disk behind its own
                    raise error.__context__ from error
                raise
        try:
            _mapped(temporary)
        except pickle.UnpicklingError as error:
            *place, kind = _not_plain(content)
            raise UserError(
                f"{path} is not written, because it could not be read again: {' / '.join(place)} "
                f"is a {kind}. Keep only {_PLAIN} in what callbacks, method and optimizer save "
                "(float(number), str(path), list(queue)); the same command then goes on"
            ) from error


def _not_plain(content: Any) -> list[str]:
    """The keys that lead to what is not loaded again, and its type."""
    inside = content.items() if isinstance(content, Mapping) else ()
    for key, value in enumerate(content) if isinstance(content, (list, tuple)) else inside:
        torch.save(value, stream := io.BytesIO())
        try:
            torch.load(io.BytesIO(stream.getvalue()), weights_only=True)
        except pickle.UnpicklingError:
            return [str(key), *_not_plain(value)]
    return [f"{type(content).__module__}.{type(content).__qualname__}"]


def give_name(path: Path, name: Path) -> None:
    """Gives a file another name, replacing what has it; a copy where there are no hard links."""
    if name.exists() and name.samefile(path):
        return
    with whole_file(name, otherwise=_AGAIN, durable=True) as temporary:
        try:
            temporary.hardlink_to(path)
        except OSError:
            shutil.copyfile(path, temporary)


def step_file(folder: Path, step: int) -> Path:
    """The file of the state after so many steps."""
    return folder / f"step-{step:08d}.ckpt"


def step_files(folder: Path) -> dict[int, Path]:
    """All states of a folder by step, the newest first; UserError: it cannot be read."""
    paths: list[Path] = []
    with _reading(folder), contextlib.suppress(FileNotFoundError):
        paths = sorted(folder.iterdir(), reverse=True)  # `glob` takes a locked folder for empty
    matches = ((re.fullmatch(r"step-([0-9]{8})\.ckpt", path.name), path) for path in paths)
    return {int(match[1]): path for match, path in matches if match}


def clear(folder: Path, *, keep: set[int | None]) -> None:
    """Removes what killed processes left half-written, and all states but those of some steps."""
    old = [path for step, path in step_files(folder).items() if step not in keep]
    for path in (*folder.glob(".*.tmp"), *old):
        with contextlib.suppress(OSError):  # it costs room and nothing else
            path.unlink()


# ---- which one to resume from


class Progress(NamedTuple):
    """How far a training was: its steps, those behind its best validation, whether it had ended."""

    step: int
    best_step: int | None
    ended: bool = False


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Says why a file that need not be damaged is not read: no training begins anew for that."""
    try:
        yield
    except pickle.UnpicklingError as error:
        if not (refused := re.search(r"GLOBAL (\S+)", str(error))):
            raise
        raise UserError(
            f"{path} is whole, but it holds {refused[1]}, and only {_PLAIN} are loaded. Keep those "
            "alone in what callbacks, method and optimizer save, and train again (rerun=true)"
        ) from error
    except (OSError, MemoryError, RuntimeError) as error:
        bent = isinstance(error, OSError) and error.errno == errno.EINVAL  # a seek to nowhere
        if bent or not (isinstance(error, OSError) or out_of_memory(error)):
            raise
        raise UserError(
            f"cannot read {path} ({error or type(error).__name__}), which may be as it was "
            "written. Check disk and memory, and start the same command again"
        ) from error


def damage(path: Path) -> str:
    """Why a checkpoint's bytes, all of which are read, are not those written; empty: they are."""
    try:
        with _reading(path), zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    except UserError:
        raise
    except Exception as error:  # zipfile and zlib have a zoo of types for damaged files
        return (str(error) or type(error).__name__).splitlines()[0]
    return f"wrong checksum of {record}" if record else ""


def read_progress(path: Path) -> Progress | None:
    """How far the training of a checkpoint was; None: it is damaged, or not of a training."""
    if damage(path):
        return None
    try:
        with _reading(path):
            content = _mapped(path)
        state = content["callbacks"][STATE_KEY]
        best, ended = state["best_step"], bool(state.get("ended"))
        return Progress(int(content["global_step"]), None if best is None else int(best), ended)
    except UserError:
        raise
    except Exception:  # torch raises a zoo of types for what no checksum covers
        return None


def _mapped(path: Path) -> Any:
    """What a checkpoint holds, its tensors left in the file where the file system allows it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:
        return torch.load(path, map_location="cpu", weights_only=True)


def newest(folder: Path) -> Path | None:
    """The newest state that is intact, as is the best one it refers to; None: there is none."""
    states = list(step_files(folder).values())
    last = folder / "last.ckpt"
    if last.is_file() and not any(last.samefile(path) for path in states):
        states.insert(0, last)  # the training had come to its end
    aside: list[str] = []
    for path in states:
        progress = read_progress(path)
        if progress and _best_is_intact(folder, progress):
            if aside:
                log.warning("%s: resuming from %s instead", "; ".join(aside), path)
            return path
        missing = f"the best checkpoint of {path} is damaged or gone"
        aside.append(missing if progress else f"{path} is damaged")
    if aside:
        log.warning("%s: there is no other, the training starts from the beginning",
                    "; ".join(aside))  # fmt: skip
    return None


def _best_is_intact(folder: Path, progress: Progress) -> bool:
    if progress.best_step in (None, progress.step):
        return True
    files = (step_file(folder, progress.best_step), folder / "best.ckpt")
    found = (read_progress(file) for file in files if file.is_file())
    return any(one and one.step == progress.best_step for one in found)
