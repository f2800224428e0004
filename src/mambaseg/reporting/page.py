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

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from mambaseg.errors import counted
from mambaseg.evaluation.metrics import Metric
from mambaseg.reporting.cards import Picture
from mambaseg.reporting.collect import Comparison
from mambaseg.reporting.grid import Grid, signed
from mambaseg.reporting.paired import Paired, digits, verdict
from mambaseg.reporting.status import RunState, status_grid, summary
from mambaseg.storage.run_folder import slug
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
    own = {
        "signed": signed,
        "counted": counted,
        "verdict": verdict,
        "digits": digits,
        "drawn": _drawn,
        "slug": slug,
    }
    environment.filters |= own
    return environment.get_template(path.name)


_BESIDE = {  # title of a table, and the name of the figure beside it
    "Clinical indices": "agreement",
    "Calibration": "reliability",
    "What the networks cost": "costs",
}


@dataclass(frozen=True)
class Section:
    """A comparison with everything that is shown of it."""

    comparison: Comparison
    cautions: list[str]  # sentences on top
    pairs: list[tuple[Metric, list[Paired]]]  # on each metric, Dice first; empty with one entry
    grids: list[Grid]  # in the order of the page, the one of the scores first
    protocol: Grid
    figures: list[Picture] = field(default_factory=list)

    @property
    def blocks(self) -> list[Grid | Picture]:
        """Tables and figures in the order of the page."""
        later = (*_BESIDE.values(), "curves")
        kept = {words: [p for p in self.figures if words in p.path.stem] for words in later}
        scores, *grids = self.grids
        blocks: list[Grid | Picture] = [scores]
        blocks += [p for p in self.figures if not any(p in own for own in kept.values())]
        for grid in grids:
            blocks += [grid, *kept.get(_BESIDE.get(grid.title, ""), ())]
        return [*blocks, *kept["curves"]]


def page(
    name: str,
    sections: Sequence[Section],
    others: Sequence[Grid],
    runs: Sequence[RunState],
    problems: Sequence[str],
    *,
    images: bool = True,
    files: Sequence[str] = (),
) -> str:
    """The page of an experiment: sections with their figures, tables of other tasks, all runs.

    `problems` are the runs that could not be read, one sentence each; `images` is whether pictures
    of patients were asked for; `files` are the names of the tables written beside the page.
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
        images=images,
        files=files,
        sections=sections,
        others=others,
        counts=summary(runs),
        all_done=all(run.state == "done" for run in runs),
        runs=status_grid(runs),
    )


def _drawn(picture: Picture) -> Markup:
    """A plot as SVG; one too wide for a phone scrolls, or its text would be beyond reading."""
    svg = str(picture.svg)
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])  # type: ignore[index]
    style = f"width:100%;min-width:{round(0.85 * width)}px;max-width:{round(1.6 * width)}px"
    named = f'<svg role="img" aria-label="{escape(picture.title)}" style="{style}"'
    return Markup(svg.replace("<svg", named, 1))
