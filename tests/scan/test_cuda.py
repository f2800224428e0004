"""What is special about the CUDA C++ kernels; `test_backends` holds them to the reference."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scan_inputs import (
    DEVICES,
    image_inputs,
    relative_errors,
    scan_1d,
    scan_2d,
    sequence_inputs,
    value_and_gradients,
)

from mambaseg.errors import UserError
from mambaseg.scan import available_backends, choose_backend, chunked, cross, nvrtc
from mambaseg.scan.operators import Inputs

running = pytest.mark.skipif(
    "cuda" not in DEVICES, reason="no GPU, and no g++ to emulate the kernels with"
)
here = pytest.mark.parametrize("backend", ["cuda"], indirect=True)


@pytest.fixture
def module(backend):
    choose_backend("cuda", DEVICES["cuda"])
    return sys.modules["mambaseg.scan.cuda"]


def asked_for(monkeypatch, shared):
    """The dynamic shared memory that the driver is asked to allow a kernel that wants `shared`."""
    calls = []
    monkeypatch.setattr(nvrtc, "_module", lambda *_: None)
    monkeypatch.setattr(nvrtc, "_call", lambda *call: calls.append(call))
    nvrtc._function.__wrapped__(Path("kernels.cu"), "kernel", (), 0, shared)
    return [call[3] for call in calls if call[0] == "cuFuncSetAttribute"]


def reference_2d(*inputs):
    return cross.selective_scan_2d(chunked.selective_scan, *inputs)  # in float64: as good, faster


@running
@here
@pytest.mark.parametrize(("side", "parts"), [(56, 2), (28, 1), (28, 4), (14, 2), (7, 1), (7, 4)])
def test_the_maps_of_a_network_agree_with_the_reference(module, monkeypatch, side, parts):
    monkeypatch.setattr(module, "PARTS", parts)
    inputs = image_inputs(1, side, side, 50 if side < 28 else 3, 16)
    expected = value_and_gradients(reference_2d, inputs)
    errors = relative_errors(value_and_gradients(scan_2d("cuda"), inputs, torch.float32), expected)
    assert max(errors.values()) < 1e-5, errors


@running
@here
@pytest.mark.parametrize(
    ("states", "parts"),  # of those that make the same kernel, one
    [(1, 1), (2, 1), (4, 1), (5, 1), (8, 2), (16, 1), (16, 2), (16, 4), (17, 1), (17, 4), (40, 1)],
)
def test_any_number_of_states_is_right(module, monkeypatch, states, parts):
    monkeypatch.setattr(module, "PARTS", parts)
    inputs = sequence_inputs(1, 2, 41, 35, states)
    expected = value_and_gradients(scan_1d("reference"), inputs)
    errors = relative_errors(value_and_gradients(scan_1d("cuda"), inputs, torch.float32), expected)
    assert max(errors.values()) < 1e-5, errors


@running
@here
@pytest.mark.parametrize(("segments", "length"), [(1, 96), (2, 101), (3, 96), (8, 101), (3, 7)])
def test_a_split_sequence_is_right_and_has_the_same_bits_again(
    module, monkeypatch, segments, length
):
    monkeypatch.setattr(module, "SEGMENTS", segments)
    inputs = sequence_inputs(2, 2, 35, length, 16)
    expected = value_and_gradients(scan_1d("reference"), inputs)
    actual = value_and_gradients(scan_1d("cuda"), inputs, torch.float32)
    again = value_and_gradients(scan_1d("cuda"), inputs, torch.float32)
    errors = relative_errors(actual, expected)
    assert max(errors.values()) < 1e-5, errors
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


@running
@here
@pytest.mark.parametrize(("segments", "states"), [(2, 5), (3, 16), (8, 1), (8, 16)])
def test_a_split_image_is_right(module, monkeypatch, segments, states):
    monkeypatch.setattr(module, "SEGMENTS", segments)
    inputs = image_inputs(2, 13, 11, 50, states)
    expected = value_and_gradients(reference_2d, inputs)
    errors = relative_errors(value_and_gradients(scan_2d("cuda"), inputs, torch.float32), expected)
    assert max(errors.values()) < 1e-5, errors


@running
@here
@pytest.mark.parametrize("which", range(7))
@pytest.mark.parametrize("where", [0, -1])
def test_a_nan_at_either_end_of_a_split_sequence_goes_where_the_reference_has_it(
    module, monkeypatch, which, where
):
    monkeypatch.setattr(module, "SEGMENTS", 3)
    inputs = [t.float() for t in sequence_inputs(1, 1, 3, 31, 8)]
    inputs[which].view(-1)[where] = float("nan")
    expected = value_and_gradients(scan_1d("reference"), inputs, torch.float32)
    actual = value_and_gradients(scan_1d("cuda"), inputs, torch.float32)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.isnan(), e.isnan())


@running
@here
@pytest.mark.parametrize(("width", "segments"), [(0, 1), (0, 3), (7, 1), (7, 2)])
def test_a_wider_gradient_of_the_output_is_read_as_what_it_is(module, monkeypatch, width, segments):
    """Under autocast something behind the scan may leave it in float32."""
    monkeypatch.setattr(module, "SEGMENTS", segments)
    u, delta, A, B, C, D, bias = (t.to(DEVICES["cuda"]) for t in sequence_inputs(2, 4, 19, 35, 8))
    u, delta, B, C = (t.bfloat16().permute(0, 3, 1, 2) for t in (u, delta, B, C))
    inputs = module._ready(Inputs(u[:, :, :1] if width else u, delta, A, B, C, D, bias))
    y, starts = module._forward(inputs, width)
    assert y.dtype == torch.bfloat16
    d_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    expected = module._backward(d_y, inputs, starts, width)
    for a, e in zip(module._backward(d_y.float(), inputs, starts, width), expected, strict=True):
        assert torch.equal(a, e)


@running
@here
def test_segments_follow_from_the_shape_and_the_device(module):
    """An H100 has 132 multiprocessors; the maps of a network with 24 images."""
    maps = ((262, 1152), (66, 2304), (17, 4608), (5, 9216))  # chunks, and warps of one segment
    assert [module._segments(*each, 8, 132)[0] for each in maps] == [4, 2, 1, 1]
    assert module._segments(262, 48, 8, 132) == (53, 5)  # 65 would have less than 4 chunks each
    assert module._segments(3, 48, 8, 132) == (1, 3)


@running
@here
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("which", range(7))
@pytest.mark.parametrize("where", [0, -1])
def test_a_nan_at_either_end_goes_where_the_reference_has_it(
    module, monkeypatch, which, where, parts
):
    monkeypatch.setattr(module, "PARTS", parts)
    inputs = [t.float() for t in sequence_inputs(1, 1, 3, 21, 8)]
    inputs[which].view(-1)[where] = float("nan")
    expected = value_and_gradients(scan_1d("reference"), inputs, torch.float32)
    actual = value_and_gradients(scan_1d("cuda"), inputs, torch.float32)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.isnan(), e.isnan())


@running
@here
def test_inputs_are_read_where_a_network_leaves_them(module, monkeypatch):
    """Delta is a permuted product, B and C are parts of one projection: none is copied."""
    x, delta, A, B, C, D, bias = (t.float() for t in image_inputs(2, 5, 7, 19, 8))
    tensors = {}
    launch = module._launch
    monkeypatch.setattr(
        module, "_launch", lambda *a, **k: (tensors.update(k, inputs=a[2]), launch(*a, **k))
    )

    def permuted(x, delta, A, B, C, D, bias):
        delta = delta.permute(3, 0, 1, 2, 4).contiguous().permute(1, 2, 3, 0, 4)
        both = torch.cat((B[..., :3], B, C), dim=-1)
        B, C = both[..., 3:11], both[..., 11:]
        return scan_2d("cuda")(x, delta, A, B, C, D, bias)

    expected = value_and_gradients(scan_2d("cuda"), (x, delta, A, B, C, D, bias), torch.float32)
    actual = value_and_gradients(permuted, (x, delta, A, B, C, D, bias), torch.float32)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    length, channels = 35, 19
    _, delta, _, B, C, *_ = tensors["inputs"]
    assert delta.stride()[1:3] == (channels, 2 * length * channels)
    assert tensors["d_delta"].stride() == delta.stride()
    assert B.stride() == C.stride() == (length * 4 * 19, 4 * 19, 19, 1)


@running
@here
@pytest.mark.parametrize("width", [0, 2])
def test_the_operator_passes_opcheck(module, width):
    u, delta, A, B, C, D, bias = (t.float() for t in sequence_inputs(1, 4, 2, 4, 2))
    x, delta, B, C = (t.permute(0, 3, 1, 2).contiguous() for t in (u, delta, B, C))
    x = x[:, :, :1] if width else x
    inputs = [x, delta, A.transpose(1, 2).contiguous(), B, C, D, bias]
    inputs = [t.to(DEVICES["cuda"]).detach().requires_grad_() for t in inputs]
    torch.library.opcheck(module._scan, (*inputs, width))


@running
@here
def test_the_operator_refuses_what_its_kernels_would_misread(module):
    inputs = [torch.zeros(1, 4, 2, 3) for _ in range(7)]
    with pytest.raises(ValueError, match="gaps"):
        module._scan(torch.zeros(1, 4, 3, 2).transpose(2, 3), *inputs[1:], 0)


@running
@here
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc to count registers with")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("states", [1, 4, 16])
def test_the_compiled_kernels_keep_everything_in_registers(
    module, monkeypatch, tmp_path, states, dtype
):
    x, delta, B = (torch.empty(1, 4, g, n, dtype=dtype) for g, n in ((1, 96), (4, 96), (4, states)))
    parameters = torch.empty(4, states, 96), B, B, torch.empty(4, 96), torch.empty(4, 96)
    inputs = Inputs(x, delta, *parameters)
    ours = {"scan": module.FORWARD, "scan_backward": module.BACKWARD}
    for name, sizes in ours.items():
        layout = module._lay_out(sizes, inputs)
        defines = [f"-D{n}={value}" for n, value in layout.defines]
        run = subprocess.run(
            ["nvcc", "-arch=sm_90", "-std=c++17", "-cubin", "-Xptxas", "-v", *defines,
             str(module.SOURCE), "-o", str(tmp_path / "kernels.cubin")],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        reports = run.stderr.split("Compiling entry")[1:]
        reports = [r for r in reports if f"'{name}'" in r or f"'{name}_carry'" in r]
        assert len(reports) == 2
        for report in reports:
            assert "0 bytes spill stores, 0 bytes spill loads" in report, report
            dynamic = layout.backward_shared if "'scan_backward'" in report else 0
            shared = dynamic + int(re.search(r"(\d+) bytes smem", report)[1])
            assert shared <= 227 << 10  # of a block, on an H100
            assert shared <= 48 << 10 or asked_for(monkeypatch, dynamic), shared


def test_any_dynamic_shared_memory_is_asked_for(monkeypatch):
    """What is allowed unasked is less than 48 KiB where a kernel has static arrays."""
    assert asked_for(monkeypatch, 36_864) == [36_864] and asked_for(monkeypatch, 0) == []


def test_every_function_is_declared_for_the_device():
    """NVRTC refuses those for the host, also `constexpr` ones; nvcc does not."""
    text = (Path(nvrtc.__file__).parent / "cuda_kernels.cu").read_text()
    declared = re.findall(
        r"^[ ]*(?:\w[\w<> ]*[ *&]+)?\w+\([^;{}]*\)[^;{}()]*\{", text, re.MULTILINE
    )
    host = text[text.index("#else\ntemplate <class T> void store") :].split("#endif")[0]
    named = re.compile(r"__device__|__global__|^\s*(if|for|while|switch) ")
    wrong = [d for d in declared if not named.search(d) and d not in host]
    assert len(declared) > 20 and not wrong, wrong


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA")
def test_without_cuda_the_reason_is_named():
    assert "cuda" not in available_backends("cuda")
    with pytest.raises(UserError, match="built without CUDA"):
        choose_backend("cuda", "cuda")


def test_compiled_kernels_are_kept_by_source_and_sizes(monkeypatch, tmp_path):
    compiled = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(nvrtc, "_version", lambda: (13, 0))
    monkeypatch.setattr(
        nvrtc, "_compile", lambda *args: compiled.append(args) or bytes(len(compiled))
    )
    source = tmp_path / "kernels.cu"
    source.write_text("first")
    first = nvrtc.compile_binary(source, (("N", 16),), "sm_90")
    assert nvrtc.compile_binary(source, (("N", 16),), "sm_90") == first and len(compiled) == 1
    nvrtc.compile_binary(source, (("N", 8),), "sm_90")
    nvrtc.compile_binary(source, (("N", 16),), "sm_80")
    source.write_text("second")
    nvrtc.compile_binary(source, (("N", 16),), "sm_90")
    assert len(compiled) == 4


def test_a_cache_that_cannot_be_written_does_no_harm(monkeypatch, tmp_path):
    (tmp_path / "mambaseg").write_text("a file where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nvrtc, "_version", lambda: (13, 0))
    monkeypatch.setattr(nvrtc, "_compile", lambda *args: b"binary")
    source = tmp_path / "kernels.cu"
    source.write_text("source")
    assert nvrtc.compile_binary(source, (), "sm_90") == b"binary"
