"""Whose a case is, where only its name tells: `data.patient_pattern`."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
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
_ANY = "p1_v2-s3.4 " * 9  # a pattern that finds this whole, as `.+`, makes every case a patient
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
        return f"If a patient has several cases, add {self.override} (mambaseg check proposes it)."


def with_patient(case: Case, pattern: str | None) -> Case:
    """Return the case under the name of its patient.

    `pattern` is a regular expression that finds the patient in the case's id, by its first group or
    as a whole; without one every case is its own patient. `UserError` where it finds none.

    Where `id` has the case's part or folder before its `name`, what would hold some of that is
    looked for in the name alone: a patient has one name in `train/` and `test/`, in `benign/` and
    `malignant/`. Only if there is none in the name does it count, so that a pattern may ask for a
    part or a folder. One that takes any name whole, such as `.+`, makes every case a patient.
    """
    return _of_patient(case, case.id if pattern is None else _in_name(case, pattern), pattern)


def with_patients(cases: Sequence[Case], pattern: str | None) -> list[Case]:
    """Return the cases of a data set under the names of their patients, as `with_patient` does.

    Two things only all cases together can tell. Folders may be patients (`p01/visit1`), so that the
    ids count: where most folders have numbers, or the pattern finds these alone, and they are no
    fewer than what it finds in the names, or most of that recurs in other folders. And where the
    ids give the same patients, these are called as there: on their names splits depend, and by
    these the runs of earlier versions.
    """
    if pattern is None:
        return [with_patient(case, None) for case in cases]
    found, in_ids = _patients(cases, pattern), [_found(case.id, pattern)[0] for case in cases]
    pairs = {*zip(found, in_ids, strict=True)}
    if all(in_ids) and len({*found}) == len({*in_ids}) == len(pairs):
        found = in_ids
    return [_of_patient(case, its, pattern) for case, its in zip(cases, found, strict=True)]


def _of_patient(case: Case, patient: str, pattern: str | None) -> Case:
    if not patient:
        remedy = r"It must fit every case, as (patient\d+) fits patient01_a."
        problem = f"patient_pattern={pattern!r} finds no patient in {case.id}"
        raise DataError(problem, remedy=remedy)
    return replace(case, patient=patient, patient_assumed=pattern is None)


def _patients(cases: Sequence[Case], pattern: str) -> list[str]:
    """The patient of each case, empty where there is none; see `with_patients`."""
    in_names = [_in_name(case, pattern) for case in cases]
    folders = {case.group for case in cases if case.group}
    places: dict[str, set[str | None]] = defaultdict(set)
    for name, case in zip(in_names, cases, strict=True):
        places[name].add(case.group)
    recur = sum(len(groups) > 1 for groups in places.values()) * 2 > len(places)
    above = all(map(_ABOVE.fullmatch, folders))
    if len(folders) < len(places) and not (recur and _numbered(folders) and not above):
        return in_names
    in_folders = [_in_folder(case, pattern) for case in cases]
    alone = all(one in str(case.group) for one, case in zip(in_folders, cases, strict=True))
    return in_folders if alone or _numbered(folders) else in_names


def _in_name(case: Case, pattern: str) -> str:
    """The patient by the name of a case alone where its id says something before it."""
    if _found(_ANY, pattern)[0] == _ANY:
        return case.id
    found, start = _found(case.id, pattern)
    name = case.name or case.id
    return found if start >= len(case.id) - len(name) else _found(name, pattern)[0] or found


def _in_folder(case: Case, pattern: str) -> str:
    """The patient by the folder and the name of a case: a part is nobody's."""
    without = case.id.removeprefix(f"{case.part}-")
    return _found(without, pattern)[0] or _found(case.id, pattern)[0]


def _found(text: str, pattern: str) -> tuple[str, int]:
    """What a pattern finds, empty for nothing, and where it begins."""
    try:
        match = re.search(pattern, text)
    except re.error as error:
        raise DataError(f"patient_pattern={pattern!r} is no pattern ({error})") from error
    group = match.re.groups and 1 if match else 0
    return (match[group] or "", match.start(group)) if match else ("", -1)


def parts_of(cases: Sequence[Case]) -> dict[str, str]:
    """Patient -> part.

    Raises:
        UserError: a case is there twice, a patient is in two parts, or the names of two patients
            differ in the case of letters alone.
    """
    parts: dict[str, str] = {}
    seen: dict[str, Case] = {}
    spelled: dict[str, str] = {}
    for case in cases:
        same = case.patient if case.patient_assumed else case.patient.casefold()
        if (other := spelled.setdefault(same, case.patient)) != case.patient:
            problem = f"{case.patient} and {other} would count as two patients"
            remedy = "Spell the name of a patient alike everywhere, capital and small letters too."
            raise DataError(problem, case.image_path, remedy)
        if case.id in seen:
            problem = f"{case.id} is there twice, also as {seen[case.id].image_path}"
            raise DataError(problem, case.image_path, "Keep one of the two.")
        seen[case.id] = case
        if case.part and parts.setdefault(case.patient, case.part) != case.part:
            problem = f"{case.patient} is in {case.part} and in {parts[case.patient]}"
            remedy = "A patient belongs in one part: move the images."
            raise DataError(problem, case.image_path, remedy)
    return parts


def facts_of(
    cases: Sequence[Case], root: Path, *, by: str | None = None
) -> dict[str, dict[str, str]]:
    """Patient -> what is known of them: `pathology` where files say it, `vendor`, `centre`.

    A table patients.csv in the folder of the data set adds its columns; its first is `patient`.
    Where cases of a patient differ and the table does not say what counts, nothing is known;
    `DataError` if that is the fact `by`, of which each value is to be left out as a whole.
    """
    facts: dict[str, dict[str, str]] = {case.patient: {} for case in cases}
    several: dict[tuple[str, str], set[str]] = defaultdict(set)  # patient, what -> values
    groups = dict.fromkeys((case.patient, case.group) for case in cases if case.group)
    shared = len({group for _, group in groups}) < len(groups)  # else: a folder per patient
    for case in cases:
        known = {"pathology": case.group} if case.group and shared else {}
        known |= dict(case.facts)
        facts[case.patient] |= known
        for what, value in known.items():
            several[case.patient, what].add(value)
    several = {key: values for key, values in several.items() if len(values) > 1}
    for patient, what in several:
        del facts[patient][what]
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
                own = {key.strip(): value.strip() for key, value in row.items() if value.strip()}
                require_one_row(path, patient, own, told.setdefault(patient, own))
                facts[patient] |= own
    for (patient, what), values in several.items():
        if what == by and what not in facts[patient]:
            raise DataError(
                f"data.split_by={by}: {patient} has {' and '.join(sorted(values))}, so none of "
                "these can be left out as a whole",
                remedy=f"Say which counts in {path}, a table with columns `patient` and `{by}`, or "
                "split by patient: leave data.split_by out.",
            )
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
        facts=facts_of(cases, root, by=options.get("by")),
        **options,
    )


def find_alike(cases: Sequence[Case]) -> Alike | None:
    """Find cases whose names look like several of one patient; None where patients are known.

    Several names must begin (or, after a frame or slice, end) alike: `p01_s1` and `p01_s2`. What
    all names begin with is the data set's, and of several possible patients the one with most cases
    is taken, so that nobody is in two parts.
    """
    if not cases or not all(case.patient_assumed for case in cases):
        return None
    ids = [case.id for case in cases]
    names = {case.id: case.name or case.id for case in cases}
    folders = {case.group for case in cases if case.group}
    # first where the patient is: in folders with numbers, else in the names alone
    both = (tuple(names.values()), tuple(ids))
    ordered = dict.fromkeys(both[::-1] if _numbered(folders) else both)
    for pattern in chain.from_iterable(map(_candidates, ordered)):
        patients = dict(zip(ids, _patients(cases, pattern), strict=True))
        if not all(patients.values()):
            continue
        members: dict[str, dict[str, str]] = defaultdict(dict)  # patient -> name -> case
        for id_, patient in sorted(patients.items()):
            members[patient].setdefault(re.sub(f"^{PART}", "", names[id_]), id_)
        several = {
            patient: list(cases.values()) for patient, cases in members.items() if len(cases) > 1
        }
        if not several or len(members) == 1:
            continue
        # letters alone name a kind of image rather than a patient, where many share them
        most = max(map(len, several.values()))
        if _numbered(several) or (len(members) >= FEWEST and most * 3 <= len(ids)):
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
            if _numbered(last):
                yield pattern
            else:
                letters.append(pattern)
        if all(parts and _WITHIN.fullmatch(parts[0]) for parts in split):
            yield f"({token})$"
    if all(re.fullmatch(r".*\d[A-Za-z]{1,5}\d{0,4}", name) for name in names):
        yield f"{start}(.*[0-9])[A-Za-z]"
    yield from letters


def _numbered(names: Collection[str]) -> bool:
    """Whether most of some names have a digit."""
    return sum(any(map(str.isdigit, name)) for name in names) * 2 > len(names)
