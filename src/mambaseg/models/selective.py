"""What the blocks around a selective scan share: the 1-D one (`mamba1d`) and the 2-D one (`vss`).

Source: Mamba (Gu & Dao 2023, arXiv 2312.00752, section 3). Letters as in `mambaseg.scan.reference`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from mambaseg.models.linear import linear

STEP_RANGE = (1e-3, 1e-1)  # initial step sizes, log-uniform
STEP_FLOOR = 1e-4


def initial_step_bias(shape: tuple[int, ...]) -> Tensor:
    """Draw biases whose softplus is log-uniform in `STEP_RANGE`, as in Mamba (Gu & Dao 2023)."""
    low, high = (math.log(bound) for bound in STEP_RANGE)
    step = torch.exp(torch.rand(shape) * (high - low) + low).clamp(min=STEP_FLOOR)
    return step + torch.log(-torch.expm1(-step))  # inverse of softplus


def wide(parameter: Tensor) -> Tensor:
    """Give float32 for a parameter of lower precision; float32 and float64 stay."""
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


class LinearPair(nn.Linear):
    """A linear layer whose output comes in two contiguous halves: what follows copies neither."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # two of them
        """Map `(..., in)` to two of `(..., out / 2)`."""
        first, second = self.weight.chunk(2)
        return linear(x, first), linear(x, second)


class ScanBlock(nn.Module, ABC):
    """A module around a selective scan: which parts stay exact, and how large the scan is.

    Step bias, A and D are used in float32 also under autocast; the scan keeps its state in float32.
    """

    exact: ClassVar[tuple[str, ...]]
    """Names of the parameters that the state decays by. They stay float32 when the module is
    converted to a narrower type, where decays close to 1 would be off by much of their distance."""
    no_weight_decay: ClassVar[tuple[str, ...]]
    """Names of the parameters that pull to zero would harm."""
    d_state: int  # N, states per channel
    scan_backend: str  # a name for `mambaseg.scan`, or `auto`

    @abstractmethod
    def scan_size(self, x: Tensor) -> tuple[int, int]:
        """Give the steps L and the channels (of all directions) of the scan of one sample of x."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert the module (`.to`, `.half`, `.cuda`), but keep the `exact` parameters exact."""
        exact = {id(self.get_parameter(name)) for name in self.exact}

        def convert(t: Tensor) -> Tensor:
            converted = fn(t)
            narrowed = converted.is_floating_point() and converted.dtype.itemsize < 4
            return t.to(converted.device) if id(t) in exact and narrowed else converted

        return super()._apply(convert, recurse)


def names_without_decay(network: nn.Module) -> set[str]:
    """Name the parameters (as `named_parameters`) that pull to zero would harm.

    These are the scan's `A_logs` and `Ds` (as in Mamba) and the relative position biases (as in
    Swin): what a module lists in `no_weight_decay`.
    """
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in network.named_modules()
        if isinstance(names := getattr(module, "no_weight_decay", None), tuple)
        for name in names
    }
