"""Sizes of images and of their pixels: one number for both axes, or rows and columns."""

from collections.abc import Sequence
from typing import Any

from mambaseg.data.validation import SPACING_MM
from mambaseg.errors import UserError

Size = int | Sequence[int]  # side of a square, or rows and columns, pixels


def is_spacing(value: Any) -> bool:
    """Whether a value is the side of a pixel in mm, or its height and width."""
    if isinstance(value, (list, tuple)):
        return (
            len(value) == 2
            and not any(isinstance(one, (list, tuple)) for one in value)
            and all(map(is_spacing, value))
        )
    low, high = SPACING_MM
    return isinstance(value, (int, float)) and low <= value <= high  # not so of nan


def sides_of(size: Size) -> tuple[int, int]:
    """Rows and columns of a `Size`; `UserError` where it is none."""
    sides = pair_of(size)
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise UserError(f"data.size={size}: give a positive number of pixels, or [rows, columns]")
    return sides


def pair_of(value: Any) -> tuple[Any, ...]:
    """Both of a pair; one value stands for two."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)


def shortest(pair: Sequence[Any]) -> Any:
    """One value for two equal ones, the way a square is written; otherwise both as a list."""
    return pair[0] if pair[0] == pair[1] else list(pair)


def plain_lists(value: Any) -> Any:
    """A value with lists in place of tuples."""
    return [plain_lists(one) for one in value] if isinstance(value, (list, tuple)) else value
