"""Pictures of cases: a few slices with truth, predictions and errors, as one PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mambaseg.storage.colours import CLASS_COLOURS
from mambaseg.storage.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Arrays = dict[str, npt.NDArray[Any]]
Pixels = npt.NDArray[np.float64]

ERROR_COLOURS = {  # of Okabe & Ito's palette, and no class has them
    "false positive": "#D55E00",
    "false negative": "#CC79A7",
    "wrong class": "#F0E442",
}
IGNORED, UNLABELLED = 255, "no label"  # as in `mambaseg.data.classes`
HATCH = "#8c8c8c"  # of the stripes over pixels without a label
_STRIPE, _PERIOD = 2, 6  # pixels of a stripe, and from one to the next
_TINT = 0.6  # how much of its colour a class shows
_MARGIN = 0.45  # of the labelled area's size, left around it
_GAP = 2  # pixels between cells
_LONGEST = 1024  # pixels of a cell that is stretched
_DARK, _LIGHT = "#141414", "#e8e8e8"  # fits the images, and pages of either colour


def case_slices(
    image: npt.NDArray[Any],
    truth: npt.NDArray[Any] | None,
    prediction: npt.NDArray[Any],
    aspect: float | None = None,
) -> Arrays:
    """The slices of a case that are shown, small enough to keep for every case.

    They are at a quarter, half and three quarters of the slices that hold foreground in the truth
    (where it is empty: in the prediction, then of all slices); fewer where there are fewer.

    Args:
        image: (Z, H, W) intensities on any scale, or colours (1, H, W, 3) as bytes.
        truth: (Z, H, W) labels, None where there are none.
        prediction: (Z, H, W) labels.
        aspect: height of a pixel by its width; where it is not given, it is not kept.

    Returns:
        `image`, `truth`, `prediction`: uint8 (S, H, W) with S <= 3, the image's 1st to 99th
        percentile of the volume spread over 0..255, or its colours (1, H, W, 3); `slices`: their
        indices (S,); `aspect` ().
    """
    volumes = {"truth": truth, "prediction": prediction}
    labels = {kind: volume for kind, volume in volumes.items() if volume is not None}
    for volume in (*labels.values(), np.ones_like(prediction)):
        used = np.flatnonzero(_structures(volume).any(axis=(1, 2)))
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
        **{kind: volume[chosen].astype(np.uint8) for kind, volume in labels.items()},
        "slices": chosen.astype(np.int16),
        **({} if aspect is None else {"aspect": np.array(aspect, np.float32)}),
    }


def draw_cases(
    cases: Mapping[str, Mapping[str, Arrays]],
    *,
    headings: Mapping[str, str],
    class_names: Sequence[str],
    path: Path,
    title: str = "",
) -> Path:
    """Write a picture: a row per slice; image, truth, then prediction and error of each network.

    Slices are cut to the surroundings of what is labelled; a picture is shown whole. Where the
    truth is IGNORED it is striped, and nothing is an error. An error is
    *false positive* where the truth is background, *false negative* where the prediction is, and
    *wrong class* where both are different structures.

    Args:
        cases: name of a case, which may be empty -> network -> `case_slices`. A network that lacks
            a case leaves its cells empty; without truth there are no errors.
        headings: network -> the text above its predictions.
        class_names: the background first.
        path: PNG to write; folders are made, an existing file is replaced.
        title: line above the picture.
    """
    from matplotlib.figure import Figure

    known = any("truth" in arrays for own in cases.values() for arrays in own.values())
    titles = ["image", "truth"] if known else ["image"]
    for heading in headings.values():
        titles += [literal(heading), "error"] if known else [literal(heading)]
    rows, names = overlay_cells(cases, list(headings))
    canvas, (height, width) = mosaic(rows)
    figure = Figure(facecolor=_DARK)
    inches = 1.55 if len(titles) > 6 else 2.2  # a cell's width
    lines = max(heading.count("\n") for heading in titles) + (2 if title else 0)
    tall = inches * height / width * len(rows)
    figure.set_size_inches(inches * len(titles) + 0.4, tall + 0.65 + 0.15 * lines)
    figure.set_layout_engine("constrained")
    if title:
        figure.suptitle(literal(title), fontsize=10, color=_LIGHT, wrap=True)
    axis = figure.subplots()
    axis.imshow(canvas, interpolation="nearest")
    axis.set_anchor("S")  # room that is left is for the names above
    axis.xaxis.tick_top()
    axis.set_xticks([(k + 0.5) * width for k in range(len(titles))], titles, fontsize=8)
    places = [(k + 0.5) * height for k in range(len(rows))]
    axis.set_yticks(places, map(literal, names), fontsize=8)
    axis.tick_params(length=0, colors=_LIGHT)
    axis.spines[:].set_visible(False)
    colours = class_colours(class_names, errors=known, unlabelled=has_unlabelled(cases))
    _add_legend(figure, colours)
    return save_png(figure, path, dpi=100)


def is_flat(arrays: Arrays) -> bool:
    """Whether a case's slices are of a picture rather than of a volume."""
    return arrays["image"].ndim == 4 or arrays["slices"].tolist() == [0]


def overlay_cells(
    cases: Mapping[str, Mapping[str, Arrays]], networks: Sequence[str]
) -> tuple[list[list[Pixels | None]], list[str]]:
    """Cells of all cases, a row per slice, in the columns of `draw_cases`; and the rows' names."""
    rows: list[list[Pixels | None]] = []
    names = []
    for name, own in cases.items():
        first = next(iter(own.values()))
        rows += _rows(own, networks)
        told = [""] if is_flat(first) else [f"slice {z + 1}" for z in first["slices"]]
        names += [f"{name} {slice_name}".strip() for slice_name in told]
    return rows, names


def _rows(own: Mapping[str, Arrays], networks: Sequence[str]) -> list[list[Pixels | None]]:
    """Cells of one case, a row per slice, in the proportions of the body."""
    first = next(iter(own.values()))
    truth = first.get("truth")
    labels = [arrays["prediction"] for arrays in own.values()] + ([] if truth is None else [truth])
    window = np.s_[:, :] if is_flat(first) else _crop(np.concatenate(labels))
    aspect = next((float(one["aspect"]) for one in own.values() if "aspect" in one), 1.0)
    rows = []
    for index, z in enumerate(first["slices"]):
        grey = first["image"][index][window] / 255
        cells: list[Pixels | None] = [overlay(grey, np.zeros(grey.shape[:2], int), CLASS_COLOURS)]
        there = None if truth is None else truth[index][window]
        if there is not None:
            cells.append(overlay(grey, there, CLASS_COLOURS))
        for network in networks:
            arrays = own.get(network)
            if arrays is None or z not in arrays["slices"]:  # chosen by predictions: empty truth
                cells += [None] if there is None else [None, None]
                continue
            predicted = arrays["prediction"][arrays["slices"] == z][0][window]
            cells.append(overlay(grey, predicted, CLASS_COLOURS))
            if there is not None:
                errors, colours = _error_map(there, predicted), tuple(ERROR_COLOURS.values())
                cells.append(overlay(0.6 * grey, errors, colours, tint=0.9))
        rows.append([None if cell is None else _stretched(cell, aspect) for cell in cells])
    return rows


def _stretched(cell: Pixels, aspect: float) -> Pixels:
    """Pixels (H, W, 3) repeated along their longer side; fewer where it would become too large."""
    height, width = cell.shape[:2]
    tall, wide = (height * aspect, width) if aspect > 1 else (height, width / aspect)
    shrink = min(1.0, max(_LONGEST, height, width) / max(tall, wide))
    rows, columns = (max(1, round(side * shrink)) for side in (tall, wide))
    return cell[np.arange(rows) * height // rows][:, np.arange(columns) * width // columns]


def mosaic(rows: Sequence[Sequence[Pixels | None]]) -> tuple[Pixels, tuple[int, int]]:
    """Cells (h, w, 3) of any size centred in one dark picture; a cell's height and width in it."""
    from matplotlib.colors import to_rgb

    # one picture, because a hundred axes take matplotlib half a minute to lay out
    known = [cell for row in rows for cell in row if cell is not None]
    height = max(cell.shape[0] for cell in known) + _GAP
    width = max(cell.shape[1] for cell in known) + _GAP
    canvas = np.full((height * len(rows), width * len(rows[0]), 3), to_rgb(_DARK)[0])
    for i, row in enumerate(rows):
        for k, cell in enumerate(row):
            if cell is not None:
                top = i * height + (height - cell.shape[0]) // 2
                left = k * width + (width - cell.shape[1]) // 2
                canvas[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
    return canvas, (height, width)


def _error_map(truth: npt.NDArray[Any], prediction: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """0 where right, else 1, 2, 3 for the kinds of `ERROR_COLOURS`, or IGNORED; same shape."""
    wrong = [truth == 0, prediction == 0, truth > 0]
    errors = np.select([own & (truth != prediction) for own in wrong], [1, 2, 3])
    return np.where(truth == IGNORED, IGNORED, errors).astype(np.uint8)


def overlay(
    grey: npt.NDArray[np.floating],
    labels: npt.NDArray[Any],
    colours: Sequence[str],
    *,
    tint: float = _TINT,
) -> Pixels:
    """Image (H, W[, 3]) in [0, 1] with label k > 0 tinted in colours[k - 1]: RGB (H, W, 3).

    What is IGNORED gets grey stripes.
    """
    from matplotlib.colors import to_rgb

    rgb = np.array(grey, dtype=np.float64)
    if rgb.ndim == 2:
        rgb = np.repeat(rgb[..., None], 3, axis=-1)
    for index in map(int, np.unique(labels)):
        if index:
            colour = np.array(to_rgb(colours[(index - 1) % len(colours)]))
            inside = labels == index
            if index == IGNORED:  # the last one
                colour, inside = np.array(to_rgb(HATCH)), inside & _stripes(labels.shape)
                tint = _TINT
            rgb[inside] = (1 - tint) * rgb[inside] + tint * colour
    return rgb


def _stripes(shape: Sequence[int]) -> npt.NDArray[np.bool_]:
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return (rows + columns) % _PERIOD < _STRIPE


def has_unlabelled(cases: Mapping[str, Mapping[str, Arrays]]) -> bool:
    """Whether a truth among `case_slices` has pixels without a label."""
    arrays = (one for own in cases.values() for one in own.values())
    return any("truth" in one and bool((one["truth"] == IGNORED).any()) for one in arrays)


def _structures(labels: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Where labels are a class other than the background."""
    return (labels > 0) & (labels != IGNORED)


def class_colours(
    class_names: Sequence[str], *, errors: bool, unlabelled: bool = False
) -> dict[str, str]:
    """Colours of the classes (the background is first and has none), errors, and no label."""
    colours = dict(zip(class_names[1:], cycle(CLASS_COLOURS), strict=False))
    colours |= ERROR_COLOURS if errors else {}
    return colours | ({UNLABELLED: HATCH} if unlabelled else {})


def _add_legend(figure: Figure, colours: Mapping[str, str]) -> None:
    """Puts names and colours below the figure; stripes stand for no label."""
    from matplotlib.patches import Patch

    patches = [
        Patch(facecolor=c, label=literal(name)) if name != UNLABELLED
        else Patch(facecolor=_DARK, edgecolor=c, hatch="/////", label=name)
        for name, c in colours.items()
    ]  # fmt: skip
    figure.legend(
        handles=patches, loc="outside lower center", ncols=6, fontsize=8, frameon=False,
        labelcolor=_LIGHT,
    )  # fmt: skip


def literal(text: str) -> str:
    """Names are names for matplotlib, also those with a $, which would begin a formula."""
    return text.replace("$", r"\$")


def _crop(labelled: npt.NDArray[Any]) -> tuple[slice, slice]:
    """Rows and columns around everything labelled in the volume (Z, H, W), with a margin."""
    sides = [slice(None), slice(None)]
    for axis in (1, 2):
        used = np.flatnonzero(_structures(labelled).any(axis=(0, 3 - axis)))
        if used.size:
            margin = max(8, round(_MARGIN * (used[-1] - used[0] + 1)))
            sides[axis - 1] = slice(max(0, int(used[0]) - margin), int(used[-1]) + margin + 1)
    return sides[0], sides[1]


def save_png(figure: Figure, path: Path, *, dpi: int = 120) -> Path:
    """Writes a figure as PNG, whole or not at all; folders are made."""
    with whole_file(path, otherwise="choose another folder with outputs=...") as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
    return path
