"""The processes of a distributed training."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor


def several_processes() -> bool:
    """Whether more than one process trains."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def own_place() -> tuple[int, int]:
    """The rank of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if several_processes() else (0, 1)


def gathered(own: Any) -> list[Any]:
    """The values of all processes, in order of rank; every one has to call this."""
    ranks = [own]
    if several_processes():
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
    return ranks


def gathered_cases(own: Mapping[str, Any]) -> dict[str, Any]:
    """Case -> its content, of all ranks; a case that a sampler gave to two ranks counts once."""
    return {case: content for rank in gathered(dict(own)) for case, content in rank.items()}


def averaged(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes; every one has to call this."""
    if several_processes():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value
