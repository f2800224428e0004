"""One self-contained HTML page: tables, sentences and figures, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from hashlib import sha256
from html import escape as _escape_html
from pathlib import Path
from typing import TYPE_CHECKING

from mambaseg.reporting.other_tables import paired
from mambaseg.reporting.plots import Picture
from mambaseg.reporting.statistics import verdict
from mambaseg.reporting.status import STATES, RunState, counted, status_grid
from mambaseg.reporting.tables import Grid, signed
from mambaseg.storage.untrusted import printable

if TYPE_CHECKING:
    from mambaseg.reporting.report import Section

_HERE = Path(__file__).parent
_LONG = 24  # letters: longer text may break into lines
_MANY = 30  # rows, of a table or a list; the comparison of 17 networks has 136 pairs


def escape(text: str) -> str:
    """Text of a folder as text of the page: no markup, and nothing that turns other text round."""
    return _escape_html(printable(text))


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
        runs: what became of all runs.
        problems: runs that could not be read, one sentence each.
    """
    links = [(f"part-{i + 1}", s.comparison.title) for i, s in enumerate(sections)]
    body = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="lead">{_count(sections, others)}Runs: {escape(counted(list(runs)))}.</p>',
        _navigation([*links, ("runs", "Runs")]) if len(sections) > 1 else "",
        _cautions(_unfinished(runs, len(sections)) + list(problems)),
        *(_section(f"part-{i + 1}", section) for i, section in enumerate(sections)),
        *(_table(g, heading=g.title, anchor=f"other-{_slug(g.title)}") for g in others),
        '<h2 id="runs">Runs</h2>',
        _table(status_grid(list(runs)), states=True),
        "<footer>Made by mambaseg's src/report.py from the run folders alone. Unrounded numbers: "
        "table.csv, paired.csv and clinical.csv beside this page; table.md and table.tex hold the "
        "tables.</footer>",
    ]
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            _policy(script),
            f"<title>{escape(name)} · mambaseg</title>",
            f"<style>\n{style}</style>\n</head>\n<body>",
            *filter(None, body),
            f"<script>\n{script}</script>\n</body>\n</html>\n",
        ]
    )


def _policy(script: str) -> str:
    """What a browser may do with the page: show it, and run the one script that is ours."""
    digest = base64.b64encode(sha256(f"\n{script}".encode()).digest()).decode()
    allowed = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return f'<meta http-equiv="Content-Security-Policy" content="{allowed}">'


def _count(sections: Sequence[Section], others: Sequence[Grid]) -> str:
    if not sections and others:
        return ""
    entries = sum(len(section.comparison.entries) for section in sections)
    runs = sum(len(e.runs) for section in sections for e in section.comparison.entries)
    return f"{_plural(entries, 'row')} from {_plural(runs, 'finished run')}. "


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _unfinished(runs: Sequence[RunState], comparisons: int) -> list[str]:
    said = []
    if any(run.state != "done" for run in runs):
        said.append(
            f"Not all runs are finished ({counted(list(runs))}): the tables hold the finished "
            "ones. The list of runs at the end names the causes."
        )
    if comparisons > 1:
        said.append(
            "The runs do not share data, split and metric convention. They are in sections of "
            "their own; numbers of different sections are not comparable."
        )
    return said


def _section(anchor: str, section: Section) -> str:
    main, *scores = section.scores
    rest = [section.clinical, section.cost, section.settings]
    tables = [*section.pairs, *scores, *(grid for grid in rest if grid is not None)]
    named = [*((g.title, "") for g in tables), *((p.title, "") for p in section.figures)]
    links = [(f"{anchor}-{_slug(title)}", title) for title, _ in named]
    parts = [
        f'<h2 id="{anchor}">{escape(section.comparison.title)}</h2>',
        _navigation(links, "inner"),
        _cautions(section.cautions),
        _table(main, heading="Test scores", anchor=f"{anchor}-scores"),
        _verdicts(section),
    ]
    by_title = {picture.title: picture for picture in section.figures}
    # a picture stands with the table that it belongs to
    first = ["Distribution of Dice", "Dice per class"]
    clinical = [t for t in by_title if "volume" in t or "fraction" in t or "mass" in t]
    parts += [_figure(by_title.pop(title), anchor) for title in first if title in by_title]
    agreements = [by_title.pop(title) for title in clinical]
    overlays = [by_title.pop(title) for title in list(by_title) if title.startswith("The ")]
    parts += [_figure(picture, anchor) for picture in overlays]
    for grid in tables:
        parts.append(_table(grid, heading=grid.title, anchor=f"{anchor}-{_slug(grid.title)}"))
        if grid is section.clinical:
            parts += [_figure(picture, anchor) for picture in agreements]
    parts += [_figure(picture, anchor) for picture in by_title.values()]
    return "\n".join(filter(None, parts))


def _navigation(links: Iterable[tuple[str, str]], kind: str = "") -> str:
    items = "".join(f'<a href="#{escape(to)}">{escape(text)}</a>' for to, text in links)
    return f'<nav class="{kind}">{items}</nav>'


def _cautions(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<div class="caution"><strong>Read first</strong><ul>{items}</ul></div>'


def _verdicts(section: Section) -> str:
    """The paired comparison of Dice in words."""
    if len(section.comparison.entries) < 2:
        return ""
    pairs = paired(section.comparison, "dice")
    items = "".join(
        f"<li><strong>{escape(pair.first)} and {escape(pair.second)}</strong> "
        f"({signed(pair.difference, 3)} Dice, {signed(pair.low, 3)} to {signed(pair.high, 3)}): "
        f"{escape(verdict(pair))}.</li>"
        for pair in pairs
    )
    return f'<h3>In words</h3><ul class="verdicts{_tall(len(pairs))}" tabindex="0">{items}</ul>'


def _tall(rows: int) -> str:
    """The class of what scrolls on its own, because it is longer than a screen or two."""
    return " tall" if rows > _MANY else ""


def _table(grid: Grid, *, heading: str = "", anchor: str = "", states: bool = False) -> str:
    def kind(index: int, cell: str = "") -> str:
        if index >= grid.wide:
            return ""
        return ' class="text long"' if len(cell) > _LONG else ' class="text"'

    head = "".join(
        f'<th scope="col" aria-sort="none"{kind(i)}><button type="button">{escape(c)}</button></th>'
        for i, c in enumerate(grid.header)
    )
    rows = []
    for number, row in enumerate(grid.rows):
        cells = "".join(f"<td{kind(i, cell)}>{escape(cell)}</td>" for i, cell in enumerate(row))
        if states:
            for state in STATES:
                cells = cells.replace(f'"text">{state}<', f'"text state-{state}">{state}<', 1)
        quoted = ' class="quoted"' if number in grid.quoted else ""
        rows.append(f"<tr{quoted}>{cells}</tr>")
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in grid.notes)
    title = f'<h3 id="{escape(anchor)}">{escape(heading)}</h3>' if heading else ""
    return (
        f'{title}<div class="scroll{_tall(len(rows))}" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{notes}"
    )


def _figure(picture: Picture, anchor: str) -> str:
    if picture.svg is not None:
        # text of a wide figure would shrink beyond reading on a phone: it scrolls instead
        width = float(re.search(r'viewBox="0 0 ([\d.]+)', picture.svg)[1])  # type: ignore[index]
        style = f"width:100%;min-width:{round(0.85 * width)}px;max-width:{round(1.6 * width)}px"
        content = picture.svg.replace("<svg", f'<svg role="img" style="{style}"', 1)
    else:
        pixels = picture.path.read_bytes()
        width = int.from_bytes(pixels[16:20], "big")  # where a PNG says it
        style = f"width:100%;min-width:{round(0.6 * width)}px;max-width:{width}px"
        data = f"data:image/png;base64,{base64.b64encode(pixels).decode()}"
        content = f'<img alt="{escape(picture.title)}" style="{style}" src="{data}">'
    return (
        f'<figure id="{anchor}-{_slug(picture.title)}"><h3>{escape(picture.title)}</h3>'
        f'<div class="scroll" tabindex="0">{content}</div>'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
