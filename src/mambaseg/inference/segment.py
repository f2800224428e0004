"""Whole cases through a network in batches of slices, and back to native geometry."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mambaseg.data.geometry import Pixel, Preprocessing
from mambaseg.errors import UserError

VIEWS: dict[str, tuple[tuple[int, bool], ...]] = {
    "none": ((0, False),),
    "flips": ((0, False), (0, True), (2, False), (2, True)),
    "rot90": tuple((turns, False) for turns in range(4)),
    "all": tuple((turns, mirrored) for mirrored in (False, True) for turns in range(4)),
}
"""Names of test-time augmentations: quarter turns, and whether the image is mirrored before."""
_LEARNT = {"none": "none", "modern": "flips", "paper": "all"}
"""What checkpoints of earlier versions call their augmentation -> its views."""
log = logging.getLogger(__name__)
OVERLAP = 0.5  # of neighbouring windows on an image that is larger than the grid


def choose_precision(name: str, *, gpu: bool) -> str:
    """A precision by its name; two names follow the device.

    `auto` is bf16-mixed on a GPU that computes in bfloat16, and 32-true elsewhere; `bf16-native` is
    bf16-mixed on a CPU that does, too.

    Raises:
        UserError: it has another name.
    """
    if name in ("auto", "bf16-native"):
        if gpu:
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            bf16 = name == "bf16-native" and cpu_has_bf16()
        return "bf16-mixed" if bf16 else "32-true"
    if name not in ("32-true", "bf16-mixed"):
        raise UserError(f"precision={name}: choose auto, 32-true, bf16-mixed or bf16-native")
    return name


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16: AVX512-BF16, AMX, or the same of ARM."""
    import llvmlite.binding  # type: ignore[import-untyped]  # ships no types; comes with numba

    host = llvmlite.binding.get_host_cpu_features()
    return any(host.get(name) for name in ("avx512bf16", "amx-bf16", "bf16"))


def learnt_views(about: Mapping[str, Any], sides: tuple[int, int]) -> str | None:
    """The views that the training of a checkpoint has made alike; None: it does not record them.

    On a grid of unequal `sides` a training turns the image before it is brought there, and never
    shows what prediction would see: a turned grid.
    """
    views = about.get("views") or _LEARNT.get(str(about.get("augmentation")), "none")
    recorded = about.get("views") or about.get("augmentation")
    if sides[0] != sides[1]:
        views = {"all": "flips", "rot90": "none"}.get(views, views)
    return (views if views in VIEWS else "none") if recorded else None


def choose_views(tta: bool | str, learnt: str | None, network: str) -> str:
    """The name of the views in which a network sees each slice.

    A network that was trained without flips may tell classes apart by their side: in a mirrored
    view it exchanges left and right.

    Args:
        tta: a name of `VIEWS`; `True` follows the training, `False` is `none`.
        learnt: the views that training has made alike to the network; None: it is not known.
        network: what messages call it.

    Raises:
        UserError: there is no such name, or the training is to be followed and is not known.
    """
    name = "none" if tta is False else tta
    if name is True:
        if learnt is None:
            raise UserError(
                f"tta=true: {network} does not record the augmentation of its training, so the "
                "views that fit are unknown. Choose tta=flips, rot90 or all; if it was trained "
                "without flips, choose none: left and right classes could be exchanged"
            )
        if learnt == "none":
            log.warning(
                "tta=true: %s was trained without flips or rotations by 90 degrees: each "
                "slice is seen once, as it is",
                network,
            )
        return learnt
    if not isinstance(name, str) or name not in VIEWS:
        raise UserError(f"tta={tta}: choose true, {', '.join(VIEWS)} or false")
    if learnt is not None and (unknown := set(VIEWS[name]) - set(VIEWS[learnt])):
        risk = "they can be labelled worse"
        if learnt == "none":
            risk = "classes that differ by their side can be exchanged"
        log.warning(
            "tta=%s: %s has not learnt from %d of these %d views: %s",
            name,
            network,
            len(unknown),
            len(VIEWS[name]),
            risk,
        )
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
    """One network of an ensemble."""

    network: nn.Module  # (B, C, S, T) -> logits (B, K, S, T)
    preprocessing: Preprocessing  # that it was trained with
    views: str = "none"  # name in `VIEWS` of those in which it sees every slice
    temperature: float = 1.0  # that its logits are divided by before they become probabilities


class Segmentation(NamedTuple):
    """What networks say about one volume; the last two on the CPU, and None unless asked for."""

    labels: Tensor  # (Z, H, W) uint8 at native resolution, on the networks' device
    probabilities: Tensor | None  # (Z, K, H, W) uint8, 255 is 1
    uncertainty: Tensor | None = None  # `normalised_entropy` (Z, H, W) uint8, 255 is 1


def predict_case(
    network: nn.Module,
    image: Tensor,
    preprocessing: Preprocessing,
    *,
    spacing: tuple[float, float, float] | None = None,
    batch_size: int = 24,
    views: str = "none",
) -> Tensor:
    """The labels that `segment` gives of one image (Z, C, H, W) and one network."""
    members = [Member(network, preprocessing, views)]
    return segment(members, [image], spacing=spacing, batch_size=batch_size).labels


def segment(
    members: Sequence[Member],
    images: Sequence[Tensor],
    *,
    shape: tuple[int, int] | None = None,
    spacing: tuple[float, float, float] | None = None,
    probabilities: bool = False,
    uncertainty: bool = False,
    batch_size: int = 24,
) -> Segmentation:
    """Segment one volume with one or more networks.

    One network in one view decides by its logits. Otherwise the class probabilities at native
    resolution are averaged over each network's views and then over the networks, and the most
    probable class is taken.

    Slices that are larger than a network's grid are seen through windows of its size, which overlap
    by half; the logits of a pixel are averaged over them, Gaussian weights favouring a window's
    middle (MONAI's `sliding_window_inference`). Smaller ones are seen at once.

    Memory is bounded by the batch: only labels outlive it, and what else is asked for. Autocast is
    the caller's to choose; logits are float32 by the time they are resampled.

    Args:
        members: networks of the same classes, on one device. Training modes are left as found.
        images: the volume for each member, (Z, C, H, W) float32, scaled by its preprocessing.
        shape: native height and width, where images were reduced; None for those of the images.
        spacing: voxel size in mm (z, y, x), None where it is unknown.
        probabilities: whether to return them.
        uncertainty: whether to return it.
        batch_size: slices (or windows on them) per forward pass.

    Raises:
        UserError: a preprocessing needs to know the voxel size.
    """
    pixel = None if spacing is None else (spacing[1], spacing[2])
    shape = shape or _sides(images[0])
    decided = sum(len(VIEWS[member.views]) for member in members) == 1  # by logits
    labels: list[Tensor] = []
    entropies: list[Tensor] = []
    kept: npt.NDArray[np.uint8] | None = None
    with ExitStack() as stack:
        for member in members:
            stack.enter_context(evaluating(member.network))
        stack.enter_context(torch.inference_mode())
        windows = max(
            _windows(member.preprocessing, _sides(image), pixel)
            for member, image in zip(members, images, strict=True)
        )
        count = max(1, batch_size // windows)  # slices that are on their way at the same time
        for start in range(0, len(images[0]), count):
            total: Tensor | float = 0.0
            for member, image in zip(members, images, strict=True):
                preprocessing, seen = member.preprocessing, _sides(image)
                share = len(members) * len(VIEWS[member.views])
                slices = preprocessing.stacked(image, start, min(start + count, len(image)))
                for logits in _logits(member, slices, pixel, batch_size):
                    back = (logits, shape, pixel)
                    if decided:
                        labels.append(preprocessing.labels_to_native(*back, seen=seen))
                    if probabilities or uncertainty or not decided:
                        native = preprocessing.logits_to_native(*back, seen=seen)
                        if member.temperature != 1:
                            native = native / member.temperature
                        total = total + native.softmax(dim=1) / share
            if isinstance(total, Tensor):
                if not decided:
                    labels.append(total.argmax(dim=1).to(torch.uint8))
                if uncertainty:
                    entropies.append(_bytes(normalised_entropy(total)))
                if probabilities:
                    if kept is None:  # once as a whole: it may fill half the memory
                        kept = np.empty((len(images[0]), *total.shape[1:]), np.uint8)
                    kept[start : start + count] = _bytes(total).numpy()
    # outside inference mode: ordinary tensors
    return Segmentation(
        torch.cat(labels),
        None if kept is None else torch.from_numpy(kept),
        torch.cat(entropies) if entropies else None,
    )


def native_logits(
    member: Member,
    image: Tensor,
    *,
    spacing: tuple[float, float, float] | None = None,
    batch_size: int = 24,
) -> Iterator[Tensor]:
    """Logits (B, K, H, W) at native resolution by which a network decides in one view.

    `image` is the whole case as `segment` takes it; the batches are of consecutive slices.
    """
    pixel = None if spacing is None else (spacing[1], spacing[2])
    once = member._replace(views="none")
    count = max(1, batch_size // _windows(member.preprocessing, _sides(image), pixel))
    with evaluating(member.network), torch.inference_mode():
        for start in range(0, len(image), count):
            stop = min(start + count, len(image))
            slices = member.preprocessing.stacked(image, start, stop)
            for logits in _logits(once, slices, pixel, batch_size):
                yield member.preprocessing.logits_to_native(logits, _sides(image), pixel)


def normalised_entropy(probabilities: Tensor) -> Tensor:
    """Entropy of class probabilities (B, K, ...) over its largest value, ln K: (B, ...) in [0, 1].

    0: one class is certain; 1: all classes are equally probable.
    """
    entropy = torch.special.entr(probabilities).sum(dim=1)
    return (entropy / math.log(probabilities.shape[1])).clamp(0, 1)


def case_uncertainty(uncertainty: Tensor, labels: Tensor) -> float | None:
    """Mean uncertainty of the voxels that are labelled as foreground, in [0, 1]; None: no such.

    Both as `segment` returns them.
    """
    inside = uncertainty[labels.to(uncertainty.device) > 0]
    return float(inside.double().mean() / 255) if len(inside) else None


def _bytes(shares: Tensor) -> Tensor:
    """Numbers in [0, 1] as uint8 on the CPU, 255 is 1."""
    return (255 * shares).round().to(torch.uint8).cpu()


def _sides(image: Tensor) -> tuple[int, int]:
    return image.shape[-2], image.shape[-1]


def passes(
    preprocessing: Preprocessing, image: Tensor, spacing: tuple[float, float, float] | None,
    views: str,
) -> int:  # fmt: skip
    """How often a network sees each slice of an image (Z, C, H, W): windows times views."""
    pixel = None if spacing is None else (spacing[1], spacing[2])
    return _windows(preprocessing, _sides(image), pixel) * len(VIEWS[views])


def _windows(preprocessing: Preprocessing, shape: tuple[int, int], pixel: Pixel | None) -> int:
    """How many windows see a slice; one where it is not larger than the grid."""
    if not preprocessing.windowed:
        return 1
    extent = preprocessing.resampled(shape, pixel).extent
    return math.prod(
        1 + math.ceil((side - window) / max(1, int(window * (1 - OVERLAP))))
        for side, window in zip(extent, preprocessing.sides, strict=True)
    )


def _logits(
    member: Member, slices: Tensor, pixel: Pixel | None, batch_size: int
) -> Iterator[Tensor]:
    """Logits (B, K, ...) in float32 of native slices (B, C, H, W), one per view, turned back."""
    parameter = next(member.network.parameters(), None)
    like = slices if parameter is None else parameter
    grid = member.preprocessing.to_grid(slices.to(like.device), pixel).to(like.dtype)
    for turns, mirrored in VIEWS[member.views]:
        seen = (grid.flip(-1) if mirrored else grid).rot90(turns, (-2, -1))
        sides = member.preprocessing.sides[:: -1 if turns % 2 else 1]
        logits = _through_windows(member.network, seen, sides, batch_size).rot90(-turns, (-2, -1))
        yield logits.flip(-1) if mirrored else logits


def _through_windows(
    network: nn.Module, image: Tensor, sides: tuple[int, ...], batch_size: int
) -> Tensor:
    """Logits (B, K, ...) in float32 of an image (B, C, ...) of a window's sides or larger."""
    if all(whole <= side for whole, side in zip(image.shape[-2:], sides, strict=True)):
        return network(image).float()
    from monai.inferers.utils import sliding_window_inference

    def through(window: Tensor) -> Tensor:
        return network(window.to(image.dtype)).float()

    # It weighs and sums in the type of what it is given.
    return sliding_window_inference(
        image.float(), sides, batch_size, through, overlap=OVERLAP, mode="gaussian"
    )
