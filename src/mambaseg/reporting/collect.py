"""Reads run folders back, and decides what may be averaged and what may be compared.

Three levels, each stricter than a reader would check by hand:

- *run*: one finished folder with test scores.
- *entry*: a row of the tables. Its runs differ in seed and fold only; any other difference of the
  configuration makes another entry, and stands in its label.
- *comparison*: entries scored on the same data and split under the same metric convention. Others
  get a comparison, and a section of the page, of their own.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mambaseg.errors import UserError
from mambaseg.reporting.labels import flatten, labels
from mambaseg.reporting.valid import (
    check_config,
    check_record,
    check_rows,
    check_summary,
    reading,
)
from mambaseg.storage.identity import scientific, with_digests
from mambaseg.storage.run_folder import RunFolder
from mambaseg.storage.untrusted import ForeignFileError, read_json, read_table, read_yaml

Row = dict[str, Any]

_TEXT = {"case", "patient", "phase", "group", "class_name", "outcome", "policy"}
_COUNTS = {"class", "voxels", "reference_voxels"}
_FOLD = re.compile(r"^(?P<base>.+)-fold(?P<fold>\d{1,4})$")
# what makes a fold or a seed: never part of an entry's setting
_REPEATS = {"seed", "data.seed", "data.fold"}


@dataclass(frozen=True)
class RunData:
    """One finished run as its folder tells it.

    Attributes:
        path: the run folder.
        record: what run.json holds.
        config: what config.yaml holds.
        summary: what metrics.json holds.
        rows: of cases.csv, one per case and class; numbers as numbers, undefined as None.
    """

    path: Path
    record: Mapping[str, Any]
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    rows: tuple[Row, ...]

    @property
    def model(self) -> str:
        """Name of the network's leaf."""
        return str(self.config["model"]["name"])

    @property
    def seed(self) -> int:
        """Of weights, order and augmentation."""
        return int(self.config["seed"])

    @property
    def split(self) -> Mapping[str, Any]:
        """Name, hash and note of the split."""
        return dict(self.summary["split"])

    @property
    def fold(self) -> int | None:
        """Of a cross-validation, None where the split has no folds."""
        # From the split's name: data.fold may be set where the split has no use for it.
        match = _FOLD.match(self.split["name"])
        return int(match["fold"]) if match else None

    @property
    def saw_cases(self) -> bool:
        """Whether the network was trained or chosen on cases that it is scored on."""
        return bool((self.summary.get("seen") or {}).get("cases"))

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
        digests = self.record.get("weights")
        return _settings(with_digests(self.config, digests if isinstance(digests, dict) else {}))


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = flatten(scientific(config))
    return {key: value for key, value in flat.items() if key not in _REPEATS}


@dataclass(frozen=True)
class Entry:
    """A network under one setting: a row of the tables.

    Attributes:
        label: unique in its comparison; says what differs from the other entries.
        runs: differ in seed and fold only; sorted by both.
    """

    label: str
    runs: tuple[RunData, ...]

    @cached_property
    def by_seed(self) -> dict[int, list[Row]]:
        """Seed -> rows of all its folds together, a case that is in two folds once per fold."""
        rows: dict[int, list[Row]] = defaultdict(list)
        for run in self.runs:
            rows[run.seed] += run.rows
        return dict(rows)

    @property
    def folds(self) -> list[int]:
        """Folds of the cross-validation that any seed has; empty without one."""
        return sorted({run.fold for run in self.runs if run.fold is not None})

    @cached_property
    def patients(self) -> set[str]:
        """Who was tested, by any run."""
        return {row["patient"] for run in self.runs for row in run.rows}


@dataclass(frozen=True)
class Comparison:
    """Entries that were scored on the same data, split and convention.

    Attributes:
        protocol: what they share; see `RunData.protocol`.
        entries: in order of their labels.
    """

    protocol: Mapping[str, Any]
    entries: tuple[Entry, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the foreground classes."""
        return tuple(self.protocol["classes"][1:])

    @property
    def title(self) -> str:
        """Data, split and convention in one line."""
        protocol = self.protocol
        digest = f" ({protocol['split hash']})" if protocol["split hash"] else ""
        side = protocol.get("longest side")
        return (
            f"{protocol['data']}, split {protocol['split']}{digest}, "
            f"empty masks: {protocol['empty masks']}"
        ) + "".join(
            [
                f", at most {side} pixels a side" if side else "",
                ", SEEN CASES" if protocol.get("seen cases") else "",
            ]
        )

    @cached_property
    def subject(self) -> str:
        """`patient`, or `case` where every case is one of its own, as pictures are."""
        rows = [row for entry in self.entries for run in entry.runs for row in run.rows]
        return "case" if all(row["patient"] == row["case"] for row in rows) else "patient"

    @cached_property
    def unit(self) -> str:
        """`mm` where every run shows its distances in mm, otherwise `vox`, which all have."""
        runs = [run for entry in self.entries for run in entry.runs]
        known = all(row.get("volume_ml") is not None for run in runs for row in run.rows)
        said = {run.summary["convention"].get("distances", "mm") for run in runs}
        return "mm" if known and said == {"mm"} else "vox"


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
    with reading(path / "metrics.json") as file:
        summary = read_json(file)
        check_summary(summary)
    with reading(path / "cases.csv") as file:
        rows = read_rows(file)
        check_rows(rows, config["data"]["class_names"])
    run = RunData(path, record, config, summary, tuple(rows))
    if not rows:
        raise UserError(f"{path / 'cases.csv'} holds no case")
    return run


def read_identity(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Record (run.json) and configuration (config.yaml) of a run folder.

    Raises:
        UserError: one is missing or damaged; the message names it.
    """
    with reading(path / "run.json"):
        record = RunFolder(path).record
        check_record(record)
    with reading(path / "config.yaml") as file:
        config = read_yaml(file)
        check_config(config)
    return record, config


def read_rows(path: Path) -> list[Row]:
    """Rows of a cases.csv; empty cells are None.

    Raises:
        ForeignFileError: not a table, or a cell that should be a number is none.
        OSError: it is missing or may not be read.
    """
    table = read_table(path)[1]
    return [{key: _value(key, text) for key, text in row.items()} for row in table]


def _value(key: str, text: str) -> Any:
    if text == "":
        return None
    if key in _TEXT:
        return text
    try:
        return int(text) if key in _COUNTS else float(text)
    except ValueError:
        raise ForeignFileError(f"a cell of column {key} is not a number") from None


def is_other_task(path: Path) -> bool:
    """Whether a finished run folder is of another task than segmentation."""
    try:
        return read_json(path / "metrics.json").get("task", "segmentation") != "segmentation"
    except (OSError, ForeignFileError, AttributeError):
        return False


def collect(folder: str | Path) -> tuple[list[Comparison], list[str]]:
    """Reads all finished runs of an experiment.

    Args:
        folder: `outputs/<experiment>`.

    Returns:
        Comparisons, the largest first, and what had to be left out, one sentence each.

    Raises:
        UserError: there is no finished run with test scores, of whatever task.
    """
    runs, problems, others = [], [], False
    for path in run_folders(folder):
        if not RunFolder(path).finished:
            continue  # `mambaseg.reporting.status` lists these, and why
        if is_other_task(path):
            others = True  # `mambaseg.reporting.tasks` reads these
            continue
        try:
            runs.append(read_run(path))
        except UserError as error:
            problems.append(f"left out: {error}")
    if not runs and not others:
        detail = "".join(f"\n  {problem}" for problem in problems)
        raise UserError(
            f"{folder}: no finished run with test scores yet. "
            f"`python src/report.py status {folder}` lists what there is.{detail}"
        )
    runs, repeated = without_repeats(runs, lambda run: [run.protocol, run.setting, run.fold])
    return group(runs), problems + repeated


def group(runs: Sequence[RunData]) -> list[Comparison]:
    """Runs -> comparisons -> entries, by protocol and by setting."""
    by_protocol: dict[str, list[RunData]] = defaultdict(list)
    for run in runs:
        by_protocol[_key(run.protocol)].append(run)
    comparisons = []
    for members in by_protocol.values():
        by_setting: dict[str, list[RunData]] = defaultdict(list)
        for run in members:
            by_setting[_key(run.setting)].append(run)
        groups = list(by_setting.values())
        names = entry_labels(groups)
        entries = [
            Entry(name, tuple(sorted(runs, key=lambda run: (run.seed, run.fold or 0))))
            for name, runs in zip(names, groups, strict=True)
        ]
        entries.sort(key=lambda entry: _order(entry.label))
        comparisons.append(Comparison(members[0].protocol, tuple(entries)))
    return sorted(comparisons, key=lambda part: (-len(part.entries), part.title))


def entry_labels(groups: Sequence[Sequence[RunData]]) -> list[str]:
    """A unique name for each entry's runs; where two settings read alike, with a run's hash."""
    names = labels([(runs[0].model, runs[0].settings) for runs in groups])
    return [
        f"{name} ({runs[0].path.name[-8:]})" if names.count(name) > 1 else name
        for name, runs in zip(names, groups, strict=True)
    ]


def _order(label: str) -> tuple[int, str]:
    """The paper's three networks in its order, others after them by name."""
    known = ("unet", "swin_unet", "mamba_unet")
    model = label.split(" ", 1)[0]
    return (known.index(model) if model in known else len(known), label)


def without_repeats(
    runs: Sequence[RunData], setting: Callable[[RunData], Any]
) -> tuple[list[RunData], list[str]]:
    """Of runs with the same setting and seed only the latest counts.

    Args:
        runs: of an experiment.
        setting: run -> all that tells it from others but its seed, as plain data.

    Returns:
        The runs that count by name, and what is left out, one sentence each.
    """
    latest: dict[tuple[Any, ...], RunData] = {}
    said = []
    for run in sorted(runs, key=lambda run: str(run.record.get("ended", ""))):
        key = (_key(setting(run)), run.seed)
        if key in latest:
            said.append(
                f"left out: {latest[key].path.name} has the setting, seed and fold of "
                f"{run.path.name}, which ended later"
            )
        latest[key] = run
    return sorted(latest.values(), key=lambda run: run.path.name), said


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
