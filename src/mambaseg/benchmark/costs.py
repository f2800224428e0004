"""What a network costs: parameters, multiply-adds, and the scan, which usual tools do not see.

Counting tools look at layers (convolutions, linear layers). They miss the matrix products between
layers (attention, the projections of a scan block) and the scan itself, which is neither.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mambaseg.benchmark.measure import Protocol
from mambaseg.benchmark.networks import Builder, inference, measure_networks
from mambaseg.models import SS2D
from mambaseg.models.vss import DIRECTIONS

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def profile_networks(
    builders: Mapping[str, Builder],
    image: Tensor,
    *,
    autocast: bool,
    protocol: Protocol,
    seed: int,
) -> dict[str, Any]:
    """Parameters, operations, latency and peak memory of one inference call of each network.

    Returns:
        `rows` and `notes`; see docs/performance.md.
    """
    measured = measure_networks(
        builders, inference(image, autocast=autocast),
        images=len(image), protocol=protocol, seed=seed,
    )  # fmt: skip
    for row in measured["rows"]:
        network = builders[row["network"]]().to(protocol.device)
        row.update(count_operations(network, image))
    return measured


def count_operations(network: nn.Module, image: Tensor) -> dict[str, int]:
    """Counts the operations of one forward pass, of the whole batch.

    Returns:
        `layer_macs`: multiply-adds of convolutions and linear layers, biases not counted;
        `other_macs`: of all other matrix products; `scan_flops`: see `scan_flops`; `flops`: all of
        them, a multiply-add as two.
    """
    layers = 0
    scans = 0

    def count_layer(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal layers
        layers += _layer_macs(module, inputs[0], output)

    def count_scan(module: SS2D, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal scans
        batch, height, width, dim = inputs[0].shape
        scans += batch * scan_flops(height * width, DIRECTIONS * 2 * dim, module.d_state)

    handles = []
    for module in network.modules():
        if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)):
            handles.append(module.register_forward_hook(count_layer))
        elif isinstance(module, SS2D):
            handles.append(module.register_forward_hook(count_scan))
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network.eval()(image)
    finally:
        for handle in handles:
            handle.remove()
    macs = counter.get_total_flops() // 2  # sees every matrix product, but no scan
    return {
        "layer_macs": layers,
        "other_macs": macs - layers,
        "scan_flops": scans,
        "flops": 2 * macs + scans,
    }


def scan_flops(length: int, channels: int, states: int) -> int:
    """Operations of one scan, 9 L D N + L D, as VMamba counts them (the last is the skip)."""
    return length * channels * (9 * states + 1)


def _layer_macs(module: nn.Module, image: Tensor, output: Tensor) -> int:
    """Multiply-adds of a convolution or linear layer."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    per_element = math.prod(weight.shape[1:])  # of the output; of the input where transposed
    return per_element * (image if isinstance(module, _TRANSPOSED) else output).numel()
