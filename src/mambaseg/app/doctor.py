"""Check whether this machine can train: `mambaseg doctor [overrides]`.

Exits with 1 when something that a training needs is broken. What is broken must not hide the rest,
so each check imports the libraries that it looks at.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mambaseg.errors import UserError, counted

STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}
GIB = 2**30
# a run keeps a few checkpoints: up to 0.7 GiB for the networks here
NEEDED, COMFORTABLE = 1 * GIB, 5 * GIB
# bytes of a dtype -> error against the float64 definition, relative to the largest value
TOLERANCES = {4: 1e-4, 2: 3e-2}


class Finding(NamedTuple):
    """One line: how bad (`ok`, `warning`, `error`), about what, what was found, and what to do."""

    level: str
    about: str
    said: str
    remedy: str = ""


def examine(words: Sequence[str] = (), config_dir: str | None = None) -> list[Finding]:
    """Run all checks; overrides of a training choose data, folders and device."""
    findings: list[Finding] = []
    configuration: list[Any] = []

    def configure(_: Any) -> Iterator[Finding]:
        from mambaseg.app.api import composition, our_hydra
        from mambaseg.app.check import check_targets, checked
        from mambaseg.app.entry import explained_errors
        from mambaseg.app.overrides import arranged

        _, overrides = arranged(words)
        with explained_errors(UserError), our_hydra(config_dir):
            configuration.append(composition("config", overrides))
            check_targets(checked(configuration[0], "config", overrides))
        yield Finding("ok", "configuration", " ".join(words) or "the default")

    checks: list[Callable[[Any], Iterator[Finding]]] = [packages, configure, torch_and_devices]
    for check in (*checks, scan_backends, disks, data, wandb):
        if configuration or check not in (disks, data, wandb):
            try:
                findings += check(configuration[0] if configuration else None)
            except Exception as error:  # whatever it is, the other checks have to run
                known = isinstance(error, UserError)  # which says the remedy
                said = str(error) if known else f"{type(error).__name__}: {error}"
                about = check.__name__.replace("_", " ")
                findings.append(Finding("error", about, said, "" if known else "make setup"))
    return findings


# ---- the environment ----------------------------------------------------------------------------


def packages(_: Any) -> Iterator[Finding]:
    """Python and the installed packages against the ranges that pyproject.toml declares."""
    from importlib import metadata

    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    python, wanted = platform.python_version(), metadata.metadata("mambaseg")["Requires-Python"]
    fits = python in SpecifierSet(wanted)
    yield Finding("ok" if fits else "error", "Python", f"{python} (wanted: {wanted})",
                  "" if fits else f"make setup PYTHON=<a Python {wanted}>")  # fmt: skip
    good = 0
    for one in map(Requirement, metadata.requires("mambaseg") or []):
        needed = one.marker is None or one.marker.evaluate({"extra": ""})
        remedy = f"pip install '{one.name}{one.specifier}'"
        try:
            version = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            if needed:
                yield Finding("error", one.name, "is not installed", remedy)
            continue
        if one.specifier.contains(version, prereleases=True):
            good += 1
        else:
            said = f"{version} is not in the declared range {one.specifier}"
            yield Finding("error" if needed else "warning", one.name, said, remedy)
    yield Finding("ok", "packages", f"{good} in their declared ranges")


def torch_and_devices(configuration: Any) -> Iterator[Finding]:
    """The machine, PyTorch, the CUDA it was built for, the driver and the GPUs."""
    import torch

    said = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not every system tells
        said += f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.0f} GiB memory"
    yield Finding("ok", "machine", said)
    build = torch.version.cuda
    said = f"{torch.__version__}, {f'built for CUDA {build}' if build else 'built without CUDA'}"
    yield Finding("ok", "torch", f"{said}, {torch.get_num_threads()} threads")
    driver = _driver()
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding("ok", "GPU", f"{', '.join(names)}; driver {driver or 'unknown'}")
        return
    wanted = configuration is not None and configuration.trainer.accelerator in ("gpu", "cuda")
    if driver:
        remedy = f"a driver for CUDA {build} or newer, or an older" if build else "a CUDA build of"
        yield Finding("error" if wanted else "warning", "GPU",
                      f"driver {driver}, but torch cannot use it",
                      f"install {remedy} torch (docs/gpu.md)")  # fmt: skip
    elif wanted:
        yield Finding("error", "GPU", "none, and no driver", "trainer=cpu, or a machine with a GPU")
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

    gpu = torch.cuda.is_available()
    for device in ("cuda", "cpu") if gpu else ("cpu",):
        dtypes = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)
        best = False  # the first that works is what a training should have, the next ones are spare
        for name, backend in BACKENDS.items():
            about = f"scan {name} on {device}"
            if device not in (backend.devices or (device,)):
                continue
            if (missing := obstacle(name, device)) is not None:
                level = "warning" if best or name == "mamba_ssm" else "error"
                yield Finding(level, about, "does not load", missing)
                continue
            found = _compared(name, torch.device(device), dtypes)._replace(about=about)
            yield found
            best = best or found.level == "ok"
            if name == "numba" and found.level == "ok":
                from mambaseg.scan.numba import threading_layer

                layer, threads = threading_layer()
                yield Finding("ok", "numba threads", f"layer {layer}, at most {threads}")
    if not gpu:
        names = [name for name, one in BACKENDS.items() if one.devices == ("cuda",)]
        yield Finding("ok", "scan on cuda", f"no GPU, so {', '.join(names)} were not tried")


def _compared(name: str, device: Any, dtypes: Sequence[Any]) -> Finding:
    """Whether a backend that loads also computes, and what it should."""
    from mambaseg.benchmark.scans import Shape, errors_of

    shape = Shape("odd", 2, 17, 40)  # no whole number of a backend's chunks and blocks
    remedy = "choose another with model.scan_backend=..., and report this"
    said = []
    for dtype in dtypes:
        try:
            (found,) = errors_of(["2d"], [name], dtype, device, shape=shape)
        except Exception as error:  # compilers, drivers, threads: any of them
            return Finding("error", name, f"fails: {type(error).__name__}: {error}", remedy)
        what = f"worst error {found['worst']:.0e} in {str(dtype).removeprefix('torch.')}"
        if not found["worst"] <= TOLERANCES[dtype.itemsize]:  # NaN is wrong too
            return Finding("error", name, f"gives wrong numbers ({what})", remedy)
        said.append(what)
    return Finding("ok", name, f"agrees with the definition ({', '.join(said)})")


# ---- places -------------------------------------------------------------------------------------


def disks(configuration: Any) -> Iterator[Finding]:
    """Room and the right to write where runs and caches go, and locks for run folders."""
    from mambaseg.storage.lock import RunLock

    places = {"outputs": configuration.outputs, "data.cache_dir": configuration.data.cache_dir}
    for option, place in places.items():
        path = Path(place).expanduser().absolute()
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        elsewhere = f"free some space, or choose another folder with {option}=..."
        if not there.is_dir():
            yield Finding("error", option, f"{there} is not a folder", f"choose {option}=...")
            continue
        try:
            with tempfile.TemporaryDirectory(prefix=".doctor-", dir=there) as trial:
                (Path(trial) / "file").write_bytes(bytes(4096))
                lock = RunLock(Path(trial) / "run")
                lock.acquire()
                locks = lock.held
                lock.release()
        except OSError as error:
            said = f"{there} cannot be written: {error.strerror}"
            yield Finding("error", option, said, elsewhere)
            continue
        free = shutil.disk_usage(there).free
        level = "ok" if free >= COMFORTABLE else "warning" if free >= NEEDED else "error"
        said = f"{path}: {free / GIB:.1f} GiB free"
        yield Finding(level, option, said, "" if level == "ok" else elsewhere)
        if option == "outputs" and not locks:
            yield Finding("warning", option, "the file system has no locks",
                          "do not run one command twice at the same time")  # fmt: skip


def data(configuration: Any) -> Iterator[Finding]:
    """The data that a training would take; no image is opened."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from mambaseg.app.check import require_acquired

    chosen = configuration.data
    if OmegaConf.is_missing(chosen, "root"):
        yield Finding("error", "data", "data.root is not set", "data.root=<folder of the data set>")
        return
    named = os.environ.get("ACDC_ROOT")
    if named and not Path(named).expanduser().is_dir():
        level = "error" if str(chosen.root) == named else "warning"  # these data do not read it
        remedy = "set it to the folder of ACDC, or unset it for the phantom"
        yield Finding(level, "ACDC_ROOT", f"{named} is not a folder", remedy)
    root = Path(chosen.root).expanduser()
    said = f"{chosen.title} in {root}"
    if chosen.synthetic:
        said += "" if root.is_dir() else " (to be written)"
        yield Finding("ok", "data", f"{said}; ACDC was not asked for or not found")
    elif not root.is_dir():
        yield Finding("error", "data", f"{said}, which is not a folder", "set data.root")
    elif "find_cases" not in chosen:  # images in pairs: nothing to list
        yield Finding("ok", "data", said)
    else:
        try:
            require_acquired(chosen)
            cases = instantiate(chosen.find_cases)(root)
        except UserError as error:
            remedy = f"mambaseg check {root}, or set data.root"
            yield Finding("error", "data", str(error), remedy)
            return
        patients = counted(len({case.patient for case in cases}), "patient")
        yield Finding("ok", "data", f"{said}: {counted(len(cases), 'case')} of {patients}")
        yield from _split(chosen, cases)


def _split(chosen: Any, cases: Sequence[Any]) -> Iterator[Finding]:
    """The parts of a training, and whose labels it reads where less than all are asked for."""
    from mambaseg.data.labelling import labelled_patients, supervision_note, with_labels
    from mambaseg.data.patients import split_cases

    root = Path(chosen.root).expanduser()
    how = {"fold": chosen.get("fold", 0), "count": chosen.get("folds", 5)}
    how |= {"by": chosen.get("split_by"), "seed": chosen.get("split_seed", 0)}
    try:
        split = split_cases(chosen.split, cases, root, **how)
        split.require_training()
    except UserError as error:
        yield Finding("error", "split", str(error), "choose another with data.split=...")
        return
    parts = f"{len(split.train)} / {len(split.val)} / {len(split.test)} patients"
    yield Finding("ok", "split", f"{split.name}: {parts} for training, validation, test")
    labels, wanted = chosen.get("labels", "dense"), chosen.get("labelled")
    if labels == "dense" and wanted is None:
        return
    try:
        patients = labelled_patients(split, wanted)
        for case in cases:
            if case.patient in patients:
                with_labels(case, labels)
    except UserError as error:
        remedy = "data.split, data.labelled and data.labels say whose labels are read"
        yield Finding("error", "labels", str(error), remedy)
        return
    yield Finding("ok", "labels", supervision_note(split, patients, labels))


def wandb(_: Any) -> Iterator[Finding]:
    """Whether W&B answers, where a key is configured; the key itself is neither read nor shown."""
    from mambaseg.app.resolvers import wandb_mode

    if (mode := wandb_mode()) != "online":
        yield Finding("ok", "W&B", f"{mode}: nothing is sent")
        return
    url = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    try:
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=5):
            pass
    except urllib.error.HTTPError:
        pass  # an answer, if only to say that there is no such page
    except (OSError, ValueError) as error:
        said = f"a key is configured, but {url} does not answer: {getattr(error, 'reason', error)}"
        yield Finding("warning", "W&B", said,
                      "runs are logged offline; WANDB_MODE=offline saves the waiting")  # fmt: skip
        return
    yield Finding("ok", "W&B", f"{url} answers")


def main(words: Sequence[str]) -> int:
    """Print the findings; 1 when one is an error, else 0."""
    parser = argparse.ArgumentParser(prog="mambaseg doctor", description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="*", help="as of mambaseg train: data=acdc trainer=gpu")
    parser.add_argument("--config-dir", help="a folder of your own configs")
    given = parser.parse_intermixed_args(words)
    from rich.console import Console
    from rich.text import Text

    findings = examine(given.overrides, given.config_dir)
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
