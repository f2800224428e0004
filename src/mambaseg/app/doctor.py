"""Is this machine fit for training? `python -m mambaseg.app.doctor [overrides]`, `make doctor`.

Prints one line per finding, with the remedy below what is wrong, and exits with 1 when something is
broken that a training needs. Every check stands alone: what is broken must not hide the rest. So
the libraries are imported by the checks that look at them.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Level = Literal["ok", "warning", "error"]
STYLES: dict[Level, str] = {"ok": "green", "warning": "yellow", "error": "bold red"}
GIB = 2**30
# a run keeps a few checkpoints: up to 0.7 GiB for the networks here
NEEDED, COMFORTABLE = 1 * GIB, 5 * GIB
SECONDS_FOR_WANDB = 5
# bytes of a dtype -> error against the float64 definition, relative to the largest value
TOLERANCES = {4: 1e-4, 2: 3e-2}


@dataclass(frozen=True)
class Finding:
    """One line: how bad, about what, what was found, and what to do about it."""

    level: Level
    about: str
    said: str
    remedy: str = ""


Check = Callable[[Any], Iterator[Finding]]


def examine(words: Sequence[str] = ()) -> list[Finding]:
    """Run all checks.

    Args:
        words: as for train.py; they choose the data, the folders and the device that are looked at.
    """
    findings = [*_safely(packages, None), *_safely(machine, None)]
    configuration: list[Any] = []

    def compose(_: Any) -> Iterator[Finding]:
        configuration.append(_composed(words))
        yield Finding("ok", "configuration", " ".join(words) or "the default")

    findings += _safely(compose, None)
    for check in (torch_and_devices, scan_backends):
        findings += _safely(check, configuration[0] if configuration else None)
    for check in (disks, data, wandb):
        if configuration:
            findings += _safely(check, configuration[0])
    return findings


def _safely(check: Check, configuration: Any) -> list[Finding]:
    """The findings of a check; one that breaks down is a finding too."""
    found: list[Finding] = []
    try:
        found.extend(check(configuration))
    except Exception as error:  # whatever it is, the other checks have to run
        said = f"{type(error).__name__}: {error}"
        found.append(Finding("error", check.__name__.replace("_", " "), said, "make setup"))
    return found


def _composed(words: Sequence[str]) -> Any:
    """The configuration that train.py would have."""
    from hydra import compose, initialize_config_dir

    import mambaseg.app.build  # noqa: F401 (it registers what the configuration asks of the machine)
    from mambaseg.app.entry import CONF

    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(words))


# ---- the environment ----------------------------------------------------------------------------


def packages(_: Any) -> Iterator[Finding]:
    """Python and the installed packages against the ranges that pyproject.toml declares."""
    from importlib import metadata

    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    about = metadata.metadata("mambaseg")
    python, wanted = platform.python_version(), about["Requires-Python"]
    fits = python in SpecifierSet(wanted)
    remedy = "" if fits else f"make a new .venv with another Python: make setup PYTHON=... {wanted}"
    yield Finding("ok" if fits else "error", "Python", f"{python} (wanted: {wanted})", remedy)
    good = 0
    for text in metadata.requires("mambaseg") or []:
        one = Requirement(text)
        needed = one.marker is None or one.marker.evaluate({"extra": ""})
        try:
            version = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            if needed:
                yield Finding("error", one.name, "is not installed", f"pip install '{_plain(one)}'")
            continue
        if one.specifier.contains(version, prereleases=True):
            good += 1
        else:
            said = f"{version} is not in the declared range {one.specifier}"
            yield Finding("error" if needed else "warning", one.name, said,
                          f"pip install '{_plain(one)}'")  # fmt: skip
    yield Finding("ok", "packages", f"{good} in their declared ranges")


def _plain(requirement: Any) -> str:
    return f"{requirement.name}{requirement.specifier}"


def machine(_: Any) -> Iterator[Finding]:
    """System, cores and memory."""
    said = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not every system tells
        said += f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.0f} GiB memory"
    yield Finding("ok", "machine", said)


def torch_and_devices(configuration: Any) -> Iterator[Finding]:
    """PyTorch, the CUDA it was built for, the driver and the GPUs."""
    import torch

    build = torch.version.cuda
    said = f"{torch.__version__}, {f'built for CUDA {build}' if build else 'built without CUDA'}"
    yield Finding("ok", "torch", f"{said}, {torch.get_num_threads()} threads")
    driver = _driver()
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("ok", "GPU", f"{', '.join(names)}; driver {driver or 'unknown'}")
        return
    wanted = configuration is not None and configuration.trainer.accelerator in ("gpu", "cuda")
    level: Level = "error" if wanted else "warning"
    if driver:
        remedy = "install a CUDA build of torch (docs/gpu.md)"
        if build:
            remedy = f"a driver for CUDA {build} or newer, or an older torch (docs/gpu.md)"
        yield Finding(level, "GPU", f"driver {driver}, but torch cannot use it", remedy)
    elif wanted:
        yield Finding(level, "GPU", "none, and no driver", "trainer=cpu, or a machine with a GPU")
    else:
        yield Finding("ok", "GPU", "none: training runs on the CPU")


def _driver() -> str:
    """Version of NVIDIA's driver; empty where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.split("\n")[0].strip() if answer.returncode == 0 else ""


# ---- the scan -----------------------------------------------------------------------------------


def scan_backends(_: Any) -> Iterator[Finding]:
    """Runs each backend on small images, and compares values and gradients with the definition."""
    import torch

    from mambaseg.scan.dispatch import BACKENDS, obstacle

    dtypes = (torch.float32, torch.bfloat16)  # of training; on a CPU of float32 alone
    best: set[str] = set()
    for device in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
        for name, backend in BACKENDS.items():
            about = f"scan {name} on {device}"
            if device not in (backend.devices or (device,)):
                continue
            missing = obstacle(name, device)
            if missing is not None:
                # the first of the list is what a training should have; the next ones are spare
                level: Level = "warning" if device in best or name == "mamba_ssm" else "error"
                yield Finding(level, about, "does not load", missing)
                continue
            found = _compared(name, torch.device(device), dtypes[: 2 if device == "cuda" else 1])
            yield Finding(found.level, about, found.said, found.remedy)
            if found.level == "ok":
                best.add(device)
            if name == "numba" and found.level == "ok":
                yield from _numba_threads()
    if not torch.cuda.is_available():
        names = [name for name, one in BACKENDS.items() if one.devices == ("cuda",)]
        yield Finding("ok", "scan on cuda", f"no GPU, so not {' and not '.join(names)}")


@functools.cache
def _scanned(dtype: torch.dtype) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Arguments of `selective_scan_2d`, and what the definition makes of them in float64.

    A tiny image, and one whose positions and channels fill no whole number of a backend's chunks
    and blocks, with the states of a network. What a network computes is of the `dtype`.
    """
    import torch

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = []
    for height, width, channels, states in ((5, 6, 3, 4), (19, 17, 40, 16)):
        place = (2, height, width)
        x, delta = normal(*place, channels), normal(*place, 4, channels) - 2
        A, D = -torch.exp(normal(4, channels, states)), normal(4, channels)
        B, C, bias = normal(*place, 4, states), normal(*place, 4, states), normal(4, channels)
        x, delta, B, C = (t.to(dtype) for t in (x, delta, B, C))
        inputs = [x, delta, A.float(), B, C, D.float(), bias.float()]
        exact = [t.double() for t in inputs]
        found.append((inputs, _values_and_gradients(exact, "reference", torch.device("cpu"))))
    return found


def _values_and_gradients(inputs: list[Tensor], backend: str, device: Any) -> list[Tensor]:
    from mambaseg.scan import selective_scan_2d

    own = [t.detach().to(device).requires_grad_() for t in inputs]
    output = selective_scan_2d(*own, backend=backend)
    output.square().sum().backward()
    return [output.detach(), *(t.grad for t in own if t.grad is not None)]


def _compared(name: str, device: Any, dtypes: Sequence[torch.dtype]) -> Finding:
    """Whether a backend that loads also computes, and what it should."""
    remedy = "choose another with model.scan_backend=..., and report this"
    said = []
    for dtype in dtypes:
        worst = 0.0
        for inputs, expected in _scanned(dtype):
            try:
                got = _values_and_gradients(inputs, name, device)
            except Exception as error:  # compilers, drivers, threads: any of them
                return Finding("error", name, f"fails: {type(error).__name__}: {error}", remedy)
            pairs = zip(got, expected, strict=True)
            errors = [float((a.cpu().double() - b).abs().max() / b.abs().max()) for a, b in pairs]
            worst = max(worst, *(math.inf if math.isnan(error) else error for error in errors))
        what = f"worst error {worst:.0e} in {str(dtype).removeprefix('torch.')}"
        if worst > TOLERANCES[dtype.itemsize]:
            return Finding("error", name, f"gives wrong numbers ({what})", remedy)
        said.append(what)
    return Finding("ok", name, f"agrees with the definition ({', '.join(said)})")


def _numba_threads() -> Iterator[Finding]:
    from mambaseg.scan.numba import threading_layer

    layer, threads = threading_layer()
    yield Finding("ok", "numba threads", f"layer {layer}, at most {threads}")


# ---- places -------------------------------------------------------------------------------------


def disks(configuration: Any) -> Iterator[Finding]:
    """Room and the right to write where runs and caches go, and locks for run folders."""
    places = {"outputs": configuration.outputs, "data.cache_dir": configuration.data.cache_dir}
    for option, place in places.items():
        path = Path(place).expanduser().absolute()
        there = next(folder for folder in (path, *path.parents) if folder.is_dir())
        elsewhere = f"free some space, or choose another folder with {option}=..."
        try:
            locks = _lock_works(there)
        except OSError as error:
            yield Finding("error", option, f"{there} cannot be written: {error.strerror}",
                          elsewhere)  # fmt: skip
            continue
        free = shutil.disk_usage(there).free
        level: Level = "ok" if free >= COMFORTABLE else "warning" if free >= NEEDED else "error"
        yield Finding(level, option, f"{path}: {free / GIB:.1f} GiB free",
                      "" if level == "ok" else elsewhere)  # fmt: skip
        if option == "outputs" and not locks:
            yield Finding("warning", option, "the file system has no locks",
                          "do not run one command twice at the same time")  # fmt: skip


def _lock_works(folder: Path) -> bool:
    """Whether a file in a new folder can be locked.

    Raises:
        OSError: the folder cannot be written.
    """
    from mambaseg.storage.lock import RunLock

    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as place:
        (Path(place) / "file").write_bytes(bytes(4096))
        lock = RunLock(Path(place) / "run")
        lock.acquire()
        held = lock.held
        lock.release()
    return held


def data(configuration: Any) -> Iterator[Finding]:
    """The data that a training would take; no image is opened."""
    named = os.environ.get("ACDC_ROOT")
    from omegaconf import OmegaConf

    if OmegaConf.is_missing(configuration.data, "root"):
        yield Finding("error", "data", "data.root is not set", "data.root=<folder of the data set>")
        return
    root = Path(configuration.data.root).expanduser()
    if named and not Path(named).expanduser().is_dir():
        remedy = "set it to the folder of the data set, or unset it for the phantom"
        yield Finding("error", "ACDC_ROOT", f"{named} is not a folder", remedy)
    if configuration.data.synthetic:
        said = f"{configuration.data.title}, {'in' if root.is_dir() else 'to be written to'} {root}"
        yield Finding("ok", "data", f"{said}; ACDC was not asked for or not found")
        return
    if "find_cases" not in configuration.data:  # of another task: nothing to list
        there = root.is_dir()
        said = f"{configuration.data.title} in {root}{'' if there else ', which is no folder'}"
        yield Finding("ok" if there else "error", "data", said, "" if there else "set data.root")
        return
    from hydra.utils import instantiate

    from mambaseg.errors import UserError

    try:
        cases = instantiate(configuration.data.find_cases)(root)
    except UserError as error:
        yield Finding("error", "data", str(error), f"make data-check DATA={root}, or set data.root")
        return
    patients = len({case.patient for case in cases})
    said = f"{configuration.data.title} in {root}: {len(cases)} cases of {patients} patients"
    yield Finding("ok", "data", said)


def wandb(_: Any) -> Iterator[Finding]:
    """Whether W&B answers, where a key is configured; the key itself is neither read nor shown."""
    from omegaconf import OmegaConf

    mode = OmegaConf.create({"mode": "${wandb_mode:}"}).mode
    if mode != "online":
        yield Finding("ok", "W&B", f"{mode}: nothing is sent")
        return
    url = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    try:
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=SECONDS_FOR_WANDB):
            pass
    except urllib.error.HTTPError:
        pass  # an answer, if only to say that there is no such page
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        yield Finding("warning", "W&B", f"a key is configured, but {url} does not answer: {reason}",
                      "runs are logged offline; WANDB_MODE=offline saves the waiting")  # fmt: skip
        return
    yield Finding("ok", "W&B", f"{url} answers")


def main(words: Sequence[str] | None = None) -> int:
    """Print the findings; 1 when one is an error, else 0."""
    from rich.console import Console
    from rich.text import Text

    findings = examine(sys.argv[1:] if words is None else words)
    console = Console()
    for one in findings:  # Text: square brackets in a path are no markup
        line = Text.assemble((f"{one.level:>7}  ", STYLES[one.level]), f"{one.about}: {one.said}")
        console.print(line, soft_wrap=True)
        if one.remedy:
            console.print(Text(f"         -> {one.remedy}"), soft_wrap=True)
    broken = [one.about for one in findings if one.level == "error"]
    said = f"broken: {', '.join(broken)}" if broken else "ready to train"
    console.print(Text(said, "red" if broken else "green"), soft_wrap=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
