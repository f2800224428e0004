"""One self-contained HTML page: tables, sentences and figures, nothing fetched from anywhere.

`templates/page.html` holds the markup. All text is escaped by Jinja2, as it comes from run folders
that somebody else may have made.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from markupsafe import escape as _escape

from mambaseg.reporting.grid import Grid, counted, signed
from mambaseg.reporting.paired import verdict
from mambaseg.reporting.plots import Picture
from mambaseg.reporting.status import RunState, status_grid, summary
from mambaseg.storage.untrusted import printable

if TYPE_CHECKING:
    from mambaseg.reporting.report import Section

_TEMPLATES = Path(__file__).parent / "templates"


def visible(value: Any) -> Any:
    """A text without what would reorder or hide the text around it; markup of ours as it is."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value)


def escape(text: str) -> str:
    """Text of a folder as text of a page: no markup, and nothing that reorders other text."""
    return str(_escape(printable(text)))


def environment() -> Environment:
    """Jinja2 with the folder of templates, autoescape and no silently missing value."""
    made = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined,
        finalize=visible, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters["slug"] = lambda text: re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return made


def page(
    name: str,
    sections: Sequence[Section],
    others: Sequence[Grid],
    runs: Sequence[RunState],
    problems: Sequence[str],
) -> str:
    """The whole page.

    Args:
        name: of the experiment.
        sections: one per comparison, figures drawn.
        others: tables of runs that are not of segmentation.
        runs: states of all runs.
        problems: runs that could not be read, one sentence each.
    """
    script = (_TEMPLATES / "page.js").read_text(encoding="utf-8")
    return environment().get_template("page.html").render(
        name=name,
        # a browser may show the page, and run the one script that is ours
        digest=base64.b64encode(sha256(f"\n{script}".encode()).digest()).decode(),
        script=Markup(script),
        style=Markup((_TEMPLATES / "page.css").read_text(encoding="utf-8")),
        lead=_lead(sections, others, runs),
        problems=[*_unfinished(runs, len(sections)), *problems],
        sections=[_section(f"part-{i + 1}", section) for i, section in enumerate(sections)],
        others=others,
        runs=status_grid(runs),
    )  # fmt: skip


def _lead(sections: Sequence[Section], others: Sequence[Grid], runs: Sequence[RunState]) -> str:
    told = f"Runs: {summary(runs)}."
    if not sections and others:
        return told
    entries = sum(len(section.comparison.entries) for section in sections)
    finished = sum(len(section.comparison.runs) for section in sections)
    return f"{counted(entries, 'row')} from {counted(finished, 'finished run')}. {told}"


def _unfinished(runs: Sequence[RunState], comparisons: int) -> list[str]:
    told = []
    if any(run.state != "done" for run in runs):
        told.append(
            f"Not all runs are finished ({summary(runs)}): the tables hold the finished ones. The "
            "list of runs at the end gives the causes."
        )
    if comparisons > 1:
        told.append(
            "The runs do not share data, split and metric convention. They are in separate "
            "sections; numbers of different sections are not comparable."
        )
    return told


def _section(anchor: str, section: Section) -> dict[str, Any]:
    found = section.pairs[0][1] if section.pairs else []  # of Dice
    return {
        "id": anchor,
        "title": section.comparison.title,
        "cautions": section.cautions,
        "blocks": [b if isinstance(b, Grid) else _figure(b) for b in section.blocks],
        "verdicts": [
            (
                f"{pair.first} and {pair.second}",
                f"{signed(pair.difference, 3)} Dice, {signed(pair.low, 3)} to "
                f"{signed(pair.high, 3)}",
                verdict(pair),
            )
            for pair in found
        ],
    }


def _figure(picture: Picture) -> dict[str, Any]:
    """A picture as the template shows it: drawn in place, or as the bytes of its PNG."""
    shown: dict[str, Any] = {"title": picture.title, "caption": picture.caption, "svg": ""}
    if picture.svg is not None:
        # text of a wide figure would shrink beyond reading on a phone: it scrolls instead
        width = float(re.search(r'viewBox="0 0 ([\d.]+)', picture.svg)[1])  # type: ignore[index]
        style = f"width:100%;min-width:{round(0.85 * width)}px;max-width:{round(1.6 * width)}px"
        shown["svg"] = Markup(picture.svg.replace("<svg", f'<svg role="img" style="{style}"', 1))
        return shown
    pixels = picture.path.read_bytes()
    width = int.from_bytes(pixels[16:20], "big")  # where a PNG says it
    style = f"width:100%;min-width:{round(0.6 * width)}px;max-width:{width}px"
    return shown | {"style": style, "data": base64.b64encode(pixels).decode()}
