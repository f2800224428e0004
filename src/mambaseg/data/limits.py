"""What a number may be: of the configuration, an operation or a learning method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from math import inf, isfinite
from numbers import Integral, Real
from typing import Any, NamedTuple


class Number(NamedTuple):
    """A finite number from `low` to `high`, greater than `above` and less than `below`.

    A `pair` is two such numbers, the lower one first.
    """

    low: float = -inf
    high: float = inf
    above: float = -inf
    below: float = inf
    whole: bool = False
    pair: bool = False

    def holds(self, value: Any) -> bool:
        """Whether a value is such a number."""
        numbers = value if self.pair else [value]
        if not isinstance(numbers, Sequence) or len(numbers) != 1 + self.pair:
            return False
        kind = Integral if self.whole else Real
        if not all(isinstance(one, kind) and not isinstance(one, bool) for one in numbers):
            return False
        within = (isfinite(one) and self.low <= one <= self.high for one in numbers)
        return all(within) and self.above < numbers[0] <= numbers[-1] < self.below

    def __str__(self) -> str:
        """What it is called in a message."""
        words = "two numbers" if self.pair else "a whole number" if self.whole else "a number"
        if self.above > -inf:
            words += f" above {self.above:g}"
        if self.low > -inf:
            words += f", {self.low:g} " + ("or more" if self.high == inf else f"to {self.high:.0f}")
        elif self.high < inf:
            words += f", {self.high:g} at most"
        if self.below < inf:
            words += f" and below {self.below:g}"
        return words + ", the lower one first" * self.pair


SHARE = Number(0, 1)
PART = Number(above=0, high=1)
AMOUNT = Number(0)
RANGE = Number(pair=True)
FACTORS = Number(above=0, pair=True)


def limited(default: Any, limits: Number) -> Any:
    """A field of a dataclass with limits."""
    return field(default=default, metadata={"limits": limits})
