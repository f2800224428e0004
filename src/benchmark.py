"""Measures scans, blocks, networks and training steps: speed and memory, as ratios within one run.

python src/benchmark.py scan backends=[numba,torch] shapes=[stage1]
python src/benchmark.py inference models=[swin_unet,mamba_unet]
python src/benchmark.py train size=128 batch=4
python src/benchmark.py blocks
python src/benchmark.py profile models=all page=docs/models.md
python src/benchmark.py truth
python src/benchmark.py kernels device=cuda
python src/benchmark.py gpu minutes=9 root=$ACDC_ROOT out=outputs/gpu
"""

import datetime
import logging
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from mambaseg.app.entry import CONF, entry
from mambaseg.app.networks import build_network
from mambaseg.benchmark import networks
from mambaseg.benchmark.blocks import measure_blocks
from mambaseg.benchmark.gpu import measure_gpu
from mambaseg.benchmark.kernels import measure_kernels
from mambaseg.benchmark.measure import Protocol
from mambaseg.benchmark.pages import networks_page
from mambaseg.benchmark.scans import measure_scans, shapes_of
from mambaseg.benchmark.tables import tables
from mambaseg.benchmark.truth import measure_truth
from mambaseg.errors import UserError
from mambaseg.inference.segment import choose_precision
from mambaseg.scan import choose_backend
from mambaseg.storage.run_folder import RunFolder, code_state, environment

log = logging.getLogger(__name__)


def scan(cfg: DictConfig, protocol: Protocol, autocast: bool) -> dict[str, Any]:
    """Scan backends at the shapes of Mamba-UNet."""
    return measure_scans(
        shapes_of(cfg.shapes, size=cfg.size, batch=cfg.batch),
        protocol=protocol,
        forms=list(cfg.forms),
        backends=list(cfg.backends),
        dtype=torch.bfloat16 if autocast else torch.float32,
        loop_limit=cfg.loop_limit,
    )


def inference(cfg: DictConfig, protocol: Protocol, autocast: bool) -> dict[str, Any]:
    """Networks: a forward pass."""
    step = networks.inference(_image(cfg, protocol.device), autocast=autocast)
    return networks.measure_networks(
        _networks(cfg, protocol.device), step, images=cfg.batch, protocol=protocol, seed=cfg.seed
    )


def train(cfg: DictConfig, protocol: Protocol, autocast: bool) -> dict[str, Any]:
    """Networks: a training step."""
    return networks.measure_networks(
        _networks(cfg, protocol.device), _training(cfg, protocol.device, autocast),
        images=cfg.batch, protocol=protocol, seed=cfg.seed,
    )  # fmt: skip


def kernels(cfg: DictConfig, protocol: Protocol, autocast: bool) -> dict[str, Any]:
    """Networks on a GPU: a training step by kernel."""
    return measure_kernels(
        _networks(cfg, protocol.device), _training(cfg, protocol.device, autocast),
        protocol=protocol, seed=cfg.seed,
    )  # fmt: skip


def truth(cfg: DictConfig, protocol: Protocol, autocast: bool) -> dict[str, Any]:
    """Scan backends against float64; whether trainings repeat their bits."""
    return measure_truth(
        _networks(cfg, protocol.device), _training(cfg, protocol.device, autocast),
        shapes=list(cfg.scans), device=protocol.device, seed=cfg.seed,
    )  # fmt: skip


def gpu(cfg: DictConfig) -> None:
    """A fresh GPU machine: its numbers, its speed, and trainings of the paper's networks."""
    if cfg.root is None:
        raise UserError("gpu: root=<folder of ACDC> names the data to train on")
    out = Path(cfg.out).expanduser().absolute()
    parts = measure_gpu(
        Path(cfg.root).expanduser().absolute(), out, minutes=cfg.minutes, cwd=ROOT,
        networks=list(cfg.models), only=list(cfg.parts), graph=cfg.device != "cpu",
        train=list(cfg.train), bench=list(cfg.bench),
    )  # fmt: skip
    log.info("results: %s", out / "table.md")
    if failed := [part["name"] for part in parts if part["status"] == "failed"]:
        raise UserError(f"failed: {', '.join(failed)}; their logs are in {out / 'logs'}")


def blocks(cfg: DictConfig, protocol: Protocol, autocast: bool) -> dict[str, Any]:
    """Building blocks: forward and backward at four resolutions."""
    return measure_blocks(
        size=cfg.size, batch=cfg.batch, scan_backend=choose_backend("auto", protocol.device),
        protocol=protocol, autocast=autocast, seed=cfg.seed,
    )  # fmt: skip


def profile(cfg: DictConfig, protocol: Protocol, autocast: bool) -> dict[str, Any]:
    """Networks: parameters, operations, latency, memory."""
    return networks.profile_networks(
        _networks(cfg, protocol.device), _image(cfg, protocol.device),
        autocast=autocast, protocol=protocol, seed=cfg.seed,
    )  # fmt: skip


ROOT = Path(__file__).resolve().parents[1]
NETWORKS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
WORDS = {
    "scan": scan, "inference": inference, "train": train, "blocks": blocks, "profile": profile,
    "kernels": kernels, "truth": truth,
}  # fmt: skip


@entry("benchmark")
def main(cfg: DictConfig) -> None:
    """Measures, prints tables, writes a JSON file."""
    if cfg.what == "gpu":
        gpu(cfg)
        return
    device = _device(cfg.device)
    precision = choose_precision(cfg.precision, gpu=device.type == "cuda")
    if cfg.page and (cfg.what, cfg.models) != ("profile", "all"):
        raise UserError("page: is written by `profile models=all`")
    if cfg.graph and device.type != "cuda":
        raise UserError("graph=true: CUDA graphs need device=cuda")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.batch is None:
        scans = 24 if device.type == "cuda" else 1
        twos = dict.fromkeys(("train", "blocks", "truth"), 2)
        cfg.batch = {**twos, "scan": scans, "kernels": 24}.get(cfg.what, 1)
    torch.manual_seed(cfg.seed)
    protocol = Protocol(device, cfg.repeats, cfg.warmup, cfg.budget)
    started = datetime.datetime.now(datetime.UTC)
    record = {
        "what": cfg.what,
        "command": shlex.join(["python", "src/benchmark.py", *_typed]),
        "started": started.isoformat(timespec="seconds"),
        "device": device.type,
        "precision": precision,
        "settings": OmegaConf.to_container(cfg, resolve=True),
        "code": code_state(),
        **environment(),
        **WORDS[cfg.what](cfg, protocol, precision == "bf16-mixed"),
    }
    console = Console(width=None if sys.stdout.isatty() else 100)
    for table in tables(record):
        console.print(table)
    for note in record["notes"]:
        log.info(note)
    if cfg.page:
        _write_page(Path(cfg.page), record)
    name = f"{cfg.what}-{started:%Y%m%d-%H%M%S-%f}.json"
    path = RunFolder(cfg.outputs).write_json(name, record)
    log.info("written: %s", path)
    if not record.get("within", True):
        raise UserError(f"wrong numbers: errors above their limits, see the tables or {path}")


def _write_page(path: Path, record: dict[str, Any]) -> None:
    """All networks as Markdown, for docs/models.md."""
    configs = {name: (CONF / "model" / f"{name}.yaml").read_text("utf-8") for name in NETWORKS}
    versions, hardware = record["versions"], record["hardware"]
    device = hardware["gpus"][0] if record["device"] == "cuda" else hardware["cpu"]
    text = networks_page(
        record["rows"],
        configs,
        size=record["settings"]["size"],
        command=record["command"],
        setting=(
            f"{device}, threads: {hardware['threads']}, {record['precision']}, "
            f"torch {versions['torch']}, numba {versions['numba']}, {record['started'][:10]}"
        ),
    )
    RunFolder(path.parent).write_text(path.name, text)
    log.info("written: %s", path)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UserError(f"device={name}: choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: no CUDA device is visible to PyTorch")
    return torch.device(name)


def _image(cfg: DictConfig, device: torch.device) -> torch.Tensor:
    return torch.rand(cfg.batch, cfg.data.in_channels, cfg.size, cfg.size, device=device)


def _training(cfg: DictConfig, device: torch.device, autocast: bool) -> networks.Step:
    image = _image(cfg, device)
    label = torch.randint(cfg.data.num_classes, (cfg.batch, cfg.size, cfg.size)).to(device)
    return networks.training(
        image, label, instantiate(cfg.loss), instantiate(cfg.optim.optimizer), autocast=autocast,
        graph=cfg.graph,
    )  # fmt: skip


def _networks(cfg: DictConfig, device: torch.device) -> dict[str, Callable[[], nn.Module]]:
    """Networks to build, by the entries of `models`: a config of conf/model and changes to it."""
    builders: dict[str, Callable[[], nn.Module]] = {}
    for label in NETWORKS if cfg.models == "all" else cfg.models:
        name, *changes = str(label).split()
        words = [f"model={name}", *(f"model.{change}" for change in changes)]
        model = compose("benchmark", [*HydraConfig.get().overrides.task, *words]).model
        if "scan_backend" in model:
            model.scan_backend = choose_backend(model.scan_backend, device)
            log.info("%s: scan backend %s", label, model.scan_backend)
        builders[str(label)] = partial(_network, model)
    if not builders and cfg.what != "truth":
        raise UserError("models: name at least one config of conf/model")
    return builders


def _network(model: DictConfig) -> nn.Module:
    return build_network(model)[0]


if __name__ == "__main__":
    _typed = sys.argv[1:]
    known = [*WORDS, "gpu"]
    if _typed and _typed[0] in known:
        sys.argv[1] = f"what={_typed[0]}"
    elif not {"--help", "-h"} & set(_typed):
        said = f"{_typed[0]!r} is not a benchmark" if _typed else "which benchmark?"
        sys.exit(f"{said}: python src/benchmark.py {'|'.join(known)} [key=value ...]")
    main()
