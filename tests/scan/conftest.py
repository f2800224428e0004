"""Where each scan backend is tested: on a GPU if there is one, else by whatever can stand in.

Without a GPU the Triton kernels run in Triton's interpreter, in a process of their own (see
`test_triton`), and the CUDA extension of mamba-ssm is replaced by a module that computes
the same. The CUDA C++ kernels are compiled for the host, with a header that emulates a block.
"""

import importlib
import sys

import cuda_stand_in
import emulated_cuda
import pytest
from scan_inputs import DEVICES

from mambaseg.scan import dispatch


@pytest.fixture
def backend(request, monkeypatch):
    """Name of a backend that has been made to run on its device of `DEVICES`."""
    name = request.param
    if name in ("triton", "mamba_ssm", "cuda") and DEVICES[name] == "cpu":
        if name == "mamba_ssm":
            stand_in = cuda_stand_in.selective_scan_cuda()
            monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
        elif name == "cuda":
            emulated_cuda.install(monkeypatch)
        else:
            module = importlib.import_module("mambaseg.scan.triton")
            monkeypatch.setattr(module, "STEPS", 8)  # several chunks, in a slow interpreter
            monkeypatch.setattr(module, "UNROLL", 4)
            monkeypatch.setattr(module, "UNROLL_BACKWARD", 2)
        on_cpu = dispatch.BACKENDS[name]._replace(devices=("cpu",))
        monkeypatch.setitem(dispatch.BACKENDS, name, on_cpu)
    yield name
    if name in ("mamba_ssm", "cuda"):  # let no other test see the stand-in
        sys.modules.pop(f"mambaseg.scan.{name}", None)
        dispatch._modules.pop(name, None)
