"""The `mamba_ssm` backend: the CUDA scan of the mamba-ssm package, for whoever has built it.

Only the compiled extension `selective_scan_cuda` is imported: the package around it needs more and
does not import everywhere. It takes sequences with L contiguous and all K D channels side by side,
so the 2-D form is the one of `cross`, with its copies. Its gradients of B and C are summed by
atomics: the same inputs do not give the same bits.

Its rules on dtypes: u, delta, B and C alike, and A, D and the bias float32. Where the inputs differ
they are computed in float32; float64 goes to `chunked`. Letters as in `reference`.
"""

from typing import Any

import torch  # before the extension, which needs its libraries
from selective_scan_cuda import bwd, fwd
from torch import Tensor

from mambaseg.scan import chunked

STEPS = 2048
"""Steps from one state that the extension keeps to the next."""


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
    y, _ = _scan(x.flatten(1, 2), steps.flatten(1, 2), A, B, C, D, delta_bias)
    return y.view(u.shape).to(u.dtype)


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
