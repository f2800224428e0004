"""What a run is scored on where nobody says it: its own data, as its run folder tells.

A checkpoint may come from anybody, so nothing that it names is opened or made. A run folder says
which config of conf/data it was trained with, and the plain values: root, split, fold, classes. The
objects (`_target_`) are those of the installed config.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from mambaseg.app.check import require_named_data
from mambaseg.app.targets import moved
from mambaseg.errors import UserError
from mambaseg.reporting.runs import read_identity

_CHOOSING = ("data", "experiment")  # groups that decide what the data are


def with_run_data(cfg: DictConfig) -> DictConfig:
    """The configuration of an evaluation with the data of the run, unless `data=` names others.

    Args:
        cfg: as Hydra composed it for this job.

    Raises:
        UserError: nothing says what the data are, or they are not to be had.
    """
    if not cfg.checkpoint or not Path(cfg.checkpoint).expanduser().exists():
        return cfg  # `build` says what is missing
    words = list(HydraConfig.get().overrides.task)
    keys = [word.key_or_group for word in OverridesParser.create().parse_overrides(words)]
    if any(key in _CHOOSING for key in keys):
        require_named_data(cfg, words)
        return cfg
    folder = _run_folder(Path(cfg.checkpoint).expanduser())
    if folder is None:
        raise UserError(
            f"run={cfg.checkpoint} is not in a run folder, so nothing says which data it is to be "
            "scored on. Name them: data=<a config of conf/data>, with data.root=<their folder>."
        )
    record, config = read_identity(folder)
    used = config.get("data") or {}
    known = GlobalHydra.instance().config_loader().get_group_options("data")
    name = (record.get("data") or {}).get("config") or used.get("name")
    if name not in known:
        raise UserError(
            f"{folder} was trained with data={name}, but there is no conf/data/{name}.yaml. "
            "--config-dir=<folder> adds a folder that has data/, or name other data: data=..."
        )
    job = HydraConfig.get().job.config_name
    cfg = compose(job, overrides=[*words, f"data={name}"])
    said = {key.removeprefix("data.") for key in keys if key.startswith("data.")}
    used = {key: value for key, value in used.items() if key != "augmentation"}  # of earlier runs
    with open_dict(cfg):
        _take(cfg.data, used, said, where=f"{folder / 'config.yaml'}: data")
    require_named_data(cfg, words)
    _require_root(cfg.data, folder)
    return cfg


def _run_folder(path: Path) -> Path | None:
    """The run folder that a path is, or whose checkpoint it is."""
    folder = path if path.is_dir() else path.resolve().parent.parent
    inside = path.is_dir() or path.resolve().parent.name == "checkpoints"
    return folder if inside and (folder / "run.json").is_file() else None


def _take(leaf: DictConfig, used: Mapping[Any, Any], said: set[str], *, where: str) -> None:
    """Puts the plain values that a run used into the leaf that it was trained with.

    Args:
        leaf: changed in place. What it derives from another value of the data stays derived.
        used: of the run.
        said: keys that the command line gives, with a dot where they are deeper.
        where: what messages call `used`.

    Raises:
        UserError: an object of the run is another one than the leaf's.
    """
    raw: Any = OmegaConf.to_container(leaf, resolve=False)
    for key, value in used.items():
        now = raw.get(key)
        if key in said or (isinstance(now, str) and "${data." in now):
            continue
        if key == "_target_" or (isinstance(value, Mapping) and "_target_" in value):
            theirs = moved(str(value if key == "_target_" else value["_target_"]))
            ours = now if key == "_target_" else isinstance(now, dict) and now.get("_target_")
            if theirs != ours:
                raise UserError(
                    f"{where}.{key} is {theirs}, which conf/data does not have there (any more). "
                    "Objects are not taken from a run folder: say data=... and what belongs to it."
                )
        if isinstance(value, Mapping) and isinstance(now, dict) and "_target_" in now:
            deeper = {one.removeprefix(f"{key}.") for one in said if one.startswith(f"{key}.")}
            _take(leaf[key], value, deeper, where=f"{where}.{key}")
        elif not str(key).startswith("_"):
            leaf[key] = _escaped(value)


def _escaped(value: Any) -> Any:
    """Plain data in which nothing is interpolated or made.

    Raises:
        UserError: it asks for an object.
    """
    if isinstance(value, Mapping):
        if any(str(key).startswith("_") for key in value):
            raise UserError(f"a run folder asks for an object in its data: {sorted(value)}")
        return {key: _escaped(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_escaped(one) for one in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _require_root(data: DictConfig, folder: Path) -> None:
    root = Path(str(data.root)).expanduser()
    if not data.get("synthetic") and not root.is_dir():
        raise UserError(
            f"{folder} was trained on data in {root}, which is not there. Say where they are: "
            "data.root=<folder>; or name other data: data=..."
        )
