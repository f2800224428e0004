"""The benchmarks of conf/benchmark.yaml: builds what is measured, prints and writes the results."""

from __future__ import annotations

import datetime
import logging
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hydra import compose
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from mambaseg.app.build import build
from mambaseg.app.check import check_imports, plain_tree
from mambaseg.app.devices import usable_device
from mambaseg.app.entry import CONF
from mambaseg.app.networks import build_network, plain
from mambaseg.app.overrides import given_overrides
from mambaseg.benchmark.blocks import measure_blocks
from mambaseg.benchmark.gpu import measure_gpu
from mambaseg.benchmark.growth import measure_growth
from mambaseg.benchmark.kernels import measure_kernels
from mambaseg.benchmark.loop import EVERY, Paces
from mambaseg.benchmark.measure import Call, Protocol, instruction_sets
from mambaseg.benchmark.networks import (
    Step,
    inference,
    measure_networks,
    profile_networks,
    training,
)
from mambaseg.benchmark.scans import measure_scans, shapes_of
from mambaseg.benchmark.tables import tables
from mambaseg.benchmark.truth import measure_truth
from mambaseg.errors import UserError
from mambaseg.inference.segment import choose_precision
from mambaseg.scan import choose_backend
from mambaseg.storage.run_folder import RunFolder, code_state, environment
from mambaseg.training.checks import require_loss
from mambaseg.training.losses import DeepSupervision

STEPS_OF_LOOP = 97
IMAGES_OF_A_STEP = 2  # as `benchmark train` has
_NETWORKS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
log = logging.getLogger(__name__)


def run_benchmark(cfg: DictConfig, *, command: str) -> None:
    """Measures what `cfg.what` names; `command` is what the user typed.

    Raises:
        UserError: a setting is impossible here, a part of `gpu` failed, or numbers are wrong.
    """
    if cfg.what == "gpu":
        _measure_machine(cfg)
        return
    if cfg.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={cfg.device}: choose auto, cpu or cuda")
    device = usable_device(cfg.device)
    precision = choose_precision(cfg.precision, gpu=device.type == "cuda")
    if cfg.graph and device.type != "cuda":
        raise UserError("graph=true: CUDA graphs need device=cuda")
    if cfg.compile and cfg.what not in ("train", "inference"):
        raise UserError("compile=true: is for train and inference")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.batch is None:
        batches = {"loop": 12, "train": IMAGES_OF_A_STEP, "blocks": 2, "truth": 2, "kernels": 24}
        batches["scan"] = 24 if device.type == "cuda" else 1
        cfg.batch = batches.get(cfg.what, 1)
    torch.manual_seed(cfg.seed)
    autocast = precision == "bf16-mixed"
    protocol = Protocol(device, cfg.repeats, cfg.warmup, cfg.budget, cfg.seed, autocast)
    started = datetime.datetime.now(datetime.UTC)
    record = {
        "what": cfg.what,
        "command": command,
        "started": started.isoformat(timespec="seconds"),
        "device": device.type,
        "precision": precision,
        "settings": plain(cfg),
        "code": code_state(),
        **environment(),
        "instructions": instruction_sets(),
        **_measured(cfg, protocol),
    }
    console = Console(width=None if sys.stdout.isatty() else 100)
    for table in tables(record):
        console.print(table)
    for note in record["notes"]:
        log.info(note)
    used = (f"{name} {said}" for name, said in record["instructions"].items())
    log.info("instruction sets: %s", ", ".join(used))
    name = f"{cfg.what}-{started:%Y%m%d-%H%M%S-%f}.json"
    path = RunFolder(Path(cfg.outputs).expanduser()).write_json(name, record)
    log.info("written: %s", path)
    if not record.get("within", True):
        raise UserError(
            f"wrong numbers: errors above their limits, or none at all; see the tables or {path}"
        )


def _measured(cfg: DictConfig, protocol: Protocol) -> dict[str, Any]:
    """`rows`, `notes` and what else a kind of benchmark finds."""
    device = protocol.device
    if OmegaConf.is_list(cfg.size):
        raise UserError(f"size={cfg.size}: benchmarks measure squares, give the pixels of a side")
    if cfg.what == "scan":
        shapes = shapes_of(cfg.shapes, size=cfg.size, batch=cfg.batch)
        forms, backends = list(cfg.forms), list(cfg.backends)
        return measure_scans(shapes, protocol, forms, backends, loop_limit=cfg.loop_limit)
    if cfg.what == "blocks":
        backend = choose_backend("auto", device)
        return measure_blocks(protocol, size=cfg.size, batch=cfg.batch, scan_backend=backend)
    if cfg.what == "loop":
        return {"rows": [_loop(cfg, label, device) for label in _labels(cfg)], "notes": []}
    networks = _networks(cfg, device)
    if cfg.what == "growth":
        points = {str(part): list(sizes) for part, sizes in cfg.growth.items()}
        if unknown := set(cfg.parts) - points.keys():
            raise UserError(
                f"parts: growth has no part {', '.join(unknown)}; there are {', '.join(points)}"
            )
        chosen = {part: points[part] for part in cfg.parts or points}
        return measure_growth(networks, partial(_training, cfg, device), protocol, chosen)
    image = _image(cfg, device, cfg.size, cfg.batch)
    if cfg.what == "profile":
        train = _training(cfg, device, cfg.size, IMAGES_OF_A_STEP) if cfg.models == "all" else None
        return profile_networks(networks, image, protocol, train)
    if cfg.what == "inference":
        step = inference(image, autocast=protocol.autocast)
        return measure_networks(networks, step, protocol, images=cfg.batch)
    step = _training(cfg, device, cfg.size, cfg.batch)
    if cfg.what == "kernels":
        return measure_kernels(networks, step, protocol)
    if cfg.what == "truth":
        return measure_truth(networks, step, protocol, shapes=list(cfg.scans))
    return measure_networks(networks, step, protocol, images=cfg.batch)


def _image(cfg: DictConfig, device: torch.device, size: int, batch: int) -> torch.Tensor:
    return torch.rand(batch, cfg.data.in_channels, size, size, device=device)


def _training(cfg: DictConfig, device: torch.device, size: int, batch: int) -> Step:
    """A training step on random images."""
    image = _image(cfg, device, size, batch)
    label = torch.randint(cfg.data.num_classes, (batch, size, size)).to(device)
    loss, optimizer = instantiate(cfg.loss), instantiate(cfg.optim.optimizer)
    if not isinstance(loss, DeepSupervision):  # which takes the heads of a network
        logits = torch.rand(batch, cfg.data.num_classes, size, size, device=device)
        require_loss(loss, logits, label, instead="dice_ce")
    mixed = choose_precision(cfg.precision, gpu=device.type == "cuda") == "bf16-mixed"
    return training(image, label, loss, optimizer, autocast=mixed, graph=cfg.graph)


def _loop(cfg: DictConfig, label: str, device: torch.device) -> dict[str, Any]:
    """The pace of a training without validation beside its bare step."""
    words = [
        *_overrides(label), f"trainer={'gpu' if device.type == 'cuda' else 'cpu'}",
        f"trainer.precision={cfg.precision}", "data=phantom", "logger=csv", f"data.size={cfg.size}",
        f"data.batch_size={cfg.batch}", f"data.steps={STEPS_OF_LOOP}",
        f"data.val_every={STEPS_OF_LOOP}", "evaluation.batch_size=8", "test=false", *cfg.train,
    ]  # fmt: skip
    config = compose("config", words)
    if config.data.steps < EVERY:
        raise UserError(
            f"train: data.steps={config.data.steps} is too short, give at least {EVERY}"
        )

    def step_of(network: nn.Module, batch: Mapping[str, Any]) -> Call:
        optimizer = instantiate(config.optim.optimizer)
        loss = instantiate(config.loss)
        mixed = "mixed" in run.config["trainer"]["precision"]
        return training(batch["image"], batch["label"], loss, optimizer, autocast=mixed)(network)

    with TemporaryDirectory(prefix="mambaseg-loop-") as place:
        config.outputs = place
        with build(config) as run:
            paces = Paces(step_of)
            run.trainer.callbacks.append(paces)  # type: ignore[attr-defined]  # Lightning sets it
            run.trainer.limit_val_batches = 1
            run.fit()
    return paces.row(label)


def _measure_machine(cfg: DictConfig) -> None:
    """A fresh GPU machine: its numbers, its speed, and trainings of the paper's networks."""
    if cfg.root is None:
        raise UserError("gpu: root=<folder of ACDC> names the data to train on")
    if not Path(cfg.root).expanduser().is_dir():
        raise UserError(f"gpu: root={cfg.root}: there is no such folder")
    if changed := [label for label in _labels(cfg) if label.split() != [label]]:
        raise UserError(f"gpu: models takes configs of conf/model as they are, not {changed}")
    if cfg.device != "cpu" and not torch.cuda.is_available():
        raise UserError("gpu: no CUDA device is visible to PyTorch; device=cpu rehearses it")
    out = Path(cfg.out).expanduser().absolute()
    parts = measure_gpu(
        Path(cfg.root).expanduser().absolute(), out, minutes=cfg.minutes, cwd=Path.cwd(),
        networks=_labels(cfg), only=list(cfg.parts), graph=cfg.device != "cpu",
        train=list(cfg.train), bench=list(cfg.bench),
    )  # fmt: skip
    log.info("results: %s", out / "table.md")
    if not parts:
        raise UserError(f"nothing was measured: no part begins with one of {list(cfg.parts)}")
    undone = [f"{part['status']}: {part['name']}" for part in parts if part["status"] != "done"]
    if undone:
        raise UserError(f"{'; '.join(undone)}; the logs are in {out / 'logs'}")


def _labels(cfg: DictConfig) -> list[str]:
    """The entries of `models`: a config of conf/model and changes to it each."""
    return _NETWORKS if cfg.models == "all" else [str(label) for label in cfg.models]


def _overrides(label: str) -> list[str]:
    """What chooses the network of an entry of `models`."""
    name, *changes = label.split()
    return [f"model={name}", *(f"model.{change}" for change in changes)]


def _networks(cfg: DictConfig, device: torch.device) -> dict[str, Callable[[], nn.Module]]:
    """Networks to build, by the entries of `models`."""
    builders: dict[str, Callable[[], nn.Module]] = {}
    for label in _labels(cfg):
        words = [*given_overrides(), *_overrides(label)]
        model = compose("benchmark", words).model
        check_imports("model", plain_tree(model))
        if "scan_backend" in model:
            model.scan_backend = choose_backend(model.scan_backend, device)
            log.info("%s: scan backend %s", label, model.scan_backend)
        builders[label] = partial(_network, model)
        if cfg.compile:
            builders[f"{label}, compiled"] = partial(_network, model, compiled=True)
    if not builders and not (cfg.what == "truth" and cfg.scans):
        raise UserError("models: name at least one config of conf/model")
    return builders


def _network(model: DictConfig, *, compiled: bool = False) -> nn.Module:
    network = build_network(model)[0]
    if compiled:
        network.compile(dynamic=False)
    return network
