"""The best, the median and the worst patient, all networks side by side with truth and errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mambaseg.reporting.collect import Comparison, Entry, RunData
from mambaseg.reporting.figures import (
    CLASS_COLOURS,
    ERROR_COLOURS,
    add_legend,
    crop,
    error_map,
    overlay,
    save_png,
)
from mambaseg.reporting.scores import best_middle_worst, patient_scores

if TYPE_CHECKING:
    from mambaseg.reporting.plots import Picture

Arrays = dict[str, npt.NDArray[Any]]


def overlay_pictures(comparison: Comparison, folder: Path, prefix: str) -> list[Picture]:
    """A picture per shown patient; none where no run has overlays of them."""
    from mambaseg.reporting.plots import Picture

    pictures = []
    scores = {entry.label: patient_scores(entry, "dice") for entry in comparison.entries}
    for place, patient in best_middle_worst(comparison.entries).items():
        columns = [(e, _first_run(e, patient)) for e in comparison.entries]
        cases = _cases(comparison.entries, patient)
        loaded = {e.label: _load(run, cases) for e, run in columns if run is not None}
        if not any(loaded.values()):
            continue
        own = [scores[label].get(patient) for label in loaded]
        mean = fmean(score for score in own if score is not None)
        path = folder / f"{prefix}overlay-{place}.png"
        _picture(loaded, cases, comparison.classes, scores, patient, path)
        seeds = {run.seed for _, run in columns if run is not None}
        caption = (
            f"{patient}: mean foreground Dice {mean:.3f} over networks and seeds. Slices at a "
            "quarter, half and three quarters of the labelled ones. Predictions of seed "
            f"{', '.join(map(str, sorted(seeds)))}; under each name its mean Dice of this patient."
        )
        pictures.append(Picture(f"The {place} patient", caption, path))
    return pictures


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
    """Case -> image, truth, prediction (S, H, W) and slices (S,), of those the file holds."""
    names = ("image", "truth", "prediction", "slices")
    with np.load(run.path / "overlays.npz") as file:
        return {
            case: {name: file[f"{case}/{name}"] for name in names}
            for case in cases
            if f"{case}/image" in file
        }


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

    first: dict[str, Arrays] = {}
    windows = {}
    for case in cases:
        of_case = [arrays[case] for arrays in loaded.values() if case in arrays]
        if of_case:
            first[case] = of_case[0]
            labels = [of_case[0]["truth"], *(arrays["prediction"] for arrays in of_case)]
            windows[case] = crop(np.concatenate(labels))
    rows = [(case, index) for case, own in first.items() for index in range(len(own["slices"]))]
    columns = 2 + 2 * len(loaded)
    figure = Figure(figsize=(1.55 * columns, 1.6 * len(rows) + 0.7), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    titles = ["image", "truth"]
    for label in loaded:
        score = scores[label].get(patient)
        said = "" if score is None else f"\n{score:.3f}"
        titles += [f"{label.replace(' · ', chr(10))}{said}", "error"]
    for row, (case, index) in enumerate(rows):
        window = windows[case]
        grey = first[case]["image"][index][window] / 255
        truth = first[case]["truth"][index][window]
        shown: list[npt.NDArray[Any] | None] = [
            overlay(grey, np.zeros_like(truth), CLASS_COLOURS),
            overlay(grey, truth, CLASS_COLOURS),
        ]
        for arrays in loaded.values():
            shown += _predicted(arrays.get(case), index, window, grey, truth)
        for column, pixels in enumerate(shown):
            axis = axes[row, column]
            if pixels is not None:
                axis.imshow(pixels, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if row == 0:
                axis.set_title(titles[column], fontsize=8)
        phase = case.removeprefix(patient).strip("_")
        axes[row, 0].set_ylabel(f"{phase} slice {first[case]['slices'][index] + 1}", fontsize=8)
    add_legend(figure, ("background", *classes), errors=True)
    save_png(figure, path, dpi=100)


def _predicted(
    own: Arrays | None, index: int, window: Any, grey: npt.NDArray[Any], truth: npt.NDArray[Any]
) -> list[npt.NDArray[Any] | None]:
    if own is None or index >= len(own["prediction"]):
        return [None, None]
    labels = own["prediction"][index][window]
    errors = error_map(truth, labels)
    return [
        overlay(grey, labels, CLASS_COLOURS),
        overlay(0.6 * grey, errors, tuple(ERROR_COLOURS.values()), tint=0.9),
    ]
