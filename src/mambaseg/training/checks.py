"""What must hold before the first step: an output of the right kind, and a loss that takes it."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from mambaseg.errors import UserError, out_of_memory
from mambaseg.training.losses import DeepSupervision, of_monai

log = logging.getLogger(__name__)


def require_logits(logits: Tensor, label: Tensor, *, num_classes: int, network: str) -> None:
    """Makes sure that an untrained (or resumed) network's output can be trained as logits.

    Args:
        logits: the output for a training batch, (B, K, H, W) if all is well.
        label: (B, H, W).
        num_classes: K.
        network: its name, for the message.

    Raises:
        UserError: another shape; probabilities (softmax or sigmoid) in place of logits.
    """
    expected = (label.shape[0], num_classes, *label.shape[1:])
    if tuple(logits.shape) != expected:
        raise UserError(
            f"{network} gives {tuple(logits.shape)} for labels {tuple(label.shape)}; expected is "
            f"(B, K, H, W) = {expected} with K = data.num_classes. Set the network's number of "
            "output channels to ${data.num_classes} in its config."
        )
    if function := _activation(logits):
        raise UserError(
            f"{network} gives {function} outputs: before its first step they all lie in [0, 1]. "
            "The loss applies softmax itself and needs logits. Leave the last activation out of "
            "the network, or switch it off in its config."
        )


def require_heads(output: Any, loss: nn.Module, *, network: str) -> None:
    """Makes sure that a loss for several heads gets several outputs, and others one; `UserError`.

    Warns where the loss has a weight for the finest head alone.

    Args:
        output: for a training batch; a list of several heads.
        loss: the run's.
        network: its name, for the message.
    """
    several = isinstance(output, list)
    if several and not isinstance(loss, DeepSupervision):
        raise UserError(
            f"{network} gives {len(output)} outputs while it trains, and loss={type(loss).__name__}"
            " takes one: use loss=deep_supervision, or switch the network's further heads off"
        )
    if isinstance(loss, DeepSupervision) and not several:
        raise UserError(
            f"loss=deep_supervision needs a network with heads at several scales, and {network} "
            "gives one output. Use u_mamba_none, u_mamba_bot, u_mamba_enc or emcad_b2; nnunet_2d "
            "with model.deep_supervision=true model.deep_supr_num=4, or nnunet_2d_half with these "
            "and 3; or another loss, such as dice_ce_nnunet."
        )
    if isinstance(loss, DeepSupervision) and len(output) == 2 and not loss.coarsest:
        log.warning(
            "loss=deep_supervision trains one of the two heads of %s alone: the coarsest has no "
            "weight. Set model.deep_supr_num=4 (nnunet_2d_half: 3), or give it more stages",
            network,
        )


def require_loss(loss: nn.Module, output: Any, truth: Tensor, *, instead: str) -> None:
    """Makes sure that a loss compares the first output with what is true, and gives one number.

    Args:
        loss: the run's.
        output: for a training batch; a list of several heads.
        truth: as the loss takes it.
        instead: a loss that fits, for the message.
    """
    try:
        with warnings.catch_warnings():  # torch would stretch one to the other's shape
            warnings.filterwarnings("error", message="Using a target size")
            shape = tuple(loss(output, truth).shape)
    except (RuntimeError, ValueError, TypeError, IndexError, UserWarning) as error:
        if out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    else:
        if shape == ():
            return
        reason = f"it gives {shape} instead of one number"
    raise UserError(
        f"loss: {type(loss).__name__} does not take what this network and these data give "
        f"({reason}). Use another, such as loss={instead}."
    )


def require_minimum(loss: nn.Module, output: Tensor, clear: Tensor) -> None:
    """Makes sure that a loss of images is least where the output is the clear image; `UserError`.

    Its gradient is 0 there, up to rounding. That of a loss for classes is not: it would train
    something else, without an error.
    """
    at_output, at_clear = (
        torch.autograd.grad(loss(point, clear), point)[0].abs().max()
        for point in (one.detach().float().requires_grad_() for one in (output, clear))
    )
    if at_clear > 0.1 * at_output:
        raise UserError(
            f"loss: {type(loss).__name__} is not least where the restored image is the clear one, "
            "so it restores no images. Use loss=l1 or another loss of images."
        )


def _activation(logits: Tensor) -> str | None:
    """`softmax`, `sigmoid` or None.

    Logits of an untrained network lie about 0 or are 0 everywhere. A sigmoid's lie about 0.5,
    inside (0, 1), for every class; a softmax's sum to 1 at every pixel.
    """
    values = logits.detach().float()
    if not ((values >= 0) & (values <= 1)).all():
        return None
    if ((values.sum(1) - 1).abs() < 1e-2).all():  # rounded to 16 bits
        return "softmax"
    means = values.mean((0, 2, 3))
    inside = ((values > 0) & (values < 1)).all()
    about_half = ((means > 0.25) & (means < 0.75)).all()
    return "sigmoid" if torch.logical_and(inside, about_half) else None


def require_settings(loss: nn.Module) -> None:
    """Makes sure that a loss of MONAI is set up for logits and class indices, else UserError."""
    missing = [
        "softmax"
        for part in filter(of_monai, loss.modules())
        if [getattr(part, key, None) for key in ("softmax", "sigmoid", "other_act")]
        == [False, False, None]
    ]
    labelled = loss if hasattr(loss, "to_onehot_y") else getattr(loss, "dice", None)
    if of_monai(loss) and getattr(labelled, "to_onehot_y", True) is False:
        missing.append("to_onehot_y")
    if missing:
        raise UserError(
            f"loss: {type(loss).__name__} is not set up for logits and class indices. "
            f"Set loss.{missing[0]}=true (see conf/loss/dice_focal.yaml)."
        )
