"""One self-contained HTML page: tables, sentences and figures, nothing fetched from anywhere.

`templates/page.html` holds the markup. All text is escaped by Jinja2, as it comes from run folders
that somebody else may have made.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from mambaseg.evaluation.metrics import Metric
from mambaseg.reporting.collect import Comparison
from mambaseg.reporting.figures import Picture
from mambaseg.reporting.grid import Grid, counted, signed
from mambaseg.reporting.paired import Paired, verdict
from mambaseg.reporting.status import RunState, status_grid, summary
from mambaseg.storage.untrusted import printable

_TEMPLATES = Path(__file__).parent / "templates"


def template_of(path: Path) -> Template:
    """A template that escapes all text and refuses a name that it is not given."""
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=True,
        # nothing that would reorder or hide the text around it; markup of ours as it is
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    slug = {"slug": lambda text: re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")}
    environment.filters |= {"signed": signed, "counted": counted, "verdict": verdict, **slug}
    return environment.get_template(path.name)


@dataclass(frozen=True)
class Section:
    """A comparison with everything that is shown of it."""

    comparison: Comparison
    cautions: list[str]  # sentences on top
    pairs: list[tuple[Metric, list[Paired]]]  # on each metric, Dice first; empty with one entry
    grids: list[Grid]  # in the order of the page, the one of the scores first
    figures: list[Picture] = field(default_factory=list)

    @property
    def blocks(self) -> list[Grid | Picture]:
        """Tables and figures in the order of the page."""
        agreements = [picture for picture in self.figures if "agreement" in picture.path.stem]
        curves = [picture for picture in self.figures if "curves" in picture.path.stem]
        scores, *grids = self.grids
        blocks: list[Grid | Picture] = [scores]
        blocks += [p for p in self.figures if p not in agreements and p not in curves]
        for grid in grids:
            blocks += [grid, *(agreements if grid.title == "Clinical indices" else ())]
        return [*blocks, *curves]


def page(
    name: str,
    sections: Sequence[Section],
    others: Sequence[Grid],
    runs: Sequence[RunState],
    problems: Sequence[str],
) -> str:
    """The page of an experiment: sections with their figures, tables of other tasks, all runs.

    `problems` are the runs that could not be read, one sentence each.
    """
    template = template_of(_TEMPLATES / "page.html")
    script = (_TEMPLATES / "page.js").read_text(encoding="utf-8")
    return template.render(
        name=name,
        # a browser may show the page, and run the one script that is ours
        digest=base64.b64encode(sha256(f"\n{script}".encode()).digest()).decode(),
        script=Markup(script),
        style=Markup((_TEMPLATES / "page.css").read_text(encoding="utf-8")),
        problems=problems,
        sections=sections,
        figures=[[_figure(block) for block in section.blocks] for section in sections],
        others=others,
        counts=summary(runs),
        all_done=all(run.state == "done" for run in runs),
        runs=status_grid(runs),
    )


def _figure(block: Grid | Picture) -> dict[str, Any]:
    """What the template needs of a picture: drawn in place, or the bytes of its PNG."""
    if isinstance(block, Grid):
        return {}
    if block.svg is not None:
        # text of a wide figure would shrink beyond reading on a phone: it scrolls instead
        width = float(re.search(r'viewBox="0 0 ([\d.]+)', block.svg)[1])  # type: ignore[index]
        style = f"width:100%;min-width:{round(0.85 * width)}px;max-width:{round(1.6 * width)}px"
        return {"svg": Markup(block.svg.replace("<svg", f'<svg role="img" style="{style}"', 1))}
    pixels = block.path.read_bytes()
    width = int.from_bytes(pixels[16:20], "big")  # where a PNG says it
    style = f"width:100%;min-width:{round(0.6 * width)}px;max-width:{width}px"
    return {"style": style, "data": base64.b64encode(pixels).decode()}
