"""The torchmetrics shell around `mambaseg.evaluation.metrics`: collects the rows of many cases."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from mambaseg.data.case import Case
from mambaseg.data.classes import IGNORED
from mambaseg.errors import UserError
from mambaseg.evaluation.metrics import Metric as CaseMetric
from mambaseg.evaluation.metrics import Policy, Row, score_case
from mambaseg.evaluation.summary import summarise
from mambaseg.evaluation.surface import Spacing


class CaseRows(Metric):
    """Rows of cases as they come, summarised at the end over all ranks.

    A case is known by its id: one that a sampler hands out twice, to fill up a batch or a rank,
    counts once. Rows are plain Python on the CPU; nothing of them is in the module's state dict.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self._cases: dict[str, list[Row]] = {}

    @abstractmethod
    def summarise(self) -> dict[str, Any]:
        """Summary of `rows`."""

    def compute(self) -> dict[str, Any]:
        """Gather the cases of all ranks, then summarise them.

        Every rank has to call this, and gets the same answer.
        """
        if dist.is_available() and dist.is_initialized():
            ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, self._cases)
            self._cases = {name: rows for cases in ranks for name, rows in cases.items()}
        return self.summarise()

    @property
    def rows(self) -> list[Row]:
        """Rows sorted by case: of all ranks after `compute`, of this one before."""
        return [row for _, rows in sorted(self._cases.items()) for row in rows]

    def reset(self) -> None:
        """Forget all cases."""
        super().reset()
        self._cases = {}


class CaseScores(CaseRows):
    """Scores whole cases as they come and summarises them at the end, over all ranks.

    `score_case` and `summarise` describe the arguments. `partial`: references may hold IGNORED,
    which otherwise is a label out of range. `regions` (name -> labels) are scored in place of the
    classes; `names` are those of what is scored.
    """

    slices: Tensor

    def __init__(
        self,
        *,
        class_names: Sequence[str],
        policy: Policy = "strict",
        tolerance_mm: float = 2.0,
        tolerance_vox: float = 1.0,
        surface: bool = True,
        distances: Literal["mm", "vox"] | None = None,
        more: Sequence[CaseMetric] = (),
        partial: bool = False,
        regions: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.add_state("slices", torch.tensor(0), dist_reduce_fx="max")  # of the deepest case
        self.distances, self.more, self.partial = distances, tuple(more), partial
        self.class_names, self.surface = tuple(class_names), surface
        self.regions = dict(regions or {})
        self.names = (self.class_names[0], *self.regions) if regions else self.class_names
        self.convention: dict[str, Any] = {
            "policy": policy,
            "tolerance_mm": tolerance_mm,
            "tolerance_vox": tolerance_vox,
        }

    def update(
        self,
        case: Case,
        prediction: Tensor,
        reference: Tensor,
        *,
        spacing: Spacing | None = None,
    ) -> None:
        """Score labels (Z, H, W) at native resolution, on any device; spacing (z, y, x) in mm.

        In `partial` references, what is IGNORED belongs to no class on either side.

        Raises:
            UserError: shapes differ or a label is out of range; the message names the case.
        """
        found, truth = prediction.cpu().numpy(), reference.cpu().numpy()
        ignored = truth == IGNORED if self.partial and found.shape == truth.shape else None
        try:
            scored = score_case(
                found,
                truth,
                num_classes=len(self.class_names),
                spacing=spacing,
                surface=self.surface,
                more=self.more,
                ignored=ignored,
                regions=tuple(self.regions.values()),
                **self.convention,
            )
        except UserError as error:
            raise UserError(f"{case.id}: {error}") from error
        self.slices = self.slices.clamp(min=1 if 1 in truth.shape else len(truth))
        identity = {
            "case": case.id,
            "patient": case.patient,
            "phase": case.phase,
            "group": case.group,
        }
        self._cases[case.id] = [
            {**identity, "class_name": self.names[row["class"]], **row} for row in scored
        ]

    def summarise(self) -> dict[str, Any]:
        """See `mambaseg.evaluation.summary.summarise`."""
        summary = summarise(self.rows, self.names, distances=self.distances, more=self.more)
        summary["slices"] = int(self.slices)
        if self.regions:
            summary["regions"] = {name: list(labels) for name, labels in self.regions.items()}
        return summary
