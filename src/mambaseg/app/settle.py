"""Settles what a configuration leaves open, and refuses what cannot work."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from mambaseg.errors import UserError
from mambaseg.storage.untrusted import readable

log = logging.getLogger(__name__)


def settle(cfg: DictConfig) -> None:
    """Replaces every `auto` that can change a result, and refuses what cannot work."""
    import torch

    from mambaseg.inference.segment import choose_precision
    from mambaseg.scan import choose_backend

    device = device_type(cfg.trainer.accelerator)
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
    if cfg.trainer.get("graph") and (why := no_graph(cfg, gpu=gpu)):
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


def device_type(accelerator: str) -> str:
    """The kind of device that Lightning takes for `trainer.accelerator`: `cpu`, `cuda` or `mps`."""
    import torch
    from lightning.pytorch.accelerators import MPSAccelerator

    if accelerator in ("auto", "gpu"):  # in Lightning's order
        if MPSAccelerator.is_available():
            return "mps"
        return "cuda" if accelerator == "gpu" or torch.cuda.is_available() else "cpu"
    return accelerator if accelerator in ("cuda", "mps") else "cpu"


def no_graph(cfg: DictConfig, *, gpu: bool) -> str:
    """Why the training pass cannot be a CUDA graph; empty where it can."""
    if not gpu:
        return "CUDA graphs need an NVIDIA GPU"
    if cfg.trainer.devices not in (1, "1", [0]) or cfg.trainer.get("num_nodes", 1) != 1:
        return "CUDA graphs are for one device"
    if cfg.trainer.accumulate_grad_batches != 1:
        return "trainer.accumulate_grad_batches is not 1, and a graph overwrites its gradients"
    return ""


def require_unicode(cfg: DictConfig) -> None:
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
