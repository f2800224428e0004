"""What a value of the configuration may be: in words for a message, and as a function."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Attributes:
        words: what is allowed, to follow "must be".
        take: value -> the value as the run has it; ValueError: it is of another kind.
        text: whether it is text, so that a command line gives it as typed: 2024, a=b.
    """

    words: str
    take: Callable[[Any], Any]
    text: bool = False


def whole(low: int, high: int | None = None) -> Kind:
    """A whole number from `low` on, up to `high`."""

    def take(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError
        if value < low or (high is not None and value > high):
            raise ValueError
        return value

    return Kind(f"a whole number, {low} {'or more' if high is None else f'to {high}'}", take)


def number(low: float | None = None, *, above: float | None = None) -> Kind:
    """A finite number, not below `low`, or greater than `above`."""

    def take(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError
        if not math.isfinite(value) or (low is not None and value < low):
            raise ValueError
        if above is not None and value <= above:
            raise ValueError
        return float(value)

    bound = "" if low is None else f", {low:g} or more"
    return Kind(f"a number{bound}{'' if above is None else f' above {above:g}'}", take)


def choice(*options: Any, **spellings: Any) -> Kind:
    """One of `options`; `spellings` are other ways to write one: `choice("a", b="a")`."""

    def take(value: Any) -> Any:
        for option in options:
            if type(option) is type(value) and option == value:
                return option
        return spellings[str(value)] if str(value) in spellings else _refuse()

    return Kind("one of " + ", ".join(shown(option) for option in options), take)


def _refuse() -> Any:
    raise ValueError


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError
    return str(value)


def _named(value: Any) -> str:
    return _text(value) if value != "" else _refuse()


def text(words: str = "text") -> Kind:
    """Any text but an empty one; numbers are taken as text."""
    return Kind(words, _named, text=True)


def listed(kind: Kind) -> Kind:
    """A list of values of a kind."""

    def take(value: Any) -> list[Any]:
        return [kind.take(item) for item in value] if isinstance(value, list) else _refuse()

    return Kind(f"a list in brackets, each {kind.words}", take, text=kind.text)


def maybe(kind: Kind) -> Kind:
    """A value of a kind, or null."""

    def take(value: Any) -> Any:
        return None if value is None else kind.take(value)

    return Kind(f"{kind.words}, or null", take, text=kind.text)


def either(*kinds: Kind) -> Kind:
    """A value of any of the kinds; the first that takes it counts."""

    def take(value: Any) -> Any:
        for kind in kinds:
            try:
                return kind.take(value)
            except ValueError:
                continue
        return _refuse()

    return Kind(" or ".join(kind.words for kind in kinds), take)


def instead(remedy: str) -> Kind:
    """Nothing: the value follows from elsewhere."""
    return Kind(f"left out; {remedy}", lambda value: _refuse())


def shown(value: Any) -> str:
    """A value as it is typed."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


flag = choice(True, False)
anything = Kind("anything", lambda value: value)
