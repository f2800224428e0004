"""Run folders read back: all that a report computes with, checked once for types and ranges.

A folder may come from somebody else. Whatever is missing, damaged or out of range in it ends in one
`UserError` that names the file and the field, so that the report of the other runs can go ahead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mambaseg.errors import UserError
from mambaseg.evaluation.metrics import BUILT_IN, VOLUME, Metric
from mambaseg.reporting.labels import flatten
from mambaseg.storage.identity import scientific, with_digests
from mambaseg.storage.untrusted import ForeignFileError, read_json, read_table, read_yaml

Row = dict[str, Any]
Check = Callable[[Any], bool]

VOLUMES = {metric.name for metric in VOLUME}  # quantities, no scores
SIZE = 1e15  # an upper bound of every number in a run folder: operations, voxels, ml, mm, s, bytes
_FOLD = re.compile(r"^(?P<base>.+)-fold(?P<fold>\d{1,4})$")
_REPEATS = {"seed", "data.seed", "data.fold"}  # what may differ between the runs of an entry


def is_number(value: Any) -> bool:
    """Whether a value is a finite number of a plausible size."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and abs(value) <= SIZE


def is_text(value: Any) -> bool:
    """Whether a value is text of a plausible length."""
    return isinstance(value, str) and len(value) <= 10_000


def is_mapping(value: Any) -> bool:
    """Whether a value has keys."""
    return isinstance(value, Mapping)


def optional(check: Check) -> Check:
    """The same check for a value that may be absent."""
    return lambda value: value is None or check(value)


def _is_list(each: Check, longest: int) -> Check:
    return lambda value: isinstance(value, list) and len(value) <= longest and all(map(each, value))


def _is_whole(value: Any) -> bool:
    return type(value) is int and is_number(value)


def _are_classes(value: Any) -> bool:
    return _is_list(is_text, 256)(value) and len(set(value)) == len(value) >= 2


def _is_metric(value: Any) -> bool:
    return (
        is_mapping(value)
        and is_text(value.get("name"))
        and is_text(value.get("title"))
        and value.get("unit") in ("", "vox", "mm", "ml")
        and type(value.get("higher_is_better")) in (bool, type(None))
        and value.get("decimals") in range(10)
    )


RECORD: dict[str, Check] = {
    "parameters": optional(_is_whole),
    "weights": optional(is_mapping),
    "cost.image": optional(_is_list(is_number, 4)),
    "hardware.gpus": optional(_is_list(is_text, 1024)),
    **dict.fromkeys(
        ("fit_seconds", "cost.macs", "cost.scan_flops", "cost.seconds_per_case",
         "cost.peak_memory_bytes"),
        optional(is_number),
    ),
    **dict.fromkeys(
        ("data.fingerprint", "data.config", "code.digest", "code.commit", "versions.torch",
         "hardware.cpu"),
        optional(is_text),
    ),
}  # fmt: skip
CONFIG: dict[str, Check] = {
    "model.name": is_text,
    "seed": lambda value: type(value) is int,
    "data.class_names": _are_classes,
    **dict.fromkeys(("optim", "loss", "trainer", "evaluation"), optional(is_mapping)),
}
ORIGIN: dict[str, Check] = {  # of every metrics.json, whatever the task
    "data": is_text,
    "split.name": is_text,
    "split.hash": is_text,
    "seen.cases": optional(is_mapping),
}
_SUMMARY: dict[str, Check] = {
    **ORIGIN,
    "convention.policy": is_text,
    "convention.tolerance_mm": is_number,
    "convention.tolerance_vox": is_number,
    "metrics": optional(_is_list(_is_metric, 100)),
}
# columns of cases.csv
_TEXT = {"case", "patient", "phase", "group", "class_name", "outcome", "policy"}
_COUNTS = {"class", "voxels", "reference_voxels"}
_NEEDED = ("case", "patient", "class_name", "outcome", "class")
_RANGES = {"dice": (0, 1), "voxels": (0, SIZE), "reference_voxels": (0, SIZE)}


@dataclass(frozen=True)
class RunData:
    """One finished run as its folder tells it.

    Attributes:
        path: the run folder.
        record: content of run.json.
        config: content of config.yaml.
        summary: content of metrics.json.
        rows: of cases.csv, one per case and class; numbers as numbers, undefined as None.
    """

    path: Path
    record: Mapping[str, Any]
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    rows: tuple[Row, ...]

    @property
    def model(self) -> str:
        """Name of the network."""
        return str(self.config["model"]["name"])

    @property
    def seed(self) -> int:
        """Seed of weights, order and augmentation."""
        return int(self.config["seed"])

    @property
    def split(self) -> Mapping[str, Any]:
        """Name, hash and note of the split."""
        return dict(self.summary["split"])

    @property
    def fold(self) -> int | None:
        """Fold of a cross-validation, None where the split has no folds."""
        # From the split's name: data.fold may be set where the split has no use for it.
        match = _FOLD.match(self.split["name"])
        return int(match["fold"]) if match else None

    @property
    def saw_cases(self) -> bool:
        """Whether the network was trained or chosen on cases that it is scored on."""
        return bool((self.summary.get("seen") or {}).get("cases"))

    @cached_property
    def metrics(self) -> list[Metric]:
        """Descriptions of the scores in its rows, in the order of the columns."""
        columns = self.rows[0].keys() - VOLUMES
        return [metric for metric in described(self.summary) if metric.name in columns]

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """What two runs must share for their scores to be comparable."""
        match = _FOLD.match(self.split["name"])
        convention = self.summary["convention"]
        return {
            "data": self.summary["data"],
            "fingerprint": self.record.get("data", {}).get("fingerprint"),
            "split": match["base"] if match else self.split["name"],
            "split hash": None if match else self.split["hash"],  # each fold has its own
            "empty masks": convention["policy"],
            "tolerance_mm": convention["tolerance_mm"],
            "tolerance_vox": convention["tolerance_vox"],
            "classes": list(self.config["data"]["class_names"]),
            "longest side": self.config["data"].get("longest_side"),
            "seen cases": self.saw_cases,
        }

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Flat scientific configuration without seed and fold, `optim.optimizer.lr` style."""
        return _settings(self.config)

    @cached_property
    def setting(self) -> dict[str, Any]:
        """The same with the content of weights instead of their place: equal within an entry."""
        return _settings(with_digests(self.config, self.record.get("weights") or {}))


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = flatten(scientific(config))
    return {key: value for key, value in flat.items() if key not in _REPEATS}


def described(summary: Mapping[str, Any]) -> Sequence[Metric]:
    """The metrics that a metrics.json describes; the built-in ones where it is an older one."""
    keys = ("unit", "higher_is_better", "decimals")
    stored = summary.get("metrics")
    if stored is None:
        return BUILT_IN
    return [Metric(m["name"], m["title"], **{key: m[key] for key in keys}) for m in stored]


def run_folders(folder: str | Path) -> list[Path]:
    """Run folders of an experiment, sorted by name; superseded ones (`.previous`) left out.

    Raises:
        UserError: there is no such folder, or it holds no run folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Run folders lie under outputs/<experiment>/.")
    if (folder / "run.json").is_file():
        raise UserError(
            f"{folder} is a single run. A report compares the runs of an experiment: name the "
            f"folder above it, {folder.resolve().parent.name}."
        )
    found = [path.parent for path in sorted(folder.glob("*/run.json"))]
    found = [path for path in found if not path.name.endswith(".previous")]
    if not found and not (folder / ".jobs").is_dir():
        inside = sorted({path.parents[1].name for path in folder.glob("*/*/run.json")})
        hint = f" Its subfolders {', '.join(inside)} do: name one of them." if inside else ""
        raise UserError(f"{folder} holds no run folders (a run folder has a run.json).{hint}")
    return found


def read_run(path: str | Path) -> RunData:
    """Reads one finished run folder.

    Raises:
        UserError: a file is missing or damaged; the message names it.
    """
    path = Path(path)
    record, config = read_identity(path)
    summary = read_file(path / "metrics.json", _SUMMARY)
    with _reading(path / "cases.csv") as file:
        rows = _read_rows(file, config["data"]["class_names"])
    return RunData(path, record, config, summary, rows)


def read_identity(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Record (run.json) and configuration (config.yaml) of a run folder.

    Raises:
        UserError: one is missing or damaged; the message names it.
    """
    return read_file(path / "run.json", RECORD), read_file(path / "config.yaml", CONFIG)


def read_file(file: Path, fields: Mapping[str, Check]) -> dict[str, Any]:
    """Reads a JSON or YAML file of a finished run folder.

    Args:
        file: of the folder.
        fields: dotted key -> what its value must be.

    Raises:
        UserError: it is missing, damaged, or a field is not what it must be.
    """
    with _reading(file):
        content = read_yaml(file) if file.suffix == ".yaml" else read_json(file)
        for key, fits in fields.items():
            value = content
            for part in key.split("."):
                if value is not None:
                    _require(is_mapping(value), key)
                    value = value.get(part)
            _require(fits(value), key)
    return dict(content)


@contextmanager
def _reading(file: Path) -> Iterator[Path]:
    """Explains what is wrong with a file that the block reads and checks."""
    try:
        yield file
    except (OSError, ForeignFileError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{file} cannot be read ({reason}). A finished run writes it whole: copy the folder "
            "again, or leave it out."
        ) from error


def _read_rows(file: Path, classes: Sequence[str]) -> tuple[Row, ...]:
    """Rows of a cases.csv; empty cells are None."""
    columns, table = read_table(file)
    for column in (*_NEEDED, "dice"):
        _require(column in columns, f"column {column}")
    _require(bool(table), "its number of cases")
    rows = []
    for line, cells in enumerate(table, start=2):
        row = {column: _value(column, text) for column, text in cells.items()}
        for column in _NEEDED:
            _require(row[column] is not None, f"{column} in line {line}")
        known = 0 <= row["class"] < len(classes) and classes[row["class"]] == row["class_name"]
        _require(known, f"class in line {line}")
        for column in ("voxels", "volume_ml"):
            both = row.get(column), row.get(f"reference_{column}")
            _require((both[0] is None) == (both[1] is None), f"{column} in line {line}")
        for column, value in row.items():
            if isinstance(value, (int, float)):
                low, high = _RANGES.get(column, (-SIZE, SIZE))
                _require(is_number(value) and low <= value <= high, f"{column} in line {line}")
        rows.append(row)
    return tuple(rows)


def _value(column: str, text: str) -> Any:
    if text == "" or column in _TEXT:
        return text or None
    try:
        return int(text) if column in _COUNTS else float(text)
    except ValueError:
        raise ForeignFileError(f"a cell of column {column} is not a number") from None


def _require(holds: bool, field: str) -> None:
    if not holds:
        raise ForeignFileError(f"{field} is not what a run folder has there")
