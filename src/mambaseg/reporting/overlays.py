"""The best, the median and the worst patient, all networks side by side with truth and errors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mambaseg.reporting.collect import Comparison, Entry
from mambaseg.reporting.figures import (
    CLASS_COLOURS,
    ERROR_COLOURS,
    add_legend,
    crop,
    error_map,
    literal,
    overlay,
    save_png,
)
from mambaseg.reporting.runs import RunData
from mambaseg.reporting.scores import best_middle_worst, patient_scores
from mambaseg.storage.untrusted import ForeignFileError, read_arrays

if TYPE_CHECKING:
    from mambaseg.reporting.plots import Picture

Arrays = dict[str, npt.NDArray[Any]]
Pixels = npt.NDArray[np.float64]

_NAMES = ("image", "truth", "prediction", "slices")  # of a case's arrays
_SIDE = 1024  # pixels of a slice: a picture has dozens of them
_GAP = 2  # pixels between cells
_DARK, _LIGHT = "#141414", "#e8e8e8"  # fits the images, and pages of either colour
log = logging.getLogger(__name__)


def overlay_pictures(comparison: Comparison, folder: Path, prefix: str) -> list[Picture]:
    """A picture per shown patient; none where no run has overlays of them."""
    from mambaseg.reporting.plots import Picture

    pictures = []
    scores = {entry.label: patient_scores(entry, "dice") for entry in comparison.entries}
    for place, patient in best_middle_worst(comparison.entries).items():
        columns = [(e, _first_run(e, patient)) for e in comparison.entries]
        cases = _cases(comparison.entries, patient)
        loaded = {e.label: _load(run, cases) for e, run in columns if run is not None}
        _leave_out_other_images(loaded)
        if not any(loaded.values()):
            continue
        own = [scores[label].get(patient) for label in loaded]
        mean = fmean(score for score in own if score is not None)
        path = folder / f"{prefix}overlay-{place}.png"
        _picture(loaded, cases, comparison.classes, scores, patient, path)
        seeds = {run.seed for _, run in columns if run is not None}
        arrays = [case for own in loaded.values() for case in own.values()]
        flat = all(_is_flat(case) for case in arrays)
        slices = (
            "" if flat else "Slices at a quarter, half and three quarters of the labelled ones. "
        )
        subject = comparison.subject
        caption = (
            f"{patient}: mean foreground Dice {mean:.3f} over networks and seeds. {slices}"
            f"Predictions of seed {', '.join(map(str, sorted(seeds)))}; under each name its mean "
            f"Dice of this {subject}."
        )
        pictures.append(Picture(f"The {place} {subject}", caption, path))
    return pictures


def _is_flat(arrays: Arrays) -> bool:
    """Whether a case's arrays are of a picture rather than of a volume."""
    return arrays["image"].ndim == 4 or arrays["slices"].tolist() == [0]


def _first_run(entry: Entry, patient: str) -> RunData | None:
    """The lowest seed's run that tested the patient and kept overlays."""
    for run in entry.runs:
        tested = any(row["patient"] == patient for row in run.rows)
        if tested and (run.path / "overlays.npz").is_file():
            return run
    return None


def _cases(entries: Sequence[Entry], patient: str) -> list[str]:
    rows = [row for entry in entries for run in entry.runs for row in run.rows]
    return sorted({row["case"] for row in rows if row["patient"] == patient})


def _load(run: RunData, cases: Sequence[str]) -> dict[str, Arrays]:
    """Case -> image (S, H, W[, 3]), truth, prediction (S, H, W) and slices (S,), if it is there."""
    keys = [f"{case}/{name}" for case in cases for name in _NAMES]
    try:
        found = read_arrays(run.path / "overlays.npz", keys, _fits)
        held = [case for case in cases if f"{case}/image" in found]
        loaded = {case: {name: found[f"{case}/{name}"] for name in _NAMES} for case in held}
        for arrays in loaded.values():
            if len({arrays[name].shape[:3] for name in _NAMES[:3]}) > 1:
                raise ForeignFileError("its arrays differ in shape")
            if len(arrays["slices"]) != len(arrays["image"]):
                raise ForeignFileError("its arrays differ in their number of slices")
    except (OSError, ForeignFileError, KeyError) as error:
        log.warning("no overlays of %s: overlays.npz: %s", run.path, error)
        return {}
    return loaded


def _leave_out_other_images(loaded: dict[str, dict[str, Arrays]]) -> None:
    """Of each case the overlays that are not of the first network's image size."""
    for case in {case for own in loaded.values() for case in own}:
        holders = {label: own for label, own in loaded.items() if case in own}
        size = next(iter(holders.values()))[case]["image"].shape[1:3]
        for label, own in holders.items():
            if own[case]["image"].shape[1:3] != size:
                log.warning("no overlay of %s, %s: its image has another size", label, case)
                del own[case]


def _fits(key: str, array: npt.NDArray[Any]) -> bool:
    """Whether an array is as `mambaseg.training.callbacks.overlay_slices` makes it."""
    if key.endswith("/slices"):
        return array.ndim == 1 and array.dtype == np.int16
    colours = key.endswith("/image") and array.ndim == 4 and array.shape[3] == 3
    sizes = (array.ndim == 3 or colours) and len(array) <= 3 and min(array.shape) > 0
    return sizes and max(array.shape) <= _SIDE and array.dtype == np.uint8


def _picture(
    loaded: dict[str, dict[str, Arrays]],
    cases: Sequence[str],
    classes: Sequence[str],
    scores: dict[str, dict[str, float | None]],
    patient: str,
    path: Path,
) -> None:
    """Rows: slices of each case. Columns: image, truth, then prediction and error per network."""
    from matplotlib.figure import Figure

    titles = ["image", "truth"]
    for label in loaded:
        score = scores[label].get(patient)
        said = "" if score is None else f"\n{score:.3f}"
        titles += [f"{literal(label.replace(' · ', chr(10)))}{said}", "error"]
    rows: list[list[Pixels | None]] = []
    names = []
    for case in cases:
        own = {label: arrays[case] for label, arrays in loaded.items() if case in arrays}
        if own:
            rows += _rows(own, list(loaded))
            phase = case.removeprefix(patient).strip("_")
            first = next(iter(own.values()))
            told = [""] if _is_flat(first) else [f"slice {z + 1}" for z in first["slices"]]
            names += [literal(f"{phase} {one}".strip()) for one in told]
    canvas, (height, width) = mosaic(rows)
    figure = Figure(facecolor=_DARK)
    inches = 1.55 if len(titles) > 6 else 2.2  # a cell's width
    lines = max(title.count("\n") for title in titles)
    figure.set_size_inches(
        inches * len(titles) + 0.4, inches * height / width * len(rows) + 0.65 + 0.15 * lines
    )
    figure.set_layout_engine("constrained")
    axis = figure.subplots()
    axis.imshow(canvas, interpolation="nearest")
    axis.set_anchor("S")  # room that is left is for the names above
    axis.xaxis.tick_top()
    axis.set_xticks([(k + 0.5) * width for k in range(len(titles))], titles, fontsize=8)
    axis.set_yticks([(k + 0.5) * height for k in range(len(rows))], names, fontsize=8)
    axis.tick_params(length=0, colors=_LIGHT)
    axis.spines[:].set_visible(False)
    add_legend(figure, ("background", *classes), errors=True)
    for text in figure.legends[0].get_texts():
        text.set_color(_LIGHT)
    save_png(figure, path, dpi=100)


def _rows(own: dict[str, Arrays], columns: Sequence[str]) -> list[list[Pixels | None]]:
    """Cells of one case, a row per slice, cut to the surroundings of what is labelled.

    A picture is shown whole: what is around it tells where in the scene it is.
    """
    first = next(iter(own.values()))
    labels = [first["truth"], *(arrays["prediction"] for arrays in own.values())]
    window = np.s_[:, :] if _is_flat(first) else crop(np.concatenate(labels))
    rows = []
    for index in range(len(first["slices"])):
        grey = first["image"][index][window] / 255
        truth = first["truth"][index][window]
        cells: list[Pixels | None] = [
            overlay(grey, np.zeros_like(truth), CLASS_COLOURS),
            overlay(grey, truth, CLASS_COLOURS),
        ]
        for label in columns:
            cells += _predicted(own.get(label), index, window, grey, truth)
        rows.append(cells)
    return rows


def mosaic(rows: Sequence[Sequence[Pixels | None]]) -> tuple[Pixels, tuple[int, int]]:
    """Puts cells (h, w, 3) of any size into one dark picture, centred in cells of one size.

    One picture, because a hundred axes take matplotlib half a minute to lay out.

    Returns:
        The picture, and height and width of a cell with its gap.
    """
    from matplotlib.colors import to_rgb

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


def _predicted(
    own: Arrays | None, index: int, window: Any, grey: npt.NDArray[Any], truth: npt.NDArray[Any]
) -> list[Pixels | None]:
    if own is None or index >= len(own["prediction"]):
        return [None, None]
    labels = own["prediction"][index][window]
    errors = error_map(truth, labels)
    return [
        overlay(grey, labels, CLASS_COLOURS),
        overlay(0.6 * grey, errors, tuple(ERROR_COLOURS.values()), tint=0.9),
    ]
