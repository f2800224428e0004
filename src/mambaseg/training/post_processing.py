"""Which structures are reduced to their largest component: chosen on the validation set."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mambaseg.data.case import Case
from mambaseg.data.classes import Structures
from mambaseg.evaluation.case_scores import CaseScores
from mambaseg.evaluation.largest import candidates, keep_largest
from mambaseg.evaluation.summary import kept_in_words, summarise
from mambaseg.evaluation.surface import Spacing
from mambaseg.training.ranks import gathered_cases

log = logging.getLogger(__name__)
Array = npt.NDArray[np.uint8]


class Validated(NamedTuple):
    """A validation case and what a network makes of it; labels are compressed."""

    case: Case
    spacing: Spacing | None
    shape: tuple[int, ...]
    prediction: bytes
    truth: bytes

    @classmethod
    def of(cls, batch: Mapping[str, Any], prediction: Tensor) -> Validated:
        """Of an evaluation batch and the labels (Z, H, W) that were predicted."""
        found, truth = (_packed(labels) for labels in (prediction, batch["label"]))
        return cls(batch["case"], batch["spacing"], tuple(prediction.shape), found, truth)

    def with_prediction(self, labels: Array) -> Validated:
        """The same case with other labels."""
        return self._replace(prediction=_packed(torch.from_numpy(labels)))

    def unpacked(self) -> tuple[Array, Array]:
        """Prediction and truth."""
        arrays = (np.frombuffer(zlib.decompress(one), np.uint8) for one in self[3:])
        prediction, truth = (array.reshape(self.shape) for array in arrays)
        return prediction, truth


def _packed(labels: Tensor) -> bytes:
    return zlib.compress(labels.cpu().numpy().astype(np.uint8).tobytes(), 1)


class Chosen(NamedTuple):
    """What was chosen, and the mean Dice of the validation set without and with it."""

    parts: Structures
    before: float | None
    after: float | None


def choose(cases: Sequence[Validated], tried: Structures, scores: CaseScores) -> Chosen:
    """Which structures to reduce to their largest component, one after the other.

    A structure is, where that raises the mean Dice of the validation set, with those that were
    chosen before it, and lowers that of no structure. nnU-Net chooses alike; there a single class
    is judged by its own Dice alone, which is the same unless classes are regions.

    Args:
        cases: of this process; each rank has to call this, and gets the same answer.
        tried: candidates by name, in their order.
        scores: how cases are scored; it is emptied.
    """
    scores.surface, scores.more = False, ()
    cases = list(cases)
    rows = {one.case.id: _rows(one, scores) for one in cases}
    before = best = _dice(rows, scores)
    parts: Structures = {}
    for name, labels in tried.items():
        reduced = [_reduced(one, {name: labels}) for one in cases]
        changed = {
            new.case.id: _rows(new, scores)
            for old, new in zip(cases, reduced, strict=True)
            if new is not old
        }
        found = _dice({**rows, **changed}, scores)
        if _gains(found, best):
            parts[name], best = labels, found
            cases, rows = reduced, {**rows, **changed}
    return Chosen(parts, before["mean"], best["mean"])


def _reduced(one: Validated, parts: Structures) -> Validated:
    prediction, _ = one.unpacked()
    kept = keep_largest(prediction, parts)
    return one if np.array_equal(kept, prediction) else one.with_prediction(kept)


def _rows(one: Validated, scores: CaseScores) -> list[dict[str, Any]]:
    prediction, truth = (torch.tensor(array) for array in one.unpacked())
    scores.reset()
    scores.update(one.case, prediction, truth, spacing=one.spacing)
    return scores.rows


def _dice(rows: Mapping[str, Any], scores: CaseScores) -> dict[str, float | None]:
    """Mean Dice over all cases of all ranks, of each structure and of these together (`mean`)."""
    every = gathered_cases(rows).values()
    summary = summarise([row for own in every for row in own], scores.names)
    found = {f"of {name}": part["dice"]["mean"] for name, part in summary["classes"].items()}
    del found[f"of {scores.names[0]}"]
    return {**found, "mean": summary["foreground"]["dice"]["mean"]}


def _gains(now: Mapping[str, float | None], before: Mapping[str, float | None]) -> bool:
    pairs = [(now[key], before[key]) for key in before]
    if any(a is not None and b is not None and a < b for a, b in pairs):
        return False
    mean, previous = now["mean"], before["mean"]
    return mean is not None and previous is not None and mean > previous


def told(task: Any) -> dict[str, list[int]] | None:
    """What was chosen and is done before scoring, for metrics.json; None: nobody chose."""
    if task.evaluation.get("keep_largest", False) in (True, False):
        return None
    return {name: list(labels) for name, labels in task.kept.items()}


def choose_for(task: Any, trainer: Any, data: Any, checkpoint: Path) -> dict[str, Any]:
    """Chooses for the state in a checkpoint, which says so from then on; for a run's record.

    The task has the weights of that state. Only the validation set is read.
    """
    from mambaseg.training.checkpoints import CheckedIO, write

    task.validated = []
    trainer.predict(task, datamodule=data, return_predictions=False)
    chosen = choose(
        task.validated, candidates(task.class_names, task.structures), task.case_scores()
    )
    task.validated = []
    parts = {name: list(labels) for name, labels in chosen.parts.items()}
    if trainer.is_global_zero:
        state = CheckedIO().load_checkpoint(checkpoint, map_location="cpu", weights_only=True)
        write({**state, "mambaseg": {**state["mambaseg"], "keep_largest": parts}}, checkpoint)
        log.info("post-processing, chosen on the validation set: %s", kept_in_words(parts))
    trainer.strategy.barrier()  # the others read the file next
    return {"keep_largest": parts, "val_dice": {"before": chosen.before, "after": chosen.after}}
