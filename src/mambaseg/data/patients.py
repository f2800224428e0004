"""Whose a case is, where only its name tells: `data.patient_pattern`."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mambaseg.data.case import Case
from mambaseg.data.splits import Split, listed, make_split
from mambaseg.data.validation import DataError
from mambaseg.storage.untrusted import ForeignFileError, read_table

SEPARATORS = "_. -"
FEWEST = 3  # names without a number that are patients: fewer are kinds of images
PART = r"(?:(?:train|val|test)[A-Z]?[-_])"  # the folder that an image lies in, or GlaS's names
# tokens that say when or where in a patient an image was taken, and those that group patients
_WITHIN = re.compile(
    r"(?:frame|fr|slice|sl|phase|time|t|z|ed|es|visit|session|ses|series|view)\d*", re.I
)
_ABOVE = re.compile(
    r"(?:cent(?:er|re)|site|vendor|hospital|data|dataset|set|fold|group|class)\d*|(?:19|20)\d\d",
    re.I,
)
_CALLED = r"(?i)((?:patient|subject|subj|sub|pat)[-_. ]?[0-9]+)"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Alike:
    """Names that look like several cases of one patient."""

    pattern: str  # `data.patient_pattern` that finds the patient, without quotes and backslashes
    patients: dict[str, str]  # case -> its patient by that pattern
    examples: list[str]  # two cases of the first patient that has several

    @property
    def override(self) -> str:
        """The override as it is pasted into a shell: Hydra needs quotes of its own."""
        return f"""'data.patient_pattern="{self.pattern}"'"""

    @property
    def problem(self) -> str:
        """What may be wrong, for a log or a report."""
        return (
            f"names begin or end alike ({', '.join(self.examples)}); each case counts as a patient"
        )

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return f"If a patient has several cases, add {self.override} (data-check proposes it)."


def with_patient(case: Case, pattern: str | None) -> Case:
    """Return the case under the name of its patient.

    `pattern` is a regular expression that finds the patient in the case's id, by its first group or
    as a whole; without one every case is its own patient. `UserError` where it finds none.
    """
    patient = case.id if pattern is None else _found(case.id, pattern)
    if not patient:
        remedy = r"It must fit every case, as (patient\d+) fits patient01_a."
        problem = f"data.patient_pattern={pattern!r} finds no patient in {case.id}"
        raise DataError(problem, remedy=remedy)
    return replace(case, patient=patient, patient_assumed=pattern is None)


def _found(id_: str, pattern: str) -> str:
    try:
        match = re.search(pattern, id_)
    except re.error as error:
        raise DataError(f"data.patient_pattern={pattern!r} is no pattern ({error})") from error
    return (match[match.re.groups and 1] or "") if match else ""


def parts_of(cases: Sequence[Case]) -> dict[str, str]:
    """Patient -> part; `UserError` for a case that is there twice or a patient in two parts."""
    parts: dict[str, str] = {}
    seen: dict[str, Case] = {}
    for case in cases:
        if case.id in seen:
            problem = f"{case.id} is there twice, also as {seen[case.id].image_path}"
            raise DataError(problem, case.image_path, "Keep one of the two.")
        seen[case.id] = case
        if case.part and parts.setdefault(case.patient, case.part) != case.part:
            problem = f"{case.patient} is in {case.part} and in {parts[case.patient]}"
            remedy = "A patient belongs in one part: move the images."
            raise DataError(problem, case.image_path, remedy)
    return parts


def facts_of(cases: Sequence[Case], root: Path) -> dict[str, dict[str, str]]:
    """Patient -> what is known of them: `pathology` where files say it, `vendor`, `centre`.

    A table patients.csv in the folder of the data set adds its columns; its first is `patient`.
    """
    facts: dict[str, dict[str, str]] = {case.patient: {} for case in cases}
    groups = dict.fromkeys((case.patient, case.group) for case in cases if case.group)
    shared = len({group for _, group in groups}) < len(groups)  # else: a folder per patient
    for case in cases:
        known = {"pathology": case.group} if case.group and shared else {}
        facts[case.patient] |= {**known, **dict(case.facts)}
    path = root / "patients.csv"
    if path.is_file():
        try:
            columns, rows = read_table(path)
        except (ForeignFileError, OSError) as error:
            raise DataError(f"is no table of patients: {error}", path) from error
        if "patient" not in columns:
            remedy = "Name the patient of each row in a column `patient`."
            raise DataError(f"has the columns {', '.join(columns)}", path, remedy)
        told: dict[str, dict[str, str]] = {}
        named = {row["patient"] for row in rows}
        if strangers := named - facts.keys():
            if strangers == named:
                remedy = f"Name them as the images do: {listed(facts)}."
                raise DataError(f"names no patient of these images: {listed(strangers)}", path,
                                remedy)  # fmt: skip
            log.warning("%s: rows of no patient here: %s", path, listed(strangers))
        for row in rows:
            if (patient := row.pop("patient")) in facts:
                own = {key.strip(): value.strip() for key, value in row.items() if value}
                require_one_row(path, patient, own, told.setdefault(patient, own))
                facts[patient] |= own
    return facts


def require_one_row(
    path: Path, name: str, row: Mapping[str, str], before: Mapping[str, str]
) -> None:
    """Raises DataError unless two rows of one patient say the same."""
    for key in row.keys() | before.keys():
        if key and (one := before.get(key)) != (other := row.get(key)):
            problem = f"says of {name} that {key} is {one} and that it is {other}"
            raise DataError(problem, path, "Keep one row of each patient.")


def split_cases(
    name: str,
    cases: Sequence[Case],
    root: Path,
    *,
    alike: Alike | None = None,
    **options: Any,
) -> Split:
    """The split `name` of the patients of all cases of a data set; `options` of `make_split`."""
    return make_split(
        name,
        {case.patient for case in cases},
        given=parts_of(cases),
        given_fold=next((case.fold for case in cases if case.fold is not None), None),
        unit="case" if any(case.patient_assumed for case in cases) else "patient",
        alike=alike.patients if alike else None,
        facts=facts_of(cases, root),
        **options,
    )


def find_alike(cases: Sequence[Case]) -> Alike | None:
    """Find cases whose names look like several of one patient; None where patients are known.

    Several names must begin (or, after a frame or slice, end) alike: `p01_s1` and `p01_s2`. What
    all names begin with is the data set's, and of several possible patients the one with most cases
    is taken, so that nobody is in two parts.
    """
    ids = [case.id for case in cases]
    if not ids or not all(case.patient_assumed for case in cases):
        return None
    for pattern in _candidates(ids):
        patients = {id_: _found(id_, pattern) for id_ in ids}
        if not all(patients.values()):
            continue
        members: dict[str, dict[str, str]] = defaultdict(dict)  # patient -> name -> case
        for id_, patient in sorted(patients.items()):
            members[patient].setdefault(re.sub(f"^{PART}", "", id_), id_)
        several = {
            patient: list(cases.values()) for patient, cases in members.items() if len(cases) > 1
        }
        if not several or len(members) == 1:
            continue
        # letters alone name a kind of image rather than a patient, where many share them
        numbered = sum(map(_has_digit, several)) * 2 > len(several)
        most = max(map(len, several.values()))
        if numbered or (len(members) >= FEWEST and most * 3 <= len(ids)):
            return Alike(pattern, patients, next(iter(several.values()))[:2])
    return None


def _candidates(ids: Sequence[str]) -> Iterator[str]:
    """Patterns that may find the patient: those with numbers first, the shortest first."""
    yield _CALLED
    start = f"^{PART}?" if any(re.match(PART, case) for case in ids) else "^"
    names = [re.sub(start, "", case) for case in ids]
    present = "".join(mark for mark in SEPARATORS if any(mark in name for name in names))
    letters = []
    if present:
        token, gap = f"[^{present}]+", f"[{present}]+"
        split = [[part for part in re.split(gap, name) if part] for name in names]
        for count in range(1, max(map(len, split))):
            last = [parts[count - 1] for parts in split if len(parts) > count]
            if all(map(_WITHIN.fullmatch, last)) or all(map(_ABOVE.fullmatch, last)):
                continue
            more = f"(?:{gap}{token}){{0,{count - 1}}}" if count > 1 else ""
            pattern = f"{start}({token}{more})"
            if sum(map(_has_digit, last)) * 2 > len(last):
                yield pattern
            else:
                letters.append(pattern)
        if all(parts and _WITHIN.fullmatch(parts[0]) for parts in split):
            yield f"({token})$"
    if all(re.fullmatch(r".*\d[A-Za-z]{1,5}\d{0,4}", name) for name in names):
        yield f"{start}(.*[0-9])[A-Za-z]"
    yield from letters


def _has_digit(text: str) -> bool:
    return any(map(str.isdigit, text))
