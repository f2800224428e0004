"""What a run is scored on where no data are named: its own, as its run folder records them.

A run folder may come from anybody, so only the name of a config of conf/data and plain values are
taken from it. The objects (`_target_`) are those of the installed config.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from mambaseg.app.check import checked, plain_tree, require_named_data
from mambaseg.app.networks import escaped
from mambaseg.app.overrides import given_overrides, key_of
from mambaseg.app.own import config_remedy, is_config_name
from mambaseg.app.schema import INSTEAD
from mambaseg.errors import UserError
from mambaseg.inference.found import find_run
from mambaseg.reporting.reading import read_identity
from mambaseg.storage.identity import target_name
from mambaseg.storage.run_folder import RunFolder

_OF_THE_MACHINE = ("cache_dir", "num_workers", "on_device")


def with_run_data(cfg: DictConfig) -> DictConfig:
    """The configuration of an evaluation with the data of the run, unless `data=` names others."""
    for key in ("predictions", "references", "class_names", "ignore_label", "patient_pattern"):
        if cfg[key] is not None:
            own = key in ("ignore_label", "patient_pattern")
            instead = f"with run= give data.{key}=" if own else "with run= leave it out"
            raise UserError(f"{key}= applies to label maps only; {instead}")
    if cfg.checkpoint:
        cfg.checkpoint = str(find_run(cfg.checkpoint, cfg.outputs))
    if not cfg.checkpoint or not Path(cfg.checkpoint).exists():
        return cfg  # `build` says what is missing
    overrides = given_overrides()
    keys = set(map(key_of, overrides))
    if "seed" in keys:
        raise UserError("seed=: an evaluation uses the seed of its run; leave seed= out")
    path = Path(cfg.checkpoint)
    folder = path if path.is_dir() else path.resolve().parents[1]
    inside = path.is_dir() or path.resolve().parent.name == "checkpoints"
    known = inside and (folder / "run.json").is_file()
    if keys & {"data", "experiment"}:  # groups that decide what the data are
        require_named_data(cfg, overrides)
        if known:
            cfg.seed = _seed_of(read_identity(folder)[1], cfg.seed)
        return cfg
    if not known:
        raise UserError(
            f"run={cfg.checkpoint} is not in a run folder, so nothing says which data it is to be "
            "scored on. Name them: data=<a config of conf/data>, with data.root=<their folder>."
        )
    record, config = read_identity(folder)
    used = config.get("data") or {}
    name = str((record.get("data") or {}).get("config") or used.get("name"))
    group, _, config_name = f"data/{name}".rpartition("/")  # data=mine/heart lies in a folder
    there = GlobalHydra.instance().config_loader().get_group_options(group)
    if not is_config_name(name) or config_name not in there:
        raise UserError(
            f"{folder} was trained with data={name}, but there is no conf/data/{name}.yaml. "
            f"{config_remedy('data', name, RunFolder(folder))}. Or name other data: data=..."
        )
    cfg = compose(HydraConfig.get().job.config_name, overrides=[*overrides, f"data={name}"])
    cfg.checkpoint, cfg.seed = str(path), _seed_of(config, cfg.seed)
    left_out = {*_OF_THE_MACHINE, *(key.removeprefix("data.") for key in INSTEAD)}
    used = {key: value for key, value in used.items() if key not in left_out}
    with open_dict(cfg):
        _take(cfg, {"data": used}, "", keys, file=folder / "config.yaml")
    require_named_data(cfg, overrides)
    root = Path(str(cfg.data.root)).expanduser()
    if not cfg.data.get("synthetic") and not root.is_dir():
        raise UserError(
            f"{folder}: its data are expected in {root}, which is not there. Say where they are: "
            "data.root=<folder>; or name other data: data=..."
        )
    return checked(cfg, "evaluate", overrides)


def _seed_of(config: Mapping[str, Any], otherwise: int) -> int:
    """The seed that a run's configuration says, which names its evaluation too."""
    seed = config.get("seed")
    return seed if type(seed) is int and 0 <= seed < 2**32 else otherwise


def _take(
    ours: DictConfig, used: Mapping[Any, Any], at: str, given: set[str], *, file: Path
) -> None:
    """Puts the plain values that a run `used` into `ours`, except keys `given` on the command line.

    What the config derives from another value of the data stays derived.
    """
    raw = plain_tree(ours)
    for name, value in used.items():
        key, now = f"{at}.{name}".lstrip("."), raw.get(name)
        if str(name).startswith("_") or key in given:
            continue
        if isinstance(now, str) and "${data." in now:
            continue
        if _target_of(now) != _target_of(value):
            raise UserError(
                f"{file}: {key} makes another object than conf/data has there (any more). Objects "
                "are not taken from a run folder: say data=... and what belongs to it."
            )
        if _target_of(now):
            _take(ours[name], value, key, given, file=file)
        elif "_target_" in str(value):
            raise UserError(f"{file}: {key} asks for an object among its values")
        else:
            ours[name] = escaped(value)


def _target_of(value: Any) -> Any:
    """What makes an object; None: the value is none."""
    return target_name(value.get("_target_")) if isinstance(value, Mapping) else None
