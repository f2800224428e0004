"""Pictures of a report; overlays also as cards, one per network, that a page lays out by its width.

A figure of many networks is too wide for a phone. Cards fit any width, so that every prediction is
seen; `mambaseg.reporting.figures.draw_cases` draws the same cells as one picture for print.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mambaseg.reporting.figures import (
    Arrays,
    Pixels,
    class_colours,
    has_unlabelled,
    mosaic,
    overlay_cells,
)


@dataclass(frozen=True)
class Card:
    """What one network predicts of a patient; or image and truth."""

    heading: str
    columns: tuple[str, str]
    png: str  # base64


@dataclass(frozen=True)
class Deck:
    """All cards of a patient, image and truth first."""

    cards: tuple[Card, ...]
    rows: tuple[str, ...]  # names of the slices; empty where there is nothing to tell apart
    legend: Mapping[str, str]  # class or kind of error -> colour


@dataclass(frozen=True)
class Picture:
    """A figure on disk and for the page, there as SVG in the page's own colours or as cards."""

    title: str  # heading on the page
    caption: str  # what is shown, and of which runs
    path: Path  # the PNG
    svg: str | None = None
    deck: Deck | None = None


def deck(
    cases: Mapping[str, Mapping[str, Arrays]],
    *,
    headings: Mapping[str, str],
    class_names: Sequence[str],
) -> Deck:
    """The cards of a patient; arguments and cells as of `draw_cases`, all with a truth."""
    rows, names = overlay_cells(cases, list(headings))
    canvas, (_, width) = mosaic(rows)
    columns = [("image and truth", ("image", "truth"))]
    columns += [(heading, ("prediction", "error")) for heading in headings.values()]
    cards = [
        Card(heading, own, png(canvas[:, 2 * width * k : 2 * width * (k + 1)]))
        for k, (heading, own) in enumerate(columns)
    ]
    legend = class_colours(class_names, errors=True, unlabelled=has_unlabelled(cases))
    return Deck(tuple(cards), tuple(names), legend)


def png(pixels: Pixels) -> str:
    """Colours (H, W, 3) in [0, 1] as a PNG in base64."""
    from PIL import Image

    buffer = io.BytesIO()
    # no palette made to measure: it would merge the colours of small structures and errors
    Image.fromarray(np.round(255 * pixels).astype(np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
