"""uncertainty.csv: one line per image, with a flag on those that deserve a look."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from mambaseg.errors import UserError
from mambaseg.reporting.grid import cell_text
from mambaseg.storage.files import write_whole
from mambaseg.storage.untrusted import ForeignFileError, read_json, read_table

FILE = "uncertainty.csv"
_COLUMNS = ("case", "frame", "uncertainty", "threshold", "flag")


def has_own_table(output: Path) -> bool:
    """Whether an uncertainty.csv of this command is there."""
    try:
        return read_table(output / FILE)[0] == list(_COLUMNS)
    except (ForeignFileError, OSError):
        return False


def require_own_table(output: Path, *, otherwise: str) -> None:
    """Raises UserError where another uncertainty.csv lies in the way."""
    if (path := output / FILE).exists() and not has_own_table(output):
        raise UserError(f"{path} was not made by this command: {otherwise}")


def write_table(
    output: Path, names: Sequence[str], threshold: float | None, *, otherwise: str
) -> list[str]:
    """Writes the table from what the .json beside each label map says; returns flagged names.

    Rows of other images stay where their label maps still have that uncertainty.

    The flag is `look` where nothing was labelled or the uncertainty exceeds the threshold, else
    `ok`; `unknown` without a threshold.
    """
    if not names and not has_own_table(output):
        return []
    rows, flagged = list(_earlier(output, {str(cell_text(name)) for name in names})), []
    for name in names:
        for frame, score in enumerate(_scores(output, name) or [None], 1):
            flag = _flag(score, threshold)
            rows.append([name, frame, score, threshold, flag])
            if flag == "look" and name not in flagged:
                flagged.append(name)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_COLUMNS)
    rows.sort(key=lambda row: str(row[0]))  # frames stay in their order
    writer.writerows([cell_text(cell) for cell in row] for row in rows)
    text = stream.getvalue().encode("utf-8", "backslashreplace")
    write_whole(output / FILE, text, otherwise=otherwise)
    return flagged


def read_about(path: Path) -> dict[str, Any]:
    """What the .json beside a label map says; nothing where it is missing or damaged."""
    try:
        about = read_json(path)
    except (ForeignFileError, OSError):
        return {}
    return about if isinstance(about, dict) else {}


def _scores(output: Path, name: str) -> list[float | None]:
    """The uncertainty of each frame; empty where the label map has none."""
    return read_about(output / f"{name}.json").get("uncertainty") or []


def _earlier(output: Path, without: set[str]) -> Iterator[list[Any]]:
    """Rows of the table that is there, of other images than `without`, that are still true."""
    rows = read_table(output / FILE)[1] if has_own_table(output) else []
    for case, own in groupby(rows, key=lambda row: row["case"]):
        cells = [list(row.values()) for row in own]
        told = ["" if score is None else str(score) for score in _scores(output, case)]
        if case not in without and [row[2] for row in cells] == told:
            yield from cells


def _flag(score: float | None, threshold: float | None) -> str:
    if score is None:
        return "look"
    if threshold is None:
        return "unknown"
    return "look" if score > threshold else "ok"
