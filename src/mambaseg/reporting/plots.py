"""Figures of a comparison: distributions, curves, agreement; as PNG, and as SVG for the page."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from mambaseg.evaluation.calibration import HOW, REGIONS
from mambaseg.reporting.calibration import reliability
from mambaseg.reporting.cards import Picture
from mambaseg.reporting.clinical import UNITS, Agreement, agreements_of, indices_of, over_seeds
from mambaseg.reporting.collect import Comparison, Entry
from mambaseg.reporting.costs import costs_of
from mambaseg.reporting.curves import DICE, LOSS, band
from mambaseg.reporting.figures import save_png
from mambaseg.reporting.grid import plus_minus
from mambaseg.reporting.runs import case_dice
from mambaseg.reporting.scores import estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette again, in an order that keeps neighbours apart on white and on black.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")
# With more entries than colours, the second seven, the third, ... are told apart by these.
LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
HATCHES = ("", "////", "....", "xxxx", "----")
MARKERS = ("o", "s", "^", "D", "v")
_MACS, _PASS = "multiply-adds per slice", "multiply-adds per pass"
# Stands for the page's text colour: nearly black in PNGs, replaced by currentColor in SVGs.
_INK = "#010203"
_STYLE = {
    "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK, "xtick.color": _INK,
    "ytick.color": _INK, "axes.spines.top": False, "axes.spines.right": False, "font.size": 9,
    "axes.titlesize": 9.5, "svg.fonttype": "none", "svg.hashsalt": "mambaseg",
    "text.parse_math": False,  # names are names, also those with $
    "figure.facecolor": "none", "axes.facecolor": "none", "legend.frameon": False,
}  # fmt: skip


def draw(comparison: Comparison, folder: Path, prefix: str = "") -> list[Picture]:
    """Draws every figure that the runs have data for; `prefix` is of the PNGs' names."""
    pictures = []
    for name, title, caption, make in _figures(comparison):
        path = folder / f"{prefix}{name}.png"
        figure = _styled(make)
        if figure is not None:
            svg = _to_svg(figure)
            figure.set_layout_engine("none")  # stays as laid out: that is half of the time
            figure.set_facecolor("white")
            pictures.append(Picture(title, caption, save_png(figure, path), svg))
    return pictures


def _figures(
    comparison: Comparison,
) -> Iterator[tuple[str, str, str, Callable[[], Figure | None]]]:
    """Name of the file, title, caption, and what draws it."""
    entries = comparison.entries
    seeds = "all seeds and folds together"
    yield (
        "dice-histogram", "Distribution of Dice",
        f"Mean foreground Dice of each test case, {seeds}; the line is the Dice of the table.",
        partial(_histograms, entries),
    )  # fmt: skip
    yield (
        "dice-classes", "Dice per class",
        f"Each test case, {seeds}. Box: quartiles and median; whiskers: 1.5 interquartile "
        "ranges; a missed structure counts as 0.",
        partial(_boxes, comparison),
    )  # fmt: skip
    yield (
        "curves", "Training",
        "Training loss, and Dice of the validation set (mean over the foreground classes; of "
        "several networks that learn together, the best one's). Lines: means over seeds and "
        "folds, up to the last step of the shortest run; bands: from the lowest to the highest.",
        partial(_curves, entries),
    )  # fmt: skip
    yield (
        "costs", "Dice and costs",
        "A point per network: Dice of the table (± standard deviation over seeds) against "
        "parameters, multiply-adds (two operations of a scan as one) of a slice with all passes "
        "that it takes, and the time of a test case where all were measured under one condition.",
        partial(_costs, entries),
    )  # fmt: skip
    yield (
        "reliability", "Reliability",
        "Test voxels in bins of confidence, all runs together: how many of a bin are right. On the "
        "diagonal confidence and accuracy agree; below it the network is too sure.",
        partial(_reliability, entries),
    )  # fmt: skip
    agreements = (
        "A point per patient and seed. Left: prediction against reference, the diagonal "
        "is agreement. Right (Bland–Altman): difference against mean; lines are the bias "
        "and the 95 % limits of agreement. All numbers are the table's: means over seeds."
    )
    for name, title in (
        ("EF", "Ejection fraction"), ("EDV", "End-diastolic volume"),
        ("ESV", "End-systolic volume"), ("mass", "Left ventricular mass"),
    ):  # fmt: skip
        draws = partial(_agreements, entries, name)
        yield f"agreement-{name.lower()}", title, agreements, draws


def _styled(make: Callable[[], Figure | None]) -> Figure | None:
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        return make()


def _to_svg(figure: Figure) -> str:
    """Inline SVG without any address in it, text in the page's font and colour."""
    import matplotlib as mpl

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)  # HTML knows what an svg is
    text = re.sub(r' (width|height)="[^"]*"', "", text, count=2)  # of the svg itself
    text = re.sub(r"font: (\d+(?:\.\d+)?px) [^;\"]*", r"font-size: \1; font-family: inherit", text)
    return text.replace(_INK, "currentColor")


def _new(width: float, height: float, layout: Any = "constrained") -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _again(index: int, styles: Sequence[Any]) -> Any:
    """The style of an entry's colour when it comes for the first, second, third time."""
    return styles[index // len(COLOURS) % len(styles)]


def _legend(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """A legend above the axes, for which the figure grows; in as many columns as its width has."""
    width, height = figure.get_size_inches()
    for columns in (3, 2, 1):
        parts = np.array_split([len(name) for name in names], columns)  # as matplotlib does
        if sum(0.5 + 0.066 * max(part, default=0) for part in parts) < width:
            break
    rows = math.ceil(len(names) / columns)
    figure.set_size_inches(width, height + 0.18 * max(0, rows - 1))
    figure.legend(handles, names, loc="outside upper left", ncols=min(columns, len(names)))


def _histograms(entries: Sequence[Entry]) -> Figure:
    values = [[v for run in e.runs for v in case_dice(run.rows).values()] for e in entries]
    low = min((v for own in values for v in own), default=0.0)
    edges = np.linspace(min(np.floor(20 * low) / 20, 0.95), 1, 25)
    figure = _new(7, 1.3 * len(entries) + 0.5)
    axes = figure.subplots(len(entries), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for index, (axis, own, entry) in enumerate(zip(axes, values, entries, strict=True)):
        axis.hist(own, edges, color=_colour(index), alpha=0.85)
        mean = estimate(entry, "dice").mean
        if mean is not None:
            axis.axvline(mean, color=_INK, linewidth=1, linestyle="--")
        told = f"{plus_minus(mean, None, 3)} ({len(own)} values)"
        axis.set_title(f"{entry.label}: {told}", loc="left")
        axis.set_ylabel("cases")
    axes[-1].set_xlabel("Dice")
    return figure


def _boxes(comparison: Comparison) -> Figure:
    entries, classes = comparison.entries, comparison.classes
    figure = _new(min(max(6.0, 0.45 * len(entries) * len(classes) + 1.5), 12), 3.4)
    axis = figure.subplots()
    width = 0.8 / len(entries)
    handles = []
    for index, entry in enumerate(entries):
        places = [k - 0.4 + width * (index + 0.5) for k in range(len(classes))]
        scored = [row for row in entry.rows if row["dice"] is not None]
        values = [[row["dice"] for row in scored if row["class_name"] == k] for k in classes]
        line = {"color": _INK, "linewidth": 0.9}
        drawn = axis.boxplot(
            values, positions=places, widths=0.85 * width, patch_artist=True, manage_ticks=False,
            boxprops={"edgecolor": _INK, "linewidth": 0.9}, whiskerprops=line, capprops=line,
            medianprops={**line, "linewidth": 1.6},
            flierprops={"marker": "o", "markersize": 2.5, "markeredgecolor": _colour(index)},
        )  # fmt: skip
        for box in drawn["boxes"]:
            box.set(facecolor=_colour(index), hatch=_again(index, HATCHES))
        handles.append(drawn["boxes"][0])
    axis.set_xticks(range(len(classes)), classes)
    axis.set_ylabel("Dice")
    axis.grid(axis="y", color=_INK, alpha=0.15)
    _legend(figure, handles, [entry.label for entry in entries])
    return figure


def _costs(entries: Sequence[Entry]) -> Figure | None:
    scores, costs = [estimate(e, "dice") for e in entries], [costs_of(e.runs) for e in entries]
    known = all(cost.passes for cost in costs)  # runs of earlier versions did not count them
    panels: dict[str, list[float | None]] = {
        "parameters": [cost.parameters for cost in costs],
        (_MACS if known else _PASS): [
            cost.macs and (cost.macs + (cost.scan_flops or 0) / 2) * ((known and cost.passes) or 1)
            for cost in costs
        ],
    }
    if len({place for cost in costs for place in cost.conditions}) == 1:
        panels["s per case"] = [fmean(c.seconds) if c.seconds else None for c in costs]
    panels = {name: xs for name, xs in panels.items() if sum(map(bool, xs)) > 1}
    if not panels:
        return None
    figure = _new(3.6 * len(panels), 3.4)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    drawn = {}
    for axis, (name, xs) in zip(axes, panels.items(), strict=True):
        for index, (x, score) in enumerate(zip(xs, scores, strict=True)):
            if x and score.mean is not None:
                style = {"color": _colour(index), "marker": _again(index, MARKERS)}
                drawn[index] = axis.errorbar(
                    x, score.mean, score.sd or 0, linestyle="", capsize=3, markersize=7, **style
                )
        _cost_axis(axis, name, [x for x in xs if x])
    axes[0].set_ylabel("Dice")
    _legend(figure, list(drawn.values()), [entries[index].label for index in drawn])
    return figure


def _cost_axis(axis: Axes, name: str, xs: Sequence[float]) -> None:
    """Parameters and operations differ by powers of ten; times are compared from zero."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axis.set_xlabel(name)
    axis.grid(color=_INK, alpha=0.15)
    if name not in ("parameters", _MACS, _PASS):
        axis.set_xlim(0, 1.15 * max(xs))
        return
    axis.set(xscale="log", xlim=(min(xs) / 2.3, 2.3 * max(xs)))  # two of 1, 2, 5 are in it
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(xs) < 20 * min(xs) else (1,)))
    axis.xaxis.set_major_formatter(EngFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())


def _curves(entries: Sequence[Entry]) -> Figure | None:
    figure = _new(9, 3.2)
    axes = figure.subplots(1, 2)
    drawn = 0
    for index, entry in enumerate(entries):
        for axis, key in zip(axes, (LOSS, DICE), strict=True):
            steps, mean, low, high = band([own[key] for own in entry.curves])
            style = {"linewidth": 1.2, "linestyle": _again(index, LINES), "label": entry.label}
            axis.plot(steps, mean, color=_colour(index), **style)
            if low != high:
                axis.fill_between(steps, low, high, color=_colour(index), alpha=0.18, linewidth=0)
            drawn += len(steps)
    if not drawn:
        return None
    for axis, title in zip(axes, ("training loss", "validation Dice"), strict=True):
        axis.set(title=title, xlabel="step")
        axis.grid(color=_INK, alpha=0.15)
    handles, names = axes[0].get_legend_handles_labels()
    _legend(figure, handles, names)
    return figure


def _reliability(entries: Sequence[Entry]) -> Figure | None:
    figure = _new(7, 6.4)
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    rows = ("as trained", "with the temperature")
    drawn = 0
    for index, entry in enumerate(entries):
        for row, column in np.ndindex(2, 2):
            points = reliability(entry, REGIONS[column], HOW[row])
            if len(points):
                axes[row, column].plot(*points.T, color=_colour(index), linewidth=1.2, marker="o",
                                       linestyle=_again(index, LINES), markersize=3,
                                       label=entry.label)  # fmt: skip
            drawn += len(points)
    if not drawn:
        return None
    for row, column in np.ndindex(2, 2):
        axis = axes[row, column]
        axis.axline((0, 0), slope=1, color=_INK, linewidth=0.8, alpha=0.6)
        axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axis.set_title(f"{REGIONS[column]} voxels, {rows[row]}", loc="left")
        axis.grid(color=_INK, alpha=0.15)
    figure.supxlabel("confidence", fontsize=9)
    figure.supylabel("accuracy", fontsize=9)
    _legend(figure, *axes[0, 0].get_legend_handles_labels())
    return figure


def _agreements(entries: Sequence[Entry], name: str) -> Figure | None:
    found = [[i for own in indices_of(e).values() for i in own] for e in entries]
    found = [[i for i in own if i.name.endswith(f" {name}") and None not in i] for own in found]
    kinds = sorted({index.name for own in found for index in own})
    if not kinds:
        return None
    labels = [textwrap.fill(entry.label, 26) for entry in entries]
    left = 0.65 + 0.15 * max(label.count("\n") + 1 for label in labels)  # of the axes, in inches
    width, height = 4.6 * len(kinds) + left - 0.5, 2.4 * len(entries) + 0.2
    figure = _new(width, height, None)  # to lay out dozens of axes takes longer than to draw them
    axes = figure.subplots(len(entries), 2 * len(kinds), squeeze=False)
    figure.subplots_adjust(
        left=left / width, right=1 - 0.1 / width, bottom=0.5 / height, top=1 - 0.3 / height,
        wspace=0.45, hspace=0.3,
    )  # fmt: skip
    for row, (entry, own) in enumerate(zip(entries, found, strict=True)):
        agreed = agreements_of(entry)
        for column, kind in enumerate(kinds):
            pairs = [(i.prediction, i.reference) for i in own if i.name == kind]
            points, differences = axes[row, 2 * column], axes[row, 2 * column + 1]
            _agreement_points(points, differences, pairs, _colour(row))
            title = f"{kind} ({UNITS[name]})"
            _agreement_numbers(points, differences, agreed.get(kind, []), title)
        axes[row, 0].set_ylabel(f"{labels[row]}\nprediction")
    _share_limits(axes)
    for axis in axes[:-1].flat:  # the scale is that of the last row
        axis.set_xlabel("")
        axis.tick_params(labelbottom=False)
    return figure


def _agreement_points(left: Axes, right: Axes, pairs: Any, colour: str) -> None:
    dots: dict[str, Any] = {"markersize": 3.5, "color": colour, "alpha": 0.75}
    left.plot([r for _, r in pairs], [p for p, _ in pairs], "o", **dots)
    right.plot([(p + r) / 2 for p, r in pairs], [p - r for p, r in pairs], "o", **dots)
    left.set(xlabel="reference", ylabel="prediction")
    right.set(xlabel="mean", ylabel="difference")
    for axis in (left, right):
        axis.locator_params(nbins=4)  # text takes most of the time
    if pairs:
        left.axline((pairs[0][1], pairs[0][1]), slope=1, color=_INK, linewidth=0.8, alpha=0.6)


def _agreement_numbers(left: Axes, right: Axes, seeds: Sequence[Agreement], title: str) -> None:
    """Lines and titles; a number is the mean over seeds, as in the table of indices."""
    known = {name: over_seeds(seeds, name) for name in ("bias", "low", "high", "r")}
    means = {name: fmean(values) if values else None for name, values in known.items()}
    left.set_title(f"{title}, r = {plus_minus(means['r'], None, 3)}", loc="left")
    bias = plus_minus(means["bias"], None, 1, sign=True)
    right.set_title("no value" if means["bias"] is None else f"bias {bias}", loc="left")
    for name, style in (("bias", "-"), ("low", "--"), ("high", "--")):
        if (value := means[name]) is not None:
            right.axhline(value, color=_INK, linewidth=0.9, linestyle=style)


def _share_limits(axes: Any) -> None:
    """Panels of one index get one scale, so that rows can be compared by eye."""
    for column in range(axes.shape[1]):
        own = axes[:, column]
        low = min(axis.get_xlim()[0] for axis in own), min(axis.get_ylim()[0] for axis in own)
        high = max(axis.get_xlim()[1] for axis in own), max(axis.get_ylim()[1] for axis in own)
        for axis in own:
            if column % 2 == 0:  # one scale for both directions: the diagonal is at 45 degrees
                limits = (min(low), max(high))
                axis.set(xlim=limits, ylim=limits, aspect="equal")
            else:
                axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
