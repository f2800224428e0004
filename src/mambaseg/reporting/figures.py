"""Pictures of single cases: image | truth | prediction | error, at base, middle and apex."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mambaseg.storage.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette, told apart by colour-blind readers: class 1, 2, 3, ... (0 stays clear).
CLASS_COLOURS = ("#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")
ERROR_COLOURS = {
    "false positive": "#D55E00",
    "false negative": "#CC79A7",
    "wrong class": "#F0E442",
}
_TINT = 0.6  # how much of its colour a class shows
_MARGIN = 0.45  # of the heart's size, left around it

_TRUTH_COLUMNS = ("truth", "prediction", "error")
_THIRDS = {"base": 1 / 6, "mid": 1 / 2, "apex": 5 / 6}  # where in the labelled range

Volume = npt.NDArray[Any]


class View(NamedTuple):
    """What the picture of a case shows of it: a few slices, cut to the heart.

    Attributes:
        rows: name and index of each slice.
        depth: slices of the volume.
        image: (S, h, w) intensities, or colours (S, h, w, 3).
        truth: (S, h, w) labels, None where there are none.
        prediction: (S, h, w) labels.
        grey: intensities of the volume that are drawn black and white; 0 and 255 of colours.
        aspect: height of a pixel by its width.
    """

    rows: list[tuple[str, int]]
    depth: int
    image: Volume
    truth: Volume | None
    prediction: Volume
    grey: tuple[float, float]
    aspect: float


def case_view(
    image: Volume,
    truth: Volume | None,
    prediction: Volume,
    *,
    spacing: tuple[float, float, float] | None = None,
) -> View:
    """The part of a case that is drawn; it keeps nothing of the rest in memory.

    Args:
        image: (Z, H, W) intensities on any scale, or colours (Z, H, W, 3) as bytes.
        truth: (Z, H, W) labels, or None: then the picture has no truth and no error.
        prediction: (Z, H, W) labels.
        spacing: mm (z, y, x), for the pixels' true aspect; None draws square pixels.
    """
    rows = pick_slices(prediction if truth is None else truth, prediction)
    window = crop(prediction if truth is None else (truth > 0) | (prediction > 0))
    if len(image) == 1:
        window = slice(0, image.shape[1]), slice(0, image.shape[2])
    shown = (np.array([z for _, z in rows])[:, None, None], *np.ogrid[window])
    low, high = np.percentile(image, (0.5, 99.5)) if image.ndim == 3 else (0, 255)
    return View(
        rows=rows,
        depth=len(image),
        image=image[shown],
        truth=None if truth is None else truth[shown],
        prediction=prediction[shown],
        grey=(low, high),
        aspect=1.0 if spacing is None else spacing[1] / spacing[2],
    )


def case_figure(
    image: Volume,
    truth: Volume | None,
    prediction: Volume,
    *,
    class_names: Sequence[str],
    title: str,
    path: Path,
    spacing: tuple[float, float, float] | None = None,
) -> Path:
    """Write the picture of one case: `case_view`, then `view_figure`."""
    view = case_view(image, truth, prediction, spacing=spacing)
    return view_figure(view, class_names=class_names, title=title, path=path)


def view_figure(view: View, *, class_names: Sequence[str], title: str, path: Path) -> Path:
    """Write the picture of one case.

    Rows are a basal, a middle and an apical slice, cut to the surroundings of what is labelled; a
    volume of one slice is shown whole.
    An error is *false positive* where the truth is background, *false negative* where the
    prediction is, and *wrong class* where both are different structures.

    Args:
        view: what is drawn.
        class_names: names of the classes 0..K-1, the background first.
        title: line above the picture; says which dataset it is.
        path: PNG to write; folders are made, an existing file is replaced.

    Returns:
        `path`.
    """
    from matplotlib.figure import Figure

    columns = ["image", "prediction"] if view.truth is None else ["image", *_TRUTH_COLUMNS]
    height = 2.4 * view.image.shape[1] * view.aspect / view.image.shape[2]
    figure = Figure(figsize=(2.5 * len(columns) + 0.4, height * len(view.rows) + 1.2))
    figure.set_layout_engine("constrained")
    figure.suptitle(literal(title), fontsize=10)
    axes = figure.subplots(len(view.rows), len(columns), squeeze=False)
    low, high = view.grey
    for row, (name, z) in enumerate(view.rows):
        grey = np.clip((view.image[row] - low) / max(high - low, 1e-9), 0, 1)
        labels = {"prediction": view.prediction[row]}
        if view.truth is not None:
            labels["truth"] = view.truth[row]
        for column, kind in enumerate(columns):
            _draw(axes[row, column], grey, kind, labels, view.aspect)
            if row == 0:
                axes[row, column].set_title(kind, fontsize=9)
        if view.depth > 1:
            axes[row, 0].set_ylabel(f"{name}, slice {z + 1}/{view.depth}", fontsize=9)
    add_legend(figure, class_names, errors=view.truth is not None)
    return save_png(figure, path)


def pick_slices(truth: Volume, prediction: Volume) -> list[tuple[str, int]]:
    """The slices in the middle of the basal, middle and apical third of the labelled ones.

    The larger end of the heart is its base. Where the truth is empty the prediction decides, and
    where both are, all slices count. With fewer than three slices there are fewer rows.

    Returns:
        [(name, slice index)], from base to apex.
    """
    for labels in (truth, prediction, np.ones_like(truth)):
        area = (labels > 0).sum(axis=(1, 2))
        used = np.flatnonzero(area)
        if used.size:
            break
    if area[used[: (used.size + 1) // 2]].sum() < area[used[used.size // 2 :]].sum():
        used = used[::-1]
    chosen = {used[int(share * used.size)]: name for name, share in _THIRDS.items()}
    return [(name, int(z)) for z, name in chosen.items()]


def error_map(truth: Volume, prediction: Volume) -> npt.NDArray[np.uint8]:
    """0 where right, else 1, 2, 3 for the kinds of `ERROR_COLOURS` in their order; same shape."""
    kinds = np.zeros(truth.shape, np.uint8)
    kinds[(truth == 0) & (prediction > 0)] = 1
    kinds[(truth > 0) & (prediction == 0)] = 2
    kinds[(truth > 0) & (prediction > 0) & (truth != prediction)] = 3
    return kinds


def overlay(
    grey: npt.NDArray[np.floating], labels: Volume, colours: Sequence[str], *, tint: float = _TINT
) -> npt.NDArray[np.float64]:
    """Image (H, W[, 3]) in [0, 1] with label k > 0 tinted in colours[k - 1]: RGB (H, W, 3)."""
    from matplotlib.colors import to_rgb

    rgb = np.array(grey, dtype=np.float64)
    if rgb.ndim == 2:
        rgb = np.repeat(rgb[..., None], 3, axis=-1)
    for index in range(1, int(labels.max(initial=0)) + 1):
        colour = np.array(to_rgb(colours[(index - 1) % len(colours)]))
        rgb[labels == index] = (1 - tint) * rgb[labels == index] + tint * colour
    return rgb


def _draw(
    axes: Axes, grey: npt.NDArray[np.floating], kind: str, labels: dict[str, Volume], aspect: float
) -> None:
    if kind == "error":
        shown, colours = error_map(labels["truth"], labels["prediction"]), ERROR_COLOURS.values()
        picture = overlay(0.6 * grey, shown, tuple(colours), tint=0.9)
    elif kind == "image":
        picture = overlay(grey, np.zeros(grey.shape[:2], np.uint8), CLASS_COLOURS)
    else:
        picture = overlay(grey, labels[kind], CLASS_COLOURS)
    axes.imshow(picture, aspect=aspect, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def add_legend(figure: Figure, class_names: Sequence[str], *, errors: bool) -> None:
    """Puts the classes' colours, and those of errors, below the figure."""
    from matplotlib.patches import Patch

    colours = {
        name: CLASS_COLOURS[index % len(CLASS_COLOURS)]
        for index, name in enumerate(class_names[1:])
    }
    if errors:
        colours |= ERROR_COLOURS
    patches = [Patch(facecolor=c, label=literal(name)) for name, c in colours.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize=8, frameon=False)


def literal(text: str) -> str:
    """Names are names for matplotlib, also those with a $, which would begin a formula."""
    return text.replace("$", r"\$")


def crop(labelled: Volume) -> tuple[slice, slice]:
    """Rows and columns around everything labelled in the volume (Z, H, W), with a margin."""
    sides = []
    for axis in (1, 2):
        size = labelled.shape[axis]
        used = np.flatnonzero((labelled > 0).any(axis=(0, 3 - axis)))
        if used.size == 0:
            sides.append(slice(0, size))
            continue
        margin = max(8, round(_MARGIN * (used[-1] - used[0] + 1)))
        sides.append(slice(max(0, int(used[0]) - margin), min(size, int(used[-1]) + margin + 1)))
    return sides[0], sides[1]


def save_png(figure: Figure, path: Path, *, dpi: int = 120) -> Path:
    """Writes a figure as PNG, whole or not at all; folders are made."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=dpi)
    with whole_file(path, otherwise="choose another folder with outputs=...") as temporary:
        temporary.write_bytes(buffer.getvalue())
    return path
