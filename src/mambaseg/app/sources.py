"""Refuse data and runs that are not there before anything heavy is imported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mambaseg.app.targets import import_target
from mambaseg.inference.found import weights_file


def require_sources(cfg: DictConfig, script: str) -> None:
    """Asks for what a command of conf/<script>.yaml reads.

    Raises:
        UserError: the folder of the data of a training, or a run that is named, is not there.
    """
    if script == "config":
        _require_data(cfg)
    named = [cfg.get(key) for key in ("run", "ensemble", "predictions") if cfg.get(key)]
    if len(named) > 1:
        return  # the command says which of them it takes
    for run in (cfg.get("run"), *(cfg.get("ensemble") or ())):
        if isinstance(run, str) and not re.search(r"[*?\[]", run):
            path = Path(run).expanduser()
            if run != "newest" and not path.exists():
                weights_file(path)


def _require_data(cfg: DictConfig) -> None:
    from mambaseg.data.readers.reader import Reader

    root, finds = _value(cfg, "data.root"), _value(cfg, "data.find_cases._target_")
    computed = OmegaConf.select(cfg, "data.prepare") is not None
    if not isinstance(root, str) or computed or Path(root).expanduser().is_dir() or finds is None:
        return
    reader = import_target("data.find_cases", finds)
    if isinstance(reader, Reader):
        reader.require(root)


def _value(cfg: DictConfig, key: str) -> Any:
    # where nothing can be resolved, whoever needs the value explains it
    return OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
