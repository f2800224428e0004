"""The loop over time that public code ships where no kernel is at hand, as a yardstick.

Decays and inflows of all steps are made at once, as whole tensors (B, K, D, L, N), and the loop
walks through them. Public code indexes them step by step, which makes the backward quadratic in
L: hours for one map of 56 x 56. Here they are taken apart by `unbind`, in linear time; what is left
is the traffic of whole tensors, gigabytes at that size. The `reference` backend makes each step
from what it needs at that step, and so is faster than this.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def unbind_loop(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> Tensor:
    """The scan of `mambaseg.scan.reference.selective_scan`: same arguments, same result."""
    wide = torch.promote_types(u.dtype, torch.float32)
    x, delta, B, C = (t.to(wide) for t in (u, delta, B, C))
    delta = F.softplus(delta + delta_bias[..., None])
    decays = torch.exp(torch.einsum("bkdl,kdn->bkdln", delta, A))
    inflows = torch.einsum("bkdl,bknl->bkdln", delta * x, B)
    h = torch.zeros_like(decays[..., 0, :])
    outputs = []
    for decay, inflow, C_t in zip(decays.unbind(3), inflows.unbind(3), C.unbind(3), strict=True):
        h = decay * h + inflow
        outputs.append(torch.einsum("bkdn,bkn->bkd", h, C_t))
    return (torch.stack(outputs, dim=-1) + D[..., None] * x).to(u.dtype)
