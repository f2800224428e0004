"""What a network costs: multiply-adds, the scan, which usual tools do not see, time and memory.

Counting tools look at layers (convolutions, linear layers). They miss the matrix products between
layers (attention, the projections of a scan block) and the scan itself, which is neither.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mambaseg.models import ScanBlock
from mambaseg.models.linear import ONEDNN
from mambaseg.models.vss import CrossScan

_LAYERS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear,
)  # fmt: skip


def count_operations(network: nn.Module, image: Tensor) -> dict[str, int]:
    """Counts the operations of one forward pass, of the whole batch; the same on every device.

    Returns:
        `layer_macs`: multiply-adds of convolutions and linear layers, biases not counted;
        `other_macs`: of all other matrix products; `scan_flops`: see `scan_flops`; `flops`: all of
        them, a multiply-add as two.
    """
    scans = 0

    def count_scan(module: ScanBlock, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal scans
        length, channels = module.scan_size(inputs[0])
        scans += len(inputs[0]) * scan_flops(length, channels, module.d_state)

    blocks = (module for module in network.modules() if isinstance(module, ScanBlock))
    handles = [block.register_forward_hook(count_scan) for block in blocks]
    crossed = [module for module in network.modules() if isinstance(module, CrossScan)]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        for block in crossed:
            block.dense = False  # the zeros that a GPU multiplies by are no work of the network
        # Attention as matrix products: the counter knows neither the CPU's fused kernel nor that
        # of whole transformer layers.
        torch.backends.mha.set_fastpath_enabled(False)
        plain = sdpa_kernel(SDPBackend.MATH)
        with torch.no_grad(), plain, counter_of_products() as counter:
            network.eval()(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
        for block in crossed:
            del block.dense
    root, counts = type(network).__name__, counter.get_flop_counts()
    layers = sum(
        sum(counts.get(f"{root}.{name}".rstrip("."), {}).values())
        for name, module in network.named_modules()
        if isinstance(module, _LAYERS)
    ) // 2  # fmt: skip
    macs = counter.get_total_flops() // 2  # sees every matrix product, but no scan
    return {
        "layer_macs": layers,
        "other_macs": macs - layers,
        "scan_flops": scans,
        "flops": 2 * macs + scans,
    }


def counter_of_products() -> FlopCounterMode:
    """A counter that knows the operator of `mambaseg.models.linear` too."""

    def product(x: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
        return 2 * math.prod(out_shape) * x[-1]

    known: dict[Any, Any] = {torch.ops.mkldnn._linear_pointwise: product} if ONEDNN else {}
    return FlopCounterMode(display=False, custom_mapping=known)


def scan_flops(length: int, channels: int, states: int) -> int:
    """Operations of one scan, 9 L D N + L D, as VMamba counts them (the last is the skip)."""
    return length * channels * (9 * states + 1)


# ---- time and memory ----------------------------------------------------------------------------


def seconds_on(device: torch.device) -> float:
    """Seconds of a clock that waits for what a GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def start_peak(device: torch.device) -> int | None:
    """Begins to watch for the peak of memory; gives the memory in use now, in bytes.

    That of the GPU's allocator, or the resident memory of the process: the kernel's own high-water
    mark (Linux), not a sampled one. None where the system does not tell. Memory that the allocator
    holds back from earlier work is returned first, so that it is not taken for memory in use.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)  # gives freed memory back to the system
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the mark
        return _memory_status("VmRSS")
    except OSError:
        return None


def peak(device: torch.device) -> int | None:
    """The highest memory since `start_peak`, in bytes; None where the system does not tell.

    On a CPU that is the whole process, with all libraries that it has loaded.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        return _memory_status("VmHWM")
    except OSError:
        return None


def _memory_status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status does not tell {key}")
