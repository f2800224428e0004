"""What the numbers of an operation may be: said beside each field, held to when one is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, fields
from math import inf, isfinite
from numbers import Real
from typing import Any, NamedTuple

from mambaseg.errors import UserError


class Limits(NamedTuple):
    """Of a number, or of a pair in order: from `low` to `high`, and greater than `above`."""

    words: str
    low: float = -inf
    high: float = inf
    above: float = -inf
    pair: bool = False

    def holds(self, value: Any) -> bool:
        """Whether a value is within them."""
        numbers = value if self.pair else [value]
        if not isinstance(numbers, Sequence) or len(numbers) != 1 + self.pair:
            return False
        if not all(isinstance(one, Real) and not isinstance(one, bool) for one in numbers):
            return False
        within = (isfinite(one) and self.low <= one <= self.high for one in numbers)
        return all(within) and self.above < numbers[0] <= numbers[-1]


SHARE = Limits("a number from 0 to 1", 0, 1)
PART = Limits("a number above 0, at most 1", high=1, above=0)
AMOUNT = Limits("a number, 0 or more", 0)
RANGE = Limits("two numbers, the lower one first", pair=True)
FACTORS = Limits("two numbers above 0, the lower one first", above=0, pair=True)


def limited(default: Any, limits: Limits) -> Any:
    """A field of a dataclass with limits."""
    return field(default=default, metadata={"limits": limits})


def require_limits(operation: Any) -> None:
    """Raise `UserError` where a field of an operation is beyond its limits."""
    for one in fields(operation):
        limits, value = one.metadata.get("limits"), getattr(operation, one.name)
        if limits and not limits.holds(value):
            raise UserError(
                f"augmentation: {type(operation).__name__} has {one.name}={value}: "
                f"give {limits.words}"
            )
