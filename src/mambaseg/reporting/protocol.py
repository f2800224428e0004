"""How the runs of a comparison were made, in one box: from their configurations and records."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any

from mambaseg.errors import counted
from mambaseg.evaluation.summary import kept_in_words
from mambaseg.reporting.collect import Comparison
from mambaseg.reporting.costs import conditions
from mambaseg.reporting.grid import Grid
from mambaseg.reporting.labels import flatten, text_of
from mambaseg.reporting.pack import without_folders
from mambaseg.reporting.runs import RunData, ended_early

_VERSIONS = ("python", "mambaseg", "torch", "lightning", "monai")
# where things are on one machine, and how jobs are started: it changes no number
_PLACES = ("outputs", "run_dir", "data.root", "data.cache_dir", "logger", "hydra", "rerun")
# where a network was only scored, these are defaults of the configuration that trained nothing
_RECIPE = ("method", "optimizer", "learning rate", "loss", "steps", "batch", "augmentation")
_MOST = 6  # commands that are shown where they are no sweep


def protocol_grid(comparison: Comparison) -> Grid:
    """A row per subject; where the runs differ, each value with the networks that have it."""
    rows = [["command", ";\n".join(commands(comparison.runs))], ["seeds", _seeds(comparison)]]
    rows += [[name, _of_entries(comparison, name)] for name in _TOLD]
    return Grid("Protocol", ["", "value"], [row for row in rows if row[1]], wide=2)


def commands(runs: Sequence[RunData]) -> list[str]:
    """The command lines that give these runs: one sweep where they are a full grid of values.

    Otherwise one for the seeds of each. Nothing where no run recorded its overrides, as runs of
    earlier versions.
    """
    jobs = [_words(run) for run in runs if run.record.get("overrides") is not None]
    keys = list(dict.fromkeys(key for job in jobs for key in job))
    values = {key: list(dict.fromkeys(job.get(key) for job in jobs)) for key in keys}
    distinct = {tuple(map(job.get, keys)) for job in jobs}
    full = prod(map(len, values.values())) == len(distinct)
    if not jobs or not full or any(None in own for own in values.values()):
        seeds: dict[tuple[tuple[str, str], ...], dict[str, None]] = {}
        for job in jobs:
            form = job | ({"seed": ""} if "seed" in job else {})
            seeds.setdefault(tuple(form.items()), {})[job.get("seed", "")] = None
        lines = [
            _line({key: ",".join(own) if key == "seed" else v for key, v in form}, len(own) > 1)
            for form, own in seeds.items()
        ]
        more = [f"... and {len(lines) - _MOST} more"] if len(lines) > _MOST else []
        return lines[:_MOST] + more
    return [_line({key: ",".join(map(str, own)) for key, own in values.items()}, len(distinct) > 1)]


def _words(run: RunData) -> dict[str, str]:
    """Overrides by key, without places; of an absolute path the last part."""
    parted = (word.partition("=") for word in run.record["overrides"])
    script = "evaluate" if run.rescored else "train"
    shown = {
        key: without_folders(value)
        for key, _, value in parted if not key.lstrip("+~").startswith(_PLACES)
    }  # fmt: skip
    return {"": f"mambaseg {script}", **shown}


def _line(job: Mapping[str, str], sweep: bool = False) -> str:
    script, *words = (
        key if key.startswith("~") and not value else f"{key}={value}".removeprefix("=")
        for key, value in job.items()
    )
    return " ".join([script, *(["-m"] if sweep else []), *map(_quoted, words)])


def _quoted(word: str) -> str:
    """For a shell; Hydra's own quotes in double ones, which can be read."""
    double = "'" in word and not set(word) & set('"$`!\\')
    return f'"{word}"' if double else shlex.quote(word)


def _of_entries(comparison: Comparison, name: str) -> str:
    """What all runs share, or each value with its entries; those that tell nothing are left out."""
    texts: dict[str, list[str]] = {}
    for entry in comparison.entries:
        runs = [run for run in entry.runs if not (run.rescored and name in _RECIPE)]
        own = dict.fromkeys(_TOLD[name](run, flatten(run.config)) for run in runs)
        texts.setdefault(" / ".join(filter(None, own)), []).append(entry.label)
    if len(texts) == 1:
        return next(iter(texts))
    return "; ".join(f"{', '.join(labels)}: {text}" for text, labels in texts.items() if text)


def _seeds(comparison: Comparison) -> str:
    texts: dict[str, list[str]] = {}
    trained = [entry for entry in comparison.entries if not entry.runs[0].rescored]
    for entry in trained:
        texts.setdefault(", ".join(map(str, entry.by_seed)), []).append(entry.label)
    if len(texts) == 1 and len(trained) == len(comparison.entries):
        (seeds,) = texts
        counts = [len(entry.runs) for entry in trained]
        least = f"{min(counts)} to " if min(counts) < max(counts) else ""
        return f"{seeds} ({least}{counted(max(counts), 'training')} per network)"
    return "; ".join(f"{', '.join(labels)}: {seeds}" for seeds, labels in texts.items())


def _name(config: Mapping[str, Any], key: str) -> str:
    return text_of(f"{key}._target_", config.get(f"{key}._target_", "")).strip()


def _optimizer(_: RunData, config: Mapping[str, Any]) -> str:
    return _with(
        _name(config, "optim.optimizer"), _arguments(config, "optim.optimizer", {"lr", "fused"})
    )


def _rate(_: RunData, config: Mapping[str, Any]) -> str:
    rate = config.get("optim.optimizer.lr")
    schedule = _name(config, "optim.scheduler")
    known = [] if rate is None else [text_of("", rate)]
    if schedule:
        known.append(_with(schedule, _arguments(config, "optim.scheduler", set())))
    return ", ".join(known)


def _steps(run: RunData, config: Mapping[str, Any]) -> str:
    steps, every = config.get("data.steps"), config.get("data.val_every")
    told = "" if steps is None else f"{steps}"
    if ended := ended_early(run):
        told += f", ended after {ended}"
    return told + (f", validation every {every}" if told and every else "")


def _batch(_: RunData, config: Mapping[str, Any]) -> str:
    batch, parts = config.get("data.batch_size"), config.get("data.accumulate") or 1
    if batch is None:
        return ""
    return f"{batch}" + (f" in {parts} parts" if parts != 1 else "")


def _size(_: RunData, config: Mapping[str, Any]) -> str:
    size, kind = config.get("data.size"), config.get("data.preprocessing")
    if isinstance(size, int):
        size = [size, size]
    told = " × ".join(map(str, size)) if isinstance(size, list) else text_of("", size or "")
    known = [f"{told} pixels" if isinstance(size, list) else told]
    return ", ".join(filter(None, [*known, f"preprocessing {kind}" if kind else ""]))


def _augmentation(run: RunData, _: Mapping[str, Any]) -> str:
    operations = run.config.get("augmentation")
    if not isinstance(operations, Mapping):
        return "none" if "augmentation" in run.config else ""
    told = []
    for name, operation in operations.items():
        arguments = flatten(operation) if isinstance(operation, Mapping) else {}
        named = (f"{k}={text_of(k, v)}" for k, v in arguments.items() if not k.startswith("_"))
        told.append(_with(str(name), named))
    return ", ".join(told) or "none"


def _method(run: RunData, config: Mapping[str, Any]) -> str:
    if run.method == "supervised":
        return ""
    told = _with(run.method, _arguments(config, "method", {"name", "partner", "networks"}))
    return f"{told} of {run.model}"


def _counts(run: RunData, _: Mapping[str, Any]) -> str:
    counts = run.record.get("counts")
    if not isinstance(counts, Mapping):
        return ""
    words = {"train": "training", "val": "validation", "test": "test"}
    parts = {name: counts.get(name) for name in words if name == "test" or not run.rescored}
    shown = [
        f"{words[name]} {counted(part['cases'], 'case')} of {counted(part['patients'], 'patient')}"
        + (f" ({part['labelled']} with labels)" if "labelled" in part else "")
        for name, part in parts.items()
        if isinstance(part, Mapping) and {"cases", "patients"} <= part.keys()
    ]
    return ", ".join(shown)


def _versions(run: RunData, _: Mapping[str, Any]) -> str:
    versions = run.record.get("versions") or {}
    return ", ".join(f"{name} {versions[name]}" for name in _VERSIONS if versions.get(name))


def _code(run: RunData, _: Mapping[str, Any]) -> str:
    code = run.record.get("code") or {}
    changed = " with local changes" if code.get("dirty") else ""
    return f"commit {code['commit'][:10]}{changed}" if code.get("commit") else ""


def _arguments(config: Mapping[str, Any], key: str, without: set[str]) -> Iterable[str]:
    """`name=value` of an object's own arguments."""
    for full, value in config.items():
        name = full.removeprefix(f"{key}.")
        if full != name and not name.startswith("_") and name not in without and value is not None:
            yield f"{name}={text_of(name, value)}"


def _with(name: str, arguments: Iterable[str]) -> str:
    told = ", ".join(arguments)
    return f"{name} ({told})" if name and told else name


def _post_processing(run: RunData, _: Mapping[str, Any]) -> str:
    kept = run.summary.get("keep_largest")
    if kept is not None:
        return f"{kept_in_words(kept)} (chosen in validation)"
    every = (run.config.get("evaluation") or {}).get("keep_largest")
    return "largest component of every structure" if every else ""


_TOLD: dict[str, Callable[[RunData, Mapping[str, Any]], str]] = {
    "data": _counts,
    "method": _method,
    "optimizer": _optimizer,
    "learning rate": _rate,
    "loss": lambda _, config: _with(_name(config, "loss"), _arguments(config, "loss", set())),
    "steps": _steps,
    "batch": _batch,
    "image size": _size,
    "augmentation": _augmentation,
    "post-processing": _post_processing,
    "views of a slice": lambda run, _: str(run.summary.get("views") or ""),
    "versions": _versions,
    "code": _code,
    "device": lambda run, _: conditions(run),
    "scan": lambda run, _: str(run.record.get("scan_backend") or ""),
}
