"""The selective scan as a readable loop over time: the definition that all backends must meet.

Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023),
section 3.2 and algorithm 2, with K independent groups of channels ("directions" in VMamba).
Glossary of the letters, in the paper's notation, for one batch element, group and channel::

    u    input sequence                               u_t
    Δ    step size, positive                          Δ_t   = softplus(delta_t + delta_bias)
    A    decay rates of the N states, negative        A_n
    B    how the input enters the states              B_t,n
    C    how the states are read out                  C_t,n
    D    skip connection from input to output         D
    h    hidden state, zero before the first step     h_t,n = exp(Δ_t A_n) h_t-1,n + Δ_t B_t,n u_t
    y    output sequence                              y_t   = Σ_n C_t,n h_t,n + D u_t

Sizes: B batch, K groups, D channels per group, L length, N states per channel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> Tensor:
    """Scan K groups of sequences, one step at a time.

    The state is float32 (float64 for float64 input) whatever the inputs are. Time and memory are
    linear in L in the backward too: tensors are taken apart by `unbind`, whose gradient is one
    concatenation, never by an index, whose gradient is a full tensor of zeros per step. All states
    are kept for the backward: gigabytes for a map of 56 x 56.

    `dispatch.selective_scan` has the arguments and the result.
    """
    out_dtype = u.dtype
    state_dtype = torch.promote_types(u.dtype, torch.float32)
    u, delta, A, B, C, D, delta_bias = (
        t.to(state_dtype) for t in (u, delta, A, B, C, D, delta_bias)
    )
    delta = F.softplus(delta + delta_bias[..., None], threshold=20.0)
    h = u.new_zeros(*u.shape[:3], A.shape[-1])  # (B, K, D, N)
    outputs = []
    steps = (t.unbind(dim=-1) for t in (u, delta, B, C))
    for u_t, delta_t, B_t, C_t in zip(*steps, strict=True):
        decay = torch.exp(delta_t[..., None] * A)  # (B, K, D, N)
        h = decay * h + (delta_t * u_t)[..., None] * B_t[:, :, None, :]
        outputs.append((h * C_t[:, :, None, :]).sum(dim=-1))  # (B, K, D)
    return (torch.stack(outputs, dim=-1) + D[..., None] * u).to(out_dtype)
