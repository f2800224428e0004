"""The `mamba_ssm` backend: the CUDA scan of the mamba-ssm package, for whoever has built it.

Only the compiled extension `selective_scan_cuda` is imported: the package around it needs more and
does not import everywhere. It takes sequences with L contiguous and all K D channels side by side,
so the 2-D form is the one of `cross`, with its copies. Its gradients of B and C are summed by
atomics: the same inputs do not give the same bits. It counts elements in 32 bits and is silently
wrong beyond them (state-spaces/mamba#1015): a larger batch goes in in parts.

Its rules on dtypes: u, delta, B and C alike, and A, D and the bias float32. Where the inputs differ
they are computed in float32; float64 goes to `chunked`. Letters as in `reference`.
"""

import torch  # before the extension, which needs its libraries
from selective_scan_cuda import bwd, fwd
from torch import Tensor

from mambaseg.errors import UserError
from mambaseg.scan import chunked
from mambaseg.scan.operators import Inputs, make_operator

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
        _scan(x[part], steps[part], A, B[part], C[part], D, delta_bias)[0]
        for part in _parts(x.shape, B.shape)
    ]
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return y.view(u.shape).to(u.dtype)


def _parts(inputs: torch.Size, weights: torch.Size) -> list[slice]:
    """Batch elements that go in together; none of their tensors has more than `MOST` elements."""
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


# The operator takes x and delta as (B, K D, L), A (K D, N), B and C (B, K, N, L), D and the bias
# (K D,); it keeps the states that the extension's backward wants.


def _forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    y, states = fwd(*inputs[:6], None, inputs.delta_bias, True)
    return y, states


def _empty(inputs: Inputs) -> tuple[Tensor, Tensor]:
    batch, channels, length = inputs.x.shape
    chunks = -(-length // STEPS)
    states = inputs.A.new_empty(batch, channels, chunks, 2 * inputs.A.shape[1])
    return torch.empty_like(inputs.x), states


def _backward(d_y: Tensor, inputs: Inputs, states: Tensor) -> list[Tensor]:
    d_y = d_y.contiguous()
    gradients = bwd(
        *inputs[:6], None, inputs.delta_bias, d_y, states, None, None, True, False
    )  # those of B and C come in float32
    return [d.to(t.dtype) for d, t in zip(gradients[:7], inputs, strict=True)]


_scan = make_operator("mamba_ssm_scan", _forward, _backward, _empty, options="")
