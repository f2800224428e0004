"""Tables and pictures of image restoration: of one run, of many, and of single images."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mambaseg.errors import UserError
from mambaseg.reporting.collect import (
    RunData,
    entry_labels,
    read_identity,
    restores,
    run_folders,
    without_repeats,
)
from mambaseg.reporting.figures import save_png
from mambaseg.reporting.tables import UNDEFINED, Grid, seen_note
from mambaseg.reporting.valid import check_image_summary, reading
from mambaseg.storage.run_folder import RunFolder
from mambaseg.storage.untrusted import read_json

if TYPE_CHECKING:
    from rich.table import Table

_METRICS = {"psnr": ("PSNR dB", 2), "ssim": ("SSIM", 4)}
METRICS_OF_BOTH = tuple(metric + ending for ending in ("", "_hazy") for metric in _METRICS)
_ERROR = 0.25  # mean absolute difference of the channels that is drawn in the last colour


def restoration_table(summary: Mapping[str, Any], *, title: str, note: str = "") -> Table:
    """The scores of one test as a rich table: the images as they were, and restored.

    Args:
        summary: of `mambaseg.restoration.scores`.
        title: says which network and which data set.
        note: line below the table.
    """
    from rich import box
    from rich.table import Table

    caption = "\n".join(filter(None, [note, convention(summary)]))
    table = Table(title=title, caption=caption, caption_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("image")
    for heading, _ in _METRICS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for name, ending in (("hazy", "_hazy"), ("restored", "")):
        scores = [
            _plus_minus(summary["scores"][metric + ending], digits)
            for metric, (_, digits) in _METRICS.items()
        ]
        table.add_row(name, *scores, style="" if ending else "bold")
    return table


def convention(summary: Mapping[str, Any]) -> str:
    """One line: of how many images the numbers are, and how they were made."""
    count = summary["cases"]
    images = "1 image" if count == 1 else f"{count} images"
    return (
        f"{images} at their own size, RGB in [0, 1], not rounded; SSIM: Gaussian 11 × 11; "
        "± standard deviation over images."
    )


def _plus_minus(score: Mapping[str, float | None], digits: int) -> str:
    if score["mean"] is None:
        return UNDEFINED
    return f"{score['mean']:.{digits}f}" + (
        "" if score["sd"] is None else f" ± {score['sd']:.{digits}f}"
    )


def restoration_runs(folder: str | Path) -> tuple[list[RunData], list[str]]:
    """The finished restoration runs of an experiment, and what had to be left out.

    Raises:
        UserError: no such folder.
    """
    runs, problems = [], []
    for path in run_folders(folder):
        if RunFolder(path).finished and restores(path):
            try:
                runs.append(_read(path))
            except UserError as error:
                problems.append(f"left out: {error}")
    runs, repeated = without_repeats(runs, _setting)
    return runs, problems + repeated


def _setting(run: RunData) -> list[Any]:
    content = (run.record.get("data") or {}).get("fingerprint")
    return [run.setting, run.summary["data"], run.summary["split"], content, run.saw_cases]


def _read(path: Path) -> RunData:
    record, config = read_identity(path)
    with reading(path / "metrics.json") as file:
        summary = read_json(file)
        check_image_summary(summary, METRICS_OF_BOTH)
    return RunData(path, record, config, summary, ())


def restoration_grid(runs: Sequence[RunData]) -> Grid:
    """One row per network, setting and data; ± standard deviation over seeds."""
    entries: dict[str, list[RunData]] = defaultdict(list)
    for run in runs:
        entries[json.dumps(_setting(run), sort_keys=True, default=str)].append(run)
    groups = list(entries.values())
    names = entry_labels(groups)
    rows = []
    for name, members in sorted(zip(names, groups, strict=True), key=lambda entry: entry[0]):
        first = members[0]
        cells = [
            _over_seeds([run.summary["scores"][metric + ending]["mean"] for run in members], digits)
            for ending in ("", "_hazy")
            for metric, (_, digits) in _METRICS.items()
        ]
        split = f"{first.split['name']} ({first.split['hash']})"
        split += ", SEEN CASES" * first.saw_cases
        parameters = first.record.get("parameters")
        rows.append(
            [
                name, str(first.summary["data"]), split, *cells, str(first.summary["cases"]),
                str(len(members)), UNDEFINED if parameters is None else f"{parameters:,}",
            ]
        )  # fmt: skip
    headings = [heading for heading, _ in _METRICS.values()]
    header = [
        "network", "data", "split", *headings, *(f"{heading} (hazy)" for heading in headings),
        "images", "runs", "parameters",
    ]  # fmt: skip
    notes = [
        "Means over the test images at their own size, RGB in [0, 1], not rounded; ± standard "
        "deviation over the runs' seeds. (hazy): of the untreated images. Rows with other data or "
        "another split are not comparable."
    ]
    notes += [f"{run.path.name}: {seen_note(run.summary)}" for run in runs if run.saw_cases]
    return Grid("Image restoration", header, rows, notes, wide=3)


def _over_seeds(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return UNDEFINED
    spread = f" ± {stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{fmean(known):.{digits}f}{spread}"


def pair_figure(images: Mapping[str, npt.NDArray[np.uint8]], *, title: str, path: Path) -> Path:
    """Write hazy | restored | clear | error of one image as PNG.

    Args:
        images: `hazy`, `restored`, `clear`: (H, W, 3) bytes.
        title: line above the picture; says which data set it is.
        path: PNG to write; folders are made.
    """
    from matplotlib.figure import Figure

    height, width = images["clear"].shape[:2]
    figure = Figure(figsize=(12, 12 / 4 * height / width + 0.9))
    figure.set_layout_engine("constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, 4)
    for axis, (kind, image) in zip(axes, images.items(), strict=False):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(kind, fontsize=9)
    difference = np.abs(images["restored"].astype(float) - images["clear"]).mean(-1) / 255
    shown = axes[3].imshow(difference, cmap="magma", vmin=0, vmax=_ERROR, interpolation="nearest")
    axes[3].set_title("error", fontsize=9)
    figure.colorbar(shown, ax=axes[3], fraction=0.04)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    return save_png(figure, path)
