"""What makes a network fast: the layout of its weights, and on a GPU CUDA graphs."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mambaseg.models.stochastic import Dropout, Stochastic, kept_samples


def channels_last(network: nn.Module) -> nn.Module:
    """Lay the weights of convolutions out as cuDNN wants them: it then runs much faster."""
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs


def keep_layout(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Lay weights out as an interrupted training had them, so that it resumes bit by bit."""
    last = torch.channels_last
    if not any(
        one.ndim == 4 and one.is_contiguous(memory_format=last) and not one.is_contiguous()
        for one in weights.values()
    ):
        module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def is_faster_channels_last(network: nn.Module) -> bool:
    """Say whether `channels_last` pays on a CPU too: with batch norms, not with instance norms."""
    modules = list(network.modules())
    return any(isinstance(one, nn.BatchNorm2d) for one in modules) and not any(
        isinstance(one, nn.InstanceNorm2d | nn.GroupNorm) for one in modules
    )


class GraphedNetwork:
    """Replaces the training pass of a network by two CUDA graphs; evaluation stays as it was.

    On a fast GPU two thousand launches take longer than the kernels themselves. A graph is recorded
    once, for one shape of the batch, and launched as a whole; it computes with the same kernels.
    Recording runs the network a few times, then puts back running statistics and generator, also
    where it fails.

    Args:
        network: on a CUDA device, in training mode, without hooks.
        image: a batch (B, C, H, W); all batches must have its shape.
        layers: `stochastic_layers` of the network. What they drop is drawn before each launch, into
            memory that the graph reads.

    Raises:
        RuntimeError: the network cannot be recorded; it is as it was.
    """

    def __init__(self, network: nn.Module, image: Tensor, layers: Sequence[Stochastic]) -> None:
        # A graph that is destroyed clears the cuBLAS workspaces of the stream on which all are
        # recorded, also those that others use (pytorch#193402). A recorded network refers to
        # itself: an earlier one may still wait for its end, which has to come before this.
        gc.collect()
        self.network, self.layers = network, list(layers)
        device = image.device
        self._kept = torch.ones(len(image), len(self.layers), dtype=torch.bool, device=device)
        buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
        generator, stream = torch.cuda.get_rng_state(device), torch.cuda.current_stream(device)
        dtype = torch.get_autocast_dtype("cuda")
        # The weights' casts belong in the graph: they change with every step. And a cache of casts
        # may hold on to an autograd graph of another stream, which would end the recording.
        torch.clear_autocast_cache()
        enabled = torch.is_autocast_enabled("cuda")
        try:
            with (
                torch.autocast("cuda", dtype, enabled, cache_enabled=False),
                self._fixed(self._masks(image)),
            ):
                torch.cuda.make_graphed_callables(
                    network, (image.clone(),), allow_unused_input=True
                )
        finally:
            torch.cuda.set_stream(stream)  # a recording that fails stays on its own
            for buffer, before in buffers:
                buffer.copy_(before)
            torch.cuda.set_rng_state(generator, device)
        self._forward = network.forward

    def _masks(self, image: Tensor) -> list[Tensor | None]:
        """Memory for what each `Dropout` keeps; its shape shows in a pass of the network."""
        shapes: dict[nn.Module, Tensor] = {}
        handles = [
            layer.register_forward_pre_hook(lambda m, x: shapes.update({m: torch.ones_like(x[0])}))
            for layer in self.layers
            if isinstance(layer, Dropout)
        ]
        try:
            with torch.no_grad():
                self.network(image)
        finally:
            for handle in handles:
                handle.remove()
        self._kept_elements = [shapes.get(layer) for layer in self.layers]
        return self._kept_elements

    @contextmanager
    def _fixed(self, masks: Sequence[Tensor | None]) -> Iterator[None]:
        columns = self._kept.unbind(1)
        for layer, column, mask in zip(self.layers, columns, masks, strict=True):
            layer.kept, layer.mask = column, mask
        try:
            yield
        finally:
            for layer in self.layers:
                layer.kept = layer.mask = None

    @contextmanager
    def drawing(self, numbers: Tensor) -> Iterator[None]:
        """Draws what the next launch drops by (B, layers) int64, as `mambaseg.models.drawing`."""
        if self.layers:
            kept = kept_samples(self.layers, numbers)
            kept = kept.pin_memory() if self._kept.is_cuda else kept
            self._kept.copy_(kept, non_blocking=True)
        columns = numbers.unbind(1)
        for layer, mask, column in zip(self.layers, self._kept_elements, columns, strict=True):
            if mask is not None and isinstance(layer, Dropout):
                layer.draw(mask, column)
        yield

    @contextmanager
    def off(self) -> Iterator[None]:
        """Runs the network's own modules for a while, e.g. to see where a number went wrong."""
        del self.network.forward  # the instance's own are the graphs
        try:
            yield
        finally:
            self.network.forward = self._forward
