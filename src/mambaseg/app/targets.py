"""The keys beside a `_target_`: does the target take them?"""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from hydra._internal.utils import _locate

from mambaseg.app.own import code_remedy, find_code
from mambaseg.app.schema import AUTO, EXTRAS, PLANNED, TABLE, did_you_mean, shown
from mambaseg.errors import NotInstalledError, UserError

_HYDRAS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")
_BY_READER = ("longest_side", "masks", "patient_pattern")  # read where `find_cases` names them
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

MOVED = {
    "mambaseg.losses": "mambaseg.training.losses",
    "mambaseg.callbacks": "mambaseg.training.callbacks",
    "mambaseg.callbacks.ProgressBar": "mambaseg.training.progress.ProgressBar",
    "mambaseg.training.callbacks.ProgressBar": "mambaseg.training.progress.ProgressBar",
    "mambaseg.checkpoints": "mambaseg.training.checkpoints",
    "mambaseg.nonfinite": "mambaseg.training.nonfinite",
    "mambaseg.loggers": "mambaseg.training.loggers",
    "mambaseg.loggers.wandb_logger": "mambaseg.training.wandb_logger.wandb_logger",
    "mambaseg.training.loggers.wandb_logger": "mambaseg.training.wandb_logger.wandb_logger",
    "mambaseg.data.augment": "mambaseg.data.augmentation",
    "mambaseg.data.restoration": "mambaseg.restoration.data",
    "mambaseg.data.pairs": "mambaseg.restoration.pairs",
    "mambaseg.data.haze_phantom": "mambaseg.restoration.phantom",
    "mambaseg.data.phantoms.haze_phantom": "mambaseg.restoration.phantom",
    "hydra/launcher=jobs": "hydra/launcher=joblib",
    "hydra/launcher=gpus": "hydra/launcher=ray",
    "hydra/launcher=slurm": "hydra/launcher=submitit_slurm",
    "hydra/launcher=slurm_local": "hydra/launcher=submitit_local",
}
"""Modules of targets, overrides and keys of earlier versions, and what they are called now."""


def check_target(key: str, node: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Compares the keys beside a `_target_`, and their `values`, with what the target takes."""
    target = import_target(key, values["_target_"])
    takes, anything = arguments_of(target)
    extras = _extras(key, node, target)
    what = getattr(target, "__name__", str(target))
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # annotations may be anything, and name what is not there
        hints = {}
    if key == "data" and "find_cases" in node:
        takes = {name: one for name, one in takes.items() if name not in _unread(node)}
    for name in node:
        if name in (*_HYDRAS, *extras):
            continue
        if name not in takes and not anything:
            known = {f"{key}.{other}" for other in (*takes, *extras)}
            near = did_you_mean(f"{key}.{name}", known) or f": {what} takes {', '.join(takes)}"
            raise UserError(f"there is no {key}.{name}{near}")
        value, whole = values[name], f"{key}.{name}"
        said = whole in TABLE or (name in takes and value == takes[name].default)
        planned = value == AUTO and whole in PLANNED
        if not (said or planned or fits(value, hints.get(name))):
            expected = inspect.formatannotation(hints[name]).replace("typing.", "")
            raise UserError(f"{key}.{name}={shown(value)}: {what} takes {expected}")
    if not node.get("_partial_") and "_args_" not in node:
        for one in takes.values():
            given = one.name in node or f"{key}.{one.name}" in TABLE  # which `build` may set
            if one.default is inspect.Parameter.empty and not given:
                raise UserError(f"{key}.{one.name} is missing: {what} needs it")


def import_target(key: str, path: Any) -> Any:
    """What a `_target_` names; UserError: it cannot be imported, or has moved."""
    find_code(str(path))
    try:
        return _locate(path)  # `get_object` would log the error too
    except Exception as error:  # whatever the user's own module raises when it is imported
        if isinstance(missing := error.__cause__ or error, NotInstalledError):
            raise missing from None
        reason = str(error.__cause__ or error).splitlines() or [type(error).__name__]
        module, _, name = str(path).rpartition(".")
        now = MOVED.get(str(path)) or (f"{MOVED[module]}.{name}" if module in MOVED else None)
        said = f"it is {now} now" if now else reason[0] + code_remedy(str(path))
        raise UserError(f"{key}._target_={path} cannot be imported: {said}") from error


def arguments_of(target: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    """The arguments that have names, of base classes too (`**rest`), and whether it takes any."""
    takes: dict[str, inspect.Parameter] = {}
    makers = [target]
    if inspect.isclass(target):
        classes = target.__mro__[:-1]
        makers = [vars(one)["__init__"] for one in classes if "__init__" in vars(one)] or [object]
    for maker in makers:
        try:
            parameters = list(inspect.signature(maker).parameters.values())
        except (TypeError, ValueError):
            return takes, True
        named = [one for one in parameters if one.kind in _NAMED]
        takes = {one.name: one for one in named[inspect.isclass(target) :]} | takes  # but self
        if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters):
            return takes, False
    return takes, True


def _extras(key: str, node: Mapping[str, Any], target: Any) -> tuple[str, ...]:
    """Keys beside this target that others read: `build`, `networks`, or its reader by `${...}`."""
    extras = EXTRAS.get(key, ())
    if key == "data":
        return tuple(name for name in extras if name not in _unread(node))
    if key == "model" and not hasattr(target, "load_pretrained_encoder"):
        if node.get("pretrained"):
            name = node.get("name")
            raise UserError(f"model.pretrained: {name} has no pretrained encoder; leave it null")
        return tuple(name for name in extras if name != "mirror_encoder")
    return extras


def _unread(data: Mapping[str, Any]) -> list[str]:
    """Keys that the reader of this data set does not take."""
    return [name for name in _BY_READER if f"${{data.{name}}}" not in str(data)]


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value can be what an annotation says; what it leaves open can."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is None or isinstance(value, dict) or (isinstance(value, str) and "${" in value):
        return True  # not said; an object of another target, or of a resolver
    if origin in (typing.Union, types.UnionType):
        return any(value is None if one is type(None) else fits(value, one) for one in inner)
    if origin is typing.Literal:
        return any(type(value) is type(option) and value == option for option in inner)
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint in (int, float):
        number = int if hint is int else int | float
        return isinstance(value, number) and type(value) is not bool and math.isfinite(value)
    kind = origin or hint
    if kind in (list, tuple, set, Sequence, Iterable, Collection):
        if not isinstance(value, list):
            return False
        if kind is tuple and inner and inner[-1] is not Ellipsis:
            return len(value) == len(inner) and all(map(fits, value, inner))
        return not inner or all(fits(item, inner[0]) for item in value)
    if isinstance(value, str) and inspect.isclass(kind):  # a path, a callable: not for us to say
        return kind.__module__ != "torch" or kind is object
    return True
