"""SegmentationTask: slices in training, whole cases in validation and test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from mambaseg.data.classes import structures_of
from mambaseg.data.geometry import Preprocessing
from mambaseg.errors import UserError
from mambaseg.evaluation.case_scores import CaseScores
from mambaseg.evaluation.largest import keep_largest, parts_of
from mambaseg.evaluation.metrics import SURFACE, Metric
from mambaseg.evaluation.summary import distance_unit
from mambaseg.inference.segment import choose_views, learnt_views, passes, predict_case
from mambaseg.reporting.views import SegmentationViews
from mambaseg.training.checks import require_heads, require_logits, require_loss, require_settings
from mambaseg.training.losses import DeepSupervision, leave_out_ignored, taken_label
from mambaseg.training.methods.supervised import Supervised
from mambaseg.training.post_processing import Validated
from mambaseg.training.task import OptimizerFactory, SchedulerFactory, Task


class SegmentationTask(Task):
    """Trains a network on slices and scores it on whole cases.

    Args:
        network: image (B, C, H, W) -> logits (B, K, H, W).
        loss: (logits (B, K, H, W), label (B, H, W)) -> scalar, or one of MONAI.
        optimizer: see `Task`, like all that is not named here.
        scheduler: likewise.
        preprocessing: one for all stages.
        class_names: one per class, background first.
        distances: unit in which distances are shown, `mm` where the spacing of all cases of the
            run is known; None leaves it to the cases of each part.
        metrics: beside the built-in ones.
        partial: labels have pixels that are IGNORED.
        regions: name -> labels of what is scored in place of the classes.
        **common: `decay`, `seed`, `description`, `evaluation` (`empty`, `tolerance_mm`,
            `keep_largest`, `tta`, `batch_size`, `val_distances`).

    Attributes:
        structures: what is scored: the classes, or regions.
        kept: structures of which the largest component is kept before scoring; under `auto` what
            the checkpoint says that was chosen.
        tested_in: name in `VIEWS` of the views in which the test sees each slice.
        validated: what `predict_step` makes of validation cases.
    """

    monitor: ClassVar[str] = "val/dice"
    truth: ClassVar[str] = "label"

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        *,
        preprocessing: Preprocessing,
        class_names: Iterable[str],
        distances: Literal["mm", "vox"] | None = None,
        metrics: Sequence[Metric] = (),
        partial: bool = False,
        regions: Mapping[str, Sequence[int]] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(network, loss, optimizer, scheduler, **common)
        if partial:
            leave_out_ignored(loss)
        if isinstance(loss, DeepSupervision):
            self._supervise_deeply()
        self._distances, self._metrics, self._partial = distances, metrics, partial
        self.preprocessing = preprocessing
        self.class_names = tuple(class_names)
        self.structures = structures_of(self.class_names, regions)
        self._regions = regions
        self.views = SegmentationViews(self.class_names)
        self.evaluation = {
            "empty": "strict", "tolerance_mm": 2.0, "keep_largest": False, "tta": False,
            "batch_size": 24, "val_distances": False, **self.evaluation,
        }  # fmt: skip
        self.method.batch_size = self.evaluation["batch_size"]
        learnt = learnt_views(self._description, preprocessing.sides)
        self.tested_in = choose_views(self.evaluation["tta"], learnt, self.network_name())
        self.validated: list[Validated] = []
        self.kept = parts_of(self.evaluation["keep_largest"], self.structures)
        self.scores = nn.ModuleDict(
            {
                f"{stage}_{number}" if number else stage: self.case_scores()
                for stage in ("val", "test")
                for number in range(len(self.method.networks))
            }
        )

    def _supervise_deeply(self) -> None:
        """Switches the network's coarse heads on."""
        if not isinstance(self.method, Supervised):
            raise UserError(
                "loss=deep_supervision trains with method=supervised only: the others compare "
                "single outputs. Choose another loss, such as dice_ce_nnunet, and for nnunet_2d "
                "model.deep_supervision=false."
            )
        getattr(self.network, "supervise_deeply", lambda: None)()

    def on_validation_start(self) -> None:
        """Measures distances in the validations of a training that wants them or chooses by one."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        watched = {str(getattr(one, "monitor", "")).rpartition("/")[2] for one in callbacks}
        chosen = not watched.isdisjoint(metric.name for metric in SURFACE)
        for number in range(len(self.method.networks)):
            self._scores("val", number).surface = self.evaluation["val_distances"] or chosen

    def case_scores(self) -> CaseScores:
        """What scores cases as this run does."""
        return CaseScores(
            class_names=self.class_names,
            policy=self.evaluation["empty"],
            tolerance_mm=self.evaluation["tolerance_mm"],
            distances=self._distances,
            more=self._metrics,
            partial=self._partial,
            regions=self._regions,
        )

    def check(self, output: Any, batch: Mapping[str, Any]) -> None:
        """Makes sure that the network gives K logits per pixel, and that the loss takes them."""
        classes, name = len(self.class_names), self.network_name()
        require_heads(output, self.loss, network=name)
        fine = output[0] if isinstance(output, list) else output
        require_logits(fine, batch["label"], num_classes=classes, network=name)
        require_settings(self.loss)
        require_loss(self.loss, output, self.taken(batch["label"]), instead="dice_ce")

    def taken(self, truth: Tensor) -> Tensor:
        """The label as the loss takes it."""
        return taken_label(self.loss, truth)

    def predict(self, batch: dict[str, Any], network: nn.Module) -> Tensor:
        """Labels (Z, H, W) of a case; validations while it trains see each slice once."""
        return predict_case(
            network,
            batch["image"],
            self.preprocessing,
            spacing=batch["spacing"],
            batch_size=self.evaluation["batch_size"],
            views="none" if self._trainer and self.trainer.state.fn == "fit" else self.tested_in,
        )

    def score(self, batch: dict[str, Any], prediction: Tensor, scores: Any) -> dict[str, Any]:
        """Scores a case at native resolution."""
        if self.kept:
            prediction = keep_largest(prediction, self.kept)
        scores.update(batch["case"], prediction, batch["label"], spacing=batch["spacing"])
        seen = passes(self.preprocessing, batch["image"], batch["spacing"], self.tested_in)
        return {"prediction": prediction, "passes": seen}

    @classmethod
    def logged(cls, data: Any) -> list[str]:
        """`val/dice`, a score per structure, and a distance (if it is measured)."""
        unit = data.for_task()["distances"]
        names = ("dice", f"hd95_{unit}", *(f"dice_{name}" for name in data.structures))
        return [f"val/{name}" for name in names]

    def values(self, stage: str, summary: Mapping[str, Any]) -> dict[str, float | None]:
        """`dice`, the mean over the structures, one for each of them, others, a distance."""
        others = (metric.name for metric in self._metrics)
        shown = ("dice", f"hd95_{distance_unit(summary)}", *others)
        means = summary["foreground"]
        values = {f"{stage}/{name}": means[name]["mean"] for name in shown if name in means}
        for name in self.structures:
            values[f"{stage}/dice_{name}"] = summary["classes"][name]["dice"]["mean"]
        return values

    def means(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Means over the foreground classes; those in mm and ml only where all cases have them."""
        mm = distance_unit(summary) == "mm"
        means = summary["foreground"].items()
        return {name: mean for name, mean in means if mm or not name.endswith(("_mm", "_ml"))}

    # ---- post-processing

    def predict_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Keeps what the chosen network makes of a validation case."""
        prediction: Tensor = self.predict(batch, self.method.networks[self.chosen])
        self.validated.append(Validated.of(batch, prediction))
        return prediction

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the post-processing that was chosen, too."""
        super().on_load_checkpoint(checkpoint)
        if self.evaluation["keep_largest"] == "auto":
            self.kept = parts_of(checkpoint["mambaseg"].get("keep_largest"), self.structures)
