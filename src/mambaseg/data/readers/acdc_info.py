"""Info.cfg of ACDC's official layout: what a patient's frames are."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from mambaseg.data.readers.acdc_h5 import PHASES
from mambaseg.data.validation import DataError, check_file

FRAME_NUMBER = re.compile(r"\d{1,6}")
MAX_BYTES = 2**16  # that are read; real ones have about 100


@dataclass(frozen=True)
class Info:
    """What Info.cfg says about a patient: frame numbers of ED and ES, pathology group."""

    ed: int
    es: int
    group: str | None


def read_info(path: Path) -> Info:
    """Read a patient's Info.cfg (lines "key: value").

    Raises:
        UserError: missing or unreadable; ED or ES absent, there twice, not a number, or the same
            frame.
    """
    remedy = 'It comes with the patient\'s images and has lines such as "ED: 1" and "ES: 12".'
    if not (path.exists() or path.is_symlink()):
        problem = f"{path.parent.name} has no Info.cfg, which says what frames are ED and ES"
        raise DataError(problem, path, remedy)
    check_file(path)
    with path.open("rb") as file:
        text = file.read(MAX_BYTES).decode("utf-8-sig", errors="replace")
    fields: dict[str, set[str]] = defaultdict(set)
    for key, _, value in _pairs(text):
        fields[key.strip()].add(value.strip())
    ed, es = (_frame_number(path, phase, fields[phase], remedy) for phase in PHASES)
    if ed == es:
        raise DataError(f"ED and ES are the same frame ({ed})", path, remedy)
    return Info(ed, es, min(fields["Group"], default="") or None)


def _frame_number(path: Path, phase: str, values: set[str], remedy: str) -> int:
    """The one frame number among what Info.cfg says about a phase."""
    if len(values) > 1:
        found = ", ".join(sorted(values))
        raise DataError(f"there are different frame numbers for {phase} ({found})", path, remedy)
    value = next(iter(values), None)
    if value is None or not FRAME_NUMBER.fullmatch(value):
        raise DataError(f"there is no frame number for {phase} (found {value!r})", path, remedy)
    return int(value)


def _pairs(text: str) -> list[tuple[str, str, str]]:
    """Lines with a colon, cut at the first one."""
    return [line.partition(":") for line in text.splitlines() if ":" in line]
