"""Scores of label maps that lie in a folder: anybody's predictions against references."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml

from mambaseg.data.classes import IGNORED, Structures, check_class_names, structures_of
from mambaseg.data.fingerprint import THREADS, digest_of
from mambaseg.data.formats.files import read_label, without_ending
from mambaseg.data.labelling import checked_ignore
from mambaseg.data.seen import EARLIER, PUBLISHED, TRAINED, VALIDATED, require_unseen
from mambaseg.data.validation import DataError, as_label
from mambaseg.data.volume import Volume
from mambaseg.errors import UserError
from mambaseg.evaluation.case_scores import CaseScores
from mambaseg.evaluation.largest import keep_largest, parts_of
from mambaseg.evaluation.metrics import Metric
from mambaseg.inference.label_pairs import LABELS, Pair, find_pairs
from mambaseg.storage.lock import RunLock
from mambaseg.storage.run_folder import RunFolder, code_state, environment, file_digest, slug
from mambaseg.storage.untrusted import ForeignFileError, read_json

_FRAME = re.compile(r"_frame\d+$")
_TOLERANCE = 0.01  # mm; other programs round affines
log = logging.getLogger(__name__)


def class_names_of(pairs: Sequence[Pair], given: Sequence[str] | None = None) -> list[str]:
    """Names of the classes 0..K-1: as given, or as the .json files beside the predictions say.

    Raises:
        UserError: there are none, or they differ from those of another file.
    """
    names, where = list(given or ()), "class_names"
    for pair in pairs:
        for file in (pair.prediction, pair.reference):
            predicted, about = file == pair.prediction, _about(file)
            own = _by_number(about.get("labels"))
            if about and not own and predicted and not given:
                raise UserError(f"{_json(file)} names no classes 0, 1, ...: give class_names=[...]")
            if own and names and own != names:
                raise UserError(
                    f"{_json(file)} names the classes {own}, {where} {names}. Labels are compared "
                    "by their numbers, which must mean the same everywhere."
                )
            if own and not names and predicted:
                names, where = own, str(_json(file))
    if not names:
        raise UserError(
            "class_names: the predictions do not say what their labels mean (no .json beside "
            "them); give class_names=[background,...]"
        )
    check_class_names(names, "class_names")
    if len(names) < 2:
        raise UserError(f"class_names={names}: two names or more are needed")
    return names


def regions_of(pairs: Sequence[Pair], names: Sequence[str]) -> Structures | None:
    """Regions that the .json files beside the predictions name; None: the classes are scored.

    Raises:
        UserError: they differ, or are no labels of the classes.
    """
    told = [_about(pair.prediction).get("regions") for pair in pairs]
    if other := next((pair for pair, own in zip(pairs, told, strict=True) if own != told[0]), None):
        raise UserError(
            f"{_json(other.prediction)} names the regions {told[pairs.index(other)]}, "
            f"{_json(pairs[0].prediction)} {told[0]}: score predictions of the same regions"
        )
    return structures_of(names, told[0]) if told[0] else None


def _by_number(labels: Any) -> list[str]:
    """Names in the order of their numbers; none where these are not 0..K-1."""
    if not isinstance(labels, dict) or not all(type(n) is int for n in labels.values()):
        return []
    names = sorted(labels, key=labels.__getitem__)
    return names if [labels[name] for name in names] == list(range(len(names))) else []


def _json(label_map: Path) -> Path:
    return label_map.with_name(without_ending(label_map.name, LABELS) + ".json")


def _about(label_map: Path) -> dict[str, Any]:
    """What the .json beside a label map says; nothing where there is none."""
    path = _json(label_map)
    try:
        about = read_json(path) if path.is_file() else {}
    except (OSError, ForeignFileError) as error:
        raise UserError(f"{path} cannot be read ({error}): mend it, or take it away") from error
    return about if isinstance(about, dict) else {}


def _require_finished(pairs: Sequence[Pair]) -> None:
    """Raise `UserError` where a prediction was interrupted; warn where others made some of them."""
    told = {pair.prediction: _about(pair.prediction) for pair in pairs}
    if left := [path for path, about in told.items() if "unfinished" in about]:
        raise UserError(
            f"{len(left)} of {len(told)} predictions were interrupted ({left[0]}): run the command "
            "that predicts them again, or take them and their .json away"
        )
    if len({digest_of(about["made_by"]) for about in told.values() if "made_by" in about}) > 1:
        log.warning(
            "the predictions were made by different networks or with different options (made_by in "
            "their .json): these are scores of a mixture"
        )


def _seen(pairs: Sequence[Pair], *, allowed: bool) -> tuple[dict[str, Any], str]:
    """Which predictions are of images that their network has learnt from, and a note for tables."""
    told = {}
    for pair in pairs:
        seen = _about(pair.prediction).get("seen")
        told[pair.case.id] = seen if isinstance(seen, dict) else {"checked": False}
    grave = {
        pair.case.patient: how
        for pair in pairs
        if (how := told[pair.case.id].get("how")) in (TRAINED, VALIDATED, EARLIER)
    }
    found = {pair.case.id: grave[pair.case.patient] for pair in pairs if pair.case.patient in grave}
    require_unseen(found, len(pairs), allowed=allowed, subject="the network of the predictions")
    checked = all(seen.get("checked") is True for seen in told.values())
    if not (checked or found):
        log.warning(
            "the predictions do not say which images trained their network: whether it has "
            "seen these cases cannot be checked"
        )
    published = sum(seen.get("how") == PUBLISHED for seen in told.values())
    note = f"{published} cases validated the network too, as its published split does: scores are "
    return {"checked": checked, "cases": found}, f"{note}optimistic." if published else ""


def score_folders(
    predictions: Path,
    references: Path,
    *,
    class_names: Sequence[str] | None,
    evaluation: Mapping[str, Any],
    outputs: Path,
    metrics: Sequence[Metric] = (),
    metric_config: Mapping[str, Any] | None = None,
    ignore_label: int | None = None,
    patient_pattern: str | None = None,
    rerun: bool = False,
) -> tuple[RunFolder, dict[str, Any]]:
    """Scores label maps as a run scores its test set, and writes what a report needs.

    The run folder's model is the folder of the predictions, and its data the one of the
    references. The same files under the same convention are scored once.

    Both folders hold NIfTI files (of a cine every frame is a case, unless the reference labels
    other frames only) or pictures. `evaluation` has
    `empty`, `tolerance_mm`, `keep_largest` and `allow_seen`, as conf/config.yaml; without
    `class_names` the files beside the predictions tell them. `metric_config` tells how `metrics`
    were made: others score again. Pixels that have `ignore_label` in a reference are left out.
    `patient_pattern` is as `find_pairs` takes it. It returns the run folder, below `outputs`, and
    its configuration.

    Raises:
        UserError: a file has no partner, is unfinished, cannot be read, holds other labels, or lies
            elsewhere; or the network has learnt from an image.
    """
    pairs = find_pairs(predictions, references, patient_pattern)
    _require_finished(pairs)
    names = class_names_of(pairs, class_names)
    regions = regions_of(pairs, names)
    checked_ignore(ignore_label, len(names), None)
    seen, note = _seen(pairs, allowed=evaluation.get("allow_seen") is True)
    title, model = references.resolve().name, predictions.resolve().name
    files = digest_of([[pair.case.id, file_digest(pair.prediction)] for pair in pairs])
    config: dict[str, Any] = {
        "seed": 0,
        "model": {"name": model, "files": files},
        "data": {
            "name": slug(title) or "references",
            "title": title,
            "root": str(references),
            "class_names": names,
            **({"regions": {name: list(own) for name, own in regions.items()}} if regions else {}),
        },
        "evaluation": {key: evaluation[key] for key in ("empty", "tolerance_mm", "keep_largest")},
    }
    if config["evaluation"]["keep_largest"] == "auto":  # label maps are as they are
        config["evaluation"]["keep_largest"] = False
    fingerprint = digest_of([[pair.case.id, file_digest(pair.reference)] for pair in pairs])
    # scores with a mark, or with further columns, are others
    marks = [seen["cases"]] if seen["cases"] else []
    marks += [[metric.name for metric in metrics]] if metrics else []
    if arguments := {k: v for k, v in (metric_config or {}).items() if set(v) - {"_target_"}}:
        config["metric"] = arguments
        marks.append(arguments)
    marks += [{"ignored": ignore_label}] if ignore_label is not None else []
    marks += [{"patients": patient_pattern}] if patient_pattern is not None else []
    marks += [{"regions": config["data"]["regions"]}] if regions else []
    key = digest_of([config["model"], names, config["evaluation"], fingerprint, *marks])[:8]
    data = config["data"]["name"]
    folder = RunFolder(outputs / f"{slug(model) or 'predictions'}-{data}-{key}")
    if folder.finished and not rerun:
        log.info("already scored: %s (rerun=true scores again)", folder.path)
        return folder, config
    scores, without = _scores(pairs, names, config["evaluation"], metrics, ignore_label, regions)
    notes = [note] * bool(note)
    if without:
        notes.append(
            f"{without} frames of cines whose references label other frames only: left out."
        )
    hashed = digest_of([pair.case.id for pair in pairs])[:12]
    split = {"name": "all files", "hash": hashed, "note": " ".join(notes)}
    # of a cine that was seen, all frames that were scored were
    cases = {row["case"]: _FRAME.sub("", row["case"]) for row in scores.rows}
    found = {case: seen["cases"].get(case, seen["cases"].get(cine)) for case, cine in cases.items()}
    seen["cases"] = {case: how for case, how in found.items() if how}
    header = {"data": title, "model": model, "split": split, "seen": seen, "checkpoint": None}
    lock = RunLock(folder.path)
    lock.acquire()
    try:
        folder.start(
            key=key,
            data={"title": title, "fingerprint": fingerprint},
            split=split,
            predictions=str(predictions),
            code=code_state(),
            **environment(),
        )
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        folder.write_text("config.yaml", text)
        folder.write_rows("cases.csv", scores.rows)
        folder.write_json("metrics.json", {**header, **scores.compute()})
        folder.finish("done")
    finally:
        lock.release()
    return folder, config


def _scores(
    pairs: Sequence[Pair],
    names: Sequence[str],
    evaluation: Mapping[str, Any],
    metrics: Sequence[Metric],
    ignore_label: int | None,
    regions: Structures | None,
) -> tuple[CaseScores, int]:
    """Scores of all pairs, and how many frames had no reference.

    Several pairs at a time: reading and measuring let other threads run.
    """
    from rich.progress import track

    scores = CaseScores(
        class_names=names,
        policy=evaluation["empty"],
        tolerance_mm=evaluation["tolerance_mm"],
        more=metrics,
        partial=ignore_label is not None,
        regions=regions,
    )
    kept = parts_of(evaluation["keep_largest"], structures_of(names, regions))

    def score(pair: Pair) -> tuple[list[str], int]:
        prediction, reference = read_label(pair.prediction), read_label(pair.reference)
        _require_same_grid(pair, prediction, reference)
        labels = _labels(pair.prediction, prediction, len(names))
        expected = _labels(pair.reference, reference, len(names), ignore_label)
        # a volume is a case; of a cine every frame, numbered from 1 as ACDC numbers them
        digits = max(2, len(str(len(labels))))
        ids = [pair.case.id] if len(labels) == 1 else [
            f"{pair.case.id}_frame{t:0{digits}d}" for t in range(1, len(labels) + 1)
        ]  # fmt: skip
        # references of cines often label ED and ES alone: the other frames say nothing
        told = [bool(frame.any()) for frame in expected]
        told = told if any(told) else [True] * len(told)
        for name, one, other, known in zip(ids, labels, expected, told, strict=True):
            if not known:
                continue
            if kept:
                one = keep_largest(one, kept)
            both = map(torch.from_numpy, (one, other))
            scores.update(replace(pair.case, id=name), *both, spacing=reference.spacing)
        return ids, told.count(False)

    seen: set[str] = set()
    without = 0
    with ThreadPoolExecutor(THREADS) as pool:
        scored = track(pool.map(score, pairs), "label maps", total=len(pairs), transient=True)
        for pair, (ids, left_out) in zip(pairs, scored, strict=True):
            without += left_out
            if twice := seen.intersection(ids):
                raise UserError(f"{pair.prediction}: there are two cases of the name {min(twice)}")
            seen.update(ids)
    if without:
        log.warning("%d frames left out: their references label other frames only", without)
    return scores, without


def _labels(
    path: Path, read: Volume, num_classes: int, ignore: int | None = None
) -> npt.NDArray[np.uint8]:
    """The numbers of a label map, with IGNORED in place of `ignore`."""
    labels = as_label(read.image[:, :, 0], path)
    known = labels if ignore is None else labels[labels != ignore]
    if (highest := int(known.max(initial=0))) >= num_classes:
        problem = f"the label map holds the value {highest}; the classes are 0..{num_classes - 1}"
        raise DataError(problem, path, "Name all classes in class_names=[...], or map the labels.")
    if ignore is not None:
        labels = np.where(labels == ignore, np.uint8(IGNORED), labels)
    return np.ascontiguousarray(labels)


def _size(read: Volume) -> str:
    frames, z, _, y, x = read.image.shape
    return f"{z} × {y} × {x} voxels (z, y, x)" + f" in {frames} frames" * (frames > 1)


def _require_same_grid(pair: Pair, prediction: Volume, reference: Volume) -> None:
    """Raise `UserError` unless both lie on one grid; a header never filled in says no place."""
    both = prediction, reference
    theirs, ours = (_size(read) for read in both)
    if theirs == ours:
        if any(read.spacing is None or read.affine is None for read in both):
            return
        one, other = affines = [np.array(read.affine) for read in both]
        if np.allclose(one, other, rtol=0, atol=_TOLERANCE):
            return
        theirs, ours = (f"the affine {affine.round(3).tolist()}" for affine in affines)
    raise DataError(
        f"the prediction has {theirs}, its reference ({pair.reference}) {ours}",
        pair.prediction,
        "Voxels are paired by index: bring the prediction back to the image's own grid.",
    )
