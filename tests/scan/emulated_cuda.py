"""The kernels of the `cuda` backend on a host: compiled by g++ with `cuda_emulator.h`."""

import ctypes
import functools
import importlib
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = tempfile.TemporaryDirectory(prefix="emulated-cuda-")


def install(monkeypatch):
    """Import `mambaseg.scan.cuda` so that it launches its kernels in the emulator; return it."""
    from mambaseg.scan import nvrtc

    monkeypatch.setattr(nvrtc, "require", lambda: None)
    monkeypatch.setattr(nvrtc, "launch", launch)
    return importlib.import_module("mambaseg.scan.cuda")


def launch(source, name, defines, grid, threads, shared, arguments):
    values = dict(defines)
    assert threads == 32 * values["WARPS"] and shared <= 232448
    kernel = ["scan_carry", "scan", "scan_backward_carry", "scan_backward"].index(name)
    _library(source, defines).launch(kernel, *grid, shared, ctypes.byref(arguments))


@functools.cache
def _library(source, defines):
    library = Path(FOLDER.name) / ("-".join(str(value) for _, value in defines) + ".so")
    subprocess.run(
        ["g++", "-O1", "-U_FORTIFY_SOURCE", "-std=c++17", "-shared", "-fPIC",
         "-Wno-unknown-pragmas", "-x", "c++",
         *(f"-D{name}={value}" for name, value in defines), f'-DKERNELS="{source}"',
         str(HERE / "cuda_emulator.h"), "-o", str(library)],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(library))
