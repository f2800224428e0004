"""A training of a given time: `data.minutes` becomes as many steps as this machine takes in it."""

from __future__ import annotations

import copy
import json
import logging
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from mambaseg.app.devices import device_count
from mambaseg.app.networks import plain
from mambaseg.app.overrides import given_overrides, key_of
from mambaseg.app.resolvers import data_name
from mambaseg.data.fingerprint import digest_of
from mambaseg.errors import UserError
from mambaseg.storage.files import write_whole
from mambaseg.storage.identity import identity, with_digests
from mambaseg.storage.lock import alone
from mambaseg.storage.untrusted import ForeignFileError, read_json, with_values

TRIAL = 24  # steps, of which the first third does not count
VALIDATIONS = (2, 20)  # fewest and most
SHARE = 0.1  # of the time for validations, where this allows enough of them
MARGIN = 0.08  # of the time, for the start, checkpoints and a trial that was up to 5 % too fast
log = logging.getLogger(__name__)


def within_minutes(cfg: DictConfig, build: Callable[[DictConfig], Any]) -> DictConfig:
    """The configuration with steps and validations that fill `data.minutes`, where it has one.

    A short training measures them once, and a file of the experiment's folder keeps them: all seeds
    and folds, and trials of a search for numbers of optimizer, schedule and loss, train as many
    steps, also side by side, and a resumed or repeated run as many as it began with. `build` makes
    a `Run`.

    Raises:
        UserError: the time is too short, or there are steps or several processes too.
    """
    minutes = OmegaConf.select(cfg, "data.minutes")
    if minutes is None or "checkpoint" in cfg:  # whoever scores a checkpoint trains nothing
        return cfg
    steps = ("data.steps", "data.val_every")
    if found := [word for word in given_overrides() if key_of(word) in steps]:
        raise UserError(
            f"{found[0]}: data.minutes={minutes:g} plans the steps. Leave this out, or "
            "add data.minutes=null"
        )
    if "ddp" in str(cfg.trainer.get("strategy")) or device_count(cfg.trainer) > 1:
        raise UserError(
            f"data.minutes={minutes:g}: is for one device. Choose trainer.devices=1, or give "
            "data.steps with data.minutes=null"
        )
    cfg = copy.deepcopy(cfg)
    path, files = _place(cfg), _files(cfg)
    with alone(path.with_suffix(".lock")):  # of jobs side by side one measures
        kept = _read(path) if path.exists() else None
        if other := kept is not None and kept.get("files", files) != files:
            log.info("the files in %s are not those of %s: measuring again", cfg.data.root, path)
        if kept is None or other:
            begun = time.perf_counter()
            step, validation = _measured(cfg, build)
            planned = _planned(minutes, time.perf_counter() - begun, step, validation)
            write_whole(path, json.dumps({**planned, **({"files": files} if files else {})}))
    planned = _read(path)
    log.info(
        "data.minutes=%g: data.steps=%d data.val_every=%d (%.2f s a step, %.1f s a validation; %s)",
        minutes, planned["steps"], planned["val_every"], planned["seconds_per_step"],
        planned["seconds_per_validation"], path,
    )  # fmt: skip
    cfg.data.update(minutes=None, steps=planned["steps"], val_every=planned["val_every"])
    return cfg


def steps_within(cfg: DictConfig) -> dict[str, int]:
    """`data.steps` and `data.val_every` of the plan that is kept for a configuration, if any."""
    if OmegaConf.select(cfg, "data.minutes") is None or not (path := _place(cfg)).exists():
        return {}
    planned = _read(path)
    return {f"data.{key}": planned[key] for key in ("steps", "val_every")}


def _planned(minutes: float, taken: float, step: float, validation: float) -> dict[str, Any]:
    """Steps and validations of these seconds each that fill what is left of the time."""
    left = (1 - MARGIN) * 60 * minutes - taken
    count = min(max(int(SHARE * left / validation), VALIDATIONS[0]), VALIDATIONS[1])
    every = int((left / count - validation) / step)
    if every < 1:
        raise UserError(
            f"data.minutes={minutes:g}: {count} validations of {validation:.1f} s and a step of "
            f"{step:.2f} s do not fit after the {60 * minutes - left:.0f} s that the start takes "
            "here; give more time"
        )
    return {"steps": count * every, "val_every": every, "seconds_per_step": step,
            "seconds_per_validation": validation}  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    """A plan that is kept."""
    try:
        planned = read_json(path)
        if min(planned["steps"], planned["val_every"]) >= 1:
            return dict(planned)
        problem = "holds no steps"
    except (ForeignFileError, OSError, KeyError, TypeError) as error:
        problem = f"cannot be read ({error})"
    raise UserError(f"{path} {problem}: delete it, and data.minutes is measured again")


def _files(cfg: DictConfig) -> str | None:
    """A digest of the names and sizes of all files below `data.root`; None: data are computed."""
    root = OmegaConf.select(cfg, "data.root")
    if root is None or OmegaConf.select(cfg, "data.prepare") is not None:
        return None
    apart = (root, cfg.outputs, OmegaConf.select(cfg, "data.cache_dir"))  # which may be below it
    seen = {os.path.realpath(Path(str(place)).expanduser()) for place in apart}
    found, root = [], Path(str(root)).expanduser()
    for place, folders, names in os.walk(root, followlinks=True):
        real = {os.path.realpath(Path(place, one)): one for one in sorted(folders, reverse=True)}
        folders[:] = sorted(
            real[one] for one in real.keys() - seen if not real[one].startswith(".")
        )
        seen |= real.keys()  # links may lead in circles
        for path in (Path(place, name) for name in names if not name.startswith(".")):
            size = path.stat().st_size if path.exists() else None
            found.append([str(path.relative_to(root)), size])
    return digest_of(sorted(found))


def _place(cfg: DictConfig) -> Path:
    """The file of a plan. One of an earlier version stays: its runs are found with its steps."""
    folder = Path(str(cfg.outputs)).expanduser() / str(cfg.name) / ".budgets"
    old = folder / f"{_key(cfg, tuned=True)}.json"
    return old if old.exists() else folder / f"{_key(cfg)}.json"


def _key(cfg: DictConfig, *, tuned: bool = False) -> str:
    """Of a plan: of the data set and all that makes a run, without seed and fold.

    With the numbers of optimizer, schedule and loss where `tuned`; they cost no time.
    """
    config = plain(cfg)
    config["seed"] = config["data"]["seed"] = 0
    if not tuned:
        config |= {part: with_values(config[part], _without_number) for part in ("optim", "loss")}
    for part in (config["data"], config["data"].get("find_cases") or {}):
        part["fold"] = 0
    return identity(with_digests(config, {}), split="", data=data_name(config["data"]))


def _without_number(value: Any) -> Any:
    return 0 if isinstance(value, int | float) and not isinstance(value, bool) else value


def _measured(cfg: DictConfig, build: Callable[[DictConfig], Any]) -> tuple[float, float]:
    """Times a step and a validation, in seconds, in a short training without a run folder."""
    trial = copy.deepcopy(cfg)
    with TemporaryDirectory(prefix="mambaseg-budget-") as place, open_dict(trial):
        trial.data.update(minutes=None, steps=TRIAL, val_every=TRIAL)
        trial.update(outputs=place, run_dir=None, logger={}, test=False, rerun=False)
        trial.evaluation.update(keep_largest=False)  # chosen after the training, not within it
        trial.callbacks = {**(trial.get("callbacks") or {}), "progress": None, "rate": None}
        log.info("measuring a step and a validation for data.minutes=%g ...", cfg.data.minutes)
        logging.disable(logging.WARNING)
        try:
            with build(trial) as run:
                run.fit()
        finally:
            logging.disable(logging.NOTSET)
    return statistics.fmean(run.recorder.steps[TRIAL // 3 :]), max(run.recorder.validating, 1e-3)
