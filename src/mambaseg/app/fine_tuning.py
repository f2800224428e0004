"""Trainings that start from another run's weights: `init_from=<run folder, .ckpt or bundle>`.

Nothing but tensors is taken from it: the network is that of this run's own configuration.
"""

from __future__ import annotations

import logging
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from mambaseg.app.networks import bare, build_network, plain, shapes, shapes_without_memory
from mambaseg.errors import UserError
from mambaseg.storage.untrusted import printable

if TYPE_CHECKING:
    from torch import nn

    from mambaseg.inference.trained import Checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Whose weights a training starts from."""

    checkpoint: Checkpoint
    head: tuple[str, ...]  # keys that depend on the classes, where these are others; they stay new

    def fill(self, network: nn.Module) -> dict[str, Any]:
        """Puts the weights that fit into a network, and reports on all, in words as `said`."""
        from mambaseg.models.pretrained import load_matching

        report = load_matching(network, self.checkpoint.weights, fresh=self.head)
        about = self.checkpoint.about
        counts = report.parameters
        lines = [
            f"init_from={self.checkpoint.path}: {about['model']['name']}, trained on "
            f"{about['data']['title']}",
            f"  matched    {counts['loaded']:>12,} values, {len(report.loaded)} keys",
        ]
        fresh = [key for key in report.missing if key in self.head]
        shapes = {text.partition(" is ")[0]: text for text in report.mismatched}
        rest = [shapes.get(key, key) for key in report.missing if key not in self.head]
        for what, keys in (("new head", fresh), ("new", rest), ("not used", report.ignored)):
            if keys:
                shown = ", ".join(keys[:5]) + f" and {len(keys) - 5} more" * (len(keys) > 5)
                lines.append(f"  {what:<10} {len(keys):>12,} keys: {shown}")
        if self.head:
            lines.append(f"  classes of its own head: {', '.join(about['classes'])}")
        said = printable("\n".join(lines))
        return {"init_from": str(self.checkpoint.path), **asdict(report), "said": said}


def require_one_start(cfg: DictConfig) -> None:
    """Refuses an `init_from` that may be another run tomorrow, and says which it is now.

    Every job of a sweep would look for it anew and find the result of the job before, and a
    repeated command that of the first time.
    """
    from mambaseg.inference.found import find_run

    named = cfg.get("init_from")
    if not named or "checkpoint" in cfg:
        return
    try:
        found = find_run(named, cfg.outputs)
    except UserError as error:
        raise UserError(f"init_from={named}: {error}") from error
    if found != Path(named).expanduser():
        typed = shlex.quote(f"init_from={found}")
        raise UserError(
            f"init_from={named} is refused, as it may mean another run tomorrow: use {typed}"
        )


def start_of(cfg: DictConfig) -> Start | None:
    """The start that a configuration asks for; None: from scratch.

    Raises:
        UserError: there is no such checkpoint, or it is of another network.
    """
    from mambaseg.inference.trained import read_checkpoint

    if not cfg.get("init_from"):
        return None
    if cfg.model.get("pretrained"):
        raise UserError("init_from and model.pretrained both give the first weights: choose one")
    try:
        checkpoint = read_checkpoint(cfg.init_from)
    except UserError as error:
        raise UserError(f"init_from={cfg.init_from}: {error}") from error
    _require_network(cfg, checkpoint)
    if (made_for := checkpoint.task) != _task(cfg):
        log.warning("init_from: it was trained for %s, this run is for %s", made_for, _task(cfg))
    theirs = checkpoint.preprocessing.settings() if made_for == "segmentation" else {}
    other = [f"data.{key}={value}" for key, value in theirs.items()
             if key in cfg.data and cfg.data[key] != value]  # fmt: skip
    if other:
        log.warning("init_from: it was trained with %s; this run is not", " ".join(other))
    if list(checkpoint.about["classes"]) == list(cfg.data.get("class_names", [])):
        return Start(checkpoint, ())
    return Start(checkpoint, _head(cfg))


def _task(cfg: DictConfig) -> str:
    return str(cfg.data.get("task", "segmentation"))


def _head(cfg: DictConfig) -> tuple[str, ...]:
    """Keys of the network whose shapes depend on the number of classes."""
    own = _shapes(plain(cfg)["model"])
    wider = OmegaConf.merge(cfg, {"data": {"num_classes": cfg.data.num_classes + 1}})
    other = _shapes(plain(wider)["model"])
    return tuple(key for key, shape in own.items() if other.get(key) != shape)


def _shapes(model: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return shapes_without_memory(model) or shapes(build_network(model)[0])


def _require_network(cfg: DictConfig, checkpoint: Checkpoint) -> None:
    """Refuses weights most of which do not fit, and says how the network differs."""
    own = _shapes(plain(cfg)["model"])
    fits = sum(w.numel() for k, w in checkpoint.weights.items() if own.get(k) == tuple(w.shape))
    total = sum(w.numel() for w in checkpoint.weights.values())
    if fits >= total / 2:
        return
    about, model = checkpoint.about["model"], bare(plain(cfg)["model"])
    words = [f"model={about.get('config') or about['name']}"]
    for key, value in about.get("arguments", {}).items():
        if key in model and model[key] != value and key not in ("name", "scan_backend"):
            words.append(f"model.{key}={value}")
    raise UserError(printable(
        f"init_from={Path(checkpoint.path)}: only {fits / total:.0%} of its weights fit this "
        f"network. It was trained with {' '.join(words)}"
    ))  # fmt: skip
