"""What runs on which device: their kind and number, and what of a configuration depends on them."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from mambaseg.errors import UserError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def settle_device(cfg: DictConfig) -> None:
    """Settles what depends on the device: precision, scan backend, graphs, compilation, ..."""
    import torch

    from mambaseg.inference.segment import choose_precision
    from mambaseg.scan import choose_backend

    trainer, optimizer = cfg.trainer, cfg.optim.optimizer
    device = device_type(trainer.accelerator)
    gpu, mps = device == "cuda", torch.backends.mps.is_available()
    if (gpu and not torch.cuda.is_available()) or (device == "mps" and not mps):
        raise UserError(
            f"trainer.accelerator={trainer.accelerator}: PyTorch finds no GPU of "
            f"{'NVIDIA' if gpu else 'Apple'} here. trainer=cpu runs without one; mambaseg doctor "
            "says what is missing."
        )
    if trainer.get("sync_batchnorm") == "auto":
        trainer.sync_batchnorm = gpu  # PyTorch has it for GPUs only
    if trainer.get("graph") and (why := no_graph(cfg, gpu=gpu)):
        log.warning("trainer.graph=true: %s; the training runs without", why)
        trainer.graph = False
    if trainer.get("compile") and (why := no_compile(cfg, device)):
        log.warning("trainer.compile=true: %s; the training runs without", why)
        trainer.compile = False
    if trainer.precision in ("auto", "bf16-native"):
        trainer.precision = choose_precision(trainer.precision, gpu=gpu)
    precision = f"trainer.precision={trainer.precision}"
    float16 = str(trainer.precision).startswith("16")
    if optimizer.get("fused") and (float16 or trainer.get("gradient_clip_val")):
        # Lightning clips no fused optimizer in mixed precision; and such a one takes the loss scale
        # out of the gradient itself, after it was looked at
        optimizer.fused = False
    if "scan_backend" in cfg.model:
        if float16:
            raise UserError(
                f"{precision}: float16 overflows in the selective scan; use bf16-mixed or 32-true"
            )
        cfg.model.scan_backend = choose_backend(cfg.model.scan_backend, torch.device(device))
        if trainer.get("deterministic") and cfg.model.scan_backend == "mamba_ssm":
            raise UserError(
                "trainer.deterministic=true: the scan backend mamba_ssm sums gradients in any "
                "order; use model.scan_backend=triton or torch"
            )
    if float16 and not gpu and trainer.accelerator in (("cpu",) if mps else ("cpu", "auto")):
        # Lightning would take bfloat16 instead, and the run's tables call it float16
        raise UserError(
            f"{precision}: float16 needs a GPU, and this run is on the CPU. Use "
            "trainer.precision=32-true or bf16-mixed."
        )


def device_type(accelerator: str) -> str:
    """The kind of device that Lightning takes for `trainer.accelerator`: `cpu`, `cuda` or `mps`."""
    import torch
    from lightning.pytorch.accelerators import MPSAccelerator

    if accelerator in ("auto", "gpu"):  # in Lightning's order
        if MPSAccelerator.is_available():
            return "mps"
        return "cuda" if accelerator == "gpu" or torch.cuda.is_available() else "cpu"
    return accelerator if accelerator in ("cuda", "mps") else "cpu"


def usable_device(name: str) -> torch.device:
    """A device by its name, `auto` a GPU where there is one; UserError: it cannot be used."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        choices = "auto, cpu, cuda, cuda:1 or mps"
        raise UserError(f"device={name} cannot be used: choose {choices}") from error
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"device={name} cannot be used ({reason}); device=cpu always can"
        ) from error
    return device


def device_count(trainer: DictConfig) -> int:
    """How many devices a training takes, on all nodes."""
    import torch

    devices, count = trainer.devices, 1
    if OmegaConf.is_list(devices):
        count = len(devices)
    elif devices not in ("auto", -1):
        count = int(devices)
    elif device_type(trainer.accelerator) == "cuda":
        count = torch.cuda.device_count()
    return count * int(trainer.get("num_nodes", 1))


def no_graph(cfg: DictConfig, *, gpu: bool) -> str:
    """Why the training pass cannot be a CUDA graph; empty where it can."""
    if not gpu:
        return "CUDA graphs need an NVIDIA GPU"
    if device_count(cfg.trainer) > 1:
        return "CUDA graphs are for one device"
    if cfg.trainer.accumulate_grad_batches != 1:
        return "trainer.accumulate_grad_batches is not 1, and a graph overwrites its gradients"
    return ""


def no_compile(cfg: DictConfig, device: str) -> str:
    """Why torch.compile cannot make the training pass; empty where it can."""
    if cfg.trainer.get("graph"):
        return "trainer.graph=true records the same pass"
    if device == "cuda":
        return "" if find_spec("triton") else "on a GPU it needs triton, pip install triton"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "it needs a C++ compiler, such as g++ or clang++"
    return ""
