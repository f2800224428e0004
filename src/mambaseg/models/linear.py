"""Linear layers, on a CPU with AVX-512 by oneDNN.

There PyTorch's own takes MKL, which leaves half of the vector unit idle on processors that are not
Intel's. Everywhere else, for small products, under autocast and in exported files this is
`torch.nn.functional.linear`.
"""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
"""Whether oneDNN is there, and may use AVX-512."""
LEAST = 2**20
"""Multiply-adds below which a product is PyTorch's: calling takes longer than multiplying."""
NARROW = 16
"""Channels below which oneDNN is slow."""


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., in)` to `(..., out)`."""
        return linear(x, self.weight, self.bias)


class Mlp(nn.Sequential):
    """Four times as wide, GELU, back; `between` works on the wide map."""

    def __init__(self, dim: int, between: nn.Module | None = None) -> None:
        layers: dict[str, nn.Module] = {"fc1": Linear(dim, 4 * dim), "act": nn.GELU()}
        if between is not None:
            layers["between"] = between
        super().__init__(OrderedDict(**layers, fc2=Linear(4 * dim, dim)))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply `(..., in)` by weight `(out, in)` and add bias `(out,)`: `(..., out)`."""
    if _is_faster(x, weight):
        y: Tensor = _linear(x, weight, bias)
        return y
    return F.linear(x, weight, bias)


def _is_faster(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) >= LEAST
        and min(weight.shape) >= NARROW
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
        and ONEDNN
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        # by differentiable products again, so that gradients of gradients are right
        d_rows, rows = d_y.flatten(0, -2), x.flatten(0, -2)
        d_x = _linear(d_y, weight.t(), None) if wants_x else None
        d_weight = _weight_gradient(d_rows, rows) if wants_weight else None
        return d_x, d_weight, d_rows.sum(0) if wants_bias else None


def _weight_gradient(d_y: Tensor, x: Tensor) -> Tensor:
    """Multiply d_y `(M, out)`, transposed, by x `(M, in)`: `(out, in)`.

    oneDNN copies what comes transposed on the left: that is to be little.
    """
    (count, outs), ins = d_y.shape, x.shape[1]
    if count * outs <= count * ins + outs * ins:
        return _linear(d_y.t(), x.t(), None)
    return _linear(x.t(), d_y.t(), None).t()


_linear = _Linear.apply
