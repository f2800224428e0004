"""The best, the median and the worst patient, all networks side by side with truth and errors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from mambaseg.reporting.cards import Picture, deck
from mambaseg.reporting.collect import Comparison, Entry
from mambaseg.reporting.figures import Arrays, draw_cases, is_flat
from mambaseg.reporting.runs import RunData
from mambaseg.reporting.scores import best_middle_worst, patient_scores
from mambaseg.storage.untrusted import ForeignFileError, read_arrays

_NAMES = ("image", "truth", "prediction", "slices")  # of a case's arrays
_ALL = (*_NAMES, "aspect")  # earlier versions did not store the last one
OVERLAY = "overlay-"  # in the names of the pictures' files
_SIDE = 1024  # pixels of a slice: a picture has dozens of them
log = logging.getLogger(__name__)


def overlay_pictures(comparison: Comparison, folder: Path, prefix: str) -> list[Picture]:
    """A picture per shown patient; none where no run has overlays of them."""
    pictures = []
    entries, subject = comparison.entries, comparison.subject
    scores = {entry.label: patient_scores(entry, "dice") for entry in entries}
    for place, patient in best_middle_worst(entries).items():
        runs = {entry.label: run for entry in entries if (run := _first_run(entry, patient))}
        rows = [row for entry in entries for row in entry.rows]
        cases = sorted({row["case"] for row in rows if row["patient"] == patient})
        loaded = {label: _load(run, cases) for label, run in runs.items()}
        _leave_out_other_images(loaded)
        shown = {}
        for case in cases:
            if own := {label: held[case] for label, held in loaded.items() if case in held}:
                shown[case.removeprefix(patient).strip("_")] = own
        if not shown:
            continue
        found = {label: own.get(patient) for label, own in scores.items()}
        headings = {
            label: label.replace(" · ", "\n") + ("" if score is None else f"\n{score:.3f}")
            for label, score in found.items()
            if label in loaded
        }
        path = folder / f"{prefix}{OVERLAY}{place}.png"
        names = comparison.runs[0].config["data"]["class_names"]
        draw_cases(shown, headings=headings, class_names=names, path=path)
        mean = fmean(score for score in found.values() if score is not None)
        seeds = ", ".join(map(str, sorted({run.seed for run in runs.values()})))
        flat = all(is_flat(arrays) for own in shown.values() for arrays in own.values())
        slices = "Slices at a quarter, half and three quarters of the labelled ones. "
        caption = (
            f"{patient}: mean foreground Dice {mean:.3f} over networks and seeds. "
            f"{'' if flat else slices}Predictions of seed {seeds}; under each name its mean Dice "
            f"of this {subject}."
        )
        cards = deck(shown, headings=headings, class_names=names)
        pictures.append(Picture(f"The {place} {subject}", caption, path, deck=cards))
    return pictures


def _first_run(entry: Entry, patient: str) -> RunData | None:
    """The lowest seed's run that tested the patient and kept overlays."""
    tested = (run for run in entry.runs if any(row["patient"] == patient for row in run.rows))
    return next((run for run in tested if (run.path / "overlays.npz").is_file()), None)


def _load(run: RunData, cases: Sequence[str]) -> dict[str, Arrays]:
    """Case -> arrays as of `mambaseg.reporting.figures.case_slices`, if it is there."""
    keys = [f"{case}/{name}" for case in cases for name in _ALL]
    try:
        found = read_arrays(run.path / "overlays.npz", keys, _fits)
        held = [case for case in cases if f"{case}/image" in found]
        loaded = {
            case: {name: found[key] for name in _ALL if (key := f"{case}/{name}") in found}
            for case in held
        }
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
    """Whether an array is as `mambaseg.reporting.figures.case_slices` makes it."""
    if key.endswith("/slices"):
        return array.ndim == 1 and array.dtype == np.int16
    if key.endswith("/aspect"):
        return array.shape == () and bool(0 < array < np.inf)
    colours = key.endswith("/image") and array.ndim == 4 and array.shape[3] == 3
    sizes = (array.ndim == 3 or colours) and len(array) <= 3 and min(array.shape) > 0
    return sizes and max(array.shape) <= _SIDE and array.dtype == np.uint8
