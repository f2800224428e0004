"""Losses: functions of (logits (B, K, H, W), label (B, H, W)) -> scalar.

Any class with that signature is a loss, and so is any of `monai.losses`: see `taken_label`. Labels
are class indices 0..K-1, which `mambaseg.data.validation` checks when a case is read, or IGNORED.
"""

from typing import Any

import torch
import torch.distributed as dist
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
    if not hasattr(loss, "partial"):
        raise UserError(
            f"loss: {type(loss).__name__} cannot leave out pixels without a label. Use "
            "loss=partial_ce or loss=dice_ce, or give yours an attribute `partial`."
        )
    loss.partial = True  # type: ignore[assignment]


class DiceCE(nn.Module):
    r"""Cross entropy plus Dice, as the Mamba-UNet repository trains (inherited from SSL4MIS).

    .. math:: L = w_{ce} CE + w_{dice} \frac{1}{K} \sum_k
              \left(1 - \frac{2 \sum p_k g_k + s}{\sum p_k^2 + \sum g_k^2 + s}\right)

    p is the softmax over all K classes, g the one-hot label. The background counts as a class, and
    the sums run over the *whole batch*, over all devices that share it: the Dice part depends on
    which slices form a batch. With accumulated gradients each micro-batch has its own sums.

    Computed in float32 also under autocast: 16-bit sums over a batch would lose small classes.

    Args:
        ce_weight: weight of the cross entropy (mean over pixels).
        dice_weight: weight of the Dice loss (mean over classes).
        smooth: s, added to numerator and denominator; a class neither in the batch nor predicted
            costs nothing.
        partial: leave out the pixels whose label is IGNORED: the cross entropy is the mean over
            the others on all devices (0 where there are none), and so are the sums of the Dice.
    """

    def __init__(
        self,
        *,
        ce_weight: float = 0.5,
        dice_weight: float = 0.5,
        smooth: float = 1e-5,
        partial: bool = False,
    ) -> None:
        super().__init__()
        self.ce_weight, self.dice_weight, self.smooth = ce_weight, dice_weight, smooth
        self.partial = partial

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
            if self.partial:
                known = (label != IGNORED).to(probability.dtype)
                probability = probability * known.unsqueeze(1)
                cost, count = sum_over_devices(torch.stack([costs.sum(), known.sum()]))
                cross_entropy = cost / count.clamp(min=1)
            else:
                cross_entropy = costs.mean()
            sums = (probability * truth, probability.square(), truth.to(probability.dtype))
            shared, predicted, true = sum_over_devices(
                torch.stack([t.sum((0, 2, 3)) for t in sums])
            )
            dice = (2 * shared + self.smooth) / (predicted + true + self.smooth)
            return self.ce_weight * cross_entropy + self.dice_weight * (1 - dice).mean()


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
