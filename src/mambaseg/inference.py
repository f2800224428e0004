"""Whole cases through a network in batches of slices, and back to native geometry."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mambaseg.data.geometry import Preprocessing

Labels = TypeVar("Labels", Tensor, npt.NDArray[np.uint8])


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module is in the mode it was in before."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def predict_case(
    network: nn.Module,
    image: Tensor,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 24,
) -> Tensor:
    """Segment one case.

    Memory is bounded by the batch: only labels outlive it. Autocast is the caller's to choose;
    logits are float32 by the time they are resampled.

    Args:
        network: (B, 1, S, S) -> logits (B, K, S, S). Its training mode is left as found.
        image: (Z, H, W) float32, intensity-scaled, native resolution, on any device.
        preprocessing: the one the network was trained with.
        batch_size: slices per forward pass.

    Returns:
        Labels (Z, H, W) uint8 at native resolution, on the network's device.
    """
    parameter = next(network.parameters(), None)
    like = image if parameter is None else parameter
    shape = (image.shape[-2], image.shape[-1])
    labels = []
    with evaluating(network), torch.inference_mode():
        for slices in image.split(batch_size):
            logits = network(preprocessing.to_grid(slices.to(like.device)).to(like.dtype))
            labels.append(preprocessing.labels_to_native(logits.float(), shape))
    return torch.cat(labels)  # outside inference mode: an ordinary tensor


def keep_largest_component(labels: Labels, num_classes: int) -> Labels:
    """Each class reduced to its largest connected component in 3-D; the rest becomes background.

    Voxels are connected through their six faces. Of equally large components the first in raster
    order stays. Holes are not filled.

    Args:
        labels: (Z, H, W) uint8, an array or a tensor on any device; left unchanged.
        num_classes: K; classes 1..K-1 are looked at.

    Returns:
        A new volume of the same kind, shape, dtype and device.
    """
    if isinstance(labels, Tensor):
        kept = keep_largest_component(labels.cpu().numpy(), num_classes)
        return torch.from_numpy(kept).to(labels.device)

    from scipy.ndimage import label as connected_components

    result = labels.copy()
    for index in range(1, num_classes):
        components, count = connected_components(labels == index)
        if count > 1:
            sizes = np.bincount(components.ravel())[1:]  # without what is not this class
            result[(components > 0) & (components != 1 + int(sizes.argmax()))] = 0
    return result
