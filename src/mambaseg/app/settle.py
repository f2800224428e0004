"""Settle a configuration: every `auto` becomes a value, and what cannot work is refused."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from mambaseg.app.check import LONGEST, check_targets, plain_tree, require_acquired
from mambaseg.app.devices import settle_device
from mambaseg.app.fine_tuning import Start, start_of
from mambaseg.app.networks import (
    image_channels,
    made,
    plain,
    read_with_config,
    require_channels,
    require_lasting,
    settle_weights,
)
from mambaseg.app.own import config_dirs
from mambaseg.app.planning import settle_plan
from mambaseg.app.resolvers import data_name, task_class
from mambaseg.app.schema import EXTRAS
from mambaseg.app.sweeps import in_sweep
from mambaseg.app.terminal import announce_synthetic
from mambaseg.errors import UserError
from mambaseg.storage.untrusted import readable, with_values

if TYPE_CHECKING:
    from mambaseg.inference.trained import Checkpoint
    from mambaseg.training.run import Plan

_SUPERVISED = "mambaseg.training.methods.supervised.Supervised"
# keys of conf/evaluate.yaml that say what to score, which `checkpoint` is what comes of, and what
# else to measure
_SOURCES = ("run", "predictions", "references", "class_names", "calibration")
log = logging.getLogger(__name__)


def settle(cfg: DictConfig) -> tuple[Plan, Any, Checkpoint | None, Start | None]:
    """The plan of a run, the loaded data, and the checkpoint that is scored (None: it trains).

    The last is what a training starts from; None: from scratch.
    """
    cfg = OmegaConf.create(plain_tree(cfg))
    _require_unicode(cfg)
    check_targets(cfg)
    task = task_class(cfg.data)
    checkpoint = None
    if "checkpoint" in cfg:
        if not cfg.test:
            raise UserError("test=false: mambaseg evaluate scores the test set; leave it out")
        checkpoint = _follow_checkpoint(cfg)
        cfg.checkpoint = str(checkpoint.path)
        for key in _SOURCES:
            cfg.pop(key, None)
        if cfg.get("init_from"):
            raise UserError("init_from: is where a training starts; leave it out of an evaluation")
    if "checkpoint" in cfg or not in_sweep():  # a sweep of trainings has said it
        announce_synthetic([cfg.data])
    if checkpoint is None:
        settle_weights(cfg.model)
        _settle_channels(cfg, "model")
    if OmegaConf.is_missing(cfg.data, "root"):
        raise UserError(f"data={cfg.data.name}: name the folder of the data set, data.root=...")
    for key in ("root", "cache_dir"):
        cfg.data[key] = str(Path(cfg.data[key]).expanduser())
    require_acquired(cfg.data)
    settle_plan(cfg)
    if checkpoint is None:  # what was planned, too
        require_lasting(cfg.model, _configs(cfg)["model"])
    if start := start_of(cfg):
        cfg.init_from = str(start.checkpoint.path)
    settle_device(cfg)
    cfg.data.accumulate = cfg.trainer.accumulate_grad_batches
    if checkpoint is None:
        _settle_method(cfg)
        _settle_channels(cfg, "method")
        require_channels(cfg)
        _require_power(cfg)
    operations = plain(cfg).get("augmentation") or {}
    data = made(cfg.data, *EXTRAS["data"], augmentation=operations)
    data.load()
    if checkpoint is None:
        from mambaseg.training.monitors import settle_callbacks

        data.split.require_training()
        if near := cfg.data.get("neighbours"):
            from mambaseg.data.slices import require_neighbours

            require_neighbours([data.cache.entry(case.id) for case in data.cases["train"]], near)
        own = modes_of(cfg)
        settle_callbacks(cfg, logged=[*task.logged(data), *own], modes=own)
    parent = start.checkpoint if start else checkpoint
    return _plan(cfg, data, checkpoint, _seen(cfg, data, parent)), data, checkpoint, start


def _settle_method(cfg: DictConfig) -> None:
    """Settles what a learning method needs: the configs of its networks, unlabelled images."""
    from hydra.utils import get_class

    from mambaseg.app.networks import composed_model

    if not cfg.get("method"):
        return
    kind: Any = get_class(cfg.method["_target_"])
    ours = kind.__module__.startswith("mambaseg.") and cfg.method["_target_"] != _SUPERVISED
    if ours and (task := cfg.data.get("task", "segmentation")) != "segmentation":
        raise UserError(
            f"method={cfg.method.name} learns label maps, and data={cfg.data.name} is for {task}; "
            "choose method=supervised"
        )
    partner = cfg.method.get("partner") or []
    partners = [partner] if isinstance(partner, str) else list(partner)
    kind.require_count(1 + len(partners))
    cfg.method.partner = partners
    if partners:
        own = _configs(cfg)["model"]
        cfg.method.networks = [
            copy.deepcopy(cfg.model) if name == own else composed_model(name) for name in partners
        ]
        for network in cfg.method.networks:
            settle_weights(network)
            if "scan_backend" in network:
                network.scan_backend = "auto"  # which makes no other run
    if kind.unlabelled:
        cfg.data.unlabelled = True
    elif cfg.data.get("unlabelled_images"):
        raise UserError(
            f"data.unlabelled_images: method={cfg.method.name} learns from labels alone; choose "
            "one that learns from unlabelled images too (docs/methods.md), or leave the key out"
        )
    if cfg.trainer.get("graph") and cfg.method["_target_"] != _SUPERVISED:
        log.warning("trainer.graph=true: the method has passes of its own; it trains without")
        cfg.trainer.graph = False


def _settle_channels(cfg: DictConfig, group: str) -> None:
    """Lets networks take the channels of neighbouring slices too: their `${data.in_channels}`."""
    if not (near := cfg.data.get("neighbours")):
        return
    if "longest_side" in cfg.data:
        raise UserError(f"data.neighbours={near}: pictures have no neighbouring slices; leave it 0")
    count = image_channels(cfg.data)
    if cfg.get(group):
        cfg[group] = with_values(
            plain_tree(cfg[group]), lambda one: count if one == "${data.in_channels}" else one
        )


def _require_power(cfg: DictConfig) -> None:
    schedule: Any = cfg.optim.get("scheduler") or {}
    if str(schedule.get("_target_")).endswith(".PolynomialLR") and schedule.get("power", 1) < 0:
        raise UserError(f"optim.scheduler.power={schedule.power}: must be 0 or more")


def _plan(cfg: DictConfig, data: Any, checkpoint: Checkpoint | None, seen: dict[str, Any]) -> Plan:
    from mambaseg.storage.identity import identity, same_run, weight_digests, with_digests
    from mambaseg.training.run import Plan

    config = plain(cfg)
    weights = weight_digests(config)
    whole = with_digests(config, weights)
    key = identity(whole, split=data.split.hash, data=data.fingerprint)
    name = f"{cfg.model.name}-{data_name(cfg.data)}{_method_name(cfg)}-seed{cfg.seed}-{key}"
    if Path(name).name != name or len(name.encode()) > LONGEST:
        raise UserError(
            f"{name}: no name for a run folder. Give model.name, data.name and method.name short "
            "names without a slash"
        )
    path = Path(cfg.outputs).expanduser() / cfg.name / name
    cfg.run_dir = str(path if cfg.rerun else same_run(path, key))
    return Plan(
        config=plain(cfg),
        key=key,
        design=identity(whole, split=data.split.hash, data=""),
        configs=_configs(cfg),
        config_dirs=[str(place) for place in config_dirs()],
        weights=weights,
        seen=seen,
    )


def _configs(cfg: DictConfig) -> dict[str, str]:
    """The configs that were chosen: mine/deep of the name deep."""
    names = {"data": str(cfg.data.name), "model": str(cfg.model.name)}
    if "checkpoint" in cfg or not HydraConfig.initialized():
        return names
    chosen = HydraConfig.get().runtime.choices
    return {group: str(chosen.get(group, name)) for group, name in names.items()}


def _method_name(cfg: DictConfig) -> str:
    """The method in the name of a run folder; nothing for labels alone, or without a training."""
    if "checkpoint" in cfg or not cfg.get("method") or cfg.method["_target_"] == _SUPERVISED:
        return ""
    return f"-{cfg.method.get('name') or cfg.method['_target_'].rpartition('.')[2]}"


def metrics_of(cfg: Any) -> list[Any]:
    """The metrics of the group `metric`."""
    found = [made(config) for config in (cfg.get("metric") or {}).values() if config]
    if found and cfg["data"].get("task", "segmentation") != "segmentation":
        raise UserError("metric=...: metrics score label maps, and this data set has none")
    return found


def modes_of(cfg: Any) -> dict[str, str]:
    """Which way the values are better that the group `metric` logs: name -> `min` or `max`."""
    return {
        f"val/{metric.name}": "min" if metric.higher_is_better is False else "max"
        for metric in metrics_of(cfg)
    }


def _seen(cfg: DictConfig, data: Any, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Which test cases the given network has learnt from; refused without allow_seen."""
    from mambaseg.data.seen import require_unseen

    if checkpoint is None or not cfg.test:
        return {"checked": True, "cases": {}}
    seen, cases = checkpoint.seen, data.known("test")
    same_split = checkpoint.split_hash == data.split.hash
    found = seen.among(cases, own_split=same_split)
    allowed = cfg.evaluation.get("allow_seen") is True
    require_unseen(found, len(cases), allowed=allowed, subject=str(checkpoint.path))
    trained_on = checkpoint.about["data"].get("fingerprint", data.fingerprint)
    if same_split and trained_on != data.fingerprint:
        log.warning("%s: the files are not those that it was trained with", cfg.data.root)
    if not (seen.complete or found):
        log.warning("%s does not say which images trained it: whether it has seen the test cases "
                    "cannot be checked", checkpoint.path)  # fmt: skip
    return {"checked": seen.complete, "cases": found}


def _follow_checkpoint(cfg: DictConfig) -> Checkpoint:
    """Takes network and preprocessing from a checkpoint."""
    from mambaseg.data.classes import require_same_classes

    if cfg.checkpoint is None:
        raise UserError("give run=<run folder or .ckpt>, or predictions= and references=")
    checkpoint, cfg.model = read_with_config(cfg.checkpoint, cfg)
    about, path = checkpoint.about, checkpoint.path
    if (made_for := checkpoint.task) != cfg.data.get("task", "segmentation"):
        raise UserError(
            f"checkpoint: {path} was trained for {made_for}, data={cfg.data.name} is not for that. "
            "Choose the data that fit the checkpoint."
        )
    if checkpoint.channels != cfg.data.in_channels:
        raise UserError(
            f"data.in_channels={cfg.data.in_channels}: {path} was trained on images of "
            f"{checkpoint.channels} channels. Choose data like those of its training."
        )
    if "preprocessing" in cfg.data:
        settings = checkpoint.preprocessing.settings()
    else:
        settings = {"size": about["preprocessing"]["size"]}
    if (slicing := about.get("slicing", "stored")) != cfg.data.get("slicing", "stored"):
        settings["slicing"] = slicing
    for key, value in settings.items():
        if ((given := cfg.data.get(key)) or None) != (value or None):
            log.warning("data.%s=%s, but %s was trained with %s: the checkpoint's is used",
                        key, given, path.name, "null" if value is None else value)  # fmt: skip
            cfg.data[key] = value
    if cfg.evaluation.keep_largest == "auto":  # as its training chose, if it did
        chosen = checkpoint.keep_largest
        cfg.evaluation.keep_largest = {k: list(v) for k, v in chosen.items()} or False
    require_same_classes(
        list(about["classes"]),
        list(cfg.data.class_names),
        label_map=cfg.data.get("label_map"),
        checkpoint=str(path),
    )
    if about["data"]["name"] != cfg.data.name:
        log.warning("trained on %s, scored on %s", about["data"]["title"], cfg.data.title)
    return checkpoint


def _require_unicode(cfg: DictConfig) -> None:
    """Refuses a folder that the files of a run could not name."""
    for key in ("name", "data.root", "data.cache_dir", "outputs", "checkpoint", "init_from"):
        path = OmegaConf.select(cfg, key, throw_on_missing=False)
        if path is not None and readable(str(path)) != str(path):
            raise UserError(
                f"{key}={readable(str(path))}: the name is not UTF-8, so no file of the run can "
                "hold it. Rename the folder, or give a link to it (files below may have any name)."
            )
