"""Backends to test and where, random inputs, gradients and errors for the tests of the scan."""

import math
import os
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from mambaseg.scan import available_backends, selective_scan, selective_scan_2d

GPU = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # slow by a factor of thousands
DEVICES = dict.fromkeys(available_backends("cpu"), "cpu")
DEVICES["mamba_ssm"] = GPU if find_spec("selective_scan_cuda") else "cpu"
if INTERPRETED or (GPU == "cuda" and find_spec("triton")):
    DEVICES["triton"] = "cpu" if INTERPRETED else GPU
DEVICES["cuda"] = GPU
if GPU == "cpu" and not shutil.which("g++"):
    del DEVICES["cuda"]  # no compiler to emulate its kernels with
BACKENDS = tuple(DEVICES)

NAMES = ("y", "u", "delta", "A", "B", "C", "D", "delta_bias")


def sequence_inputs(
    batch: int, groups: int, channels: int, length: int, states: int, *, seed: int = 0
) -> list[Tensor]:
    """Float64 arguments of `selective_scan`, with the decay rates of a trained network's size."""
    normal = _generator(seed)
    return [
        normal(batch, groups, channels, length),
        normal(batch, groups, channels, length) * 2 - 2,
        -torch.exp(normal(groups, channels, states)),
        normal(batch, groups, states, length),
        normal(batch, groups, states, length),
        normal(groups, channels),
        normal(groups, channels),
    ]


def image_inputs(
    batch: int, height: int, width: int, channels: int, states: int, *, seed: int = 0
) -> list[Tensor]:
    """Float64 arguments of `selective_scan_2d`."""
    normal = _generator(seed)
    return [
        normal(batch, height, width, channels),
        normal(batch, height, width, 4, channels) * 2 - 2,
        -torch.exp(normal(4, channels, states)),
        normal(batch, height, width, 4, states),
        normal(batch, height, width, 4, states),
        normal(4, channels),
        normal(4, channels),
    ]


def scan_1d(backend: str) -> Callable[..., Tensor]:
    """The scan of sequences by a backend, on its device."""
    device = DEVICES[backend]
    return lambda *inputs: selective_scan(*(t.to(device) for t in inputs), backend=backend).cpu()


def scan_2d(backend: str) -> Callable[..., Tensor]:
    """The scan of images by a backend, on its device."""
    device = DEVICES[backend]
    return lambda *inputs: selective_scan_2d(*(t.to(device) for t in inputs), backend=backend).cpu()


def fit(backend: str, shape: Sequence[int], tiny: Sequence[int]) -> Sequence[int]:
    """The shape to test a backend with: a tiny one where Python does the work."""
    compiled = backend in ("numba", "torch") or DEVICES[backend] == "cuda"
    return shape if compiled else tiny


def value_and_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """The output and the gradient of every input, for a fixed random gradient of the output."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    y = function(*leaves)
    d_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(y, leaves, d_y.to(y.dtype))
    return [y.detach(), *gradients]


def relative_errors(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    """Largest absolute error over the largest absolute value, per tensor; exact zeros count 0.

    A NaN counts as infinite: `max` would pass over it.
    """
    errors = {}
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert a.shape == e.shape, name
        difference = (a.double() - e.double()).abs().nan_to_num(nan=math.inf).max().item()
        errors[name] = difference / max(e.double().abs().max().item(), 1e-30) if difference else 0.0
    return errors


def _generator(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal
