"""Layer norms on a GPU under autocast. Without a GPU, Triton's interpreter runs the kernels."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mambaseg.models import MambaUNet, SwinUNet, VMUNet, norm
from mambaseg.models.norm import LayerNorm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # asked for before anything imports Triton
GPU = torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED or not GPU else "cuda"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
running = pytest.mark.skipif(
    not (INTERPRETED or (GPU and find_spec("triton"))),
    reason="runs in the process that the first test here starts",
)
compiled = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels cannot be compiled")
SHAPES = [(1, 1), (3, 7), (37, 96), (2, 3, 5, 48), (21, 100), (3, 1536), (2, 2500)]


@needs_triton
@pytest.mark.skipif(INTERPRETED or GPU, reason="the kernels run in this process")
def test_the_kernels_pass_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-k", "fused", "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    assert int(run.stdout.split(" passed")[0].split()[-1]) > 30, run.stdout


def inputs_of(shape, dtype, gated):
    """x, weight, bias and gate, in what the kernels read, and the gradient of the output."""
    generator = torch.Generator().manual_seed(sum(shape))
    normal = [torch.randn(s, generator=generator) for s in (shape, shape[-1:], shape[-1:], shape)]
    x, weight, bias, gate = (3 * normal[0] + 2).to(dtype), *normal[1:3], normal[3].bfloat16()
    d_y = torch.randn(shape, generator=generator)
    return [t.to(DEVICE) for t in ((x, weight, bias, gate) if gated else (x, weight, bias))], d_y


def exact(x, weight, bias, gate=None):
    y = F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)
    return y if gate is None else y * F.silu(gate)


def fused(*inputs, dtype=torch.bfloat16):
    gate = inputs[3] if len(inputs) == 4 else None
    return norm._norm(*inputs[:3], gate, 1e-5, dtype)


def assert_near(actual, expected, name):
    """Up to float32's rounding and that of the dtype, in which the interpreter cuts bits off."""
    assert actual.shape == expected.shape, name
    rounding = 2.0**-7 if actual.dtype == torch.bfloat16 else 4e-6
    error = (actual.double().cpu() - expected).abs().max()
    assert error <= rounding * expected.abs().max() + 1e-6, f"{name}: {error}"


@running
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_values_and_gradients_are_those_of_float64(shape, dtype, gated, monkeypatch):
    monkeypatch.setattr(norm, "PROGRAMS", 2)  # several tiles for each
    monkeypatch.setattr(norm, "TILE", 512)
    inputs, d_y = inputs_of(shape, dtype, gated)
    leaves = [t.requires_grad_() for t in inputs]
    doubles = [t.detach().double().cpu().requires_grad_() for t in inputs]
    expected = exact(*doubles)
    for out in (torch.float32, torch.bfloat16):
        y = fused(*leaves, dtype=out)
        assert y.dtype == out
        assert_near(y.detach(), expected.detach(), "y")
        d_out = d_y.to(DEVICE, out)
        gradients = torch.autograd.grad(y, leaves, d_out)
        wanted = torch.autograd.grad(expected, doubles, d_out.double().cpu(), retain_graph=True)
        for name, a, e, leaf in zip(
            ["x", "weight", "bias", "gate"], gradients, wanted, leaves, strict=False
        ):
            assert a.dtype == leaf.dtype
            assert_near(a, e, name)


@running
def test_fused_rows_far_from_zero_keep_their_variance():
    x = (torch.randn(4, 96, generator=torch.Generator().manual_seed(0)) + 1000).to(DEVICE)
    ones, zeros = torch.ones(96, device=DEVICE), torch.zeros(96, device=DEVICE)
    wanted = exact(x.double().cpu(), ones.double().cpu(), zeros.double().cpu())
    y = fused(x, ones, zeros, dtype=torch.float32)
    torch.testing.assert_close(y.double().cpu(), wanted, rtol=0, atol=1e-3)


@running
def test_fused_sums_do_not_change_from_call_to_call_and_no_rows_are_no_error():
    inputs, d_y = inputs_of((50, 96), torch.float32, True)
    leaves = [t.requires_grad_() for t in inputs]
    d_y = d_y.to(DEVICE).bfloat16()
    first, second = (torch.autograd.grad(fused(*leaves), leaves, d_y) for _ in range(2))
    assert all(map(torch.equal, first, second))
    x = torch.zeros(0, 96, device=DEVICE, requires_grad=True)
    y = fused(x, *leaves[1:3])
    assert y.shape == (0, 96)
    assert not torch.autograd.grad(y.sum(), leaves[1])[0].any()


@running
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_the_fused_operator_passes_opcheck(gated):
    inputs, _ = inputs_of((3, 2, 8), torch.float32, gated)
    inputs = [t.requires_grad_() for t in inputs] + [None] * (not gated)
    torch.library.opcheck(norm._norm, (*inputs, 1e-5, torch.bfloat16))


@running
def test_the_fused_operator_refuses_what_its_kernels_would_misread():
    x, line = torch.zeros(4, 8, device=DEVICE), torch.zeros(4, device=DEVICE)
    with pytest.raises(ValueError, match="contiguous"):
        fused(x.T, line, line)


@running
def test_a_fused_layer_takes_any_strides(monkeypatch):
    monkeypatch.setattr(LayerNorm, "_fuses", lambda self, x, gate: True)
    layer = LayerNorm(5).to(DEVICE)
    x = torch.randn(2, 5, 3, 4, device=DEVICE).permute(0, 2, 3, 1).requires_grad_()
    gate = torch.randn(2, 5, 3, 4, device=DEVICE).bfloat16().permute(0, 2, 3, 1)
    y = layer(x, gate)
    wanted = F.layer_norm(x, (5,)) * F.silu(gate.float())
    torch.testing.assert_close(y.float(), wanted, rtol=1e-2, atol=1e-3)
    d_x = torch.autograd.grad(y.sum(), x)[0]
    torch.testing.assert_close(d_x, torch.autograd.grad(wanted.sum(), x)[0], rtol=0, atol=1e-5)


# ------------------------------------------------------------------ everywhere else


def test_elsewhere_it_is_pytorchs_own_bit_for_bit():
    torch.manual_seed(0)
    ours, theirs = LayerNorm(24), nn.LayerNorm(24)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    for parameters in zip(ours.parameters(), theirs.parameters(), strict=True):
        for parameter in parameters:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    x, gate = (torch.randn(6, 24, requires_grad=True) for _ in range(2))
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", enabled=dtype == torch.bfloat16):
            y, wanted = ours(x.to(dtype)), theirs(x.to(dtype))
            gated = ours(x.to(dtype), gate.to(dtype))
            wanted_gated = theirs(x.to(dtype)) * F.silu(gate.to(dtype))
        assert y.dtype == wanted.dtype
        assert torch.equal(y, wanted)
        assert torch.equal(gated, wanted_gated)
        gradients = torch.autograd.grad(gated.sum(), [x, gate, *ours.parameters()])
        others = torch.autograd.grad(wanted_gated.sum(), [x, gate, *theirs.parameters()])
        assert all(map(torch.equal, gradients, others))


@pytest.fixture
def autocast():
    """Autocast to bfloat16 on a GPU, which need not be here."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", before)


@needs_triton
def test_it_fuses_on_a_gpu_under_autocast_to_bfloat16_only(autocast, monkeypatch):
    monkeypatch.setattr(norm, "ENABLED", True)
    known = {"yes": True}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: known["yes"])
    monkeypatch.setattr(norm, "_runs_here", norm._runs_here.__wrapped__)  # without its memory
    layer, narrow, long = LayerNorm(8), LayerNorm(8).bfloat16(), LayerNorm(5000)
    with FakeTensorMode():
        x = torch.empty(2, 8, device="cuda")
        assert layer._fuses(x, None)
        assert layer._fuses(x.bfloat16(), x)
        known["yes"] = False
        assert not layer._fuses(x, None)
        known["yes"] = True
        assert not layer._fuses(x.cpu(), None)
        assert not layer._fuses(x.half(), None)
        assert not layer._fuses(x.double(), None)
        assert not layer._fuses(x, x.half())
        assert not layer._fuses(x, torch.empty(1, 8, device="cuda"))
        assert not layer._fuses(torch.empty(2, 7, device="cuda"), None)
        assert not narrow._fuses(x, None)
        assert not long._fuses(torch.empty(2, 5000, device="cuda"), None)
        torch.set_autocast_dtype("cuda", torch.float16)
        assert not layer._fuses(x, None)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", False)
        assert not layer._fuses(x, None)
        torch.set_autocast_enabled("cuda", True)
        monkeypatch.setattr(norm, "ENABLED", False)
        assert not layer._fuses(x, None)


TINY = {
    "mamba_unet": lambda: MambaUNet(
        1, 3, embed_dim=8, depths=(2, 2), d_state=2, scan_backend="torch"
    ),
    "vm_unet": lambda: VMUNet(
        1, 3, embed_dim=8, depths=(2, 2), decoder_depths=(2, 1), d_state=2, scan_backend="torch"
    ),
    "swin_unet": lambda: SwinUNet(1, 3, embed_dim=8, depths=(2, 2), heads=(2, 2), window_size=4),
}


@pytest.mark.parametrize("name", TINY)
def test_norms_keep_float32_where_blocks_add_to_their_output_and_nowhere_else(name, monkeypatch):
    """Fake tensors have dtypes and no numbers: so no kernel runs, and no GPU is needed."""
    monkeypatch.setattr(LayerNorm, "_fuses", lambda self, x, gate: True)
    dtypes = {}
    adding = {"patch_embed.norm"} | ({"decoder.1.expand.norm"} if name == "vm_unet" else set())
    network = TINY[name]().train()
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        network._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
        for key, module in network.named_modules():
            if isinstance(module, LayerNorm):
                module.register_forward_hook(lambda m, x, y, key=key: dtypes.update({key: y.dtype}))
        network(torch.empty(2, 1, 32, 32)).float().sum().backward()
        assert {p.grad.dtype for p in network.parameters()} == {torch.float32}
    assert {key for key, dtype in dtypes.items() if dtype == torch.float32} == adding
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    assert len(dtypes) == sum(isinstance(m, nn.LayerNorm) for m in network.modules())


@needs_triton
@compiled
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("channels", [96, 1536])
@pytest.mark.parametrize("name", ["norm", "norm_backward"])
def test_the_kernels_compile_for_a_gpu_that_is_not_here(
    name, channels, gated, monkeypatch, tmp_path
):
    """The interpreter is more lenient than the compiler."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mambaseg.models import norm_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(norm_kernels, name)
    constants = norm._sizes(torch.empty(1, channels), torch.empty(0) if gated else None)
    warps = constants.pop("num_warps")
    narrow = {"gate", "y", "d_y", "d_gate"}

    def type_of(argument):
        if argument in constants:
            return "constexpr"
        if argument in ("rows", "eps"):
            return "i32" if argument == "rows" else "fp32"
        return "*bf16" if argument in narrow else "*fp32"

    signature = {argument: type_of(argument) for argument in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    result = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": warps})
    ptx = result.asm["ptx"]
    assert "ld.global.v4" in ptx.replace(".L1::evict_last", "")  # 16 bytes at once
    assert "atom" not in ptx
    assert len(result.asm["cubin"]) > 0
