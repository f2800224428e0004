"""Finished run folders read back, each file checked once for types and ranges.

A folder may come from somebody else. Whatever is missing, damaged or out of range in it ends in one
`UserError` that names the file and the field, so that the report of the other runs can go ahead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from mambaseg.errors import UserError
from mambaseg.evaluation.metrics import BUILT_IN
from mambaseg.reporting.runs import SEGMENTATION, Row, RunData, described, scored, setting_of
from mambaseg.storage.identity import digest_of
from mambaseg.storage.run_folder import RunFolder
from mambaseg.storage.untrusted import ForeignFileError, read_json, read_table, read_yaml

SIZE = 1e15  # an upper bound of every number in a run folder: operations, voxels, ml, mm, s, bytes

# Values of the same type as those that the files must or may have: 1.0 is any number, [""] a list
# of texts, {} any mapping.
_RECORD = {
    "parameters": 1,
    "fit_seconds": 1.0,
    "resumed": [{}],
    "weights": {},
    "training": "",
    "split": {"hash": ""},
    "overrides": [""],
    "data": {"fingerprint": "", "scored": "", "images": "", "config": ""},
    "code": {"digest": "", "commit": ""},
    "versions": {"torch": ""},
    "hardware": {"cpu": "", "instructions": "", "gpus": [""]},
    "cost": {
        "macs": 1.0, "scan_flops": 1.0, "seconds_per_case": 1.0, "peak_memory_bytes": 1.0,
        "image": [1.0], "parameters": 1, "step_seconds": 1.0, "passes": 1.0,
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
# columns of cases.csv
_TEXT = {"case", "patient", "phase", "group", "class_name", "outcome", "policy"}
_COUNTS = {"class", "voxels", "reference_voxels"}
_NEEDED = ("case", "patient", "class_name", "outcome", "class")
_RANGES = {"dice": (0, 1), "voxels": (0, SIZE), "reference_voxels": (0, SIZE)}


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
    with reading(path / "metrics.json") as file:
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
        _check(summary, {"foreground": {"dice": {"mean": 1.0}}}, required=False)
        _require(described(summary)[:1] == BUILT_IN[:1], "metrics")  # Dice leads every table
        _check_networks(summary)
    with reading(path / "cases.csv") as file:
        rows = _read_rows(file, scored(config["data"]))
    _require_same_dice(path, summary, rows)
    return RunData(path, record, config, summary, rows)


def _require_same_dice(path: Path, summary: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Refuses scores per case that are not those of the summary: tables hold numbers of both."""
    values: dict[int, list[float]] = {}
    for row in rows:
        if row["class"] and row["dice"] is not None:
            values.setdefault(row["class"], []).append(row["dice"])
    dice = fmean(map(fmean, values.values())) if values else None
    stored = ((summary.get("foreground") or {}).get("dice") or {}).get("mean", dice)
    if dice != stored and not (dice and stored and math.isclose(dice, stored, rel_tol=1e-9)):
        raise UserError(
            f"{path}: cases.csv has a mean Dice of {dice}, metrics.json {stored}. A finished run "
            "writes both from the same scores: copy the folder again, or leave it out."
        )


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
    with reading(path / "run.json") as file:
        record = read_json(file)
        _check(record, _RECORD, required=False)
        for session in (record or {}).get("resumed") or ():
            _check(session, {"hardware": _RECORD["hardware"]}, "resumed", required=False)
    with reading(path / "config.yaml") as file:
        config = read_yaml(file)
        _check(config, _CONFIG)
        _check(config, _GROUPS, required=False)
        names = config["data"]["class_names"]
        _require(2 <= len(names) <= 256 and len(set(names)) == len(names), "data.class_names")
    return record or {}, config


def training_of(checkpoint: str | None) -> str:
    """Eight hex digits over how a checkpoint's run was trained, but for its seed; empty: unknown.

    Equal for the checkpoints of a sweep over seeds, whose scores are rows of one network.
    """
    path = Path(checkpoint or "").resolve()
    if path.parent.name != "checkpoints" or not (path.parents[1] / "run.json").is_file():
        return ""
    record, config = read_identity(path.parents[1])
    return digest_of(
        [path.name, setting_of(record, config), (record.get("split") or {}).get("hash")]
    )


@contextmanager
def reading(file: Path) -> Iterator[Path]:
    """Explains what is wrong with a file that the block reads and checks."""
    try:
        yield file
    except (OSError, ValueError, KeyError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        reason = f"it has no {reason}" if isinstance(error, KeyError) else reason
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
