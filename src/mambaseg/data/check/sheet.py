"""A contact sheet: one slice of each case with the outlines of its labels, on one page."""

from __future__ import annotations

import io
import math
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mambaseg.data.check.dataset import Examined, Report
from mambaseg.data.classes import IGNORED, UNLABELLED
from mambaseg.data.intensity import percentile
from mambaseg.data.validation import DataError
from mambaseg.data.volume import Volume
from mambaseg.storage.colours import CLASS_COLOURS
from mambaseg.storage.files import write_whole
from mambaseg.storage.untrusted import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 48  # cases on a sheet
_HATCH, _OPEN = "///", "#8c8c8c"  # of pixels without a label
_COLUMNS = 6
_SIDE = 512  # pixels of a slice that are drawn


def require_new(path: Path) -> None:
    """Raises DataError unless a sheet can be written there."""
    if path.suffix.lower() != ".png":
        raise DataError("the sheet is a picture: give a name such as labels.png", path)
    if path.exists():
        raise DataError("is there already", path, "Choose another name, or move it away.")


def write_sheet(report: Report, path: Path) -> str:
    """Draws the labels of at most `MOST` cases, evenly chosen; returns what is on the sheet."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    require_new(path)
    usable = [one for one in report.examined if one.digest is not None]
    if not usable:
        return "No case can be used: no sheet is drawn."
    places = np.linspace(0, len(usable) - 1, min(MOST, len(usable))).round().astype(int)
    shown = [usable[place] for place in places]
    values = np.flatnonzero(np.sum([one.label_counts for one in shown], axis=0))
    partial = IGNORED in values and shown[0].case.ignore is not None
    values = values[values != IGNORED] if partial else values
    colours = dict(zip((int(v) for v in values if v), cycle(CLASS_COLOURS), strict=False))
    rows = math.ceil(len(shown) / _COLUMNS)
    said = f"{len(shown)} of {report.cases} cases"
    said += f" (a sheet holds {MOST})" if len(usable) > MOST else ""
    said += ", each at its slice with the most labelled voxels"
    with rc_context({"text.parse_math": False, "font.size": 7}):  # names are names, also with $
        figure = Figure(figsize=(2 * _COLUMNS, 2.3 * rows + 0.9), layout="constrained")
        for axis, one in zip(figure.subplots(rows, _COLUMNS, squeeze=False).flat, shown,
                             strict=False):  # fmt: skip
            _draw(axis, one, colours)
        for axis in figure.axes:
            axis.axis("off")
        names = dict(enumerate(report.class_names or ()))
        handles: list[Any] = [Line2D([], [], color=colour) for colour in colours.values()]
        words = [printable(f"{value} {names.get(value, '')}".strip()) for value in colours]
        if partial:
            handles.append(Patch(facecolor="none", edgecolor=_OPEN, hatch=_HATCH))
            words.append(UNLABELLED)
        figure.suptitle(printable(f"{report.root.absolute().name}: {said}"), fontsize=10)
        if handles:
            figure.legend(handles, words, loc="outside lower center", ncols=8)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=120, facecolor="white")
    write_whole(path, stream.getvalue(), otherwise="choose another place with --sheet")
    return f"Contact sheet: {path} ({said})"


def _draw(axis: Axes, one: Examined, colours: dict[int, str]) -> None:
    volume = one.case.load()
    assert volume.label is not None  # it was examined
    partial = one.case.ignore is not None
    inside = (volume.label > 0) & ~(partial & (volume.label == IGNORED))
    labelled = inside.sum(axis=(1, 2))
    z = int(labelled.argmax()) if labelled.any() else len(labelled) // 2
    step = -(-max(volume.label.shape[1:]) // _SIDE)
    label = volume.label[z, ::step, ::step]
    pixels, extent = _pixels(volume, z, step), _extent(volume)
    axis.imshow(pixels, cmap="gray", extent=extent, interpolation="nearest")
    height, width = label.shape
    x = (np.arange(-1, width + 1) + 0.5) * extent[1] / width
    y = (np.arange(-1, height + 1) + 0.5) * extent[2] / height
    if partial and (label == IGNORED).any():
        left = np.pad(label == IGNORED, 1)
        hatch = axis.contourf(x, y, left, levels=[0.5, 1], colors="none", hatches=[_HATCH])
        hatch.set(edgecolor=_OPEN, linewidth=0)
    for value, colour in colours.items():
        inside = np.pad(label == value, 1)  # an outline closes at the border of the image
        if inside.any():
            axis.contour(x, y, inside, levels=[0.5], colors=[colour], linewidths=0.9)
    axis.set(xlim=extent[:2], ylim=extent[2:])
    name = printable(one.case.id)
    name = name if len(name) <= 28 else f"…{name[-27:]}"
    axis.set_title(f"{name}\nslice {z + 1} of {len(labelled)}", fontsize=7)


def _pixels(volume: Volume, z: int, step: int) -> Any:
    """Colours of a picture as they are; grey values between two percentiles."""
    image = np.moveaxis(volume.image[z, :, ::step, ::step], 0, -1)
    if image.shape[-1] == 3 and image.dtype == np.uint8:
        return image
    return percentile(image[..., 0].astype(np.float32))


def _extent(volume: Volume) -> tuple[float, float, float, float]:
    """Left, right, bottom and top in mm, or in pixels where a pixel's size is unknown."""
    height, width = volume.image.shape[-2:]
    _, down, across = volume.spacing or (1.0, 1.0, 1.0)
    return (0.0, width * across, height * down, 0.0)
