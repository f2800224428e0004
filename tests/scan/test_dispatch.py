import logging
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from scan_inputs import image_inputs, sequence_inputs

from mambaseg.errors import UserError
from mambaseg.scan import (
    available_backends,
    choose_backend,
    dispatch,
    selective_scan,
    selective_scan_2d,
)


@pytest.fixture
def without_numba(monkeypatch):
    import_module = dispatch.importlib.import_module

    def refuse(name):
        if name == "mambaseg.scan.numba":
            raise ImportError("No module named 'numba'")
        return import_module(name)

    monkeypatch.setattr(dispatch.importlib, "import_module", refuse)
    monkeypatch.setattr(dispatch, "_announced", set())


def test_the_reference_runs_everywhere():
    assert "reference" in available_backends("cpu")
    assert "reference" in available_backends("cuda")


def test_auto_takes_numba_on_a_cpu_only():
    pytest.importorskip("numba")
    assert choose_backend("auto", "cpu") == "numba"
    assert choose_backend("auto", "cuda") != "numba"


def test_the_package_imports_and_trains_without_any_optional_package():
    code = """
import sys

ABSENT = {"numba", "triton", "selective_scan_cuda", "mamba_ssm", "causal_conv1d"}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ImportError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())
import torch
from mambaseg.models import MambaUNet
from mambaseg.scan import available_backends, choose_backend

assert available_backends("cpu") == available_backends("cuda") == ("torch", "reference")
assert choose_backend("auto", "cpu") == "torch"
torch.manual_seed(0)
network = MambaUNet(1, 2, embed_dim=8, depths=(1, 1, 1, 1), d_state=4, drop_path_rate=0.0)
image = torch.randn(2, 1, 32, 32)
label = (image[:, 0] > 0).long()
optimizer = torch.optim.Adam(network.parameters(), 1e-2)
losses = []
for _ in range(8):
    loss = torch.nn.functional.cross_entropy(network(image), label)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.9 * losses[0], losses
assert not ABSENT & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match=r"'fast'.*reference"):
        choose_backend("fast", "cpu")


def test_a_named_backend_on_a_wrong_device_says_why():
    with pytest.raises(UserError, match="runs on cpu but the tensors are on cuda"):
        choose_backend("numba", "cuda")


def test_a_named_backend_without_its_package_names_the_remedy(without_numba):
    with pytest.raises(UserError, match="pip install numba"):
        choose_backend("numba", "cpu")
    assert "numba" not in available_backends("cpu")


def test_auto_does_without_a_missing_package_and_says_so_once(without_numba, caplog):
    inputs = sequence_inputs(1, 1, 2, 3, 2)
    with caplog.at_level(logging.INFO, logger="mambaseg.scan"):
        for _ in range(2):
            selective_scan(*inputs)
    (record,) = caplog.records
    assert "No module named 'numba'" in record.getMessage()


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_triton_without_a_compiler_for_its_launcher_is_passed_over(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delitem(sys.modules, "mambaseg.scan.triton", raising=False)
    assert "no C compiler" in dispatch.obstacle("triton", "cuda")


def test_a_backend_from_outside_the_package_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "doubling.py").write_text(
        "from mambaseg.scan import reference\n\n\n"
        "def selective_scan(*inputs):\n    return 2 * reference.selective_scan(*inputs)\n"
    )
    with pytest.raises(UserError, match="it needs the module lab"):
        choose_backend("lab.doubling", "cpu")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"the module os\.path has no function selective_scan"):
        choose_backend("os.path", "cpu")
    inputs, image = sequence_inputs(1, 1, 2, 3, 2), image_inputs(1, 2, 3, 4, 2)
    ours = selective_scan(*inputs, backend="reference"), selective_scan_2d(*image)
    theirs = [
        selective_scan(*inputs, backend="lab.doubling"),
        selective_scan_2d(*image, backend="lab.doubling"),
    ]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(2 * one, other)
    assert "lab.doubling" not in available_backends("cpu")


def test_float16_is_refused():
    with pytest.raises(UserError, match="bfloat16"):
        selective_scan(*(t.half() for t in sequence_inputs(1, 1, 2, 3, 2)))


@pytest.mark.parametrize("which", range(1, 7))
def test_shapes_that_do_not_fit_are_named(which):
    inputs = sequence_inputs(1, 1, 2, 3, 2)
    inputs[which] = torch.cat((inputs[which], inputs[which]), dim=0)
    with pytest.raises(ValueError, match="shape"):
        selective_scan(*inputs)
