"""What stands beside a `_target_`: does the target take it?"""

from __future__ import annotations

import difflib
import inspect
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from hydra._internal.utils import _locate

from mambaseg.app.kinds import shown
from mambaseg.app.schema import EXTRAS, TABLE
from mambaseg.errors import UserError

_HYDRAS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")
_BY_READER = ("masks", "patient_pattern")  # of EXTRAS: read where `find_cases` refers to them
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

MOVED = {
    "mambaseg.losses": "mambaseg.training.losses",
    "mambaseg.callbacks": "mambaseg.training.callbacks",
    "mambaseg.checkpoints": "mambaseg.training.checkpoints",
    "mambaseg.nonfinite": "mambaseg.training.nonfinite",
    "mambaseg.loggers": "mambaseg.training.loggers",
    "mambaseg.jobs": "mambaseg.app.jobs",
    "mambaseg.launching": "mambaseg.app.launching",
    "mambaseg.data.augment": "mambaseg.data.augmentation",
    "mambaseg.data.restoration": "mambaseg.restoration.data",
    "mambaseg.data.pairs": "mambaseg.restoration.pairs",
    "mambaseg.data.haze_phantom": "mambaseg.restoration.phantom",
    "mambaseg.data.phantoms.haze_phantom": "mambaseg.restoration.phantom",
}
"""Modules that configs of earlier versions name, and where these are now."""


def moved(path: str) -> str:
    """A dotted path as it is now."""
    module, dot, name = path.rpartition(".")
    return f"{MOVED.get(module, module)}{dot}{name}"


def check_target(key: str, node: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Compares the keys beside a `_target_`, and their values, with what the target takes.

    Args:
        key: of the mapping.
        node: the mapping as it is written.
        values: the same with its interpolations resolved.

    Raises:
        UserError: the target cannot be imported, takes no such argument or no such value, or needs
            one that is missing.
    """
    target = import_target(key, values["_target_"])
    takes, anything = _arguments(target)
    extras = _extras(key, node, target)
    arguments = [name for name in node if name not in (*_HYDRAS, *extras)]
    what = getattr(target, "__name__", str(target))
    if not anything:
        for name in arguments:
            if name not in takes:
                known = {f"{key}.{other}" for other in (*takes, *extras)}
                near = did_you_mean(f"{key}.{name}", known) or f": {what} takes {', '.join(takes)}"
                raise UserError(f"there is no {key}.{name}{near}")
    hints = _hints(target)
    for name in arguments:
        if f"{key}.{name}" in TABLE or (name in takes and values[name] == takes[name].default):
            continue
        if not fits(values[name], hints.get(name, Any)):
            expected = inspect.formatannotation(hints[name]).replace("typing.", "")
            raise UserError(f"{key}.{name}={shown(values[name])}: {what} takes {expected}")
    if not node.get("_partial_") and "_args_" not in node:
        for one in takes.values():
            given = one.name in node or f"{key}.{one.name}" in TABLE  # which `build` may set
            if one.default is inspect.Parameter.empty and not given:
                raise UserError(f"{key}.{one.name} is missing: {what} needs it")


def import_target(key: str, path: Any) -> Any:
    """What a `_target_` names.

    Raises:
        UserError: it cannot be imported; where it has moved, with its new place.
    """
    try:
        return _locate(path)  # `get_object` would log the error too
    except Exception as error:  # whatever the user's own module raises when it is imported
        reason = str(error.__cause__ or error).splitlines()
        said = reason[0] if reason else type(error).__name__
        if moved(str(path)) != path:
            said = f"it is {moved(path)} now"
        raise UserError(f"{key}._target_={path} cannot be imported: {said}") from error


def _arguments(target: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    """The arguments that have names, and whether any other is taken too.

    A class that hands on its `**rest` takes what the class above it takes.
    """
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
        unread = [name for name in _BY_READER if f"${{data.{name}}}" not in str(node)]
        return tuple(name for name in extras if name not in unread)
    if key == "model" and not hasattr(target, "load_pretrained_encoder"):
        if node.get("pretrained"):
            name = node.get("name")
            raise UserError(f"model.pretrained: {name} has no pretrained encoder; leave it null")
        return tuple(name for name in extras if name != "mirror_encoder")
    return extras


def _hints(target: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # annotations may be anything, and name what is not there
        return {}


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value can be what an annotation says; what it leaves open can."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in inner)
    if origin is typing.Literal:
        return any(type(value) is type(option) and value == option for option in inner)
    if isinstance(value, dict) or (isinstance(value, str) and "${" in value):
        return True  # an object of another target, or of a resolver
    if hint in (bool, str, type(None)):
        return isinstance(value, hint)
    if hint in (int, float):
        number = (int,) if hint is int else (int, float)
        return isinstance(value, number) and not isinstance(value, bool)
    kind = origin or hint
    if kind in (list, tuple, set, Sequence, Iterable, Collection):
        return isinstance(value, list) and _items_fit(value, kind, inner)
    if isinstance(value, str) and inspect.isclass(kind):  # a path, a callable: not for us to say
        return kind.__module__ != "torch" or kind is object
    return True


def _items_fit(value: list[Any], kind: Any, inner: tuple[Any, ...]) -> bool:
    if kind is tuple and inner and inner[-1] is not Ellipsis:
        return len(value) == len(inner) and all(map(fits, value, inner))
    return not inner or all(fits(item, inner[0]) for item in value)


def did_you_mean(key: str, known: Collection[str]) -> str:
    """`; did you mean ...?` for the known key that is most like this one; else an empty text."""
    last = key.rpartition(".")[2]
    known = [other for other in known if not key.startswith(f"{other}.")]
    namesakes = sorted(other for other in known if other.rpartition(".")[2] == last)
    near = difflib.get_close_matches(key, namesakes, 1, 0) or difflib.get_close_matches(
        key, sorted(known), 1, 0.7
    )
    return f"; did you mean {near[0]}?" if near else ""
