"""RestorationTask: crops of degraded images in training, whole images in validation and test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from mambaseg.errors import UserError
from mambaseg.restoration.scores import ImageScores
from mambaseg.restoration.views import RestorationViews
from mambaseg.training.checks import require_loss, require_minimum
from mambaseg.training.task import Task


class RestorationTask(Task):
    """Trains a network to give the clear image of a degraded one.

    The network takes an image (B, 3, H, W) in [0, 1] and gives the restored one, or with
    `model.residual=true` (`AnySize`) what is to be added to the image. The loss is that of
    (restored, clear); the restored image is not clipped. Nothing of `evaluation` applies.
    """

    monitor: ClassVar[str] = "val/psnr"
    truth: ClassVar[str] = "clear"

    def __init__(self, *common: Any, **named: Any) -> None:
        super().__init__(*common, **named)
        self.views = RestorationViews()
        self.scores = nn.ModuleDict({stage: ImageScores() for stage in ("val", "test")})

    def check(self, output: Tensor, batch: Mapping[str, Any]) -> None:
        """Makes sure that the loss compares the output with the clear image (B, C, H, W)."""
        if isinstance(output, list):
            raise UserError(
                f"{self.network_name()} gives {len(output)} outputs while it trains, and one image "
                "is to be restored: switch the network's further heads off "
                "(model.deep_supervision=false)"
            )
        if output.shape != batch["clear"].shape:
            raise UserError(
                f"{self.network_name()} gives {tuple(output.shape)} where images "
                f"{tuple(batch['clear'].shape)} are to be restored. Set the network's number of "
                "output channels to ${data.num_classes} in its config."
            )
        require_loss(self.loss, output, batch["clear"], instead="l1")
        require_minimum(self.loss, output, batch["clear"])

    def predict(self, batch: dict[str, Any], network: nn.Module) -> Tensor:
        """The restored image (1, 3, H, W), clipped to [0, 1]."""
        restored: Tensor = self.passed(network, batch["image"])
        return restored.clamp(0, 1)

    def score(self, batch: dict[str, Any], prediction: Tensor, scores: Any) -> dict[str, Any]:
        """Scores a whole image at its own size."""
        scores.update(batch["case"], prediction, batch["clear"], batch["image"])
        return {"restored": prediction}

    @classmethod
    def logged(cls, data: Any) -> list[str]:
        """PSNR and SSIM."""
        return ["val/psnr", "val/ssim"]

    def values(self, stage: str, summary: Mapping[str, Any]) -> dict[str, float | None]:
        """PSNR and SSIM, means over the images."""
        return {f"{stage}/{name}": summary["scores"][name]["mean"] for name in ("psnr", "ssim")}

    def means(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Of all scores, the means over the images."""
        return dict(summary["scores"])
