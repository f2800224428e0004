"""Modules that do on the CPU what the CUDA extensions of mamba-ssm and causal-conv1d do.

They check what the extensions check, and compute by the reference. Signatures: mamba-ssm 1.0 to
2.3, `csrc/selective_scan/selective_scan.cpp`; causal-conv1d 1.5, `causal_conv1d_interface.py`.
"""

from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import torch
import torch.nn.functional as F

from mambaseg.scan import reference


def selective_scan_cuda():
    module = ModuleType("selective_scan_cuda")
    module.fwd, module.bwd = _fwd, _bwd
    return module


def causal_conv1d():
    module = ModuleType("causal_conv1d")
    module.calls = 0

    def causal_conv1d_fn(x, weight, bias=None, *, activation=None):
        module.calls += 1
        assert x.stride(2) == 1 and weight.shape[1] in (2, 3, 4)
        assert activation in (None, "silu")
        steps = range(weight.shape[1])
        padded = F.pad(x, (len(steps) - 1, 0))
        y = sum(weight[:, w, None] * padded[..., w : w + x.shape[2]] for w in steps)
        y = y if bias is None else y + bias[:, None]
        return y if activation is None else F.silu(y)

    module.causal_conv1d_fn = causal_conv1d_fn
    return module


def _fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    _check(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    chunks = (u.shape[2] + 2047) // 2048
    states = torch.zeros(*u.shape[:2], chunks, 2 * A.shape[1])
    return [_scan(u, delta, A, B, C, D, delta_bias).to(delta.dtype), states]


def _bwd(u, delta, A, B, C, D, z, delta_bias, d_y, x, out, dz, delta_softplus, recompute_out_z):
    _check(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    assert d_y.dtype == u.dtype and d_y.stride(-1) == 1 and d_y.shape == u.shape
    assert x.shape == (*u.shape[:2], (u.shape[2] + 2047) // 2048, 2 * A.shape[1])
    assert x.dtype == torch.float32
    assert out is None and dz is None and recompute_out_z is False

    def gradients():
        leaves = [t.detach().requires_grad_() for t in (u, delta, A, B, C, D, delta_bias)]
        return list(torch.autograd.grad(_scan(*leaves), leaves, d_y))

    with ThreadPoolExecutor(1) as pool:  # inside an operator autograd is off, in its thread
        return pool.submit(gradients).result()


def _check(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    batch, channels, length = u.shape
    states = A.shape[1]
    assert u.dtype in (torch.float32, torch.bfloat16)
    assert u.dtype == delta.dtype == B.dtype == C.dtype
    assert A.dtype == D.dtype == delta_bias.dtype == torch.float32
    assert all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in (u, delta, B, C, D, delta_bias))
    assert delta.shape == u.shape and A.shape == (channels, states)
    assert B.shape == C.shape == (batch, B.shape[1], states, length)
    assert channels % B.shape[1] == 0 and D.shape == delta_bias.shape == (channels,)
    assert z is None and delta_softplus is True


def _scan(u, delta, A, B, C, D, delta_bias):
    groups = B.shape[1]
    u, delta = (t.unflatten(1, (groups, -1)) for t in (u, delta))
    A, D, delta_bias = (t.unflatten(0, (groups, -1)) for t in (A, D, delta_bias))
    return reference.selective_scan(u, delta, A, B, C, D, delta_bias).flatten(1, 2)
