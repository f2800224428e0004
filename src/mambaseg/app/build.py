"""Turns a configuration into a run."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from mambaseg.app.check import check_targets
from mambaseg.app.jobs import note_run
from mambaseg.app.networks import network_with_weights, plain, read_with_leaf, without
from mambaseg.app.schema import EXTRAS
from mambaseg.errors import UserError
from mambaseg.storage.files import home_file
from mambaseg.storage.untrusted import readable

if TYPE_CHECKING:
    from torch import nn

    from mambaseg.inference.trained import Checkpoint
    from mambaseg.training.run import Run

# keys of conf/evaluate.yaml that only say what to score; `checkpoint` is what they come to
_SOURCES = ("run", "predictions", "references", "class_names")
# precisions that convert the network itself, and torch's name of what it becomes
_TRUE = {"bf16-true": "bfloat16", "16-true": "float16", "64-true": "float64"}
# what the data are for (data.task), and the task that learns it
_TASKS = {
    "segmentation": "mambaseg.training.segmentation.SegmentationTask",
    "restoration": "mambaseg.restoration.task.RestorationTask",
}
log = logging.getLogger(__name__)


# ---- what the configuration may ask of the machine (nothing else reads the environment) ---------


def _acdc_root() -> str:
    return os.environ.get("ACDC_ROOT") or "data/ACDC"


def _found_data() -> str:
    named = os.environ.get("ACDC_ROOT")  # also a folder that is not there: then that is the error
    return "acdc" if named or Path(_acdc_root()).is_dir() else "phantom"


def _haze_root() -> str:
    return os.environ.get("HAZE_ROOT") or "data/haze"


def _found_haze() -> str:
    named = os.environ.get("HAZE_ROOT")
    return "haze" if named or Path(_haze_root()).is_dir() else "haze_phantom"


def _wandb_mode() -> str:
    if mode := os.environ.get("WANDB_MODE"):
        return {"dryrun": "offline", "run": "online"}.get(mode, mode)
    netrc = Path(named) if (named := os.environ.get("NETRC")) else home_file(".netrc")
    try:
        known = netrc is not None and b"api.wandb.ai" in netrc.expanduser().read_bytes()
    except (OSError, RuntimeError):
        known = False
    return "online" if known or os.environ.get("WANDB_API_KEY") else "offline"


def _monitor(*, _root_: DictConfig) -> str:
    """The validation score by which the task of the data chooses its best checkpoint."""
    return str(_task_class(_root_.data).monitor)


def _nnunet(what: str, *, _root_: DictConfig) -> Any:
    """What the data set at data.root, in nnU-Net's layout, says about itself.

    Raises:
        UserError: there is none, or its dataset.json cannot be used.
    """
    from mambaseg.data.readers.dataset_json import read_dataset_json
    from mambaseg.data.readers.nnunet import split_of

    if OmegaConf.is_missing(_root_.data, "root"):
        raise UserError("data=nnunet: say where the data set is, data.root=<its folder>")
    root = Path(_root_.data.root).expanduser()
    if what == "title":
        return re.sub(r"[^\w .+-]", "-", root.absolute().name)[:100]
    if what == "split":
        return split_of(root)
    about = read_dataset_json(root)
    if what == "in_channels":
        return len(about.channels)
    return len(about.class_names) if what == "num_classes" else list(about.class_names)


_RESOLVERS: dict[str, Callable[..., Any]] = {
    "monitor": _monitor,
    "acdc_root": _acdc_root,
    "found_data": _found_data,
    "haze_root": _haze_root,
    "found_haze": _found_haze,
    "wandb_mode": _wandb_mode,
    "nnunet": _nnunet,
}
for _name, _resolver in _RESOLVERS.items():
    OmegaConf.register_new_resolver(_name, _resolver, replace=True)


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
    _require_unicode(cfg)
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
    _settle(cfg)
    data = instantiate(without(cfg.data, *EXTRAS["data"]), _convert_="all")
    data.load()
    if checkpoint is None:
        data.split.require_training()
        settle_callbacks(cfg, logged=_task_class(cfg.data).logged(data))
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
        "augmentation": cfg.data.get("augmentation"),
        "classes": list(cfg.data.class_names),
        "data": {"name": cfg.data.name, "title": cfg.data.title, "fingerprint": data.fingerprint},
        "split": {"name": data.split.name, "hash": data.split.hash},
        "seen": Seen.of(
            {part: data.known(part) for part in PARTS},
            checkpoint.seen if checkpoint else None,
            same_split=bool(checkpoint and checkpoint.split_hash == data.split.hash),
        ).plain(),
    }
    task = _task_class(cfg.data)(
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
    )
    if (
        _device_type(cfg.trainer.accelerator) == "cuda"
    ):  # convolutions and their norms are several times as fast in this layout
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


# ---- settling what a configuration leaves open --------------------------------------------------


def _settle(cfg: DictConfig) -> None:
    """Replaces every `auto` that can change a result, and refuses what cannot work."""
    import torch

    from mambaseg.inference.segment import choose_precision
    from mambaseg.scan import choose_backend

    device = _device_type(cfg.trainer.accelerator)
    gpu = device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise UserError(
            "trainer: no CUDA device is visible to PyTorch. trainer=cpu runs without one; "
            "otherwise install a CUDA build of torch and check nvidia-smi."
        )
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError(
            f"trainer.accelerator={cfg.trainer.accelerator}: PyTorch finds no GPU of Apple here. "
            "trainer=cpu runs without one."
        )
    if cfg.trainer.get("sync_batchnorm") == "auto":
        cfg.trainer.sync_batchnorm = gpu  # PyTorch has it for GPUs only
    if cfg.trainer.get("graph") and (why := _no_graph(cfg, gpu=gpu)):
        log.warning("trainer.graph=true: %s; the training runs without", why)
        cfg.trainer.graph = False
    if cfg.trainer.precision == "auto":
        cfg.trainer.precision = choose_precision("auto", gpu=gpu)
    float16 = str(cfg.trainer.precision).startswith("16")
    if cfg.optim.optimizer.get("fused") and (float16 or cfg.trainer.get("gradient_clip_val")):
        # Lightning clips no fused optimizer in mixed precision; and such a one takes the loss scale
        # out of the gradient itself, after it was looked at
        cfg.optim.optimizer.fused = False
    if "scan_backend" in cfg.model:
        if str(cfg.trainer.precision).startswith("16"):
            raise UserError(
                f"trainer.precision={cfg.trainer.precision}: float16 overflows in the selective "
                "scan; use bf16-mixed or 32-true"
            )
        cfg.model.scan_backend = choose_backend(cfg.model.scan_backend, torch.device(device))
        if cfg.trainer.get("deterministic") and cfg.model.scan_backend == "mamba_ssm":
            raise UserError(
                "trainer.deterministic=true: the scan backend mamba_ssm sums gradients in any "
                "order; use model.scan_backend=triton or torch"
            )
    mps = torch.backends.mps.is_available()
    if float16 and not gpu and cfg.trainer.accelerator in (("cpu",) if mps else ("cpu", "auto")):
        # Lightning would take bfloat16 instead, and the run's tables call it float16
        raise UserError(
            f"trainer.precision={cfg.trainer.precision}: float16 needs a GPU, and this run is on "
            "the CPU. Use trainer.precision=32-true or bf16-mixed."
        )
    if OmegaConf.is_missing(cfg.data, "root"):
        raise UserError(f"data={cfg.data.name}: say where the data set is, data.root=<its folder>")
    cfg.data.root = str(Path(cfg.data.root).expanduser())
    cfg.data.cache_dir = str(Path(cfg.data.cache_dir).expanduser())
    with_accumulation = {"accumulate": cfg.trainer.accumulate_grad_batches}
    cfg.data = OmegaConf.merge(cfg.data, with_accumulation)


def _device_type(accelerator: str) -> str:
    """The kind of device that Lightning takes for `trainer.accelerator`: `cpu`, `cuda` or `mps`."""
    import torch
    from lightning.pytorch.accelerators import MPSAccelerator

    if accelerator in ("auto", "gpu"):  # in Lightning's order
        if MPSAccelerator.is_available():
            return "mps"
        return "cuda" if accelerator == "gpu" or torch.cuda.is_available() else "cpu"
    return accelerator if accelerator in ("cuda", "mps") else "cpu"


def _no_graph(cfg: DictConfig, *, gpu: bool) -> str:
    """Why the training pass cannot be a CUDA graph; empty where it can."""
    if not gpu:
        return "CUDA graphs need an NVIDIA GPU"
    if cfg.trainer.devices not in (1, "1", [0]) or cfg.trainer.get("num_nodes", 1) != 1:
        return "CUDA graphs are for one device"
    if cfg.trainer.accumulate_grad_batches != 1:
        return "trainer.accumulate_grad_batches is not 1, and a graph overwrites its gradients"
    return ""


def _require_unicode(cfg: DictConfig) -> None:
    """Refuses a folder that the files of a run could not name.

    Raises:
        UserError: the name of a folder is not UTF-8.
    """
    for key in ("data.root", "data.cache_dir", "outputs", "checkpoint"):
        path = OmegaConf.select(cfg, key, throw_on_missing=False)
        if path is not None and readable(str(path)) != str(path):
            raise UserError(
                f"{key}={readable(str(path))}: the name is not UTF-8, so no file of the run can "
                "hold it. Rename the folder, or give a link to it (files below may have any name)."
            )


def _notice(cfg: DictConfig) -> str:
    """What must be said first and last when the data are synthetic."""
    if not cfg.data.synthetic:
        return ""
    return f"*** {cfg.data.title} *** {cfg.data.get('instead', '')}".rstrip()


def _use_job_arguments() -> None:
    """Lets Lightning's DDP children repeat this job rather than the whole sweep."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        sys.argv[1:] = list(HydraConfig.get().overrides.task)


def _task_class(data: DictConfig) -> Any:
    """The task that learns what the data are for: `data.task`, segmentation where it is unsaid."""
    kind = data.get("task", "segmentation")
    if kind not in _TASKS:
        raise UserError(f"data.task={kind}: choose one of {', '.join(_TASKS)}")
    return get_class(_TASKS[kind])


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
