"""The page's parts as HTML, from the macros of parts.html, which escape all text."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from mambaseg.evaluation.summary import kept_in_words
from mambaseg.inference.demo.study import Segmented, Volume
from mambaseg.inference.predictor import Predictor
from mambaseg.reporting.cards import png
from mambaseg.reporting.figures import overlay
from mambaseg.reporting.page import template_of
from mambaseg.storage.colours import CLASS_COLOURS

_TYPES = {".png": "image/png", ".gz": "application/gzip"}


@cache
def _macros() -> Any:
    return template_of(Path(__file__).with_name("parts.html")).module


def part(name: str, *values: Any) -> str:
    """A macro of parts.html with its values."""
    return str(getattr(_macros(), name)(*values))


def head(predictor: Predictor) -> str:
    """Which networks these are, and what they were trained on."""
    views = list(dict.fromkeys(m.views for m in predictor.members if m.views != "none"))
    how = [f"views averaged (tta): {', '.join(views)}"] if views else []
    how += [f"post-processing: {kept_in_words(predictor.kept)}"] if predictor.kept else []
    return part(
        "head",
        predictor.title,
        ", ".join(predictor.trained_on) or "unknown data",
        ", ".join(predictor.class_names[1:]),
        f" {'; '.join(how).capitalize()}." if how else "",
    )


def facts(*files: Segmented | None) -> str:
    """Size of each image, and its label map to take along."""
    return "".join(_facts(file) for file in files if file is not None)


def _facts(file: Segmented) -> str:
    frames, depth, height, width = file.labels.shape
    size = f"{width} × {height} pixels" + ("" if file.image.flat else f", {depth} slices")
    if frames > 1:
        size += f", {frames} frames"
    place = "voxel size unknown"
    if file.image.spacing is not None:
        z, y, x = file.image.spacing
        place = f"voxel size {x:.3g} × {y:.3g} × {z:.3g} mm"
    name = file.label_map_name
    kind = next(kind for ending, kind in _TYPES.items() if name.endswith(ending))
    content = base64.b64encode(file.label_map).decode()
    return part("facts", file.name, size, place, name, kind, content)


def pictures(volume: Volume, z: int) -> str:
    """One slice beside itself with its labels."""
    low, high = volume.window
    image = np.clip((volume.image[z] - low) / max(high - low, 1e-9), 0, 1)
    labels = volume.labels[z]
    ratio = labels.shape[1] / labels.shape[0]
    if volume.spacing is not None:
        ratio *= volume.spacing[2] / volume.spacing[1]
    where = f"{volume.caption}, " if volume.caption else ""
    shown = {"Image": np.zeros_like(labels), "With labels": labels}
    return part(
        "pictures",
        {name: png(overlay(image, chosen, CLASS_COLOURS)) for name, chosen in shown.items()},
        f"{where}slice {z + 1} of {len(volume.labels)}",
        f"{ratio:.4f}",
    )


def sizes(volume: Volume, class_names: Sequence[str]) -> str:
    """The legend, with the size of each class in the whole volume."""
    counts = volume.voxels(len(class_names))
    ml = volume.voxel_ml or 0
    rows = [
        (name, colour, f"{count * ml:.1f}", f"{count:,}")
        for name, colour, count in zip(
            class_names[1:], cycle(CLASS_COLOURS), counts[1:], strict=False
        )
    ]
    caption = f"Volumes, {volume.caption}" if volume.caption else "Volumes"
    return part("sizes", caption, rows, volume.voxel_ml is not None)


def heart(
    indices: Sequence[tuple[str, float | None, str]], captions: tuple[str, str], *, proposed: bool
) -> str:
    """The heart's indices of an end-diastole and an end-systole."""
    rows = [
        (name, "undefined" if value is None else f"{value:.1f} {unit}")
        for name, value, unit in indices
    ]
    known = any(unit == "ml" for _, _, unit in indices)
    return part("heart", " → ".join(captions), rows, proposed, known)
