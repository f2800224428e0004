import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scan_inputs import DEVICES, INTERPRETED, sequence_inputs

from mambaseg.errors import UserError
from mambaseg.scan import available_backends, choose_backend

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
running = pytest.mark.skipif(
    "triton" not in DEVICES, reason="runs in the process that the first test here starts"
)
compiled = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels cannot be compiled")


@pytest.mark.skipif("triton" in DEVICES, reason="the kernels run in this process")
def test_all_tests_of_backends_pass_in_the_interpreter():
    """The interpreter must be asked for before anything imports Triton: hence a new process."""
    files = [str(HERE / "test_backends.py"), str(HERE / "test_triton.py")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "-k", "triton", "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    passed = int(run.stdout.split(" passed")[0].split()[-1])
    assert passed > 20, run.stdout


@compiled
def test_auto_takes_it_on_a_gpu_only():
    assert available_backends("cuda")[0] == choose_backend("auto", "cuda") == "triton"
    assert "triton" not in available_backends("cpu")


@running
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("width", [0, 2])
def test_the_operator_passes_opcheck(backend, width):
    from mambaseg.scan import triton as module

    u, delta, A, B, C, D, bias = (t.float() for t in sequence_inputs(1, 4, 2, 4, 2))
    x, delta, B, C = (t.permute(0, 3, 1, 2) for t in (u, delta, B, C))
    x = x[:, :, :1] if width else x
    inputs = [t.contiguous() for t in (x, delta, A.transpose(1, 2), B, C, D, bias)]
    inputs = [t.to(DEVICES["triton"]).detach().requires_grad_() for t in inputs]
    torch.library.opcheck(module._scan, (*inputs, width))


@running
def test_the_operator_refuses_what_its_kernels_would_misread():
    from mambaseg.scan import triton as module

    inputs = [torch.zeros(1, 4, 2, 3) for _ in range(7)]
    with pytest.raises(ValueError, match="contiguous"):
        module._scan(inputs[0].transpose(1, 2), *inputs[1:], 0)


@compiled
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["scan", "scan_backward"])
def test_the_kernels_compile_for_a_gpu_that_is_not_here(name, dtype, monkeypatch, tmp_path):
    """The interpreter is more lenient than the compiler."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mambaseg.scan import triton as module
    from mambaseg.scan import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(triton_kernels, name)
    unroll = module.UNROLL if name == "scan" else module.UNROLL_BACKWARD
    constants = {"IMAGE": 1, "N": 16, "BLOCK_D": module.BLOCK_D, "STEPS": module.STEPS}
    constants["UNROLL"] = unroll
    numbers = {"height", "width", "channels", "states"}
    narrow = {"x", "delta", "B", "C", "y", "d_y", "d_x", "d_delta"}

    def type_of(argument):
        if argument in constants:
            return "constexpr"
        if argument in numbers:
            return "i32"
        return f"*{dtype}" if argument in narrow else "*fp32"

    signature = {argument: type_of(argument) for argument in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*") or argument in ("channels", "states")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    result = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 1})
    exponentials = result.asm["ptx"].count("ex2.approx")
    states_per_lane = 16
    times = 1 if name == "scan" else 2  # forwards to recompute, then backwards
    assert exponentials == times * unroll * (states_per_lane + 1)  # one more for softplus
    assert len(result.asm["cubin"]) > 0


@running
def test_an_image_beyond_32_bits_is_refused_and_a_batch_is_not(monkeypatch):
    from mambaseg.scan import triton as module

    inputs = [t.float().to(DEVICES["triton"]) for t in sequence_inputs(3, 2, 3, 5, 4)]
    monkeypatch.setattr(module, "MOST", 40)  # 2 × 5 × 4 of B
    assert module.selective_scan(*inputs).shape == inputs[0].shape
    monkeypatch.setattr(module, "MOST", 39)
    with pytest.raises(UserError, match=r"40 elements.*32 bits"):
        module.selective_scan(*inputs)
