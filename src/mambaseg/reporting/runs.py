"""What a finished run is to a report: its scores, settings and protocol (`reading` reads it)."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from mambaseg.evaluation.calibration import FILE, read_calibration
from mambaseg.evaluation.metrics import BUILT_IN, DESCRIBED, Metric
from mambaseg.reporting.labels import flatten
from mambaseg.storage.identity import scientific, with_digests
from mambaseg.storage.untrusted import ForeignFileError

Row = dict[str, Any]

SEGMENTATION = "segmentation"
UNKNOWN = "not recorded"
CALIBRATIONS = (FILE, f"checkpoints/best.{FILE}")  # of an evaluation, of a training
_FOLD = re.compile(r"^(?P<base>.+)-fold(?P<fold>\d{1,4})$")
_REPEATS = {"seed", "data.seed", "data.fold", "data.find_cases.fold"}  # may differ in an entry

# follow from the method's name and its partners
_IMPLIED = ("method._target_", "method._partial_", "method.networks", "data.unlabelled")
log = logging.getLogger(__name__)


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
        """Whether it scored a given network or label maps: nothing is known of the training."""
        return bool(self.config.get("checkpoint") or "files" in self.config["model"])

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
    def calibration(self) -> dict[str, Any] | None:
        """What `calibration=true` measured of it; None: nothing, or a damaged file was left out."""
        for place in CALIBRATIONS:
            try:
                return read_calibration(self.path / place)
            except FileNotFoundError:
                continue
            except (OSError, ForeignFileError) as error:
                log.warning("left out: %s: %s", self.path / place, error)
        return None

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
            "classes": scored(self.config["data"]),
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
        setting = setting_of(self.record, self.config)
        if training := self.record.get("training"):
            setting["checkpoint"] = training
        return setting if self.fold is None else {**setting, "data": None}


def scored(data: Mapping[str, Any]) -> list[str]:
    """Names of what is scored: the background, then classes, or regions in their place."""
    return [*data["class_names"][:1], *(data.get("regions") or data["class_names"][1:])]


def setting_of(record: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The flat scientific configuration without seed and fold, with the content of weights."""
    setting = _settings(with_digests(config, record.get("weights") or {}))
    return {**setting, "data": (record.get("data") or {}).get("fingerprint")}


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = flatten(scientific(config)) | dict.fromkeys(config.get("planned") or (), "auto")
    return {key: value for key, value in flat.items() if key not in _REPEATS}


def described(summary: Mapping[str, Any]) -> Sequence[Metric]:
    """The metrics that a metrics.json describes; the built-in ones where it is an older one."""
    built_in = {metric.name: metric for metric in BUILT_IN}
    stored = summary.get("metrics")
    if stored is None:
        return BUILT_IN
    told = ({key: metric.get(key) for key in DESCRIBED} for metric in stored)
    return [built_in.get(metric["name"]) or Metric(**metric) for metric in told]


def rows_where(
    rows: Iterable[Row], where: Mapping[str, str] | None = None, *, background: bool = False
) -> list[Row]:
    """Rows of the foreground classes, or of all, that have these values."""
    return [
        row
        for row in rows
        if (background or row["class"]) and all(row.get(k) == v for k, v in (where or {}).items())
    ]


def case_dice(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Case -> mean foreground Dice of one run's rows, of the cases that have one."""
    dice: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["class"] and row["dice"] is not None:
            dice[row["case"]].append(row["dice"])
    return {case: fmean(values) for case, values in dice.items()}


def ended_early(run: RunData) -> int | None:
    """The step after which a callback or a limit of time ended a training; None: none did."""
    steps, planned = run.record.get("steps"), (run.config.get("data") or {}).get("steps")
    if run.rescored or not isinstance(steps, int) or not isinstance(planned, int):
        return None
    return steps if steps < planned else None
