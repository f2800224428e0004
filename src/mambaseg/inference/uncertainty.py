"""uncertainty.csv: one line per image, with a flag on those that deserve a look."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from mambaseg.errors import UserError
from mambaseg.reporting.grid import cell_text
from mambaseg.storage.files import whole_file
from mambaseg.storage.untrusted import ForeignFileError, read_json, read_text

FILE = "uncertainty.csv"
_COLUMNS = ("case", "frame", "uncertainty", "threshold", "flag")
_HEADER = ",".join(_COLUMNS)


def require_own_table(output: Path, *, otherwise: str) -> None:
    """Raises UserError where another uncertainty.csv lies in the way."""
    path = output / FILE
    try:
        own = not path.exists() or read_text(path).startswith(_HEADER)
    except (ForeignFileError, OSError):
        own = False
    if not own:
        raise UserError(f"{path} was not made by this command: {otherwise}")


def write_table(
    output: Path, names: Sequence[str], threshold: float | None, *, otherwise: str
) -> list[str]:
    """Writes the table from what the .json beside each label map says; returns flagged names.

    The flag is `look` where nothing was labelled or the uncertainty exceeds the threshold, else
    `ok`; `unknown` without a threshold.
    """
    rows, flagged = [], []
    for name in names:
        scores = read_json(output / f"{name}.json").get("uncertainty") or [None]
        for frame, score in enumerate(scores, 1):
            flag = _flag(score, threshold)
            rows.append([name, frame, score, threshold, flag])
            if flag == "look" and name not in flagged:
                flagged.append(name)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows([cell_text(cell) for cell in row] for row in rows)
    with whole_file(output / FILE, otherwise=otherwise) as temporary:
        temporary.write_text(stream.getvalue(), encoding="utf-8", errors="backslashreplace")
    return flagged


def _flag(score: float | None, threshold: float | None) -> str:
    if score is None:
        return "look"
    if threshold is None:
        return "unknown"
    return "look" if score > threshold else "ok"
