"""What callbacks watch: checked before anything is trained, and how good a validation is by it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pkgutil import resolve_name
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import (
    Checkpoint,
    EarlyStopping,
    ModelCheckpoint,
    WeightAveraging,
)

from mambaseg.errors import UserError
from mambaseg.storage.identity import better
from mambaseg.training.checkpoints import Checkpoints, states_of

# Lightning's callbacks that count epochs, or change what the data module has to know
_INSTEAD = {
    "StochasticWeightAveraging": "use callbacks=ema",
    "GradientAccumulationScheduler": "set trainer.accumulate_grad_batches",
    "BatchSizeFinder": "set data.batch_size",
    "LearningRateFinder": "set optim.optimizer.lr",
    "ModelPruning": "prune the trained network",
    "BackboneFinetuning": "train two runs, the second with run=<the first>",
}
log = logging.getLogger(__name__)


def settle_callbacks(
    cfg: Any, *, logged: Sequence[str], modes: Mapping[str, str] | None = None
) -> None:
    """Fills in which way a callback's monitor in `cfg` is better; UserError: it cannot work.

    `logged` names what the task's validation logs; `modes` has `min` or `max` of those whose names
    do not tell.
    """
    states, averages = [], []
    folder = f"{cfg.get('run_dir')}/checkpoints"
    for name, config in (cfg.get("callbacks") or {}).items():
        if not config or not isinstance(kind := resolve_name(config["_target_"]), type):
            continue
        key, known = f"callbacks.{name}", [*logged, "train/loss"]
        if kind.__name__ in _INSTEAD and kind.__module__.startswith("lightning."):
            raise UserError(
                f"{key}: {kind.__name__} cannot be used, because a training here is one epoch of "
                f"data.steps steps: {_INSTEAD[kind.__name__]} instead"
            )
        if issubclass(kind, WeightAveraging):
            averages.append(key)
        if issubclass(kind, Checkpoints):
            states.append(key)
            known.pop()
            if str(config.get("folder")) != folder:
                raise UserError(
                    f"{key}.folder={config.get('folder')}: leave it at ${{run_dir}}/checkpoints, "
                    "where resuming and evaluating look. outputs=... moves run folders."
                )
        elif (
            issubclass(kind, Checkpoint)
            and str(config.get("dirpath") or folder).rstrip("/") == folder
        ):
            raise UserError(
                f"{key}: another checkpoint callback needs a dirpath of its own, such as "
                f"{key}.dirpath='${{run_dir}}/more': best.ckpt and last.ckpt belong to "
                "callbacks.checkpoint"
            )
        if issubclass(kind, (Checkpoints, EarlyStopping, ModelCheckpoint)):
            optional = kind is ModelCheckpoint and config.get("monitor") is None  # saves the newest
            if not optional:
                _settle_monitor(key, config, known, modes or {})
    if len(averages) > 1:
        raise UserError(
            f"{' and '.join(averages)} both average the weights, and each would take the other's "
            "average for the weights that resume: keep one, such as callbacks=ema"
        )
    if len(states) != 1:
        found = f"{' and '.join(states)} are two of them" if states else "it is missing"
        raise UserError(
            f"callbacks.checkpoint: {found}. A run needs one: it saves the best state, which is "
            "tested, and the last one, from which an interrupted training resumes. "
            "callbacks.checkpoint.every=null saves least often."
        )


def _settle_monitor(key: str, config: Any, known: Sequence[str], modes: Mapping[str, str]) -> None:
    monitor = config.get("monitor")
    if monitor not in known:
        close = get_close_matches(str(monitor), known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"{key}.monitor={'null' if monitor is None else monitor} is not logged; "
            f"{hint}Choose one of {', '.join(known)}"
        )
    mode, natural = config.get("mode"), modes.get(monitor) or better(monitor)
    if mode is None:
        config["mode"] = natural  # Lightning would take min for all
    elif mode in ("min", "max") and mode != natural:
        more = "more" if natural == "max" else "less"
        log.warning("%s.mode=%s: %s %s is better, so this chooses the worst; leave mode out",
                    key, mode, more, monitor)  # fmt: skip


def worth_of(values: Mapping[str, float], trainer: L.Trainer, monitor: str) -> float:
    """How good a validation is by what chooses the run's best state; more is better.

    `monitor` is taken where the trainer has no `Checkpoints`, or what it watches is not there.
    """
    states, mode = states_of(trainer), better(monitor)
    if states and states.monitor in values:
        monitor, mode = states.monitor, states.mode
    worth = values[monitor] if mode == "max" else -values[monitor]
    return -math.inf if math.isnan(worth) else worth
