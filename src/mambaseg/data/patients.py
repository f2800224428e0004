"""Whose a case is, where only its name tells: `data.patient_pattern`."""

import re
from collections.abc import Sequence

from mambaseg.data.case import DataError


def name_patients(cases: Sequence[str], pattern: str | None) -> dict[str, str]:
    """Case -> patient.

    Args:
        cases: their ids.
        pattern: regular expression that finds the patient in an id, by its first group or as a
            whole; None takes every case for a patient of its own.

    Raises:
        UserError: the pattern is none, or a case's id does not hold it.
    """
    if pattern is None:
        return {case: case for case in cases}
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise DataError(f"data.patient_pattern={pattern!r} is no pattern ({error})") from error
    found = {case: compiled.search(case) for case in cases}
    patients = {case: match[match.re.groups and 1] for case, match in found.items() if match}
    without = [case for case in cases if not patients.get(case)]
    if without:
        problem = f"data.patient_pattern={pattern!r} finds no patient in {without[0]}"
        raise DataError(
            problem, remedy=r"It must fit every case, as (patient\d+) fits patient01_a."
        )
    return patients
