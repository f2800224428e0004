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

SIDE = 256  # pixels that what is kept of a 2-D image has at most


class SegmentationViews:
    """Slices of a volume with truth and prediction.

    Args:
        class_names: one per class, background first.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = tuple(class_names)

    def keep(self, batch: Mapping[str, Any], outputs: Mapping[str, Any]) -> dict[str, Any]:
        """At most seven slices; of a picture, which may be one of thousands, a small copy."""
        image = drawn(batch["image"].cpu().numpy())
        truth = batch["label"].cpu().numpy().astype(np.uint8)
        prediction = outputs["prediction"].cpu().numpy()
        step = -(-max(truth.shape) // SIDE) if len(truth) == 1 else 1
        part = (slice(None), slice(None, None, step), slice(None, None, step))
        return shown_slices(image[part], truth[part], prediction[part], batch["spacing"])

    def ranking(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Mean foreground Dice, without undefined ones."""
        dice: dict[str, list[float]] = {}
        for row in rows:
            if row["class"] and row["dice"] is not None:
                dice.setdefault(row["case"], []).append(float(row["dice"]))
        return {case: float(np.mean(values)) for case, values in dice.items()}

    def draw(self, kept: Mapping[str, Any], *, title: str, path: Path) -> Path:
        """Image | truth | prediction | error."""
        from mambaseg.reporting.figures import view_figure

        return view_figure(kept["view"], class_names=self.class_names, title=title, path=path)

    def media(self, kept: Mapping[str, Any]) -> dict[str, Any]:
        """The middle slice, with truth and prediction as masks."""
        middle, names = kept["middle"], dict(enumerate(self.class_names))
        masks = {
            kind: {"mask_data": middle[kind][0], "class_labels": names}
            for kind in ("truth", "prediction")
        }
        return {"image": middle["image"][0], "masks": masks}


def drawn(image: np.ndarray) -> np.ndarray:
    """Images (Z, C, H, W) as drawn: the colours of a picture, `grey` of everything else.

    Returns:
        Colours (1, H, W, 3) as bytes, of a range that holds at least [0, 1]; or (Z, H, W).
    """
    if image.shape[:2] != (1, 3):
        return grey(image)
    colours = image.transpose(0, 2, 3, 1)
    if colours.dtype == np.uint8:
        return colours
    low, high = min(0.0, float(colours.min())), max(1.0, float(colours.max()))
    return np.round(255 * ((colours - low) / (high - low))).astype(np.uint8)


def grey(image: np.ndarray) -> np.ndarray:
    """Images (Z, C, H, W) as drawn, (Z, H, W): the mean of three channels, else the first."""
    return image.mean(axis=1) if image.shape[1] == 3 else image[:, 0]


def overlay_slices(
    image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, **_: Any
) -> dict[str, np.ndarray]:
    """The slices of a case that a report shows, small enough to keep for every case.

    They stand at a quarter, half and three quarters of the slices that hold foreground in the
    truth (where it is empty: in the prediction, then of all slices); fewer where there are fewer.

    Args:
        image: (Z, H, W) intensities on any scale, or colours (1, H, W, 3) as bytes.
        truth: (Z, H, W) labels.
        prediction: (Z, H, W) labels.

    Returns:
        `image`, `truth`, `prediction`: uint8 (S, H, W) with S <= 3, the image's 1st to 99th
        percentile of the volume spread over 0..255, or its colours (1, H, W, 3); `slices`: their
        indices (S,).
    """
    for labels in (truth, prediction, np.ones_like(truth)):
        used = np.flatnonzero((labels > 0).any(axis=(1, 2)))
        if used.size:
            break
    chosen = np.unique(used[[int(share * used.size) for share in (0.25, 0.5, 0.75)]])
    shown = image[chosen]
    if image.ndim == 3:
        low, high = np.percentile(image, (1, 99))
        grey = np.clip((shown - low) / max(high - low, 1e-9), 0, 1)
        shown = np.round(255 * grey).astype(np.uint8)
    return {
        "image": shown,
        "truth": truth[chosen].astype(np.uint8),
        "prediction": prediction[chosen].astype(np.uint8),
        "slices": chosen.astype(np.int16),
    }


def shown_slices(
    image: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    spacing: tuple[float, float, float] | None,
) -> dict[str, Any]:
    """All that a run may show of a case: `overlay` for reports, `view` for its picture, `middle`.

    Args:
        image: (Z, H, W) intensities, or colours (1, H, W, 3) as bytes.
        truth: (Z, H, W) labels.
        prediction: (Z, H, W) labels.
        spacing: mm (z, y, x), None when unknown.

    Returns:
        Copies of at most seven slices; `middle` has the middle one of each volume, (1, H, W).
    """
    from mambaseg.reporting.figures import case_view

    volumes = {"image": image, "truth": truth, "prediction": prediction}
    middle = len(image) // 2
    return {
        "overlay": overlay_slices(**volumes),
        "view": case_view(**volumes, spacing=spacing),
        "middle": {kind: volume[middle : middle + 1].copy() for kind, volume in volumes.items()},
    }
