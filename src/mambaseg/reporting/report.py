"""Writes an experiment's report: tables, statistics, figures and one self-contained page."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mambaseg.reporting.calibration import calibration_grid
from mambaseg.reporting.cautions import cautions
from mambaseg.reporting.clinical import clinical_grid, clinical_rows
from mambaseg.reporting.collect import Comparison, collect
from mambaseg.reporting.costs import cost_grid
from mambaseg.reporting.grid import Grid, cell_text, markdown_text
from mambaseg.reporting.overlays import overlay_pictures
from mambaseg.reporting.page import Section, page
from mambaseg.reporting.paired import paired_grid, pairs, verdict
from mambaseg.reporting.plots import draw
from mambaseg.reporting.protocol import protocol_grid
from mambaseg.reporting.status import states, status_grid
from mambaseg.reporting.tables import compared_metrics, score_grids, settings_grid, tidy
from mambaseg.reporting.tasks import other_grids
from mambaseg.storage.files import remove_abandoned, writing
from mambaseg.storage.run_folder import RunFolder

_UNFINISHED = ".unfinished-"
_FIGURE = re.compile(  # of the names of a report's pictures, with the number of the section
    r"(\d+-)?(dice-(histogram|classes)|curves|costs|reliability|(agreement|overlay)-\w+)\.png"
)


def section_of(comparison: Comparison) -> Section:
    """Everything but the figures."""
    metrics = compared_metrics(comparison) if len(comparison.entries) > 1 else []
    found = [(metric, pairs(comparison, metric)) for metric in metrics]
    scores, *details = score_grids(comparison)
    others = [clinical_grid(comparison), calibration_grid(comparison), cost_grid(comparison),
              settings_grid(comparison)]  # fmt: skip
    paired = [paired_grid(comparison, metric, own) for metric, own in found]
    grids = [scores, *paired, *details, *(grid for grid in others if grid is not None)]
    return Section(comparison, cautions(comparison), found, grids, protocol_grid(comparison))


def write_report(folder: str | Path, *, images: bool = True) -> Path:
    """Reads the finished runs of an experiment and writes `<folder>/report/index.html`.

    Without `images` no picture of a patient is in it or beside it, and the page says so.

    Raises:
        UserError: no such folder, or no finished run.
    """
    folder = Path(folder)
    comparisons, other_tasks, problems = collect(folder)
    others = other_grids(other_tasks)
    runs = states(folder)
    sections = [section_of(comparison) for comparison in comparisons]
    place = folder / "report"
    with writing(place, otherwise="report on a copy of the folder; an earlier report stays"):
        place.mkdir(exist_ok=True)
        remove_abandoned(place, f"{_UNFINISHED}*")
        with TemporaryDirectory(prefix=_UNFINISHED, dir=place) as unfinished:
            report = RunFolder(unfinished)  # for its writing of whole files
            _write_tables(report, sections, others, status_grid(runs), problems)
            tables = sorted(path.name for path in report.path.glob("*.*"))
            figures = report.path / "figures"
            for index, section in enumerate(sections):
                prefix = f"{index + 1}-" if len(sections) > 1 else ""
                section.figures.extend(draw(section.comparison, figures, prefix))
                if images:
                    section.figures.extend(overlay_pictures(section.comparison, figures, prefix))
            name = folder.resolve().name
            html = page(name, sections, others, runs, problems, images=images, files=tables)
            report.write_text("index.html", html)
            _publish(report.path, place)
    return place / "index.html"


def _paired_rows(section: Section) -> Iterator[dict[str, Any]]:
    for metric, found in section.pairs:
        for pair in found:
            yield {
                "comparison": section.comparison.title,
                "metric": metric.name,
                **pair._asdict(),
                "verdict": verdict(pair, higher_is_better=bool(metric.higher_is_better)),
            }


# unrounded numbers
_CSV: dict[str, Callable[[Section], Iterable[dict[str, Any]]]] = {
    "table.csv": lambda section: tidy(section.comparison),
    "paired.csv": _paired_rows,
    "clinical.csv": lambda section: clinical_rows(section.comparison),
}


def _write_tables(
    report: RunFolder,
    sections: Sequence[Section],
    others: Sequence[Grid],
    runs: Grid,
    problems: Sequence[str],
) -> None:
    text = []
    for section in sections:
        text += [f"## {markdown_text(section.comparison.title)}", ""]
        text += [*(f"- {markdown_text(caution)}" for caution in section.cautions), ""]
        text += [grid.markdown() for grid in (*section.grids, section.protocol)]
    text += [grid.markdown(level=2) for grid in (*others, runs)]
    text += [f"- {markdown_text(problem)}" for problem in problems]
    report.write_text("table.md", "\n".join(text).rstrip() + "\n")
    grids = [*(grid for section in sections for grid in section.grids), *others]
    latex = ["% needs \\usepackage{booktabs}", *(grid.latex() for grid in grids if grid.rows)]
    report.write_text("table.tex", "\n".join(latex))
    for name, rows_of in _CSV.items():
        if found := [row for section in sections for row in rows_of(section)]:
            rows = ({key: cell_text(value) for key, value in row.items()} for row in found)
            report.write_rows(name, rows)


def _publish(unfinished: Path, place: Path) -> None:
    """Puts the files of a new report over those of the last one; this takes no more space."""
    pictures = (path for path in place.glob("figures/*.png") if _FIGURE.fullmatch(path.name))
    for path in (*(place / name for name in _CSV), *pictures):
        if not (unfinished / path.relative_to(place)).exists():  # nothing to tell or show any more
            path.unlink(missing_ok=True)
    for path in sorted(unfinished.rglob("*")):
        target = place / path.relative_to(unfinished)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            path.replace(target)
