"""What a run folder must hold for a report: types and ranges, checked before anything is computed.

A folder may come from somebody else; one that lies must not end the report of the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mambaseg.errors import UserError
from mambaseg.storage.untrusted import ForeignFileError

SIZE = 1e15  # beyond it no number of a run folder lies: operations, voxels, ml, mm, s, bytes

# part of run.json -> its fields that a report computes with
_RECORD_NUMBERS = {
    "": ("fit_seconds", "parameters"),
    "cost": ("macs", "scan_flops", "seconds_per_case", "peak_memory_bytes"),
}
_RECORD_TEXTS = {
    "data": ("fingerprint", "config"),
    "code": ("digest", "commit"),
    "versions": ("torch",),
    "hardware": ("cpu",),
}
_TEXT_COLUMNS = ("case", "patient", "class_name", "outcome")
_NUMBER_COLUMNS = ("class", "dice")
_RANGES = {"dice": (0, 1), "voxels": (0, SIZE), "reference_voxels": (0, SIZE)}


@contextmanager
def reading(file: Path) -> Iterator[Path]:
    """Explains what is wrong with a file of a finished run folder that the block reads and checks.

    Raises:
        UserError: it is missing, damaged, or not what a run folder has there.
    """
    try:
        yield file
    except (OSError, ForeignFileError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{file} cannot be read ({reason}). A finished run writes it whole: copy the folder "
            "again, or leave it out."
        ) from error


def check_record(record: Mapping[str, Any]) -> None:
    """Of run.json.

    Raises:
        ForeignFileError: naming the field.
    """
    for part, fields in {**_RECORD_NUMBERS, **_RECORD_TEXTS}.items():
        own = record if not part else record.get(part) or {}
        _require(isinstance(own, Mapping), part)
        kind = _is_number if part in _RECORD_NUMBERS else _is_text
        for field in fields:
            value = own.get(field)
            _require(value is None or kind(value), f"{part}.{field}".lstrip("."))
    image = (record.get("cost") or {}).get("image") or []
    _require(_is_list(image, _is_number, 4), "cost.image")
    gpus = (record.get("hardware") or {}).get("gpus") or []
    _require(_is_list(gpus, _is_text, 1024), "hardware.gpus")
    _require(record.get("parameters") is None or isinstance(record["parameters"], int),
             "parameters")  # fmt: skip


def check_config(config: Any) -> None:
    """Of config.yaml.

    Raises:
        ForeignFileError: naming the field.
    """
    _require(isinstance(config, Mapping), "the whole file")
    for part in ("model", "data", "optim", "loss", "trainer", "evaluation"):
        _require(isinstance(config.get(part) or {}, Mapping), part)
    _require(_is_text((config.get("model") or {}).get("name")), "model.name")
    _require(type(config.get("seed")) is int, "seed")
    names: Any = (config.get("data") or {}).get("class_names")
    named = _is_list(names, _is_text, 256) and len(set(names)) == len(names) >= 2
    _require(named, "data.class_names")


def check_summary(summary: Any) -> None:
    """Of metrics.json of a segmentation.

    Raises:
        ForeignFileError: naming the field.
    """
    _require_origin(summary)
    own = summary.get("convention")
    _require(isinstance(own, Mapping) and _is_text(own.get("policy")), "convention.policy")
    for field in ("tolerance_mm", "tolerance_vox"):
        _require(_is_number(summary["convention"].get(field)), f"convention.{field}")


def check_means(summary: Any) -> None:
    """Of metrics.json of another task, which has means of scores.

    Raises:
        ForeignFileError: naming the field.
    """
    _require_origin(summary)
    _require(_is_text(summary.get("task")), "task")
    count = summary.get("cases")
    _require(isinstance(count, int) and _is_number(count) and count >= 0, "cases")
    scores, columns = summary.get("scores"), summary.get("columns") or {}
    _require(isinstance(scores, Mapping) and 0 < len(scores) <= 256, "scores")
    for name, own in scores.items():
        _require(isinstance(own, Mapping) and {"mean", "sd"} <= own.keys(), f"scores.{name}")
        for field in ("mean", "sd"):
            value = own[field]
            _require(value is None or _is_number(value), f"scores.{name}.{field}")
    for field in ("title", "note"):
        _require(_is_text(summary.get(field) or ""), field)
    _require(isinstance(columns, Mapping), "columns")
    for name, own in columns.items():
        two = isinstance(own, list) and len(own) == 2
        _require(
            two and _is_text(own[0]) and type(own[1]) is int and own[1] in range(10),
            f"columns.{name}",
        )


def _require_origin(summary: Any) -> None:
    """The data and the split that every summary names."""
    _require(isinstance(summary, Mapping), "the whole file")
    _require(_is_text(summary.get("data")), "data")
    split = summary.get("split")
    _require(isinstance(split, Mapping), "split")
    for field in ("name", "hash"):
        _require(_is_text(split.get(field)), f"split.{field}")
    seen = summary.get("seen") or {}
    _require(isinstance(seen, Mapping), "seen")
    _require(isinstance(seen.get("cases", {}), Mapping), "seen.cases")


def check_rows(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> None:
    """Of cases.csv.

    Args:
        rows: numbers as numbers.
        classes: names of all classes by the configuration.

    Raises:
        ForeignFileError: naming the column and the line.
    """
    for line, row in enumerate(rows, start=2):
        for column in (*_TEXT_COLUMNS, *_NUMBER_COLUMNS):
            _require(column in row, f"column {column}")
            _require(column == "dice" or row[column] is not None, f"{column} in line {line}")
        index = row["class"]
        known = 0 <= index < len(classes) and classes[index] == row["class_name"]
        _require(known, f"class in line {line}")
        for column in ("voxels", "volume_ml"):
            both = row.get(column), row.get(f"reference_{column}")
            _require((both[0] is None) == (both[1] is None), f"{column} in line {line}")
        for column, value in row.items():
            if isinstance(value, (int, float)):
                low, high = _RANGES.get(column, (-SIZE, SIZE))
                _require(_is_number(value) and low <= value <= high, f"{column} in line {line}")


def _require(holds: bool, field: str) -> None:
    if not holds:
        raise ForeignFileError(f"{field or 'the whole file'} is not what a run folder has there")


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and abs(value) <= SIZE


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 10_000


def _is_list(values: Any, kind: Any, longest: int) -> bool:
    return isinstance(values, list) and len(values) <= longest and all(map(kind, values))
