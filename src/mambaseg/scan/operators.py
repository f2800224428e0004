"""What the compiled backends share: their inputs, and how two passes become one operator.

Letters as in `reference`, and G: K where each group has its own x and y, 1 where all share them.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambaseg.scan import cross


class Inputs(NamedTuple):
    """The inputs of a fused scan, positions before channels."""

    x: Tensor  # input, (B, L, G, D)
    delta: Tensor  # raw step sizes, (B, L, K, D)
    A: Tensor  # decay rates, (K, D, N); on a GPU A log2(e), (K, N, D): see `for_gpu`
    B: Tensor  # input weights, (B, L, K, N)
    C: Tensor  # output weights, (B, L, K, N)
    D: Tensor  # skip weights, (K, D)
    delta_bias: Tensor  # (K, D)


def make_operator(
    name: str,
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., Sequence[Tensor]],
    empty: Callable[..., tuple[Tensor, Tensor]],
    *,
    empty_gradients: Callable[[Any], Sequence[Tensor]] | None = None,
    kind: Any = Inputs,
    options: str = ", SymInt width",
) -> Callable[..., Any]:
    """Turn the two passes of a backend into an operator for autograd and torch.compile.

    Args:
        name: Of the operator.
        forward: `(inputs, *options) -> (y, kept)`, where the backward starts from `kept`.
        backward: `(d_y, inputs, kept, *options)` -> the gradients of all inputs.
        empty: `forward` without values: the same shapes, dtypes and strides.
        empty_gradients: `inputs` -> the gradients without values; by default alike.
        kind: Named tuple of the inputs.
        options: The other arguments, as PyTorch's schemas write them.

    Returns:
        The operator, called as `(*inputs, *options) -> (y, kept)`.
    """
    count = len(kind._fields)
    alike = empty_gradients or (lambda inputs: tuple(map(torch.empty_like, inputs)))
    tensors = ", ".join(f"Tensor {field}" for field in kind._fields)
    gradients = ", ".join(["Tensor"] * count)

    def run_forward(*values: Any) -> tuple[Tensor, Tensor]:
        return forward(kind(*values[:count]), *values[count:])

    def run_backward(d_y: Tensor, *values: Any) -> tuple[Tensor, ...]:
        kept, *rest = values[count:]
        return tuple(backward(d_y, kind(*values[:count]), kept, *rest))

    def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.options = inputs[count:]
        ctx.set_materialize_grads(False)  # or the gradient of `kept`, which nobody has, costs zeros
        ctx.save_for_backward(*inputs[:count], output[1])

    def differentiate(ctx: Any, d_y: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * len(ctx.options)
        if d_y is None:
            return (None,) * count + nothing
        return (*gradient(d_y, *ctx.saved_tensors, *ctx.options), *nothing)

    scan = torch.library.custom_op(
        f"mambaseg::{name}",
        run_forward,
        mutates_args=(),
        schema=f"({tensors}{options}) -> (Tensor, Tensor)",
    )
    gradient = torch.library.custom_op(
        f"mambaseg::{name}_backward",
        run_backward,
        mutates_args=(),
        schema=f"(Tensor d_y, {tensors}, Tensor kept{options}) -> ({gradients})",
    )
    scan.register_fake(lambda *values: empty(kind(*values[:count]), *values[count:]))
    gradient.register_fake(lambda d_y, *values: tuple(alike(kind(*values[:count]))))
    scan.register_autograd(differentiate, setup_context=save_for_backward)
    return scan


def make_forms(
    scan: Callable[..., tuple[Tensor, Tensor]],
    ready: Callable[[Inputs], Inputs],
    exact: cross.Scan1d,
    most_states: float = math.inf,
) -> tuple[cross.Scan1d, cross.Scan1d]:
    """Make a backend's `selective_scan` and `selective_scan_2d`.

    Args:
        scan: Called as `(*inputs, width)`; `width` is that of the image whose positions L are,
            walked in four directions, or 0 for a sequence.
        ready: Gives the inputs the dtypes and strides that the kernels read.
        exact: The scan for float64 and for more than `most_states` states.
        most_states: N that the kernels can hold.
    """

    def goes_elsewhere(x: Tensor, A: Tensor) -> bool:
        return x.dtype == torch.float64 or A.shape[2] > most_states

    def selective_scan(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
    ) -> Tensor:
        """The scan of `reference.selective_scan`: same arguments, same result."""
        if goes_elsewhere(u, A):
            return exact(u, delta, A, B, C, D, delta_bias)
        x, delta, B, C = (t.permute(0, 3, 1, 2) for t in (u, delta, B, C))
        y, _ = scan(*ready(Inputs(x, delta, A, B, C, D, delta_bias)), 0)
        return y.permute(0, 2, 3, 1).to(u.dtype)

    def selective_scan_2d(
        x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
    ) -> Tensor:
        """The scan of `cross.selective_scan_2d`: same arguments after the first, same result."""
        if goes_elsewhere(x, A):
            return cross.selective_scan_2d(exact, x, delta, A, B, C, D, delta_bias)
        shared = x.flatten(1, 2).unsqueeze(2)  # (B, L, 1, D)
        delta, B, C = (t.flatten(1, 2) for t in (delta, B, C))
        y, _ = scan(*ready(Inputs(shared, delta, A, B, C, D, delta_bias)), x.shape[2])
        return y.view(x.shape).to(x.dtype)

    return selective_scan, selective_scan_2d


# ------------------------------------------------------------------ for kernels on a GPU


def for_gpu(inputs: Inputs, lay_out: Callable[[Tensor], Tensor]) -> Inputs:
    """Inputs in float32 or bfloat16, parameters in float32 and contiguous, A log2(e) as (K, N, D).

    `lay_out` gives x, delta, B and C the strides that the kernels read.
    """
    x, delta, B, C = (
        lay_out(t if t.dtype == torch.bfloat16 else t.float())
        for t in (inputs.x, inputs.delta, inputs.B, inputs.C)
    )
    rates = (inputs.A.float() * math.log2(math.e)).transpose(1, 2).contiguous()
    D, delta_bias = (t.float().contiguous() for t in (inputs.D, inputs.delta_bias))
    return Inputs(x, delta, rates, B, C, D, delta_bias)


def merge_directions(each: Tensor, width: int) -> Tensor:
    """Sum the four directions of an image, in float32 and in a fixed order: (B, L, G, D).

    The result has the type of `each`: autocast would leave it in float32, which the backward
    kernels would then read as what x is.
    """
    return each.sum(dim=2, keepdim=True, dtype=each.dtype) if width else each


def sum_parts(parts: Iterable[Tensor], inputs: Inputs) -> list[Tensor]:
    """Sum the parts of the gradients of A, B, C, D and delta_bias, in a fixed order."""
    whole = (part[0] if len(part) == 1 else part.sum(0) for part in parts)
    return [t.to(like.dtype) for t, like in zip(whole, inputs[2:], strict=True)]
