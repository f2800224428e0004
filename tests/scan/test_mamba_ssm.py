import importlib
import sys
from types import ModuleType

import pytest
import torch
from scan_inputs import DEVICES, image_inputs, scan_1d, scan_2d, sequence_inputs

from mambaseg.errors import UserError
from mambaseg.scan import available_backends, choose_backend, dispatch

pytestmark = pytest.mark.skipif(
    DEVICES["mamba_ssm"] == "cuda", reason="the extension itself is here: no stand-in is needed"
)
with_stand_in = pytest.mark.parametrize("backend", ["mamba_ssm"], indirect=True)


@pytest.fixture
def seen(monkeypatch):
    """The dtypes of u, delta, B and C at each call of the extension's forward."""
    calls = []

    def watch(backend):
        module = importlib.import_module("mambaseg.scan.mamba_ssm")
        fwd = module.fwd

        def watched(u, delta, A, B, C, *rest):
            calls.append({t.dtype for t in (u, delta, B, C)})
            return fwd(u, delta, A, B, C, *rest)

        monkeypatch.setattr(module, "fwd", watched)
        return calls

    return watch


@with_stand_in
def test_the_operator_passes_opcheck(backend):
    module = importlib.import_module("mambaseg.scan.mamba_ssm")
    u, delta, A, B, C, D, bias = (t.float() for t in sequence_inputs(2, 2, 3, 9, 4))
    flat = [t.flatten(1, 2) for t in (u, delta)]
    A, D, bias = (t.flatten(0, 1) for t in (A, D, bias))
    inputs = [t.detach().requires_grad_() for t in (*flat, A, B, C, D, bias)]
    torch.library.opcheck(module._scan, inputs)


@with_stand_in
def test_bfloat16_goes_in_as_it_is(backend, seen):
    calls = seen(backend)
    y = scan_1d(backend)(*(t.bfloat16() for t in sequence_inputs(1, 2, 3, 5, 2)))
    assert calls == [{torch.bfloat16}]
    assert y.dtype == torch.bfloat16


@with_stand_in
def test_mixed_dtypes_become_float32(backend, seen):
    calls = seen(backend)
    u, delta, *rest = (t.float() for t in sequence_inputs(1, 2, 3, 5, 2))
    y = scan_1d(backend)(u.bfloat16(), delta, *rest)
    assert calls == [{torch.float32}]
    assert y.dtype == torch.bfloat16


@with_stand_in
def test_directions_of_an_image_are_summed_in_float32(backend, seen):
    calls = seen(backend)
    y = scan_2d(backend)(*(t.bfloat16() for t in image_inputs(1, 2, 3, 4, 2)))
    assert calls == [{torch.float32}]
    assert y.dtype == torch.bfloat16


@with_stand_in
def test_float64_does_not_reach_an_extension_that_refuses_it(backend, seen):
    calls = seen(backend)
    assert scan_1d(backend)(*sequence_inputs(1, 2, 3, 5, 2)).dtype == torch.float64
    assert calls == []


@with_stand_in
@pytest.mark.parametrize(("length", "states"), [(9, 4), (1, 8)], ids=["inputs", "kept states"])
def test_a_batch_beyond_32_bits_goes_in_in_parts(backend, length, states, monkeypatch):
    module = importlib.import_module("mambaseg.scan.mamba_ssm")
    sizes, fwd = [], module.fwd

    def watched(u, delta, A, B, *rest):
        y, kept = fwd(u, delta, A, B, *rest)
        sizes.append(max(t.numel() for t in (u, delta, B, y, kept)))
        return y, kept

    monkeypatch.setattr(module, "fwd", watched)
    inputs = [t.float().detach().requires_grad_() for t in sequence_inputs(5, 2, 3, length, states)]
    whole = module.selective_scan(*inputs)
    weight = torch.randn_like(whole)
    expected = torch.autograd.grad((whole * weight).sum(), inputs)
    monkeypatch.setattr(module, "MOST", 2 * sizes.pop() // 5)
    parts = module.selective_scan(*inputs)
    assert len(sizes) == 3 and max(sizes) <= module.MOST
    torch.testing.assert_close(parts, whole)
    for ours, theirs in zip(
        torch.autograd.grad((parts * weight).sum(), inputs), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    monkeypatch.setattr(module, "MOST", 5)
    with pytest.raises(UserError, match="32 bits: choose another"):
        module.selective_scan(*inputs)


def test_without_the_extension_the_error_names_the_remedy():
    assert "mamba_ssm" not in available_backends("cuda")
    with pytest.raises(UserError, match=r"selective_scan_cuda.*make setup-cuda"):
        choose_backend("mamba_ssm", "cuda")


def test_an_extension_with_another_interface_is_not_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", ModuleType("selective_scan_cuda"))
    assert "cannot import name" in dispatch.obstacle("mamba_ssm", "cuda")


@with_stand_in
def test_only_the_extension_is_imported(backend):
    importlib.import_module("mambaseg.scan.mamba_ssm")
    assert "mamba_ssm" not in sys.modules
