"""What a run shows of its test cases: slices for reports, pictures, media for W&B.

Each task has its views. They keep little of a case, or large volumes would fill memory:

- `keep(batch, outputs)`: all that may be shown of a case; `overlay` holds its arrays for
  overlays.npz.
- `ranking(rows)`: case -> one number, more is better, of the cases that have one.
- `draw(kept, title, path)`: a case's picture.
- `media(kept)`: `image` (H, W[, 3]) and `masks`, as `wandb.Image` takes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mambaseg.reporting.figures import IGNORED, UNLABELLED, case_slices, draw_cases
from mambaseg.reporting.runs import case_dice

SIDE = 256  # pixels that what is kept of a 2-D image has at most


class SegmentationViews:
    """Slices of a volume with truth and prediction; `class_names` has the background first."""

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = tuple(class_names)

    def keep(self, batch: Mapping[str, Any], outputs: Mapping[str, Any]) -> dict[str, Any]:
        """At most three slices; of a picture, which may be one of thousands, a small copy."""
        image = drawn(batch["image"].cpu().numpy())
        truth = batch["label"].cpu().numpy().astype(np.uint8)
        prediction = outputs["prediction"].cpu().numpy()
        step = -(-max(truth.shape) // SIDE) if len(truth) == 1 else 1
        part = (slice(None), slice(None, None, step), slice(None, None, step))
        spacing = batch["spacing"]
        aspect = None if spacing is None else spacing[1] / spacing[2]
        return {"overlay": case_slices(image[part], truth[part], prediction[part], aspect)}

    def ranking(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Mean foreground Dice, without undefined ones."""
        return case_dice(rows)

    def draw(self, kept: Mapping[str, Any], *, title: str, path: Path) -> Path:
        """Image | truth | prediction | error."""
        return draw_cases(
            {"": {"prediction": kept["overlay"]}},
            headings={"prediction": "prediction"},
            class_names=self.class_names,
            title=title,
            path=path,
        )

    def media(self, kept: Mapping[str, Any]) -> dict[str, Any]:
        """The middle slice, with truth and prediction as masks."""
        shown, names = kept["overlay"], dict(enumerate(self.class_names))
        if (shown["truth"] == IGNORED).any():
            names[IGNORED] = UNLABELLED
        middle = len(shown["slices"]) // 2
        masks = {
            kind: {"mask_data": shown[kind][middle], "class_labels": names}
            for kind in ("truth", "prediction")
        }
        return {"image": shown["image"][middle], "masks": masks}


def drawn(image: np.ndarray) -> np.ndarray:
    """Images (Z, C, H, W) as drawn: the colours of a picture, everything else in grey.

    Returns:
        Colours (1, H, W, 3) as bytes, of a range that holds at least [0, 1]; or (Z, H, W), the mean
        of three channels or else the first.
    """
    if image.shape[:2] != (1, 3):
        return image.mean(axis=1) if image.shape[1] == 3 else image[:, 0]
    colours = image.transpose(0, 2, 3, 1)
    if colours.dtype == np.uint8:
        return colours
    low, high = min(0.0, float(colours.min())), max(1.0, float(colours.max()))
    return np.round(255 * ((colours - low) / (high - low))).astype(np.uint8)
