"""What a checkpoint says about itself: plain data and weights, read without executing anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambaseg.errors import UserError


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of this project.

    Attributes:
        path: the file.
        about: `model` (leaf name, arguments), `preprocessing`, `classes`, `data`, `split`.
        weights: state dict of the network as `build_network` makes it.
    """

    path: Path
    about: dict[str, Any]
    weights: dict[str, Tensor]


def read_step(path: Path) -> int | None:
    """Optimizer steps that a checkpoint of a training has behind it; None: it cannot be read."""
    try:
        return int(
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
        )
    except Exception:  # torch raises a zoo of types for damaged files
        return None


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a .ckpt file, or the best checkpoint of a run folder.

    Raises:
        UserError: there is none, it cannot be read, or it is not one of this project.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / "checkpoints" / "best.ckpt"
    if not path.is_file():
        raise UserError(f"checkpoint: there is no file {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a zoo of types for damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"checkpoint: {path} cannot be read ({reason}). It is damaged or "
            "holds code instead of weights; only plain weights are loaded."
        ) from error
    about = content.get("mambaseg") if isinstance(content, dict) else None
    if not isinstance(about, dict) or "model" not in about:
        raise UserError(
            f"checkpoint: {path} does not say which network it holds, so this project did not make "
            "it. In Python, networks take the original repository's weights with "
            "load_original_state_dict()."
        )
    start = "network."
    weights = {k[len(start) :]: v for k, v in content["state_dict"].items() if k.startswith(start)}
    return Checkpoint(path, about, weights)
