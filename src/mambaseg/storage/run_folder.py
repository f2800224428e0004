"""A run folder: its identity, status and results; written by training, read by everything else.

A folder's name is a function of the scientific configuration, the split and the data, not of the
clock: `<outputs>/<experiment>/<readable name>-<hash>`. It holds

    config.yaml    the resolved configuration
    run.json       identity, status, code, versions, hardware; only `RunFolder` writes it
    train.log      everything that was logged
    metrics.csv    live curves
    cases.csv      case x class x metric, test set
    metrics.json   summary of the test set
    overlays.npz   three slices per test case: image, truth, prediction (for reports)
    checkpoints/   best.ckpt, last.ckpt (more during a training: `mambaseg.training.checkpoints`)
    figures/       image | truth | prediction | error
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from mambaseg.errors import UserError
from mambaseg.storage.files import whole_file, write_table, write_whole, writing
from mambaseg.storage.untrusted import ForeignFileError, read_json

_PACKAGES = (
    "mambaseg", "torch", "lightning", "hydra-core", "omegaconf", "monai", "torchmetrics", "einops",
    "numpy", "scipy", "nibabel", "numba", "wandb", "triton", "mamba-ssm", "causal-conv1d",
)  # fmt: skip
log = logging.getLogger(__name__)


def slug(text: str) -> str:
    """A text as part of a file name that needs no quoting anywhere."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-").lower()


def file_name(text: str) -> str:
    """A case's id as part of a file name: no path, nothing to quote, of bounded length."""
    return re.sub(r"[^\w.-]+", "-", text)[:100]


def file_digest(path: str | Path) -> str:
    """BLAKE2 digest (32 hex) of a file's content."""
    with Path(path).open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16))
    return digest.hexdigest()


class RunFolder:
    """One run's folder on disk. Files are written to a temporary name and renamed."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def record(self) -> dict[str, Any]:
        """What `run.json` holds; empty where there is none or it is damaged."""
        try:
            return self._read()
        except (OSError, ValueError):
            return {}

    def _read(self) -> dict[str, Any]:
        """The record; empty where there is none, `OSError` or `ValueError` for all other faults."""
        try:
            record = read_json(self.path / "run.json")
        except FileNotFoundError:
            return {}
        if not isinstance(record, dict):
            raise ForeignFileError("no fields")
        return record

    def _kept(self) -> dict[str, Any]:
        """The record that is written again; UserError where it would be lost."""
        try:
            return self._read()
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot read {self.path / 'run.json'} ({error}), so it stays as it is. "
                "Check the disk, and start the same command again"
            ) from error

    @property
    def trained(self) -> bool:
        """Whether the run has ended well, with its test set scored or not (`test=false`)."""
        return self.record.get("status") == "done"

    @property
    def finished(self) -> bool:
        """Whether the run has ended well and the summary of its test set exists."""
        return self.trained and (self.path / "metrics.json").is_file()

    @property
    def summary(self) -> dict[str, Any]:
        """What `metrics.json` holds; UserError where it cannot be read."""
        try:
            return dict(read_json(file := self.path / "metrics.json"))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{file} cannot be read ({error}). Delete it, and start the command of the run "
                "again: that scores the test set again, and trains nothing"
            ) from error

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest state of an unfinished run; None where there is nothing to resume from."""
        path = self.path / "checkpoints" / "last.ckpt"
        return path if path.is_file() and self.record else None

    # ---- run.json

    def start(self, **fields: Any) -> None:
        """Makes a fresh folder; an earlier one is kept as `<name>.previous`.

        Of two earlier ones the later is kept, but a finished one rather than an attempt.
        """
        with writing(self.path):
            if self.path.exists():
                with contextlib.suppress(ValueError):  # damaged: an attempt
                    self._read()  # what a disk does not give now may be a finished run
                previous = self.path.with_name(self.path.name + ".previous")
                if RunFolder(previous).trained and not self.trained:
                    shutil.rmtree(self.path)
                else:
                    if previous.exists():
                        shutil.rmtree(previous)
                    self.path.rename(previous)
            (self.path / "checkpoints").mkdir(parents=True)
        self._keep({"status": "running", "started": _now(), **_alive(), **fields})

    def resume(self, **fields: Any) -> None:
        """Resumes an unfinished run; `resumed` in its record lists when, with these fields."""
        record = {k: v for k, v in self._kept().items() if k not in ("error", "ended")}
        resumed = [*record.get("resumed", []), {"at": _now(), **fields}]
        self._keep({**record, "status": "running", "resumed": resumed, **_alive()})

    def beat(self, **fields: Any) -> None:
        """Notes that the run is alive, and in which process; warns where that is not possible."""
        try:
            self._keep({**self._kept(), **_alive(), **fields})
        except UserError as error:
            log.warning("%s", error)

    def finish(self, status: str, **fields: Any) -> None:
        """Ends the run as `done`, `failed` or `interrupted`."""
        self.update(status=status, ended=_now(), **fields)

    def update(self, **fields: Any) -> None:
        """Adds or replaces fields of `run.json`."""
        self._keep({**self._kept(), **fields})

    def _keep(self, record: Mapping[str, Any]) -> None:
        """Writes the record so that it survives a power cut, as the checkpoints do."""
        write_whole(self.path / "run.json", _json(record), durable=True)

    # ---- other files

    def write_text(self, name: str, text: str) -> Path:
        """Writes a text file as a whole or not at all."""
        write_whole(path := self.path / name, text)
        return path

    def write_json(self, name: str, value: Any) -> Path:
        """Writes plain data as JSON; NaN and infinities become null."""
        return self.write_text(name, _json(value))

    def write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Writes rows as CSV; the columns are the union of all keys in order of appearance."""
        rows = list(rows)
        columns = list(dict.fromkeys(key for row in rows for key in row))
        write_table(path := self.path / name, columns, rows)
        return path

    def write_arrays(self, name: str, arrays: Mapping[str, Any]) -> Path:
        """Writes arrays as one compressed .npz, whole or not at all."""
        import numpy as np

        path = self.path / name
        with whole_file(path) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(stream, **arrays)
        return path


def _json(value: Any) -> str:
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # of NumPy or torch
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _alive() -> dict[str, Any]:
    return {"heartbeat": _now(), "pid": os.getpid(), "host": this_host()}


# ---- what a run was made with


def this_host() -> str:
    """Eight hex digits that tell this machine from others: records hold no names."""
    return hashlib.blake2b(platform.node().encode(), digest_size=4).hexdigest()


def environment() -> dict[str, Any]:
    """Versions and hardware of this process. No environment variables, no user or host name."""
    import torch

    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    hardware = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # AVX512, AVX2, ...
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }
    return {"versions": versions, "hardware": hardware}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line[:10] == "model name")
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def code_state(config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Which code runs: a digest of the package's sources, git commit, uncommitted changes.

    They are those of the first call: the jobs of a sweep run the code that was imported then,
    whatever becomes of its files. `own`: digests of the user's modules that a `config` names by
    `_target_`, which are imported.
    """
    state = dict(_package_state(Path(__file__).resolve().parents[1]))
    if own := _own_code(config or {}):
        state["own"] = own
    return state


@functools.cache
def _package_state(package: Path) -> dict[str, Any]:

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    state: dict[str, Any] = {"digest": _sources_digest(package), "commit": None, "dirty": None}
    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # installed below a user's own repository
        commit = git("rev-parse", "HEAD")
        state.update(commit=commit, dirty=bool(git("status", "--porcelain", "-uno")))
    except (OSError, subprocess.SubprocessError):
        pass  # installed without git: the digest alone tells
    return state


def _sources_digest(place: Path) -> str:
    """Digest of a file, or of all sources in a folder by their places in it."""
    digest = hashlib.blake2b(digest_size=8)
    for source in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
        name = source.relative_to(place)
        # an editor's locks, which are links to nowhere, and its copies are no sources
        if not any(part.startswith(".") for part in name.parts) and source.is_file():
            digest.update(name.as_posix().encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()


def _own_code(config: Mapping[str, Any]) -> dict[str, str]:
    own = {}
    named = set(re.findall(r'"_target_": "(\w+)', json.dumps(config, default=str)))
    for name in sorted(named - sys.stdlib_module_names - {"mambaseg"}):
        module = sys.modules.get(name)
        place = Path([*getattr(module, "__path__", ()), getattr(module, "__file__", None) or ""][0])
        installed = {"site-packages", "dist-packages"} & set(place.parts)
        if place.parts and place.exists() and not installed:
            own[name] = _sources_digest(place)
    return own


def code_changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """One sentence when the code differs from the code that made a run, otherwise an empty text."""
    own = now.get("own", {})
    differs = [name for name, old in before.get("own", {}).items() if own.get(name, old) != old]
    if before and before.get("digest") != now.get("digest"):
        differs.insert(0, f"{code_name(before)}; now {code_name(now)}")
    return f"made by other code ({', '.join(differs)}): rerun=true makes it again" * bool(differs)


def code_name(state: Mapping[str, Any]) -> str:
    """A `code_state` in a few words."""
    commit = str(state["commit"])[:10] if state.get("commit") else "unknown commit"
    return commit + (" with local changes" if state.get("dirty") else "")
