"""What callbacks watch, settled and checked before anything is trained or written.

A monitor that nothing logs would never choose a state, one that is judged the wrong way round would
choose the worst, and Lightning's callbacks that count epochs do nothing in a training that has one.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint

from mambaseg.errors import UserError
from mambaseg.training.checkpoints import Checkpoints, better

# Lightning's callbacks that count epochs, or change what the data module has to know
_INSTEAD = {
    "StochasticWeightAveraging": "lightning.pytorch.callbacks.EMAWeightAveraging averages by steps",
    "GradientAccumulationScheduler": "set trainer.accumulate_grad_batches",
    "BatchSizeFinder": "set data.batch_size",
    "LearningRateFinder": "set optim.optimizer.lr",
    "ModelPruning": "prune the trained network",
    "BackboneFinetuning": "train two runs, the second with run=<the first>",
}
_LOSS = "train/loss"
log = logging.getLogger(__name__)


def settle_callbacks(cfg: Any, *, logged: Sequence[str]) -> None:
    """Fills in which way a callback's monitor is better, and refuses what cannot do what it says.

    Args:
        cfg: the configuration, changeable; `cfg["callbacks"]` holds a callback under each name.
        logged: names of what the validation of its task logs.

    Raises:
        UserError: naming the key.
    """
    states = []
    for name, leaf in (cfg.get("callbacks") or {}).items():
        if not isinstance(leaf, Mapping) or not (kind := _class(leaf)):
            continue
        key = f"callbacks.{name}"
        if kind.__name__ in _INSTEAD and kind.__module__.startswith("lightning."):
            raise UserError(
                f"{key}: {kind.__name__} cannot be used, because a training here is one epoch of "
                f"data.steps steps: {_INSTEAD[kind.__name__]} instead"
            )
        if issubclass(kind, Checkpoints):
            states.append(key)
            _check_place(cfg, key, leaf.get("folder"))
        elif issubclass(kind, Checkpoint):
            _check_other_place(cfg, key, leaf)
        if issubclass(kind, (Checkpoints, EarlyStopping, ModelCheckpoint)):
            own = issubclass(kind, Checkpoints)
            _settle_monitor(key, leaf, logged if own else [*logged, _LOSS])
    if len(states) != 1:
        found = f"{' and '.join(states)} are two of them" if states else "it is missing"
        raise UserError(
            f"callbacks.checkpoint: {found}. A run needs one: it saves the best state, which is "
            "tested, and the last one, from which an interrupted training resumes. "
            "callbacks.checkpoint.every=null saves least often."
        )


def _class(leaf: Mapping[str, Any]) -> type | None:
    """The class that a callback's configuration names; None: no class, or there is none."""
    module, _, name = str(leaf.get("_target_", "")).rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None  # Hydra says so when it makes the callback
    return kind if isinstance(kind, type) else None


def _check_place(cfg: Any, key: str, folder: Any) -> None:
    if str(folder) != f"{cfg.get('run_dir')}/checkpoints":
        raise UserError(
            f"{key}.folder={folder}: leave it at ${{run_dir}}/checkpoints, where a run resumes "
            "from and evaluate.py looks. outputs=... moves the run folders."
        )


def _check_other_place(cfg: Any, key: str, leaf: Mapping[str, Any]) -> None:
    """Another checkpoint callback must not write over the states that are tested and resumed."""
    place = leaf.get("dirpath")
    if not place or str(place).rstrip("/") == f"{cfg.get('run_dir')}/checkpoints":
        raise UserError(
            f"{key}: another checkpoint callback needs a dirpath of its own, such as "
            f"{key}.dirpath='${{run_dir}}/more': best.ckpt and last.ckpt are callbacks.checkpoint's"
        )


def _settle_monitor(key: str, leaf: Any, known: Sequence[str]) -> None:
    monitor = leaf.get("monitor")
    if monitor is None and leaf.get("_target_", "").endswith("ModelCheckpoint"):
        return  # Lightning's saves the newest then
    if monitor not in known:
        close = get_close_matches(str(monitor), known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"{key}.monitor={'null' if monitor is None else monitor}: nothing of that name is "
            f"logged; {hint}Choose one of {', '.join(known)}"
        )
    mode, natural = leaf.get("mode"), better(monitor)
    if mode is None:
        leaf["mode"] = natural  # Lightning would take min for all
    elif mode in ("min", "max") and mode != natural:
        more = "more" if natural == "max" else "less"
        log.warning("%s.mode=%s: %s %s is better, so this chooses the worst; leave mode out",
                    key, mode, more, monitor)  # fmt: skip
