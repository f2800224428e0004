"""The training pass of networks by torch.compile; evaluation and checkpoints stay as they were."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


class Compiled:
    """Calls networks as torch.compile makes them, and as they are where it cannot."""

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        # not modules of their own: their parameters would have two names
        self._passes: dict[Any, Any] = {one: partial(self._first, one) for one in networks}

    def pass_of(self, function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        """A function of an image, compiled if it is one of the networks."""
        return self._passes.get(function, function)

    def _first(self, network: nn.Module, image: Tensor) -> Any:
        """The first pass, in which it is compiled."""
        compiled = torch.compile(network.forward, dynamic=False)
        buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
        try:
            output = compiled(image)
        except torch._dynamo.exc.TorchDynamoException as error:
            for buffer, before in buffers:
                buffer.copy_(before)
            del self._passes[network]
            log.warning("trainer.compile: %s cannot be compiled, so the training runs without (%s)",
                        type(network).__name__, str(error).strip().splitlines()[0])  # fmt: skip
            return network(image)
        self._passes[network] = compiled
        return output
