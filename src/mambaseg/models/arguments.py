"""What the arguments of networks must be; `app.networks.made` tells the user what is refused."""

import math
from collections.abc import Sequence


def require_counts(**values: int | Sequence[int]) -> None:
    """Raise `ValueError` unless every number, also in a list, is 1 or more."""
    for name, value in values.items():
        if min(value, default=1) < 1 if isinstance(value, Sequence) else value < 1:
            raise ValueError(f"model.{name}={value}: must be 1 or more")


def require_levels(least: int = 1, most: float = math.inf, /, **lists: Sequence[float]) -> None:
    """Raise `ValueError` unless lists are equally long, with a value per level."""
    lengths = {len(one) for one in lists.values()}
    if len(lengths) > 1 or not least <= min(lengths) <= most:
        got = ", ".join(f"model.{name}={list(one)}" for name, one in lists.items())
        wanted = "equally many" if len(lengths) > 1 else f"at least {least}"
        wanted = f"exactly {least}" if least == most else wanted
        raise ValueError(f"{got}: give one value per level, {wanted}")


def require_whole_heads(dim: int, heads: int) -> None:
    """Raise `ValueError` unless channels divide into attention heads."""
    if heads < 1 or dim % heads:
        raise ValueError(f"model.heads: {dim} channels do not divide into {heads} heads")
