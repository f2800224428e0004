"""The causal convolution of the 1-D Mamba block, by the CUDA extension where that can run.

Source: Gu and Dao, "Mamba" (2023), section 3.4 and figure 3: a short depthwise convolution in front
of the scan, in which no output sees an input that comes later.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL_WIDTHS = (2, 3, 4)
"""What the extension of the package causal-conv1d is compiled for."""


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Convolve each channel with its own weights over the present and the W - 1 steps before.

    y[b, d, t] = bias[d] + Σ_w weight[d, w] x[b, d, t - (W - 1) + w], with x = 0 before the start.

    The sequences x and y have the shape (B, D, L) and x's dtype; weight is (D, W), its last column
    for the present step, and bias (D,). The activation is "silu" or None.

    Raises:
        ValueError: The activation is unknown.
    """
    if activation not in (None, "silu"):
        raise ValueError(f"activation is {activation!r} where None or 'silu' is expected")
    width = weight.shape[1]
    extension = _extension() if _fits_extension(x, width) else None
    if extension is not None:
        return extension(x.contiguous(), weight, bias, activation=activation)
    # As an image of one row: PyTorch's depthwise kernels for images are up to 3 times as fast on
    # CPUs, and keep channels last where they are.
    padded = F.pad(x.to(weight.dtype).unsqueeze(2), (width - 1, 0))
    y = F.conv2d(padded, weight[:, None, None], bias, groups=len(weight)).squeeze(2)
    return (y if activation is None else F.silu(y)).to(x.dtype)


def _fits_extension(x: Tensor, width: int) -> bool:
    fits = x.is_cuda and x.dtype != torch.float64 and width in KERNEL_WIDTHS
    return fits and not torch.are_deterministic_algorithms_enabled()  # its backward adds atomically


@lru_cache(maxsize=1)
def _extension() -> Callable[..., Tensor] | None:
    """The function of the package causal-conv1d, if it is installed."""
    try:
        from causal_conv1d import causal_conv1d_fn
    except ImportError:
        return None
    function: Callable[..., Tensor] = causal_conv1d_fn
    return function
