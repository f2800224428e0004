"""Turns a configuration into a run."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from mambaseg.app.check import check_targets
from mambaseg.app.jobs import note_run
from mambaseg.app.networks import network_with_weights, plain, read_with_leaf, without
from mambaseg.app.resolvers import task_class
from mambaseg.app.schema import EXTRAS
from mambaseg.app.settle import device_type, require_unicode, settle
from mambaseg.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from mambaseg.inference.trained import Checkpoint
    from mambaseg.training.run import Run

# keys of conf/evaluate.yaml that only say what to score; `checkpoint` is what they come to
_SOURCES = ("run", "predictions", "references", "class_names")
# precisions that convert the network itself, and torch's name of what it becomes
_TRUE = {"bf16-true": "bfloat16", "16-true": "float16", "64-true": "float64"}
log = logging.getLogger(__name__)


# ---- cfg -> Run ---------------------------------------------------------------------------------


def build(cfg: DictConfig) -> Run:
    """Builds data, network, task and trainer of one run.

    Args:
        cfg: the composed configuration; it is not changed.

    Raises:
        UserError: anything the user can mend: data, weights, devices, values.
    """
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))  # type: ignore[assignment]
    _silence_libraries()
    require_unicode(cfg)
    notice = _notice(cfg)
    if notice:
        log.warning(notice)
    check_targets(cfg)
    import lightning as L

    from mambaseg.app.cluster import requeue_call
    from mambaseg.storage.identity import identity, same_run, weight_digests, with_digests
    from mambaseg.storage.run_folder import RunFolder, slug
    from mambaseg.training.monitors import settle_callbacks
    from mambaseg.training.run import Run

    _use_job_arguments()
    checkpoint = None
    if "checkpoint" in cfg:
        checkpoint = _follow_checkpoint(cfg)
        cfg.checkpoint = str(checkpoint.path)
        for key in _SOURCES:
            cfg.pop(key, None)
    settle(cfg)
    task = task_class(cfg.data)
    data = instantiate(
        without(cfg.data, *EXTRAS["data"]),
        augmentation=cfg.get("augmentation") or {},
        _convert_="all",
    )
    data.load()
    if checkpoint is None:
        data.split.require_training()
        own = [f"val/{metric.name}" for metric in _metrics(cfg).get("metrics", ())]
        settle_callbacks(cfg, logged=[*task.logged(data), *own])
    seen = _seen(cfg, data, checkpoint)
    config = plain(cfg)
    weights = weight_digests(config)
    whole = with_digests(config, weights)
    key = identity(whole, split=data.split.hash, data=data.fingerprint)
    title = slug(cfg.data.title) if cfg.data.synthetic else cfg.data.name
    name = f"{cfg.model.name}-{title}-seed{cfg.seed}-{key}"
    path = Path(cfg.outputs).expanduser() / cfg.name / name
    folder = RunFolder(path if cfg.rerun else same_run(path, key))
    cfg.run_dir = str(folder.path)
    note_run(folder.path.parent, folder.path.name)
    finished = (folder.finished if cfg.test else folder.trained) and not cfg.rerun
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    return Run(
        config=plain(cfg),
        folder=folder,
        key=key,
        design=identity(whole, split=data.split.hash, data=""),
        weights=weights,
        data=data,
        notice=notice,
        finished=finished,
        make_network=lambda: network_with_weights(cfg.model, checkpoint),
        make_parts=lambda network: _parts(cfg, network, data, checkpoint),
        seen=seen,
        data_config=_data_config(cfg),
        requeue=requeue_call(),
    )


def _data_config(cfg: DictConfig) -> str:
    """The config of conf/data that a run is trained with, by its file's name."""
    if "checkpoint" in cfg or not HydraConfig.initialized():
        return str(cfg.data.name)
    return str(HydraConfig.get().runtime.choices.get("data", cfg.data.name))


def _seen(cfg: DictConfig, data: Any, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Who of the test part the given network has learnt from, as metrics.json has it.

    Raises:
        UserError: somebody, and `evaluation.allow_seen` is not true.
    """
    from mambaseg.data.seen import require_unseen

    if checkpoint is None or not cfg.test:
        return {"checked": True, "cases": {}}
    seen, cases = checkpoint.seen, data.known("test")
    found = seen.among(cases, own_split=checkpoint.split_hash == data.split.hash)
    allowed = cfg.evaluation.get("allow_seen") is True
    require_unseen(found, len(cases), allowed=allowed, subject=str(checkpoint.path))
    told = checkpoint.about["data"].get("fingerprint", data.fingerprint)
    if checkpoint.split_hash == data.split.hash and told != data.fingerprint:
        log.warning("%s: the files are not those that it was trained with", cfg.data.root)
    if not (seen.complete or found):
        log.warning("%s does not say which images trained it: whether it has seen the test cases "
                    "cannot be checked", checkpoint.path)  # fmt: skip
    return {"checked": seen.complete, "cases": found}


def _follow_checkpoint(cfg: DictConfig) -> Checkpoint:
    """Takes network and preprocessing from a checkpoint."""
    if cfg.checkpoint is None:
        raise UserError("give run=<run folder or .ckpt>, or predictions= and references=")
    from mambaseg.data.classes import require_same_classes

    checkpoint, cfg.model = read_with_leaf(cfg.checkpoint, cfg)
    about, path = checkpoint.about, checkpoint.path
    if (made := about.get("task", "segmentation")) != cfg.data.get("task", "segmentation"):
        raise UserError(
            f"checkpoint: {path} was trained for {made}, data={cfg.data.name} is not for that. "
            "Choose the data that fit the checkpoint."
        )
    if "preprocessing" in cfg.data:
        settings = checkpoint.preprocessing.settings()
    else:
        settings = {"size": about["preprocessing"]["size"]}
    if (slicing := about.get("slicing", "stored")) != cfg.data.get("slicing", "stored"):
        settings["slicing"] = slicing
    for key, value in settings.items():
        if (given := cfg.data.get(key)) != value:
            log.warning("data.%s=%s, but %s was trained with %s: the checkpoint's is used",
                        key, given, path.name, "null" if value is None else value)  # fmt: skip
            cfg.data[key] = value
    require_same_classes(
        list(about["classes"]),
        list(cfg.data.class_names),
        label_map=cfg.data.get("label_map"),
        checkpoint=str(path),
    )
    if about["data"]["name"] != cfg.data.name:
        log.warning("trained on %s, scored on %s", about["data"]["title"], cfg.data.title)
    return checkpoint


def _parts(
    cfg: DictConfig, network: nn.Module, data: Any, checkpoint: Checkpoint | None
) -> tuple[Any, Any]:
    """The task and the trainer; the run folder exists by now."""
    import torch
    from lightning.pytorch.callbacks import LearningRateMonitor

    from mambaseg.app.cluster import cluster_plugins
    from mambaseg.data.loaders import PARTS
    from mambaseg.data.seen import Seen
    from mambaseg.models import channels_last
    from mambaseg.storage.run_folder import RunFolder
    from mambaseg.training.checkpoints import CheckedIO
    from mambaseg.training.loggers import forgiving

    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))  # type: ignore[assignment]
    loggers = [leaf for leaf in (cfg.get("logger") or {}).values() if leaf]
    if loggers and cfg.logger.get("wandb"):
        folder = RunFolder(cfg.run_dir)
        cfg.logger.wandb.name = folder.path.name
        cfg.logger.wandb.run_id = folder.record.get("wandb_id")
        if resumed := folder.record.get("resumed"):
            cfg.logger.wandb.resume_step = resumed[-1]["step"]
            cfg.logger.wandb.history = str(folder.path / "metrics.csv")
        if cfg.data.synthetic:
            cfg.logger.wandb.tags = [*cfg.logger.wandb.tags, cfg.data.title]
    description = {
        "model": {"name": cfg.model.name, "arguments": plain(without(cfg.model, "_target_"))},
        "task": cfg.data.get("task", "segmentation"),
        "preprocessing": data.describe(),
        "slicing": cfg.data.get("slicing", "stored"),
        "views": data.views,
        "classes": list(cfg.data.class_names),
        "data": {"name": cfg.data.name, "title": cfg.data.title, "fingerprint": data.fingerprint},
        "split": {"name": data.split.name, "hash": data.split.hash},
        "seen": Seen.of(
            {part: data.known(part) for part in PARTS},
            checkpoint.seen if checkpoint else None,
            same_split=bool(checkpoint and checkpoint.split_hash == data.split.hash),
        ).plain(),
    }
    task = task_class(cfg.data)(
        network,
        instantiate(cfg.loss),
        instantiate(cfg.optim.optimizer),
        instantiate(cfg.optim.scheduler) if cfg.optim.scheduler else None,
        decay=cfg.optim.decay,
        seed=cfg.seed,
        graph=bool(cfg.trainer.pop("graph", False)),
        description=description,
        **data.for_task(),
        evaluation=plain(cfg.evaluation),
        **_metrics(cfg),
    )
    if device_type(cfg.trainer.accelerator) == "cuda":
        channels_last(network)
    if cfg.trainer.precision in _TRUE:
        # Only the network: Lightning's own would also round the data and their augmentation.
        network.to(getattr(torch, _TRUE[cfg.trainer.precision]))
        cfg.trainer.precision = "32-true"
    callbacks = [instantiate(leaf) for leaf in (cfg.get("callbacks") or {}).values() if leaf]
    if not loggers:  # such a callback refuses to run without one
        callbacks = [one for one in callbacks if not isinstance(one, LearningRateMonitor)]
    if not (cfg.get("callbacks") or {}).get("progress"):  # or Lightning takes its own
        cfg.trainer = OmegaConf.merge({"enable_progress_bar": False}, cfg.trainer)
    steps, accumulate = cfg.data.steps, cfg.trainer.accumulate_grad_batches
    trainer = instantiate(
        cfg.trainer,
        max_epochs=1,  # the loader yields exactly the batches of data.steps optimizer steps
        max_steps=steps,
        log_every_n_steps=min(cfg.trainer.log_every_n_steps, steps),
        val_check_interval=min(cfg.data.val_every, steps) * accumulate,
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,  # the data module gives each rank its share
        callbacks=callbacks,
        logger=[forgiving(instantiate(leaf)) for leaf in loggers],
        plugins=[CheckedIO(), *cluster_plugins()],
        default_root_dir=cfg.run_dir,
        _convert_="all",
    )
    return task, trainer


def _metrics(cfg: DictConfig) -> dict[str, Any]:
    """The metrics of the group `metric`, as the task takes them; nothing without any."""
    found = [instantiate(config) for config in (cfg.get("metric") or {}).values() if config]
    if found and cfg.data.get("task", "segmentation") != "segmentation":
        raise UserError("metric=...: metrics score label maps, and this data set has none")
    return {"metrics": found} if found else {}


def _notice(cfg: DictConfig) -> str:
    """What must be said first and last when the data are synthetic."""
    if not cfg.data.synthetic:
        return ""
    return f"*** {cfg.data.title} *** {cfg.data.get('instead', '')}".rstrip()


def _use_job_arguments() -> None:
    """Lets Lightning's DDP children repeat this job rather than the whole sweep."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        sys.argv[1:] = list(HydraConfig.get().overrides.task)


def _silence_libraries() -> None:
    """Silences what libraries say that nobody here can act on; their own warnings about us stay."""
    import warnings

    # Lightning 2.6 with torch 2.13: its own use of a deprecated check
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)")
    # a resumed run goes on in its own folder
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    # few workers are enough for a memory-mapped cache; the data module documents it
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # scores are of all processes' cases before they are logged
    warnings.filterwarnings("ignore", message="It is recommended to use .*sync_dist=True")
    # DDP about a depthwise convolution's gradient: its axis of one channel has two right strides
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    import lightning.pytorch.utilities  # it sets its loggers' levels at import

    for name in ("lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)  # devices and advertisements come at INFO
        logger.handlers.clear()
        logger.propagate = True
    if getattr(lightning.pytorch.utilities.rank_zero_only, "rank", 0):
        logging.getLogger().setLevel(logging.ERROR)  # the first process speaks for all
