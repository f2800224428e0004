"""Names for settings: what differs between configurations, in as few words as tell them apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

Setting = tuple[str, Mapping[str, Any]]  # network, flat configuration

_ABSENT = "–"
_OWN_ARGUMENTS = ("optim.", "loss.")  # keys of a class and what it takes, and of nothing else
_FOLLOW = (".scheduler.", ".find_cases.")  # in keys that mostly repeat the value of another one


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested plain data as `{"optim.optimizer.lr": 0.01}`; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(settings: Sequence[Setting]) -> dict[str, list[str]]:
    """What differs: key -> its value in each setting, `–` where a setting has no such key.

    Arguments of a network, or of a method, count only between settings of that one: that UNet has
    no window size is no news. What follows from other keys (a schedule's length from the number of
    steps) is left out where it always has the value of a key listed before.
    """
    found: dict[str, list[str]] = {}
    for key in sorted({key for _, flat in settings for key in flat}, key=_importance):
        values = [text_of(key, flat[key]) if key in flat else _ABSENT for _, flat in settings]
        again = any(part in key for part in _FOLLOW) and values in found.values()
        if any(_varying(key, settings, values)) and not again:
            found[key] = values
    return found


def _parting(values: Sequence[str]) -> tuple[int, ...]:
    """Which settings have the same value as which: the place of the first one that has it."""
    return tuple(map(values.index, values))


def _varying(key: str, settings: Sequence[Setting], values: Sequence[str]) -> list[bool]:
    """Of each setting, whether a key's value differs among those that share its owner."""
    owners = [_owner(key, setting) for setting in settings]
    own: dict[Any, set[str]] = defaultdict(set)
    for owner, value in zip(owners, values, strict=True):
        own[owner].add(value)
    return [len(own[owner]) > 1 for owner in owners]


def _owner(key: str, setting: Setting) -> Any:
    """The network or the method whose argument a key is; None: everyone's."""
    model, flat = setting
    if key.startswith("model."):
        return model
    return flat.get("method") if key.startswith("method.") else None


def labels(settings: Sequence[Setting]) -> list[str]:
    """A unique name for each setting: the network and what differs, `unet · AdamW lr=0.001`.

    Differences in keys that all have are always named, except for arguments of an optimizer or a
    loss that change only with its class (`unet · AdamW`, where the other one is SGD). Keys that
    only some have (`momentum` of one optimizer) are named only where they are needed to tell two
    settings apart.
    """
    different = differences(settings)
    classes = {
        (key.partition(".")[0], _parting(values))
        for key, values in different.items()
        if key.endswith("._target_") and key.startswith(_OWN_ARGUMENTS)
    }
    shared = [
        key
        for key, values in different.items()
        if _ABSENT not in values
        and (key.endswith("._target_") or (key.partition(".")[0], _parting(values)) not in classes)
    ]
    optional = [key for key in different if key not in shared]
    varying = {key: _varying(key, settings, values) for key, values in different.items()}
    while True:
        told = [
            {key: different[key][index] for key in shared if varying[key][index]}
            for index in range(len(settings))
        ]
        names = [_label(one, its, shared) for one, its in zip(settings, told, strict=True)]
        if not optional or len(set(names)) == len(names):
            return names
        shared.append(optional.pop(0))


def _label(setting: Setting, values: Mapping[str, str], keys: Sequence[str]) -> str:
    """The network with these values of it; `keys` are those that any label names."""
    model, flat = setting
    words = []
    for key, value in values.items():
        if value != _ABSENT:
            short = _short(key, keys)
            named = short in ("_target_", "method")
            words.append(value if named else f"{short}={value}")
    if "checkpoint" in flat and not any(word.startswith("checkpoint=") for word in words):
        words.append(f"checkpoint={text_of('checkpoint', flat['checkpoint'])}")
    return f"{model} · {' '.join(words)}" if words else model


def _short(key: str, keys: Sequence[str]) -> str:
    """The last part of a dotted key, more of it where another key ends alike."""
    parts = key.split(".")
    alike = [other for other in keys if other.split(".")[-1] == parts[-1]]
    return parts[-1] if len(alike) == 1 or parts[-1] == "_target_" else ".".join(parts[-2:])


def _importance(key: str) -> tuple[int, int, str]:
    """Method and network, then which object, then how it is set; schedules, which follow, last."""
    groups = ("method", "model", "optim", "loss", "data", "trainer", "evaluation")
    head = key.split(".", 1)[0]
    place = groups.index(head) if head in groups and ".scheduler" not in key else len(groups)
    return (place, 0 if key.endswith("_target_") else 1, key)


def text_of(key: str, value: Any) -> str:
    """A setting's value in few words: of a class its name, of a path its last part."""
    if key.endswith("_target_"):
        return str(value).rsplit(".", 1)[-1]
    if key in ("checkpoint", "init_from"):  # .../<run folder>/checkpoints/best.ckpt
        parts = [part for part in str(value).split("/") if part and part != "checkpoints"]
        return "/".join(parts[-2:])
    if isinstance(value, str) and "/" in value:
        return value.rstrip("/").rsplit("/", 1)[-1]  # a file's folder means nothing elsewhere
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).replace(" ", "")
