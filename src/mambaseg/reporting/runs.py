"""Finished run folders read back, each file checked once for types and ranges.

A folder may come from somebody else. Whatever is missing, damaged or out of range in it ends in one
`UserError` that names the file and the field, so that the report of the other runs can go ahead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mambaseg.errors import UserError
from mambaseg.evaluation.metrics import BUILT_IN, Metric
from mambaseg.reporting.labels import flatten
from mambaseg.storage.identity import scientific, with_digests
from mambaseg.storage.run_folder import RunFolder
from mambaseg.storage.untrusted import ForeignFileError, read_json, read_table, read_yaml

Row = dict[str, Any]

SIZE = 1e15  # an upper bound of every number in a run folder: operations, voxels, ml, mm, s, bytes
SEGMENTATION = "segmentation"
UNKNOWN = "not recorded"
_FOLD = re.compile(r"^(?P<base>.+)-fold(?P<fold>\d{1,4})$")
_REPEATS = {"seed", "data.seed", "data.fold", "data.find_cases.fold"}  # may differ in an entry

# Values of the same type as those that the files must or may have: 1.0 is any number, [""] a list
# of texts, {} any mapping.
_RECORD = {
    "parameters": 1,
    "fit_seconds": 1.0,
    "weights": {},
    "overrides": [""],
    "data": {"fingerprint": "", "scored": "", "images": "", "config": ""},
    "code": {"digest": "", "commit": ""},
    "versions": {"torch": ""},
    "hardware": {"cpu": "", "instructions": "", "gpus": [""]},
    "cost": {
        "macs": 1.0, "scan_flops": 1.0, "seconds_per_case": 1.0, "peak_memory_bytes": 1.0,
        "image": [1.0], "parameters": 1, "step_seconds": 1.0,
        "method": {"parameters": 1, "macs": 1.0, "scan_flops": 1.0},
    },
}  # fmt: skip
_CONFIG = {"seed": 1, "model": {"name": ""}, "data": {"class_names": [""]}}
_GROUPS: dict[str, Any] = {
    "optim": {}, "loss": {}, "trainer": {}, "evaluation": {}, "data": {"regions": {}},
    "method": {"name": "", "_target_": "", "networks": [{"name": ""}]}, "planned": [""],
}  # fmt: skip
_SUMMARY = {"data": "", "split": {"name": "", "hash": ""}}
_CONVENTION = {"convention": {"policy": "", "tolerance_mm": 1.0, "tolerance_vox": 1.0}}
_MEANS: dict[str, Any] = {"cases": 1, "scores": {}}
_ABOUT = {
    "convention": {"distances": ""}, "task": "", "title": "", "note": "", "seen": {"cases": {}},
    "metrics": [{"name": "", "title": "", "unit": "", "decimals": 1}], "keep_largest": {},
    "supervision": {"labelled": 1, "patients": 1, "labels": ""}, "network": "", "views": "",
}  # fmt: skip
# follow from the method's name and its partners
_IMPLIED = ("method._target_", "method._partial_", "method.networks", "data.unlabelled")
# columns of cases.csv
_TEXT = {"case", "patient", "phase", "group", "class_name", "outcome", "policy"}
_COUNTS = {"class", "voxels", "reference_voxels"}
_NEEDED = ("case", "patient", "class_name", "outcome", "class")
_RANGES = {"dice": (0, 1), "voxels": (0, SIZE), "reference_voxels": (0, SIZE)}


@dataclass(frozen=True)
class RunData:
    """One finished run as its folder tells it."""

    path: Path
    record: Mapping[str, Any]  # run.json
    config: Mapping[str, Any]  # config.yaml
    summary: Mapping[str, Any]  # metrics.json
    rows: tuple[Row, ...]  # cases.csv, one per case and class, undefined as None; other tasks: none

    @property
    def task(self) -> str:
        """`segmentation`, or the name of another task."""
        return str(self.summary.get("task") or SEGMENTATION)

    @property
    def rescored(self) -> bool:
        """Whether it scored a given network: its configuration says nothing of the training."""
        return bool(self.config.get("checkpoint"))

    @property
    def model(self) -> str:
        """Names of the networks that were trained together, mostly of one."""
        return " + ".join(self.networks)

    @property
    def method(self) -> str:
        """Name of the learning method."""
        method = self.config.get("method") or {}
        target = str(method.get("_target_") or "supervised")
        return str(method.get("name") or target.rpartition(".")[2])

    @cached_property
    def networks(self) -> dict[str, Mapping[str, Any]]:
        """Summaries of the trained networks by name; the first is that of `model=...`."""
        several = self.summary.get("networks")
        return several or {str(self.config["model"]["name"]): self.summary}

    @property
    def chosen(self) -> str:
        """Which of the networks was best in validation: the run's scores are its."""
        return str(self.summary.get("network") or next(iter(self.networks)))

    @property
    def supervision(self) -> str:
        """Which labels it learnt from: `all`, `7 of 70`, `scribbles of 80`, or `UNKNOWN`."""
        about = self.summary.get("supervision")
        if not about:
            return UNKNOWN if self.rescored else "all"
        some, dense = about["labelled"] < about["patients"], about["labels"] == "dense"
        patients = f"{about['labelled']}" + (f" of {about['patients']}" if some else "")
        return (patients if some else "all") if dense else f"{about['labels']}s of {patients}"

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
        match = _FOLD.match(self.split["name"])  # data.fold may be set where a split has no folds
        return int(match["fold"]) if match else None

    @property
    def saw_cases(self) -> bool:
        """Whether the network was trained or chosen on cases that it is scored on."""
        return bool((self.summary.get("seen") or {}).get("cases"))

    @cached_property
    def metrics(self) -> list[Metric]:
        """Descriptions of the scores in its rows, in the order of the columns."""
        return [metric for metric in described(self.summary) if metric.name in self.rows[0]]

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """What two runs must share for their scores to be comparable."""
        match = _FOLD.match(self.split["name"])  # folds score other cases of the same patients
        about = self.record.get("data") or {}
        convention = self.summary.get("convention") or {}  # of segmentation
        return {
            "task": self.task,
            "data": self.summary["data"],
            "fingerprint": about.get("images" if match else "scored", about.get("fingerprint")),
            "split": match["base"] if match else self.split["name"],
            "split hash": None if match else self.split["hash"],  # each fold has its own
            **{key: convention.get(key) for key in ("policy", "tolerance_mm", "tolerance_vox")},
            "classes": _scored(self.config["data"]),
            "regions": self.config["data"].get("regions"),
            "longest side": self.config["data"].get("longest_side"),
            "seen cases": self.saw_cases,
        }

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Flat scientific configuration without seed and fold; a method is name and arguments."""
        flat = _settings(self.config) | ({} if self.rescored else {"method": self.method})
        return {key: value for key, value in flat.items() if key not in _IMPLIED}

    @cached_property
    def setting(self) -> dict[str, Any]:
        """The same with the content of weights instead of their place: equal within an entry."""
        setting = _settings(with_digests(self.config, self.record.get("weights") or {}))
        about = self.record.get("data") or {}
        return {**setting, "data": about.get("fingerprint") if self.fold is None else None}


def _scored(data: Mapping[str, Any]) -> list[str]:
    """Names of what is scored: the background, then classes, or regions in their place."""
    return [*data["class_names"][:1], *(data.get("regions") or data["class_names"][1:])]


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = flatten(scientific(config)) | dict.fromkeys(config.get("planned") or (), "auto")
    return {key: value for key, value in flat.items() if key not in _REPEATS}


def described(summary: Mapping[str, Any]) -> Sequence[Metric]:
    """The metrics that a metrics.json describes; the built-in ones where it is an older one."""
    keys = ("name", "title", "unit", "higher_is_better", "decimals")
    built_in = {metric.name: metric for metric in BUILT_IN}
    stored = summary.get("metrics")
    if stored is None:
        return BUILT_IN
    return [built_in.get(m["name"]) or Metric(**{key: m.get(key) for key in keys}) for m in stored]


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


def rows_where(
    rows: Iterable[Row], where: Mapping[str, str] | None = None, *, background: bool = False
) -> list[Row]:
    """Rows of the foreground classes, or of all, that have these values."""
    return [
        row
        for row in rows
        if (background or row["class"]) and all(row.get(k) == v for k, v in (where or {}).items())
    ]


def is_other_task(path: Path) -> bool:
    """Whether a finished run folder is of another task than segmentation."""
    try:
        return read_json(path / "metrics.json").get("task", SEGMENTATION) != SEGMENTATION
    except (OSError, ForeignFileError, AttributeError):
        return False


def read_runs(folder: str | Path) -> tuple[list[RunData], list[str]]:
    """The finished runs of an experiment, of any task.

    Returns:
        Runs by name, and which had to be left out, one sentence each.

    Raises:
        UserError: there is no finished run with test scores.
    """
    runs, problems = [], []
    for path in run_folders(folder):
        if RunFolder(path).finished:  # `mambaseg.reporting.status` lists the others, and why
            try:
                runs.append(read_run(path))
            except UserError as error:
                problems.append(f"left out: {error}")
    if not runs:
        detail = "".join(f"\n  {problem}" for problem in problems)
        raise UserError(
            f"{folder}: no finished run with test scores yet. "
            f"`mambaseg report status {folder}` lists what there is.{detail}"
        )
    return runs, problems


def read_run(path: str | Path) -> RunData:
    """Reads one finished run folder, of any task.

    Raises:
        UserError: a file is missing or damaged; the message names it.
    """
    record, config = read_identity(path := Path(path))
    with _reading(path / "metrics.json") as file:
        summary = read_json(file)
        _check(summary, _SUMMARY)
        _check(summary, _ABOUT, required=False)
        for metric in summary.get("metrics") or []:
            _require(0 <= metric["decimals"] < 10, "metrics")
        if summary.get("task", SEGMENTATION) != SEGMENTATION:
            _check(summary, _MEANS)
            _require(0 < len(summary["scores"]) <= 256, "scores")
            for name, score in summary["scores"].items():
                _check(score, {"mean": 1.0, "sd": 1.0}, f"scores.{name}", required=False)
                _require({"mean", "sd"} <= (score or {}).keys(), f"scores.{name}")
            return RunData(path, record, config, summary, ())
        _check(summary, _CONVENTION)
        _require(described(summary)[:1] == BUILT_IN[:1], "metrics")  # Dice leads every table
        _check_networks(summary)
    with _reading(path / "cases.csv") as file:
        rows = _read_rows(file, _scored(config["data"]))
    return RunData(path, record, config, summary, rows)


def _check_networks(summary: Mapping[str, Any]) -> None:
    """What a metrics.json says of a method's networks, and of the labels that were read."""
    if (about := summary.get("supervision")) is not None:
        _require({"labelled", "patients", "labels"} <= about.keys(), "supervision")
    if (networks := summary.get("networks")) is not None:
        _check(networks, {}, "networks")
        _require(2 <= len(networks) <= 16 and summary.get("network") in networks, "networks")
        for name, own in networks.items():
            _check(own, {"foreground": {}}, f"networks.{name}")
            for score in own["foreground"].values():
                _check(score, {"mean": 1.0}, f"networks.{name}.foreground", required=False)


def read_identity(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Record (run.json) and configuration (config.yaml) of a run folder.

    Raises:
        UserError: one is missing or damaged; the message names it.
    """
    with _reading(path / "run.json") as file:
        record = read_json(file)
        _check(record, _RECORD, required=False)
    with _reading(path / "config.yaml") as file:
        config = read_yaml(file)
        _check(config, _CONFIG)
        _check(config, _GROUPS, required=False)
        names = config["data"]["class_names"]
        _require(2 <= len(names) <= 256 and len(set(names)) == len(names), "data.class_names")
    return record or {}, config


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


def _check(value: Any, example: Any, key: str = "", *, required: bool = True) -> None:
    """Raises ForeignFileError where a value, or one in it, is not of the example's type."""
    if value is None and not required:
        return
    if isinstance(example, dict):
        _require(isinstance(value, Mapping), key)
        for name, inner in example.items():
            _check(value.get(name), inner, f"{key}.{name}".lstrip("."), required=required)
    elif isinstance(example, list):
        _require(isinstance(value, list) and len(value) <= 1024, key)
        for each in value:
            _check(each, example[0], key)
    elif isinstance(example, str):
        _require(isinstance(value, str) and len(value) <= 10_000, key)
    else:
        _require(isinstance(value, (int, type(example))) and _is_number(value), key)


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and math.isfinite(value) and abs(value) <= SIZE


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
                _require(_is_number(value) and low <= value <= high, f"{column} in line {line}")
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
        raise ForeignFileError(f"{field or 'the whole file'} is not what a run folder has there")
