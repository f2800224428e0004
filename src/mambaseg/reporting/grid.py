"""A table as text, for Markdown, LaTeX, the page and the terminal; and how numbers become text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from mambaseg.evaluation.metrics import Metric
from mambaseg.storage.untrusted import printable

UNDEFINED = "–"
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_STYLES = {
    "bold": "bold", "state-done": "green", "state-running": "cyan", "state-interrupted": "yellow",
    "state-failed": "red", "state-damaged": "red", "state-missing": "magenta",
    "state-skipped": "magenta",
}  # fmt: skip
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "–": "--", "−": "$-$", "·": r"$\cdot$", "×": r"$\times$", "²": r"$^2$",
    "[": "{[}", "]": "{]}", "<": "$<$", ">": "$>$", "≥": r"$\ge$", "…": r"\ldots{}",
}  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """A table as text, ready for any format."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]  # as many cells as the header
    notes: Sequence[str] = ()  # sentences below it: the convention, what is left out
    wide: int = 1  # how many leading columns are text, aligned left and kept in view
    marks: Mapping[int, str] = field(default_factory=dict)  # row -> `quoted`, `bold`, `state-done`

    def markdown(self, level: int = 3) -> str:
        """A heading, the table, the notes; without rows the notes say why there are none."""
        rule = ["---" if index < self.wide else "---:" for index in range(len(self.header))]
        cells = (self.header, rule, *self.rows)
        lines = [f"| {' | '.join(map(markdown_text, row))} |" for row in cells if self.rows]
        notes = [f"{markdown_text(note)}  " for note in self.notes]
        title = markdown_text(self.title)
        return "\n".join([f"{'#' * level} {title}", "", *lines, "", *notes, ""])

    def latex(self) -> str:
        """A `table*` with booktabs rules, the notes in its caption."""
        columns = "l" * self.wide + "r" * (len(self.header) - self.wide)
        head, *rows = [rf"{' & '.join(map(_latex, row))} \\" for row in (self.header, *self.rows)]
        caption = _latex(". ".join([self.title, *(note.rstrip(".") for note in self.notes)]) + ".")
        start = [r"\begin{table*}", rf"\caption{{{caption}}}", rf"\begin{{tabular}}{{{columns}}}"]
        end = [r"\bottomrule", r"\end{tabular}", r"\end{table*}", ""]
        return "\n".join([*start, r"\toprule", head, r"\midrule", *rows, *end])

    def terminal(self) -> Table:
        """A rich table: text columns fold, numbers stay whole; marked rows have a colour."""

        def plain(text: str) -> Text:
            return Text(printable(text))  # brackets are not rich's markup

        table = Table(
            title=plain(self.title),
            caption=plain("\n".join(self.notes)),
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            min_width=72,  # of the caption
            collapse_padding=True,
        )
        for index, name in enumerate(self.header):
            text = index < self.wide
            table.add_column(
                plain(name),
                justify="left" if text else "right",
                overflow="fold",
                no_wrap=not text,
            )
        for index, row in enumerate(self.rows):
            mark = self.marks.get(index, "")
            table.add_row(*map(plain, row), style=_STYLES.get(mark, ""))
        return table


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())


def _latex(text: str) -> str:
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


def signed(value: float, digits: int) -> str:
    """`+0.012`, `−0.012`; what rounds to zero has no sign."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def plus_minus(mean: float | None, sd: float | None, digits: int, *, sign: bool = False) -> str:
    """`0.833 ± 0.012`, `0.833` without a standard deviation, `–` where there is no mean."""
    if mean is None:
        return UNDEFINED
    text = signed(mean, digits) if sign else signed(mean, digits).removeprefix("+")
    return text if sd is None else f"{text} ± {sd:.{digits}f}"


def of_seeds(defined: int, seeds: int) -> str:
    """Says when a mean is not over all seeds, because some have no defined value."""
    return "" if defined == seeds else f" ({defined} of {seeds} seeds)"


def heading(metric: Metric) -> str:
    """`HD95 mm`, `Dice`."""
    return f"{metric.title} {metric.unit}".strip()


def duration(seconds: float) -> str:
    """`3 h 20 min`, `4 min 5 s`, `12 s`."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
