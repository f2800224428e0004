"""Kernels in CUDA C++, compiled when they are first needed by the compiler that torch brings.

NVRTC is a library that comes with CUDA builds of torch, so neither CUDA's toolkit nor a C++
compiler has to be installed. What it made is kept (see `compile_binary`), by source,
sizes, architecture and compiler: a kernel is compiled once per machine.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

_FUNCTION_MAX_DYNAMIC_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

Defines = tuple[tuple[str, int], ...]
"""Names and values that a source is compiled with."""


def require() -> None:
    """Check that kernels can be compiled and launched here.

    Raises:
        ImportError: They cannot; the message says why.
    """
    if torch.version.cuda is None:
        raise ImportError("this PyTorch is built without CUDA")
    _compiler()
    _driver()


def launch(
    source: Path,
    name: str,
    defines: Defines,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    arguments: ctypes.Structure,
) -> None:
    """Run a kernel on the current device and stream; compile it first if it is not yet there.

    The file `source` declares it `extern "C"`, with `arguments` as the only argument. The grid is
    blocks in x, y and z; `threads` and `shared`, dynamic memory in bytes, are per block.
    """
    device = torch.cuda.current_device()
    function = _function(source, name, defines, device, shared)
    values = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    _call("cuLaunchKernel", function, *grid, threads, 1, 1, shared, stream, values, None)


@cache
def _function(
    source: Path, name: str, defines: Defines, device: int, shared: int
) -> ctypes.c_void_p:
    """The kernel, loaded on a device and allowed the shared memory it needs."""
    function = ctypes.c_void_p()
    module = _module(source, defines, device)
    _call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
    if shared:  # without asking a block has 48 KiB in all, and static arrays count among them
        _call("cuFuncSetAttribute", function, _FUNCTION_MAX_DYNAMIC_SHARED_SIZE, shared)
    return function


@cache
def _module(source: Path, defines: Defines, device: int) -> ctypes.c_void_p:
    torch.cuda.synchronize(device)  # makes the device's context current in this thread
    major, minor = torch.cuda.get_device_capability(device)
    module = ctypes.c_void_p()
    binary = compile_binary(source, defines, f"sm_{major}{minor}")
    _call("cuModuleLoadData", ctypes.byref(module), binary)
    return module


def _call(function: str, *arguments: Any) -> None:
    """Call a function of the driver."""
    if code := getattr(_driver(), function)(*arguments):
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        reason = text.value.decode() if text.value else "unknown"
        raise RuntimeError(f"CUDA, {function}: {reason} (error {code})")


# ------------------------------------------------------------------ compiling


def compile_binary(source: Path, defines: Defines, architecture: str) -> bytes:
    """Compile a file, or take what an earlier process made of it.

    Raises:
        RuntimeError: It does not compile; the message holds the compiler's.
    """
    text = source.read_bytes()
    options = [f"--gpu-architecture={architecture}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in defines]
    key = hashlib.sha256(repr((text, options, _version())).encode()).hexdigest()
    # $XDG_CACHE_HOME/mambaseg, by default ~/.cache/mambaseg
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mambaseg"
    kept = cache / f"{source.stem}-{key[:32]}.cubin"
    try:
        return kept.read_bytes()
    except OSError:
        binary = _compile(text, source.name, options)
    # a folder that cannot be written costs the next process a second
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
            file.write(binary)
        os.replace(file.name, kept)  # noqa: PTH105 - whole or not at all
    return binary


def _compile(text: bytes, name: str, options: list[str]) -> bytes:
    compiler, program, size = _compiler(), ctypes.c_void_p(), ctypes.c_size_t()

    def call(function: str, *arguments: Any) -> None:
        if code := getattr(compiler, function)(*arguments):
            compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value + 1)
            compiler.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC, {function}, {name}: error {code}\n{log.value.decode()}")

    call("nvrtcCreateProgram", ctypes.byref(program), text, name.encode(), 0, None, None)
    try:
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        call("nvrtcCompileProgram", program, len(options), encoded)
        call("nvrtcGetCUBINSize", program, ctypes.byref(size))
        binary = ctypes.create_string_buffer(size.value)
        call("nvrtcGetCUBIN", program, binary)
        return binary.raw
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))


# ------------------------------------------------------------------ the libraries


@cache
def _compiler() -> ctypes.CDLL:
    """NVRTC: that of torch's wheels first, then any that the system finds."""
    name = f"libnvrtc.so.{(torch.version.cuda or '').split('.')[0]}"
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or []) if spec else []
    folders.append(str(Path(torch.__file__).parent))
    found = [str(path) for folder in folders for path in sorted(Path(folder).glob(f"**/{name}"))]
    errors = []
    for path in [*found, name]:
        try:
            for part in sorted(Path(path).parent.glob("libnvrtc-builtins.so.*")):
                ctypes.CDLL(str(part))  # what NVRTC looks for by its name alone
            return ctypes.CDLL(path)
        except OSError as error:
            errors.append(str(error))
    raise ImportError(f"no {name}: {'; '.join(errors)}")


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise ImportError(f"no NVIDIA driver: {error}") from None


@cache
def _version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _compiler().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value
