"""Whole cases through a network in batches of slices, and back to native geometry."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mambaseg.data.geometry import Preprocessing
from mambaseg.errors import UserError

Labels = TypeVar("Labels", Tensor, npt.NDArray[np.uint8])
VIEWS = tuple((turns, mirrored) for mirrored in (False, True) for turns in range(4))
"""The symmetries of a square: quarter turns, and whether it is mirrored before."""


def choose_precision(name: str, *, gpu: bool) -> str:
    """A precision by its name; `auto` follows the device.

    Raises:
        UserError: it has another name.
    """
    if name == "auto":
        bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16-mixed" if bf16 else "32-true"
    if name not in ("32-true", "bf16-mixed"):
        raise UserError(f"precision={name}: choose auto, 32-true or bf16-mixed")
    return name


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


class Member(NamedTuple):
    """One network of an ensemble.

    Attributes:
        network: (B, C, S, S) -> logits (B, K, S, S).
        preprocessing: the one that it was trained with.
    """

    network: nn.Module
    preprocessing: Preprocessing


class Segmentation(NamedTuple):
    """What networks say about one volume.

    Attributes:
        labels: (Z, H, W) uint8 at native resolution, on the networks' device.
        probabilities: (Z, K, H, W) uint8 on the CPU, 255 is 1; None unless asked for.
    """

    labels: Tensor
    probabilities: Tensor | None


def predict_case(
    network: nn.Module,
    image: Tensor,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 24,
) -> Tensor:
    """Segment one case with one network: the labels that `segment` gives.

    Args:
        network: (B, C, S, S) -> logits (B, K, S, S). Its training mode is left as found.
        image: (Z, C, H, W) float32, intensity-scaled, native resolution, on any device.
        preprocessing: the one the network was trained with.
        batch_size: slices per forward pass.

    Returns:
        Labels (Z, H, W) uint8 at native resolution, on the network's device.
    """
    return segment([Member(network, preprocessing)], [image], batch_size=batch_size).labels


def segment(
    members: Sequence[Member],
    images: Sequence[Tensor],
    *,
    shape: tuple[int, int] | None = None,
    tta: bool = False,
    probabilities: bool = False,
    batch_size: int = 24,
) -> Segmentation:
    """Segment one volume with one or more networks.

    One network in one view decides by its logits. Otherwise the class probabilities at native
    resolution are averaged over networks and views, and the most probable class is taken.

    Memory is bounded by the batch: only labels outlive it, and probabilities where they are asked
    for. Autocast is the caller's to choose; logits are float32 by the time they are resampled.

    Args:
        members: networks of the same classes, on one device. Training modes are left as found.
        images: the volume for each member, (Z, C, H, W) float32, scaled by its preprocessing.
        shape: native height and width, where images were reduced; None for those of the images.
        tta: whether every slice is seen in the eight `VIEWS` of a square rather than in one.
        probabilities: whether to return them.
        batch_size: slices per forward pass.
    """
    shape = shape or (images[0].shape[-2], images[0].shape[-1])
    views = VIEWS if tta else VIEWS[:1]
    decided = len(members) * len(views) == 1  # by logits
    labels, kept = [], []
    with ExitStack() as stack:
        for member in members:
            stack.enter_context(evaluating(member.network))
        stack.enter_context(torch.inference_mode())
        for start in range(0, len(images[0]), batch_size):
            total: Tensor | float = 0.0
            for member, image in zip(members, images, strict=True):
                for logits in _logits(member, image[start : start + batch_size], views):
                    if decided:
                        labels.append(member.preprocessing.labels_to_native(logits, shape))
                    if probabilities or not decided:
                        native = member.preprocessing.logits_to_native(logits, shape)
                        total = total + native.softmax(dim=1)
            if isinstance(total, Tensor):
                total /= len(members) * len(views)
                if not decided:
                    labels.append(total.argmax(dim=1).to(torch.uint8))
                if probabilities:
                    kept.append((255 * total).round().to(torch.uint8).cpu())
    # outside inference mode: ordinary tensors
    return Segmentation(torch.cat(labels), torch.cat(kept) if kept else None)


def _logits(member: Member, slices: Tensor, views: Sequence[tuple[int, bool]]) -> Iterator[Tensor]:
    """Logits (B, K, S, S) in float32 of native slices (B, C, H, W), one per view, turned back."""
    parameter = next(member.network.parameters(), None)
    like = slices if parameter is None else parameter
    grid = member.preprocessing.to_grid(slices.to(like.device)).to(like.dtype)
    for turns, mirrored in views:
        seen = (grid.flip(-1) if mirrored else grid).rot90(turns, (-2, -1))
        logits = member.network(seen).float().rot90(-turns, (-2, -1))
        yield logits.flip(-1) if mirrored else logits


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
