"""Writes an experiment's report: tables, statistics, figures and one self-contained page."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mambaseg.reporting.checks import cautions
from mambaseg.reporting.collect import Comparison, collect
from mambaseg.reporting.other_tables import (
    clinical_grid,
    clinical_rows,
    cost_grid,
    paired_grids,
    paired_rows,
    settings_grid,
)
from mambaseg.reporting.score_tables import grids, tidy
from mambaseg.reporting.status import RunState, states, status_grid
from mambaseg.reporting.tables import Grid, cell_text, markdown_text
from mambaseg.reporting.tasks import other_grids, other_runs
from mambaseg.storage.files import remove_abandoned, writing
from mambaseg.storage.run_folder import RunFolder

_TABLES = {"table.csv": tidy, "paired.csv": paired_rows, "clinical.csv": clinical_rows}
_UNFINISHED = ".unfinished-"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Section:
    """A comparison with everything that is shown of it.

    Attributes:
        comparison: whose.
        cautions: sentences on top.
        scores: tables of scores, the main one first.
        pairs: paired comparisons; empty with one entry.
        clinical: None where no patient has both phases.
        cost: parameters, operations, time.
        settings: None where the entries differ in nothing but the network.
        figures: filled in when they are drawn.
    """

    comparison: Comparison
    cautions: list[str]
    scores: list[Grid]
    pairs: list[Grid]
    clinical: Grid | None
    cost: Grid
    settings: Grid | None
    figures: list[Any] = field(default_factory=list)

    @property
    def grids(self) -> list[Grid]:
        """All tables in the order of the page."""
        main, *details = self.scores
        rest = (self.clinical, self.cost, self.settings)
        return [main, *self.pairs, *details, *(grid for grid in rest if grid is not None)]


def write_report(folder: str | Path) -> Path:
    """Reads the finished runs of an experiment and writes `<folder>/report/`.

    Args:
        folder: `outputs/<experiment>`.

    Returns:
        The page, `<folder>/report/index.html`.

    Raises:
        UserError: no such folder, or no finished run.
    """
    from mambaseg.reporting.page import page
    from mambaseg.reporting.plots import draw

    folder = Path(folder)
    comparisons, problems = collect(folder)
    found, unread = other_runs(folder)
    problems += unread
    others = other_grids(found)
    runs = states(folder)
    sections = [_section(comparison) for comparison in comparisons]
    place = folder / "report"
    with writing(place, otherwise="run report.py on a copy of the folder; an earlier report stays"):
        place.mkdir(exist_ok=True)
        remove_abandoned(place, f"{_UNFINISHED}*")
        with TemporaryDirectory(prefix=_UNFINISHED, dir=place) as unfinished:
            report = RunFolder(unfinished)  # for its writing of whole files
            _write_tables(report, sections, others, runs, problems)
            for index, section in enumerate(sections):
                prefix = f"{index + 1}-" if len(sections) > 1 else ""
                section.figures.extend(draw(section.comparison, report.path / "figures", prefix))
            html = page(folder.resolve().name, sections, others, runs, problems)
            report.write_text("index.html", html)
            _publish(report.path, place)
    return place / "index.html"


def _publish(unfinished: Path, place: Path) -> None:
    """Puts the files of a new report over those of the last one; this takes no more space."""
    for table in _TABLES:
        if not (unfinished / table).exists():  # nothing to say any more
            (place / table).unlink(missing_ok=True)
    for path in sorted(unfinished.rglob("*")):
        target = place / path.relative_to(unfinished)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            path.replace(target)


def _section(comparison: Comparison) -> Section:
    return Section(
        comparison=comparison,
        cautions=cautions(comparison),
        scores=grids(comparison),
        pairs=paired_grids(comparison),
        clinical=clinical_grid(comparison),
        cost=cost_grid(comparison),
        settings=settings_grid(comparison),
    )


def _write_tables(
    report: RunFolder,
    sections: list[Section],
    others: list[Grid],
    runs: list[RunState],
    problems: list[str],
) -> None:
    text = []
    for section in sections:
        text += [f"## {markdown_text(section.comparison.title)}", ""]
        text += [*(f"- {markdown_text(caution)}" for caution in section.cautions), ""]
        text += [grid.markdown() for grid in section.grids]
    text += [grid.markdown(level=2) for grid in others]
    text += [
        status_grid(runs).markdown(level=2),
        *(f"- {markdown_text(problem)}" for problem in problems),
    ]
    report.write_text("table.md", "\n".join(text).rstrip() + "\n")
    head = "% needs \\usepackage{booktabs}\n"
    latex = [grid.latex() for section in sections for grid in section.grids]
    latex += [grid.latex() for grid in others]
    report.write_text("table.tex", head + "\n".join(latex))
    for name, rows_of in _TABLES.items():
        found = [row for section in sections for row in rows_of(section.comparison)]
        rows = [{key: cell_text(value) for key, value in row.items()} for row in found]
        if rows:
            report.write_rows(name, rows)
