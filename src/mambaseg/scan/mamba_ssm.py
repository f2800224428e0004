"""The `mamba_ssm` backend: the CUDA scan of the mamba-ssm package, for whoever has built it.

Only the compiled extension `selective_scan_cuda` is imported: the package around it needs more and
does not import everywhere. It takes sequences with L contiguous and all K D channels side by side,
so the 2-D form is the one of `cross`, with its copies. Its gradients of B and C are summed by
atomics: the same inputs do not give the same bits. It counts elements in 32 bits and is silently
wrong beyond them (state-spaces/mamba#1015): a larger batch goes in in parts.

Its rules on dtypes: u, delta, B and C alike, and A, D and the bias float32. Where the inputs differ
they are computed in float32; float64 goes to `chunked`. Letters as in `reference`.
"""

from typing import Any

import torch  # before the extension, which needs its libraries
from selective_scan_cuda import bwd, fwd
from torch import Tensor

from mambaseg.errors import UserError
from mambaseg.scan import chunked

STEPS = 2048
"""Steps from one state that the extension keeps to the next."""
MOST = 2**31 - 1
"""Elements of a tensor that the extension finds its way in."""


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> Tensor:
    """The scan of `reference.selective_scan`: same arguments, same result."""
    if u.dtype == torch.float64:
        return chunked.selective_scan(u, delta, A, B, C, D, delta_bias)
    alike = u.dtype == delta.dtype == B.dtype == C.dtype
    dtype = u.dtype if alike else torch.float32
    x, steps, B, C = (t.to(dtype).contiguous() for t in (u, delta, B, C))
    A, D, delta_bias = (t.float().flatten(0, 1).contiguous() for t in (A, D, delta_bias))
    x, steps = x.flatten(1, 2), steps.flatten(1, 2)
    parts = [
        _scan(*(t[part] for t in (x, steps)), A, *(t[part] for t in (B, C)), D, delta_bias)[0]
        for part in _parts(x.shape, B.shape)
    ]
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return y.view(u.shape).to(u.dtype)


def _parts(inputs: torch.Size, weights: torch.Size) -> list[slice]:
    """Batch elements that go in together; none of their tensors has more than `MOST` elements.

    Raises:
        UserError: a single batch element is larger.
    """
    batch, channels, length = inputs
    kept = channels * -(-length // STEPS) * 2 * weights[2]
    largest = max(channels * length, weights[1] * weights[2] * length, kept)
    together = MOST // largest
    if not together:
        raise UserError(
            f"the scan of one image has {largest} elements, and scan_backend=mamba_ssm counts them "
            "in 32 bits: choose another model.scan_backend, or a smaller data.size."
        )
    return [slice(first, first + together) for first in range(0, batch, together)]


@torch.library.custom_op("mambaseg::mamba_ssm_scan", mutates_args=())
def _scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Forward: y, and the states that the extension's backward wants.

    Args:
        u: Input, (B, K D, L).
        delta: Raw step sizes, (B, K D, L).
        A: Decay rates, (K D, N).
        B: Input weights, (B, K, N, L).
        C: Output weights, (B, K, N, L).
        D: Skip weights, (K D,).
        delta_bias: Bias of delta, (K D,).
    """
    y, states = fwd(u, delta, A, B, C, D, None, delta_bias, True)
    return y, states


@_scan.register_fake
def _empty_outputs(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> tuple[Tensor, Tensor]:
    batch, channels, length = u.shape
    chunks = (length + STEPS - 1) // STEPS
    return torch.empty_like(u), A.new_empty(batch, channels, chunks, 2 * A.shape[1])


@torch.library.custom_op("mambaseg::mamba_ssm_scan_backward", mutates_args=())
def _scan_backward(
    d_y: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D and delta_bias."""
    gradients = bwd(
        u, delta, A, B, C, D, None, delta_bias, d_y.contiguous(), states, None, None, True, False
    )
    d_u, d_delta, d_A, d_B, d_C, d_D, d_bias = gradients[:7]
    return d_u, d_delta, d_A, d_B.to(B.dtype), d_C.to(C.dtype), d_D, d_bias


@_scan_backward.register_fake
def _empty_gradients(
    d_y: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    states: Tensor,
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in (u, delta, A, B, C, D, delta_bias))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, d_y: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = _scan_backward(d_y, *ctx.saved_tensors)
    return gradients


_scan.register_autograd(_backward, setup_context=_save_for_backward)
