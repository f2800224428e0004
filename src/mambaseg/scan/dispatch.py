"""Which backend runs a scan, and why: the public functions of the package.

A backend is a module with a function `selective_scan` and, if it has a faster form than the one in
`cross`, `selective_scan_2d`. Any module can be named by its full path (`my_package.my_scan`); a
line in `BACKENDS` gives it a short name and makes it one of the choices of "auto".
"""

import importlib
import logging
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mambaseg.errors import UserError
from mambaseg.scan import cross

log = logging.getLogger(__name__)


class Backend(NamedTuple):
    """Where a backend can run: on which device types (None: all), with which package installed."""

    module: str
    devices: tuple[str, ...] | None = None
    package: str | None = None
    install: str | None = None  # how to get the package


BACKENDS: dict[str, Backend] = {  # in the order in which "auto" prefers them
    "triton": Backend("mambaseg.scan.triton", ("cuda",), "triton", "pip install triton"),
    "cuda": Backend(
        "mambaseg.scan.cuda", ("cuda",), "NVRTC of PyTorch's CUDA builds", "make setup"
    ),
    "mamba_ssm": Backend("mambaseg.scan.mamba_ssm", ("cuda",), "mamba-ssm", "make setup-cuda"),
    "numba": Backend("mambaseg.scan.numba", ("cpu",), "numba", "pip install numba"),
    "torch": Backend("mambaseg.scan.chunked"),
    "reference": Backend("mambaseg.scan.reference"),
}

ARGUMENTS = ("delta", "A", "B", "C", "D", "delta_bias")

_modules: dict[str, ModuleType] = {}  # those imported so far, by name
_announced: set[tuple[str, str]] = set()


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Selective scan of K groups of sequences; `reference` holds the definition and the letters.

    Args:
        u: Input, shape (B, K, D, L).
        delta: Step sizes before bias and softplus, shape (B, K, D, L).
        A: Decay rates, negative, shape (K, D, N).
        B: Input weights, shape (B, K, N, L).
        C: Output weights, shape (B, K, N, L).
        D: Skip weights, shape (K, D).
        delta_bias: Bias of delta, shape (K, D).
        backend: Name or module of a backend, or "auto".

    Returns:
        The output sequences, shape (B, K, D, L), in u's dtype. The state is float32 (float64 for
        float64 input) whatever the dtypes of the inputs are.

    Raises:
        UserError: The named backend cannot run here, or the input is float16.
        ValueError: The shapes do not fit together.
    """
    batch, groups, channels, length = u.shape
    weights = (batch, groups, A.shape[-1], length)
    _check_shapes((delta, A, B, C, D, delta_bias), u.shape, weights, (groups, channels))
    module = _load(backend, u)
    out: Tensor = module.selective_scan(u, delta, A, B, C, D, delta_bias)
    return out


def selective_scan_2d(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Selective scan of an image in four directions, summed (VMamba's SS2D); see `cross`.

    Directions: 0 along the rows, 1 down the columns, 2 = 0 backwards, 3 = 1 backwards.

    Like the result, the image x is channels last, (B, H, W, D). delta (B, H, W, K, D), B and C
    (B, H, W, K, N) lie at their positions in the image, for each of the K = 4 directions. The
    other arguments, the dtype and the errors are those of `selective_scan`.
    """
    *place, channels = x.shape
    of_group = (cross.NUM_DIRECTIONS, channels)
    weights = (*place, cross.NUM_DIRECTIONS, A.shape[-1])
    _check_shapes((delta, A, B, C, D, delta_bias), (*place, *of_group), weights, of_group)
    module = _load(backend, x)
    if hasattr(module, "selective_scan_2d"):
        out: Tensor = module.selective_scan_2d(x, delta, A, B, C, D, delta_bias)
        return out
    return cross.selective_scan_2d(module.selective_scan, x, delta, A, B, C, D, delta_bias)


def available_backends(device: torch.device | str) -> tuple[str, ...]:
    """Names of the backends that can run on `device` in this installation, best first."""
    device_type = torch.device(device).type
    return tuple(name for name in BACKENDS if obstacle(name, device_type) is None)


def choose_backend(name: str, device: torch.device | str) -> str:
    """Resolve a backend name for a device: "auto" becomes the best one that can run there.

    Raises:
        UserError: The name is unknown, or the named backend cannot run; the message says why.
    """
    return _choose(name, torch.device(device).type)


def check_name(name: str) -> None:
    """Raises UserError: `name` is not "auto", a backend of the table or the path of a module."""
    if name not in ("auto", *BACKENDS) and "." not in name:
        raise UserError(f"Unknown scan backend '{name}'. Choose auto or one of {[*BACKENDS]}.")


@torch.compiler.assume_constant_result  # imports and logging stay out of compiled graphs
def _choose(name: str, device_type: str) -> str:
    if name == "auto":
        return _choose_automatically(device_type)
    check_name(name)
    reason = obstacle(name, device_type)
    if reason is not None:
        raise UserError(f"scan_backend={name} cannot run: {reason}. Use model.scan_backend=auto.")
    return name


def _choose_automatically(device_type: str) -> str:
    """The first backend of the table that can run; says once what was chosen and what was not."""
    obstacles = {}
    for name in BACKENDS:
        reason = obstacle(name, device_type)
        if reason is None:
            break
        if device_type in (BACKENDS[name].devices or (device_type,)):
            obstacles[name] = reason  # worth a word: it would run here if it were installed
    if (name, device_type) not in _announced:
        _announced.add((name, device_type))
        passed_over = "".join(f"; not {other}: {why}" for other, why in obstacles.items())
        log.info("Scan backend on %s: %s (chosen by auto)%s", device_type, name, passed_over)
    return name


def obstacle(name: str, device_type: str) -> str | None:
    """Why a backend cannot run on a device type, with the remedy; None when it can."""
    backend = BACKENDS.get(name) or Backend(name, package=f"the module {name}")
    if backend.devices is not None and device_type not in backend.devices:
        return f"it runs on {' and '.join(backend.devices)} but the tensors are on {device_type}"
    remedy = f"install it with `{backend.install}`" if backend.install else "look at PYTHONPATH"
    try:
        module = importlib.import_module(backend.module)
    except ImportError as error:
        return f"it needs {backend.package} ({error}); {remedy}"
    except Exception as error:  # what is installed badly fails in any way
        if backend.package is None:
            raise
        reason = f"{type(error).__name__}: {error}"
        return f"{backend.package} is installed but does not load ({reason}); {remedy}"
    if not hasattr(module, "selective_scan"):
        return f"{backend.package} has no function selective_scan; {remedy}"
    _modules[name] = module
    return None


def _load(name: str, x: Tensor) -> ModuleType:
    """The module of the backend that runs on x."""
    if x.dtype == torch.float16:
        raise UserError(
            "The selective scan refuses float16: its states leave that range and turn into NaN. "
            "Use bfloat16 (trainer.precision=bf16-mixed) or float32 (trainer.precision=32-true)."
        )
    return _modules[_choose(name, x.device.type)]


def _check_shapes(
    tensors: tuple[Tensor, ...],
    steps: tuple[int, ...],
    weights: tuple[int, ...],
    of_group: tuple[int, ...],
) -> None:
    """Refuse `tensors` of a wrong shape: compiled backends read by address."""
    rates = (*of_group, tensors[1].shape[-1])
    shapes = (steps, rates, weights, weights, of_group, of_group)
    for name, tensor, shape in zip(ARGUMENTS, tensors, shapes, strict=True):
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} where {shape} is expected")
