"""Build a run from its configuration: data, network, task and trainer."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf, open_dict

from mambaseg.app.budget import within_minutes
from mambaseg.app.check import plain_tree
from mambaseg.app.devices import device_count, device_type
from mambaseg.app.fine_tuning import Start, require_one_start
from mambaseg.app.networks import (
    bare,
    build_network,
    composed_model,
    made,
    network_with_weights,
    plain,
)
from mambaseg.app.overrides import given_overrides
from mambaseg.app.own import config_dirs
from mambaseg.app.resolvers import task_class
from mambaseg.app.schema import EXTRAS
from mambaseg.app.settle import metrics_of, settle
from mambaseg.app.sweeps import cluster_plugins, in_sweep, note_run, requeue_call
from mambaseg.app.targets import import_target
from mambaseg.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from mambaseg.inference.trained import Checkpoint
    from mambaseg.storage.run_folder import RunFolder
    from mambaseg.training.run import Plan, Run

# precisions that convert the network itself, and torch's name of what it becomes
_TRUE = {"bf16-true": "bfloat16", "16-true": "float16", "64-true": "float64"}
log = logging.getLogger(__name__)


def build(cfg: DictConfig) -> Run:
    """Builds a run, settled and with its data; network and trainer follow when it is entered."""
    _silence_libraries()
    from mambaseg.training.run import Run

    if os.environ.get("WANDB_MODE") == "":  # which W&B would refuse
        del os.environ["WANDB_MODE"]
    _require_devices(cfg.trainer)
    require_one_start(cfg)
    cfg = within_minutes(cfg, build)
    plan, data, checkpoint, start = settle(_with_own_norms(cfg))
    if checkpoint is None:
        _require_steps(plan.config["optim"])
    note_run(plan.folder.path)
    if in_sweep():
        # Lightning's DDP children repeat this job, with its configs, rather than the whole sweep
        command = [word for word in sys.argv[1:2] if word.isalpha()]  # of `mambaseg train`
        configs = [f"--config-dir={place}" for place in config_dirs()]
        sys.argv[1:] = [*command, *configs, *given_overrides()]
    parts = Assembly(plan, data, checkpoint, start)
    return Run(plan, data, parts, overrides=given_overrides(), requeue=requeue_call())


def _with_own_norms(cfg: DictConfig) -> DictConfig:
    """The configuration, which says so where each device normalises by its own share of a batch.

    The weights then depend on the number of shares by more than rounding, so it makes another run.
    """
    if "checkpoint" in cfg or (count := device_count(cfg.trainer)) < 2:
        return cfg
    together = cfg.trainer.get("sync_batchnorm")
    if together == "auto":
        together = device_type(cfg.trainer.accelerator) == "cuda"
    if together or not _has_batch_norms(cfg):
        return cfg
    cfg = copy.deepcopy(cfg)
    with open_dict(cfg):
        cfg.batch_norms = f"of each of {count} devices"
    return cfg


def _require_devices(trainer: DictConfig) -> None:
    """Refuses, before any data are read, devices that no training can have."""
    devices, cpu = trainer.devices, device_type(trainer.accelerator) == "cpu"
    if devices == 0 or (cpu and (devices == -1 or OmegaConf.is_list(devices))):
        raise UserError(
            f"trainer.devices={devices}: give a number of {'processes' if cpu else 'GPUs'}, 1 or "
            "more, such as trainer.devices=1"
        )


def _has_batch_norms(cfg: DictConfig) -> bool:
    """Whether a network of a training has batch norms, or that cannot be told before it settles."""
    from mambaseg.training.parameters import has_batch_norms

    cfg = OmegaConf.create(plain_tree(cfg))
    try:
        partner = (cfg.get("method") or {}).get("partner") or []
        names = [partner] if isinstance(partner, str) else partner
        cfg.networks = [cfg.model, *map(composed_model, names)]
        networks = [{**model, "pretrained": None} for model in plain(cfg)["networks"]]
        return any(has_batch_norms(build_network(model)[0]) for model in networks)
    except Exception:  # what is wrong with it `settle` says
        return True


def _require_steps(optim: Mapping[str, Any]) -> None:
    """Refuses an optimizer that runs the network itself, and a schedule that waits for a score."""
    from torch.optim.lr_scheduler import ReduceLROnPlateau

    target = optim["optimizer"]["_target_"]
    step = getattr(import_target("optim.optimizer", target), "step", None)
    closure = inspect.signature(step).parameters.get("closure") if step else None
    if closure and closure.default is closure.empty:
        raise UserError(
            f"optim.optimizer._target_={target}: it runs the network several times a step, and "
            "here a step is one pass. Choose another one (optim=sgd and optim=adamw have some)"
        )
    if not optim["scheduler"]:
        return
    target = optim["scheduler"]["_target_"]
    kind = import_target("optim.scheduler", target)
    if isinstance(kind, type) and issubclass(kind, ReduceLROnPlateau):
        raise UserError(
            f"optim.scheduler._target_={target}: it waits for a score, and a schedule goes by "
            "optimizer steps here. Choose another one (optim=sgd and optim=adamw have some), or "
            "optim.scheduler=null"
        )


def _naming(key: str, part: Callable[..., Any]) -> Callable[..., Any]:
    """A part that the task completes, whose ValueError about a number names the key."""

    @functools.wraps(part)
    def complete(*given: Any) -> Any:
        try:
            return part(*given)
        except ValueError as error:
            raise UserError(f"{key}: {error}") from error

    return complete


@dataclass(frozen=True)
class Assembly:
    """Makes the parts of a run from its plan."""

    plan: Plan
    data: Any
    checkpoint: Checkpoint | None
    start: Start | None = None

    def network(self) -> tuple[nn.Module, dict[str, Any] | None]:
        """The network, and the report of its weights (None: from scratch)."""
        network, report = network_with_weights(self.plan.config["model"], self.checkpoint)
        return network, self.start.fill(network) if self.start else report

    def task_and_trainer(self, network: nn.Module, folder: RunFolder) -> tuple[Any, Any]:
        """The task and the trainer; the run folder exists by now."""
        import torch

        from mambaseg.models import channels_last

        config = self.plan.config
        optim, trainer = config["optim"], dict(config["trainer"])
        method = self._method(network)
        waits, optimizer = optim.get("freeze_encoder", 0), dict(optim["optimizer"])
        if waits and optimizer.get("fused") and optimizer.get("momentum"):
            # PyTorch's fused SGD needs the momentum of all parameters of a group, or of none
            optimizer["fused"] = False
        task = task_class(config["data"])(
            network,
            made(config["loss"]),
            _naming("optim.optimizer", made(optimizer)),
            _naming("optim.scheduler", made(optim["scheduler"])) if optim["scheduler"] else None,
            decay=optim["decay"],
            layer_decay=optim.get("layer_decay", 1.0),
            freeze_encoder=waits,
            frozen=self._filled(method.networks if method else [network]),
            seed=config["seed"],
            graph=bool(trainer.pop("graph", False)),
            compile=bool(trainer.pop("compile", False)),
            method=method,
            steps=config["data"]["steps"],
            description=self._readable(),
            **self.data.for_task(),
            evaluation=config["evaluation"],
            **({"metrics": metrics} if (metrics := metrics_of(config)) else {}),
        )
        if device_type(trainer["accelerator"]) == "cuda":
            for part in (network, task.method):  # partners and teachers, too
                channels_last(part)
        if trainer["precision"] in _TRUE:
            # Only the network: Lightning's own would also round the data and their augmentation.
            dtype = getattr(torch, _TRUE[trainer["precision"]])
            if dtype.itemsize < 4:
                from mambaseg.training.methods.method import require_wide

                require_wide(task.method, trainer["precision"])
            for part in (network, task.method):
                part.to(dtype)
            trainer["precision"] = "32-true"
        return task, self._trainer(trainer, folder)

    def _method(self, network: nn.Module) -> Any:
        """The learning method with all of its networks; none where a checkpoint is scored."""
        import torch

        config = self.plan.config.get("method")
        if self.checkpoint is not None or not config:
            return None
        with torch.random.fork_rng(devices=[]):  # the training draws as without partners
            torch.manual_seed(self.plan.config["seed"] + 1)
            partners = [build_network(one)[0] for one in config.get("networks", ())]
            if self.start and partners:
                log.warning(
                    "init_from fills model=%s alone: method.partner=%s begins with weights of its "
                    "own (equal networks would teach each other nothing)",
                    self.plan.configs["model"], ",".join(config["partner"]),
                )  # fmt: skip
            # not as a keyword of `made`: Hydra would copy the networks
            return made(config, *EXTRAS["method"])([network, *partners])

    def _filled(self, networks: Sequence[nn.Module]) -> list[nn.Module]:
        """Those of a training's networks that begin with given weights."""
        config = self.plan.config
        configs = [config["model"], *(config.get("method") or {}).get("networks", ())]
        pretrained = [network for network, one in zip(networks, configs, strict=False)
                      if one.get("pretrained")]  # fmt: skip
        return [*networks[:1], *pretrained] if self.start else pretrained

    def _trainer(self, trainer: dict[str, Any], folder: RunFolder) -> Any:
        from lightning.pytorch.callbacks import LearningRateMonitor
        from lightning.pytorch.utilities.exceptions import MisconfigurationException

        from mambaseg.training.checkpoints import CheckedIO
        from mambaseg.training.loggers import forgiving

        config = self.plan.config
        steps, every = config["data"]["steps"], config["data"]["val_every"]
        loggers = [
            forgiving(made(logger, **self._filled_in(logger, folder)))
            for logger in (config.get("logger") or {}).values()
            if logger
        ]
        chosen = config.get("callbacks") or {}
        callbacks = [made(callback) for callback in chosen.values() if callback]
        if not loggers:  # such a callback refuses to run without one
            callbacks = [one for one in callbacks if not isinstance(one, LearningRateMonitor)]
        if not chosen.get("progress"):  # or Lightning takes its own
            trainer = {"enable_progress_bar": False, **trainer}
        try:
            return made(
                trainer,
                max_epochs=1,  # the loader yields exactly the batches of data.steps optimizer steps
                max_steps=steps,
                log_every_n_steps=min(trainer["log_every_n_steps"], steps),
                val_check_interval=min(every, steps) * trainer["accumulate_grad_batches"],
                check_val_every_n_epoch=None,
                use_distributed_sampler=False,  # the data module gives each rank its share
                callbacks=callbacks,
                logger=loggers,
                plugins=[CheckedIO(), *cluster_plugins()],
                default_root_dir=str(folder.path),
            )
        except InstantiationException as error:
            if not isinstance(reason := error.__cause__, MisconfigurationException):
                raise
            raise UserError(f"trainer: {reason}") from error

    def _filled_in(self, logger: dict[str, Any], folder: RunFolder) -> dict[str, Any]:
        """Values of the run for the keys that a logger's config has as null or ???."""
        data, record = self.plan.config["data"], folder.record
        resumed = record.get("resumed", [])
        known = {
            "name": folder.path.name,
            "run_id": record.get("wandb_id"),  # by which a resumed run finds its curves
            "resume_step": resumed[-1]["step"] if resumed else None,
            "history": str(folder.path / "metrics.csv"),
        }
        absent = (None, "???")
        filled_in = {key: value for key, value in known.items() if logger.get(key, "") in absent}
        if data["synthetic"] and "tags" in logger:
            filled_in["tags"] = [*(logger["tags"] or ()), data["title"]]
        return filled_in

    def _readable(self) -> dict[str, Any]:
        """The description; UserError: no command would read a checkpoint that says this."""
        from mambaseg.inference.trained import wrong_field

        about = self._description()
        if not self.checkpoint and (field := wrong_field(about)):
            raise UserError(
                f"no command could read a checkpoint of this run, for {field}: give shorter and "
                "plainer names (letters, digits, spaces, _ . + -) and smaller numbers"
            )
        return about

    def _description(self) -> dict[str, Any]:
        """What a checkpoint says about itself: plain data."""
        from mambaseg.data.seen import Seen
        from mambaseg.data.splits import PARTS
        from mambaseg.training.averaging import averaging

        data, cfg, model = self.data, self.plan.config["data"], bare(self.plan.config["model"])
        config = {"config": self.plan.configs["model"]}  # mine/deep of the name deep
        if config["config"] == model["name"]:
            config = {}
        before = self.start.checkpoint if self.start else self.checkpoint
        method = self.plan.config.get("method") or {}
        partners = [
            {"name": one["name"], **({} if name == one["name"] else {"config": name}),
             "arguments": bare(one)}
            for name, one in zip(
                method.get("partner", ()), method.get("networks", ()), strict=False
            )
        ]  # fmt: skip
        return {
            "model": {"name": model["name"], **config, "arguments": model},
            **({"partners": partners} if partners and not self.checkpoint else {}),
            **({} if (decay := averaging(self.plan.config)) is None else {"averaged": decay}),
            "task": cfg.get("task", "segmentation"),
            "preprocessing": data.describe(),
            "slicing": cfg.get("slicing", "stored"),
            "views": data.views,
            "classes": list(cfg["class_names"]),
            **({"regions": cfg["regions"]} if cfg.get("regions") else {}),
            "data": {
                "name": cfg["name"],
                "title": cfg["title"],
                "fingerprint": data.fingerprint,
                "channels": cfg["in_channels"],
            },
            "split": {"name": data.split.name, "hash": data.split.hash},
            **({"supervision": labels} if (labels := getattr(data, "supervision", None)) else {}),
            "seen": Seen.of(
                {part: data.known(part) for part in PARTS},
                before.seen if before else None,
                same_split=bool(before and before.split_hash == data.split.hash),
            ).plain(),
        }


def _silence_libraries() -> None:
    """Silences what libraries say that nobody here can act on; their own warnings about us stay."""
    import warnings

    for message in (
        ".*isinstance\\(treespec, LeafSpec\\)",  # Lightning 2.6 with torch 2.13: its own business
        "Checkpoint directory .* exists and is not empty",  # a run resumes in its own folder
        ".*does not have many workers",  # few are enough for a memory-mapped cache
        "It is recommended to use .*sync_dist=True",  # scores are of all processes' cases already
        "Grad strides do not match bucket view strides",  # of a depthwise convolution under DDP
    ):
        warnings.filterwarnings("ignore", message=message)
    import lightning.pytorch.utilities  # it sets its loggers' levels at import

    for name in ("lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)  # devices and advertisements come at INFO
        logger.handlers.clear()
        logger.propagate = True
    if getattr(lightning.pytorch.utilities.rank_zero_only, "rank", 0):
        logging.getLogger().setLevel(logging.ERROR)  # the first process speaks for all
