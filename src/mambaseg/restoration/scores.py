"""PSNR and SSIM of restored images, by torchmetrics, case by case.

Conventions: the restored image is clipped to [0, 1] and not rounded to 8 bits; the data range is 1.
PSNR is of the mean squared error over all pixels and channels, and at most `HIGHEST` dB (equal
images). SSIM (Wang et al., IEEE TIP 13(4), 2004) has a Gaussian window of 11 × 11, sigma 1.5, K1 =
0.01, K2 = 0.03; it is taken per channel in RGB where the window lies inside the image, as in the
paper, and averaged. Both are computed in float64, at the image's own size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from mambaseg.evaluation.case_scores import CaseRows
from mambaseg.evaluation.metrics import Metric
from mambaseg.restoration.pairs import Pair

HIGHEST = 100.0  # dB
_BORDER = 5  # pixels, half a window
# column of cases.csv -> its description
METRICS = {
    name: Metric(name, title, decimals=decimals)
    for name, title, decimals in (
        ("psnr", "PSNR dB", 2),
        ("ssim", "SSIM", 4),
        ("psnr_hazy", "PSNR dB (hazy)", 2),
        ("ssim_hazy", "SSIM (hazy)", 4),
    )
}
_ABOUT = {
    "title": "Image restoration",
    "note": "Restored images at their own size, RGB in [0, 1], not rounded; SSIM: Gaussian 11 × "
    "11. (hazy): of the untreated images.",
    "metrics": [metric.plain() for metric in METRICS.values()],
    "convention": {
        "data_range": 1.0,
        "rounded": False,
        "colour": "RGB",
        "ssim_window": 11,
        "ssim_sigma": 1.5,
        "psnr_highest": HIGHEST,
    },
}


def image_scores(image: Tensor, clear: Tensor) -> tuple[float, float]:
    """PSNR in dB and SSIM of an image against the clear one, both (1, C, H, W) in [0, 1]."""
    if image.device.type == "mps":  # it has no float64
        image, clear = image.cpu(), clear.cpu()
    image, clear = image.double(), clear.double()
    psnr = peak_signal_noise_ratio(image, clear, data_range=1.0)
    full = structural_similarity_index_measure(
        image, clear, data_range=1.0, return_full_image=True
    )[1]
    # Where the window lies inside: versions of torchmetrics differ in what they average.
    ssim = full[..., _BORDER:-_BORDER, _BORDER:-_BORDER].mean()
    return float(torch.clamp(psnr, max=HIGHEST)), float(ssim)


class ImageScores(CaseRows):
    """A row per image: `case`, `scene`, `psnr`, `ssim`, and the same of the untreated image."""

    def update(self, case: Pair, restored: Tensor, clear: Tensor, hazy: Tensor) -> None:
        """Score an image (1, C, H, W) in [0, 1], and what it was made from, by the clear one."""
        scores = (*image_scores(restored, clear), *image_scores(hazy, clear))
        row = {"case": case.id, "scene": case.scene, **dict(zip(METRICS, scores, strict=True))}
        self._cases[case.id] = [row]

    def summarise(self) -> dict[str, Any]:
        """Mean and standard deviation (n - 1) over images, None where there are too few."""
        scores = {}
        for metric in METRICS:
            values = np.array([row[metric] for row in self.rows], dtype=np.float64)
            scores[metric] = {
                "mean": float(values.mean()) if len(values) else None,
                "sd": float(values.std(ddof=1)) if len(values) > 1 else None,
            }
        return {"cases": len(self.rows), "scores": scores, **_ABOUT}
