import math
import os
import subprocess
import sys

import pytest
import torch
from scan_inputs import NAMES, image_inputs, sequence_inputs, value_and_gradients

from mambaseg.scan import selective_scan_2d

pytest.importorskip("numba")


@pytest.mark.parametrize("width", [0, 5])
def test_the_operator_passes_opcheck(width):
    from mambaseg.scan import numba

    u, delta, A, B, C, D, bias = (t.float() for t in sequence_inputs(2, 4, 18, 20, 4))
    x, delta, B, C = (t.permute(0, 3, 1, 2) for t in (u, delta, B, C))
    x = x[:, :, :1] if width else x
    inputs = [t.detach().requires_grad_() for t in (x, delta, A, B, C, D, bias)]
    torch.library.opcheck(numba._scan, (*inputs, width, True))


def test_states_are_kept_only_for_a_backward(monkeypatch):
    from mambaseg.scan import numba

    kept = []
    scan = numba.scan
    monkeypatch.setattr(numba, "scan", lambda *a: (kept.append(a[6].size), scan(*a)))
    inputs = [t.float() for t in image_inputs(1, 3, 4, 16, 4)]
    alone = numba.selective_scan_2d(*inputs)
    inputs[0].requires_grad_()
    assert torch.equal(numba.selective_scan_2d(*inputs), alone)
    with torch.no_grad():
        numba.selective_scan_2d(*inputs)
    assert [size > 0 for size in kept] == [False, True, False]


def test_torch_decides_how_many_threads_run():
    import numba

    from mambaseg.scan.numba import selective_scan_2d as fused

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        fused(*(t.float() for t in image_inputs(1, 2, 2, 16, 2)))
        assert numba.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_cpu_without_avx512_computes_the_same_and_torch_keeps_its_threads(tmp_path):
    """Registers of eight numbers: in a new process numba is told of an older CPU, if of x86."""
    import llvmlite.binding

    x86 = llvmlite.binding.get_default_triple().split("-")[0] == "x86_64"
    inputs = [t.float() for t in image_inputs(2, 5, 7, 20, 5)]
    torch.save(inputs, tmp_path / "inputs.pt")
    code = """
import sys, torch
from mambaseg.scan import selective_scan_2d
torch.set_num_threads(1)
inputs = [t.requires_grad_() for t in torch.load(sys.argv[1])]
y = selective_scan_2d(*inputs, backend="numba")
torch.save([y.detach(), *torch.autograd.grad(y.square().sum(), inputs)], sys.argv[2])
from mambaseg.scan.numba import instruction_sets
print(torch.get_num_threads(), *instruction_sets())
"""
    words = [sys.executable, "-c", code, str(tmp_path / "inputs.pt"), str(tmp_path / "out.pt")]
    older = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+sse4.1,+bmi2"}
    env = {**os.environ, **(older if x86 else {})}
    run = subprocess.run(words, env=env, check=True, capture_output=True)
    threads, compiled_for, processor = run.stdout.decode().split()
    assert threads == "1"
    assert not x86 or (compiled_for == "AVX2" and processor in ("AVX512", "AVX2"))

    leaves = [t.double().requires_grad_() for t in inputs]
    y = selective_scan_2d(*leaves, backend="reference")
    exact = [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]
    for name, got, want in zip(NAMES, torch.load(tmp_path / "out.pt"), exact, strict=True):
        assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max(), name


@pytest.mark.parametrize("shape", [(2, 2, 32, 192, 16), (1, 2, 48, 100, 3), (1, 1, 17, 70, 1)])
def test_sequences_in_any_order_of_memory_agree(shape):
    """Steps side by side are transposed in registers, channels side by side are copied."""
    from mambaseg.scan import numba

    inputs = [t.float() for t in sequence_inputs(*shape)]
    other = [t.transpose(2, 3).contiguous().transpose(2, 3) if t.ndim == 4 else t for t in inputs]
    results = (
        value_and_gradients(numba.selective_scan, each, torch.float32) for each in (inputs, other)
    )
    for name, one, two in zip(NAMES, *results, strict=True):
        assert torch.equal(one, two), name


def test_powers_of_two_at_and_beyond_the_ends():
    import numpy as np
    from numba import njit

    from mambaseg.scan.numba_lanes import LANES, empty_rows, exp2_of_product, load_states, store
    from mambaseg.scan.numba_tiles import to_rates

    one = (0,)

    @njit
    def power(steps, A):
        rates, limits, out = empty_rows(1), empty_rows(1), empty_rows(1)
        rates[0] = A
        to_rates(rates, limits)
        step, rate = load_states(steps, 0, one), load_states(rates, 0, one)
        store(out, 0, exp2_of_product(step, rate, load_states(limits, 0, one)))
        return out[0]

    def decay(step, rate):
        return float(power(np.full(LANES, step, np.float32), np.float32(rate))[0])

    inf, nan, smallest, largest = math.inf, math.nan, 2.0**-120, 2.0**120
    assert decay(0.0, -1.0) == decay(5.0, 0.0) == 1.0
    near = np.linspace(1e-6, 80.0, 4001, dtype=np.float32)
    found = np.array([decay(step, -1.0) for step in near])
    assert np.abs(found / np.exp(-near.astype(np.float64)) - 1).max() < 5e-6  # 80 x 2**-24
    for step, rate in ((100.0, -1.0), (1e30, -1.0), (inf, -1.0), (inf, -1e-20), (1.0, -inf)):
        assert decay(step, rate) == pytest.approx(smallest, rel=1e-5)
    for step in (100.0, 1e30, inf):  # a positive A grows up to here
        assert decay(step, 1.0) == pytest.approx(largest, rel=1e-5)
    assert decay(1.0, 1.0) == pytest.approx(math.e, rel=1e-6)
    quiet = np.array([0x7FC00000, 0xFFC00001, 0x7F800003], np.uint32).view(np.float32)
    for odd in (*quiet, nan):
        assert math.isnan(decay(1.0, odd))
    assert math.isnan(decay(nan, -1.0))


def test_one_state_is_kept_per_64_steps():
    from mambaseg.scan import numba
    from mambaseg.scan.numba_lanes import LANES

    inputs = [t.float().requires_grad_() for t in sequence_inputs(2, 1, 20, 130, 4)]
    x, delta, B, C = (inputs[i].permute(0, 3, 1, 2) for i in (0, 1, 3, 4))
    _, kept = numba._scan(x, delta, inputs[2], B, C, *inputs[5:], 0, True)
    registers = -(-20 // LANES)  # as many as 20 channels fill
    assert kept.shape == (2, 1, 3, 4, registers * LANES)  # 130 steps
