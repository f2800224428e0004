"""Tables: of one run's scores for the terminal, and plain grids for Markdown and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

from mambaseg.evaluation.summary import distance_unit
from mambaseg.storage.untrusted import printable

UNDEFINED = "–"
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def signed(value: float, digits: int) -> str:
    """`+0.012`, `−0.012`; what rounds to zero has no sign."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


@dataclass(frozen=True)
class Grid:
    """A table as text, ready for any format.

    Attributes:
        title: what it shows.
        header: one heading per column.
        rows: cells; every row has as many as the header.
        notes: sentences that belong below it: the convention, what is left out.
        wide: how many leading columns are text, aligned left and kept in view.
        quoted: indices of rows that are others' numbers, not ours.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    wide: int = 1
    quoted: frozenset[int] = frozenset()

    def markdown(self, level: int = 3) -> str:
        """A heading, the table, the notes."""
        rule = ["---" if index < self.wide else "---:" for index in range(len(self.header))]
        cells = (self.header, rule, *self.rows)
        lines = [f"| {' | '.join(map(markdown_text, row))} |" for row in cells]
        notes = [f"{markdown_text(note)}  " for note in self.notes]
        title = markdown_text(self.title)
        return "\n".join([f"{'#' * level} {title}", "", *lines, "", *notes, ""])

    def latex(self) -> str:
        """A `table*` with booktabs rules, the notes in its caption."""
        columns = "l" * self.wide + "r" * (len(self.header) - self.wide)
        rows = [f"{' & '.join(map(_latex_text, row))} \\\\" for row in self.rows]
        caption = _latex_text(". ".join([self.title, *(n.rstrip(".") for n in self.notes)]) + ".")
        return "\n".join(
            [
                r"\begin{table*}",
                rf"\caption{{{caption}}}",
                rf"\begin{{tabular}}{{{columns}}}",
                r"\toprule",
                f"{' & '.join(map(_latex_text, self.header))} \\\\",
                r"\midrule",
                *rows,
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table*}",
                "",
            ]
        )


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "–": "--", "−": "$-$", "·": r"$\cdot$", "×": r"$\times$", "²": r"$^2$",
    "[": "{[}", "]": "{]}", "<": "$<$", ">": "$>$", "≥": r"$\ge$", "…": r"\ldots{}",
}  # fmt: skip


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in _one_line(text))


def markdown_text(text: str) -> str:
    """Text as one line of Markdown, also in a cell: no HTML, link, picture or column begins in it.

    What is harmless stays readable: `<` before a number, brackets of a list.
    """
    text = _one_line(text).replace("\\", "\\\\").replace("`", "\\`").replace("|", "/")
    return re.sub(r"<(?=[A-Za-z/!?])|(?<=\])(?=[(:\[])", lambda m: f"\\{m[0]}", text)


def cell_text(value: Any) -> Any:
    """A cell of a CSV file for spreadsheets: text that they would run as a formula gets a `'`.

    Numbers stay numbers, negative ones too.
    """
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())


def run_table(
    summary: Mapping[str, Any], *, title: str, class_names: Sequence[str], note: str = ""
) -> Table:
    """The scores of a run as its task shows them; `summary` is what metrics.json holds."""
    if "foreground" not in summary:
        return means_table(summary, title=title, note=note)
    return score_table(summary, title=title, class_names=class_names, note=note)


def table_of(summary: Mapping[str, Any], config: Mapping[str, Any]) -> Table:
    """`run_table` under the names that a run's configuration gives to network, data and classes."""
    split, data = summary["split"], config["data"]
    said = f"split {split['name']} ({split['hash']}). {split['note']}"
    note = "\n".join(filter(None, [seen_note(summary), said]))
    title = f"{config['model']['name']} · {data['title']}"
    return run_table(summary, title=title, class_names=list(data["class_names"]), note=note)


def seen_note(summary: Mapping[str, Any]) -> str:
    """The mark of scores of cases that trained or chose the network; empty where there are none."""
    count = len(((summary.get("seen") or {}).get("cases")) or ())
    if not count:
        return ""
    return (
        f"SEEN CASES: the network was trained or chosen on {count} of the {summary['cases']} cases "
        "scored; these scores are too good."
    )


def headline(summary: Mapping[str, Any]) -> tuple[str, float | None]:
    """The one score that stands for a test, in words and as a number."""
    if "foreground" not in summary:
        name, score = next(iter(summary["scores"].items()))
        heading, digits = column_of(summary, name)
        return f"mean {heading} {mean_text(score['mean'], None, digits)}", score["mean"]
    dice = summary["foreground"]["dice"]["mean"]
    return f"mean foreground Dice {UNDEFINED if dice is None else f'{dice:.4f}'}", dice


def means_table(summary: Mapping[str, Any], *, title: str, note: str = "") -> Table:
    """The scores of another task: means ± standard deviations over its cases, as a rich table."""
    from rich import box
    from rich.table import Table

    said = f"{summary['cases']} cases, ± standard deviation over these."
    caption = "\n".join(filter(None, [note, summary.get("note"), said]))
    table = Table(title=title, caption=caption, caption_justify="left", box=box.SIMPLE_HEAD,
                  min_width=72)  # fmt: skip
    table.add_column("score")
    table.add_column("mean", justify="right", no_wrap=True)
    for name, score in summary["scores"].items():
        heading, digits = column_of(summary, name)
        table.add_row(heading, mean_text(score["mean"], score["sd"], digits))
    return table


def column_of(summary: Mapping[str, Any], name: str) -> tuple[str, int]:
    """Heading and decimals of a score of another task."""
    heading, digits = (summary.get("columns") or {}).get(name, (name, 4))
    return heading, digits


def mean_text(mean: float | None, spread: float | None, digits: int) -> str:
    """`0.912 ± 0.034`, without the second where there is none."""
    if mean is None:
        return UNDEFINED
    return f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def score_table(
    summary: Mapping[str, Any], *, title: str, class_names: Sequence[str], note: str = ""
) -> Table:
    """The scores of one evaluation as a rich table.

    A row per structure with the mean over cases (± standard deviation for Dice), then the means
    over structures, without and with the background. Distances are in mm where every case's
    spacing is known, otherwise in voxels; the heading says which. Undefined values are left out of
    a mean: the last columns count the structures missed, and those predicted where there are none.
    Fits 80 characters.

    Args:
        summary: of `mambaseg.evaluation.summary.summarise`.
        title: says which network and which dataset.
        class_names: names of the classes 0..K-1, the background first.
        note: line below the table, such as what the split is; the convention follows it.
    """
    from rich import box
    from rich.table import Table

    header, rows = score_cells(summary, class_names)
    caption = "\n".join(filter(None, [note, convention(summary)]))
    table = Table(
        title=title,
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    *structures, foreground, everything = rows
    for row in structures:
        table.add_row(*row)
    table.add_section()
    table.add_row(*foreground, style="bold")
    table.add_row(*everything)
    return table


def to_markdown(summary: Mapping[str, Any], *, class_names: Sequence[str], note: str = "") -> str:
    """The same table in Markdown, the note and the convention below it."""
    header, rows = score_cells(summary, class_names)
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = [f"| {' | '.join(map(markdown_text, row))} |" for row in (header, rule, *rows)]
    return "\n".join([*lines, "", *filter(None, [note, convention(summary)])]) + "\n"


def score_cells(
    summary: Mapping[str, Any], class_names: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Heading and rows as text; the last two rows are means, without and with the background."""
    columns = _columns(summary)
    header = ["structure", *columns.values(), "missed", "false +"]
    parts = {name: summary["classes"][name] for name in class_names[1:]}
    parts["foreground"] = summary["foreground"]
    parts["+ background"] = summary["all"]
    rows = []
    for name, part in parts.items():
        scores = [_score(part[metric], metric) for metric in columns]
        counts = [str(part["counts"][outcome]) for outcome in ("missed", "false_positive")]
        rows.append([name, *scores, *counts])
    return header, rows


def convention(summary: Mapping[str, Any]) -> str:
    """One line: of how many cases the numbers are, and how they were made."""
    count, policy = summary["cases"], summary["convention"]["policy"]
    cases = "1 case" if count == 1 else f"{count} cases"
    side = (summary.get("preprocessing") or {}).get("longest_side")
    how = f"in 2-D at most {side} pixels a side" if side else "in 3-D at native resolution"
    return f"{cases}, scored {how}; empty masks: {policy}."


def _columns(summary: Mapping[str, Any]) -> dict[str, str]:
    """Metric -> heading, of what the summary holds; one unit for all distances."""
    scores = summary["foreground"]
    columns = {"dice": "Dice"}
    if "hd95_vox" not in scores:
        return columns
    unit = distance_unit(summary)
    tolerance = f"{summary['convention'][f'tolerance_{unit}']:g} {unit}"
    return columns | {
        f"hd95_{unit}": f"HD95 {unit}",
        f"assd_{unit}": f"ASSD {unit}",
        f"nsd_{unit}": f"NSD {tolerance}",
    }


def _score(score: Mapping[str, float | None], metric: str) -> str:
    if score["mean"] is None:
        return UNDEFINED
    if not metric.startswith("dice"):
        return f"{score['mean']:.3f}" if metric.startswith("nsd") else f"{score['mean']:.2f}"
    sd = score.get("sd")  # the mean over structures has none
    return f"{score['mean']:.3f}" + ("" if sd is None else f" ± {sd:.3f}")
