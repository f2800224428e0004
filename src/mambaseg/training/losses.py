"""Losses: functions of (logits (B, K, H, W), label (B, H, W)) -> scalar.

Any class with that signature is a loss, and so is any of `monai.losses`: see `taken_label`. Labels
are class indices 0..K-1, which `mambaseg.data.validation` checks when a case is read, or IGNORED.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mambaseg.data.classes import IGNORED
from mambaseg.errors import UserError
from mambaseg.training.ranks import several_processes


def of_monai(loss: nn.Module) -> bool:
    """Whether a loss, or a class that it derives from, is MONAI's."""
    return any(kind.__module__.startswith("monai.") for kind in type(loss).__mro__)


def taken_label(loss: nn.Module, label: Tensor) -> Tensor:
    """A label (B, H, W) as a loss takes it: those of MONAI want (B, 1, H, W)."""
    return label.unsqueeze(1) if of_monai(loss) else label


def leave_out_ignored(loss: nn.Module) -> None:
    """Let a loss leave out ignored pixels; `UserError` where it has no switch `partial` for it."""
    if isinstance(loss, DeepSupervision):
        leave_out_ignored(loss.loss)
        return
    if not hasattr(loss, "partial"):
        raise UserError(
            f"loss: {type(loss).__name__} cannot leave out pixels without a label. Use "
            "loss=partial_ce, dice_ce, dice_ce_nnunet, top_k or deep_supervision, or give yours an "
            "attribute `partial`."
        )
    loss.partial = True  # type: ignore[assignment]


_NO_REGIONS: Mapping[str, int | Sequence[int]] = MappingProxyType({})


class DiceCE(nn.Module):
    r"""Cross entropy plus Dice, as the Mamba-UNet repository trains (inherited from SSL4MIS).

    .. math:: L = w_{ce} CE + w_{dice} \frac{1}{K} \sum_k
              \left(1 - \frac{2 \sum p_k g_k + s}{\sum p_k^2 + \sum g_k^2 + s}\right)

    p is the softmax over all K classes, g the one-hot label. The background counts as a class, and
    the sums run over the *whole batch*, over all devices that share it: the Dice part depends on
    which slices form a batch. With accumulated gradients each micro-batch has its own sums.

    Computed in float32 also under autocast: 16-bit sums over a batch would lose small classes.

    nnU-Net's loss is this with both weights 1, `background` and `squared` False, and `batch` as its
    plan says (True in 2-D). Its value is lower by 1, which no gradient sees.

    Args:
        ce_weight: weight of the cross entropy (mean over pixels).
        dice_weight: weight of the Dice loss (mean over classes).
        smooth: s, added to numerator and denominator; a class neither in the batch nor predicted
            costs nothing.
        partial: leave out the pixels whose label is IGNORED: the cross entropy is the mean over
            the others on all devices (0 where there are none), and so are the sums of the Dice.
        background: whether the background is a class of the Dice loss.
        squared: whether probabilities are squared in the denominator.
        batch: sums over the whole batch; False: over each slice, and the mean of the slices.
        class_weights: of the cross entropy, one per class, background first; the mean over pixels
            is weighted with them. None: all the same.
        top_k: share of the pixels, those with the highest cross entropy, over which its mean goes;
            below 1 on each device by itself (nnU-Net's top-k loss has 0.1).
        regions: name -> labels of the regions that the Dice loss has in place of classes; the
            probability of a region is the sum of its classes'. Empty: the classes.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        *,
        ce_weight: float = 0.5,
        dice_weight: float = 0.5,
        smooth: float = 1e-5,
        partial: bool = False,
        background: bool = True,
        squared: bool = True,
        batch: bool = True,
        class_weights: Sequence[float] | None = None,
        top_k: float = 1.0,
        regions: Mapping[str, int | Sequence[int]] | None = _NO_REGIONS,
    ) -> None:
        super().__init__()
        self.ce_weight, self.dice_weight, self.smooth = ce_weight, dice_weight, smooth
        self.partial, self.background = partial, background
        self.squared, self.batch, self.top_k = squared, batch, top_k
        if not all(0 <= one < math.inf for one in (ce_weight, dice_weight)):
            raise UserError("loss.ce_weight, loss.dice_weight: numbers, 0 or more")
        if not ce_weight + dice_weight:
            raise UserError("loss.ce_weight, loss.dice_weight: both are 0, nothing would be learnt")
        if not 0 < top_k <= 1:
            raise UserError(f"loss.top_k={top_k}: it is a share of the pixels, above 0 and up to 1")
        if class_weights is not None and not (
            any(class_weights) and all(0 <= one < math.inf for one in class_weights)
        ):
            raise UserError(
                "loss.class_weights: one weight per class, none negative and not all 0; null: none"
            )
        if regions is None:
            raise UserError(
                "loss.regions: needs regions, such as data.regions={whole: [1, 2], core: [2]}"
            )
        labels = [[own] if isinstance(own, int) else list(own) for own in regions.values()]
        self.regions: list[list[int]] = labels
        weights = None if class_weights is None else torch.tensor(list(class_weights)).float()
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Loss of `logits` (B, K, H, W) against `label` (B, H, W), integers 0..K-1: a scalar."""
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            classes = torch.arange(logits.shape[1], device=label.device)
            truth = label.unsqueeze(1) == classes.view(-1, 1, 1)  # (B, K, H, W)
            log_probability = logits.log_softmax(1)
            probability = log_probability.exp()
            # Sums of products, not the indexed kernels of torch: those add in any order on a GPU.
            costs = -log_probability.where(truth, 0.0).sum(1)
            known = None
            if self.partial:
                known = (label != IGNORED).to(probability.dtype)
                probability = probability * known.unsqueeze(1)
            loss = self.ce_weight * self._cross_entropy(costs, truth, known)
            return loss + self.dice_weight * self._dice_loss(probability, truth)

    def _cross_entropy(self, costs: Tensor, truth: Tensor, known: Tensor | None) -> Tensor:
        """The mean of the costs (B, H, W) over pixels; `truth` is (B, K, H, W)."""
        weights = known
        if self.class_weights is not None:
            if len(self.class_weights) != truth.shape[1]:
                raise UserError(
                    f"loss.class_weights has {len(self.class_weights)} weights for "
                    f"{truth.shape[1]} classes: give one per class, background first"
                )
            weights = (truth * self.class_weights.view(-1, 1, 1)).sum(1)  # 0 where nothing is known
            costs = costs * weights
        if self.top_k < 1:
            costs = (costs if known is None else costs[known > 0]).flatten()
            count = max(1, int(self.top_k * len(costs)))
            return costs.topk(count).values.mean() if len(costs) else costs.sum()
        if weights is None:
            return costs.mean()
        cost, total = sum_over_devices(torch.stack([costs.sum(), weights.sum()]))
        least = 1 if weights is known else torch.finfo(total.dtype).tiny
        return cost / total.clamp(min=least)

    def _dice_loss(self, probability: Tensor, truth: Tensor) -> Tensor:
        """The mean over classes or regions (and slices); both are (B, K, H, W)."""
        if self.regions:
            probability = torch.stack([probability[:, own].sum(1) for own in self.regions], 1)
            truth = torch.stack([truth[:, own].any(1) for own in self.regions], 1)
        predicted = probability.square() if self.squared else probability
        sums = torch.stack(
            [
                part.sum((0, 2, 3) if self.batch else (2, 3))
                for part in (probability * truth, predicted, truth.to(probability.dtype))
            ]
        )
        shared, predicted, true = sum_over_devices(sums) if self.batch else sums
        dice = (2 * shared + self.smooth) / (predicted + true + self.smooth)
        return (1 - (dice if self.background or self.regions else dice[..., 1:])).mean()


class DeepSupervision(nn.Module):
    """A loss at every scale of the decoder: the mean of the heads' losses, weights halved.

    A network takes part that gives a list of logits while it trains, finest first. Its method
    `supervise_deeply`, where it has one, is called before the training and switches its coarse
    heads on. The label comes to a head's size by nearest neighbour (the pixel nearest to each
    centre). Source: nnU-Net v2, whose coarsest head has no weight.

    Args:
        loss: (logits (B, K, H, W), label (B, H, W)) -> scalar, for every head.
        coarsest: whether the coarsest head is trained.
    """

    def __init__(self, loss: nn.Module, *, coarsest: bool = False) -> None:
        super().__init__()
        self.loss, self.coarsest = loss, coarsest

    def forward(self, outputs: Tensor | Sequence[Tensor], label: Tensor) -> Tensor:
        """Loss of the heads' logits, each (B, K, h, w), finest first, against (B, H, W)."""
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        trained = outputs if self.coarsest or len(outputs) == 1 else outputs[:-1]
        weights = [0.5**scale for scale in range(len(trained))]
        losses = [
            weight / sum(weights) * self.loss(logits, taken_label(self.loss, _at(label, logits)))
            for weight, logits in zip(weights, trained, strict=True)
        ]
        losses += [0 * logits.mean() for logits in outputs[len(trained) :]]  # for DDP
        total: Tensor = torch.stack(losses).sum()
        return total


def _at(label: Tensor, logits: Tensor) -> Tensor:
    """The label (B, H, W) at the size of logits."""
    size = logits.shape[-2:]
    if label.shape[-2:] == size:
        return label
    return F.interpolate(label[:, None].float(), size, mode="nearest-exact")[:, 0].to(label.dtype)


class WithBoundary(nn.Module):
    r"""A loss plus the boundary loss, which counts wrong pixels by their distance to the border.

    .. math:: L = L_{region} + w \frac{1}{K - 1} \sum_{k > 0} \overline{\phi_k p_k}

    p is the softmax, and phi the distance of a pixel to the border of its slice's true class k, in
    pixels: positive outside, 0 along the inner side of the border, negative within; 0 where a slice
    does not have the class. The distances are SciPy's, computed on the CPU in every step. A pixel
    without a label has no distance, so this loss takes no labels that are partial.

    Source: Kervadec et al. 2019, Boundary loss for highly unbalanced segmentation, equation 5. They
    raise the weight from 0.01 while the region's falls; here it is constant.

    Args:
        loss: the loss of the region.
        weight: w.
    """

    def __init__(self, loss: nn.Module, *, weight: float = 0.01) -> None:
        super().__init__()
        self.loss, self.weight = loss, weight
        if not 0 <= weight < math.inf:
            raise UserError(f"loss.weight={weight}: a number, 0 or more")

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Loss of `logits` (B, K, H, W) against `label` (B, H, W), integers 0..K-1: a scalar."""
        region: Tensor = self.loss(logits, taken_label(self.loss, label))
        with torch.autocast(logits.device.type, enabled=False):
            probability = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)
            classes, truth = logits.shape[1], label.cpu().numpy()
            maps = [[signed_distance(one == k) for k in range(1, classes)] for one in truth]
            distance = torch.from_numpy(np.array(maps)).to(probability)
            return region + self.weight * (distance * probability[:, 1:]).mean()


def signed_distance(inside: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Distance in pixels to the border of a region (H, W), negative within; 0 if there is none."""
    from scipy.ndimage import distance_transform_edt

    if not inside.any():
        return np.zeros(inside.shape, np.float32)
    within = np.maximum(distance_transform_edt(inside) - 1, 0) if not inside.all() else 0
    distance: NDArray[np.float32] = (distance_transform_edt(~inside) - within).astype(np.float32)
    return distance


def sum_over_devices(sums: Tensor) -> Tensor:
    """Sum over processes, and of its gradient: DDP's average is then that of the whole batch."""
    total: Tensor = _AllReduce.apply(sums) if several_processes() else sums
    return total


class _AllReduce(torch.autograd.Function):
    """The sum over processes, forwards and backwards; torch's own with a gradient is deprecated."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _AllReduce.forward(ctx, gradients[0].contiguous())
