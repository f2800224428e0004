"""Losses: functions of (logits (B, K, H, W), label (B, H, W)) -> scalar.

Labels are class indices 0..K-1. Whether they are is checked where a case is read
(`mambaseg.data.case.validate_volume`), not here: looking at them each step would make a GPU wait.

Plain cross entropy needs no code of ours: ``conf/loss/cross_entropy.yaml`` names torch's own.
"""

import torch
from torch import Tensor, nn


class DiceCE(nn.Module):
    r"""Cross entropy plus Dice, as the Mamba-UNet repository trains (inherited from SSL4MIS).

    .. math:: L = w_{ce} CE + w_{dice} \frac{1}{K} \sum_k
              \left(1 - \frac{2 \sum p_k g_k + s}{\sum p_k^2 + \sum g_k^2 + s}\right)

    p is the softmax over all K classes, g the one-hot label. The background counts as a class, and
    the sums run over the *whole batch*: the Dice part depends on which slices share a batch, and
    with several devices or accumulated gradients each part has its own sums.

    Computed in float32 also under autocast: 16-bit sums over a batch would lose small classes.

    Args:
        ce_weight: weight of the cross entropy (mean over pixels).
        dice_weight: weight of the Dice loss (mean over classes).
        smooth: s, added to numerator and denominator; a class neither in the batch nor predicted
            costs nothing.
    """

    def __init__(
        self, *, ce_weight: float = 0.5, dice_weight: float = 0.5, smooth: float = 1e-5
    ) -> None:
        super().__init__()
        from monai.losses.dice import DiceCELoss  # one to two seconds of imports

        self.loss = DiceCELoss(
            to_onehot_y=True,
            softmax=True,
            squared_pred=True,
            batch=True,
            smooth_nr=smooth,
            smooth_dr=smooth,
            lambda_ce=ce_weight,
            lambda_dice=dice_weight,
        )

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Loss of `logits` (B, K, H, W) against `label` (B, H, W), integers 0..K-1: a scalar."""
        with torch.autocast(logits.device.type, enabled=False):
            loss: Tensor = self.loss(logits.float(), label.unsqueeze(1))
        return loss
