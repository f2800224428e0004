"""What a restoration run shows of its test cases: hazy | restored | clear | error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mambaseg.reporting.figures import literal, save_png
from mambaseg.reporting.views import SIDE

_KINDS = ("hazy", "restored", "clear")
_ERROR = 0.25  # mean absolute difference of the channels that is drawn in the last colour


class RestorationViews:
    """Hazy, restored and clear image, at most `SIDE` pixels a side; see `reporting.views`."""

    def keep(self, batch: Mapping[str, Any], outputs: Mapping[str, Any]) -> dict[str, Any]:
        """Three small copies, (H, W, 3) uint8; nothing for reports, which show scores alone."""
        images = (batch["image"], outputs["restored"], batch["clear"])
        small = {kind: _small(image[0]) for kind, image in zip(_KINDS, images, strict=True)}
        return {"overlay": {}, **small}

    def ranking(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """PSNR."""
        return {row["case"]: row["psnr"] for row in rows if np.isfinite(row["psnr"])}

    def draw(self, kept: Mapping[str, Any], *, title: str, path: Path) -> Path:
        """Write the three images and the error beside each other, as PNG."""
        from matplotlib.figure import Figure

        height, width = kept["clear"].shape[:2]
        figure = Figure(figsize=(12, 12 / 4 * height / width + 0.9))
        figure.set_layout_engine("constrained")
        figure.suptitle(literal(title), fontsize=10)
        axes = figure.subplots(1, 4)
        for axis, kind in zip(axes, _KINDS, strict=False):
            axis.imshow(kept[kind], interpolation="nearest")
        error = np.abs(kept["restored"].astype(float) - kept["clear"]).mean(-1) / 255
        scale = {"cmap": "magma", "vmin": 0, "vmax": _ERROR}
        shown = axes[3].imshow(error, interpolation="nearest", **scale)
        figure.colorbar(shown, ax=axes[3], fraction=0.04)
        for axis, kind in zip(axes, (*_KINDS, "error"), strict=True):
            axis.set_title(kind, fontsize=9)
            axis.set(xticks=[], yticks=[])
        return save_png(figure, path)

    def media(self, kept: Mapping[str, Any]) -> dict[str, Any]:
        """The three images side by side."""
        return {"image": np.concatenate([kept[kind] for kind in _KINDS], axis=1), "masks": None}


def _small(image: Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] -> bytes (H, W, 3) of every n-th pixel, n so that `SIDE` is kept."""
    step = -(-max(image.shape[-2:]) // SIDE)
    pixels = image[:, ::step, ::step].float().permute(1, 2, 0).cpu().numpy()
    return np.round(255 * np.nan_to_num(pixels)).astype(np.uint8)
