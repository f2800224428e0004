"""SegmentationTask: network + loss + optimizer factory -> training, validation and test steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from mambaseg.case_scores import CaseScores
from mambaseg.checks import require_logits
from mambaseg.counter import DROPPING, draws
from mambaseg.data.geometry import Preprocessing
from mambaseg.inference import keep_largest_component, predict_case
from mambaseg.models import drawing, names_without_decay, stochastic_layers

OptimizerFactory = Callable[[Iterable[Any]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


class SegmentationTask(L.LightningModule):
    """Trains a network on slices and scores it on whole cases; knows no concrete network.

    Args:
        network: image (B, C, H, W) -> logits (B, K, H, W).
        loss: (logits (B, K, H, W), label (B, H, W)) -> scalar.
        optimizer: parameter groups -> optimizer.
        scheduler: optimizer -> learning-rate schedule, stepped once per optimizer step.
        preprocessing: the way to the network's grid and back; one for all stages.
        class_names: one per class, background first.
        decay: `all` puts weight decay on every parameter, `matrices` spares vectors (biases,
            norms) and the scan's A_logs and Ds.
        evaluation: `empty`, `tolerance_mm`, `keep_largest`, `batch_size` (see conf/config.yaml).
        seed: of what is dropped in training.
        description: plain data that lets a checkpoint describe itself.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
        *,
        preprocessing: Preprocessing,
        class_names: Iterable[str],
        decay: str = "all",
        evaluation: Mapping[str, Any] | None = None,
        seed: int = 1337,
        description: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.loss = loss
        self.seed = seed
        self._stochastic = stochastic_layers(network)
        self.preprocessing = preprocessing
        self.class_names = tuple(class_names)
        self.evaluation = {
            "empty": "strict", "tolerance_mm": 2.0, "keep_largest": False, "batch_size": 24,
            **(evaluation or {}),
        }  # fmt: skip
        self._optimizer, self._scheduler, self._decay = optimizer, scheduler, decay
        self._description = dict(description or {})
        self._checked = False  # that the network gives logits
        self._case_seconds: list[float] = []
        self.scores: Any = nn.ModuleDict({stage: self._case_scores() for stage in ("val", "test")})

    def _case_scores(self) -> CaseScores:
        return CaseScores(
            class_names=self.class_names,
            policy=self.evaluation["empty"],
            tolerance_mm=self.evaluation["tolerance_mm"],
        )

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, C, H, W) -> logits (B, K, H, W), at least float32 whatever the network is."""
        parameter = next(self.network.parameters(), None)
        logits: Tensor = self.network(image if parameter is None else image.to(parameter.dtype))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Loss of one micro-batch, logged."""
        loss = self.training_loss(batch)
        size = len(batch["image"])
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size, sync_dist=True)
        return loss

    def training_loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Loss of a micro-batch; what is dropped depends on seed, step and position only."""
        with drawing(self._stochastic, self._numbers(batch["step"], batch["position"])):
            logits = self(batch["image"])
            if not self._checked:
                require_logits(
                    logits,
                    batch["label"],
                    num_classes=len(self.class_names),
                    network=self._network_name(),
                )
                self._checked = True
            loss: Tensor = self.loss(logits, batch["label"])
        return loss

    def _network_name(self) -> str:
        """The network's leaf where it is known, for messages."""
        name = self._description.get("model", {}).get("name")
        return f"model={name} (conf/model/{name}.yaml)" if name else type(self.network).__name__

    def _numbers(self, step: int, positions: Iterable[int]) -> Tensor:
        """Numbers for `drawing`, (B, layers): one per sample and layer."""
        layers = len(self._stochastic)
        drawn = [
            draws(self.seed, DROPPING, step=step, position=position, count=layers)
            for position in map(int, positions)
        ]
        return torch.from_numpy((np.stack(drawn) >> np.uint64(1)).astype(np.int64))

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Any]:
        """Scores one whole case."""
        return self._score(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Any]:
        """Scores one whole case."""
        return self._score(batch, "test")

    def _score(self, batch: dict[str, Any], stage: str) -> dict[str, Any]:
        start = _seconds(self.device)
        prediction = predict_case(
            self.network,
            batch["image"],
            self.preprocessing,
            batch_size=self.evaluation["batch_size"],
        )
        self._case_seconds.append(_seconds(self.device) - start)
        if self.evaluation["keep_largest"]:
            prediction = keep_largest_component(prediction, len(self.class_names))
        self.scores[stage].update(
            batch["case"], prediction, batch["label"], spacing=batch["spacing"]
        )
        return {"prediction": prediction}

    def on_validation_epoch_end(self) -> None:
        """Logs `val/dice`, the mean over the foreground classes, and one score per class."""
        self._log_summary("val")

    def on_test_epoch_end(self) -> None:
        """Likewise for the test part."""
        self._log_summary("test")

    def _log_summary(self, stage: str) -> None:
        summary = self.scores[stage].compute()
        values = {f"{stage}/dice": summary["foreground"]["dice"]["mean"]}
        known_mm = any(row["volume_ml"] is not None for row in self.scores[stage].rows)
        distance = "hd95_mm" if known_mm else "hd95_vox"
        values[f"{stage}/{distance}"] = summary["foreground"][distance]["mean"]
        for name in self.class_names[1:]:
            values[f"{stage}/dice_{name}"] = summary["classes"][name]["dice"]["mean"]
        # an average over no case at all (every mask empty) is nan in the curves, never 0
        self.log_dict(
            {k: float("nan") if v is None else float(v) for k, v in values.items()},
            rank_zero_only=False,
            sync_dist=False,
        )
        self.results = {"stage": stage, "rows": self.scores[stage].rows, "summary": summary}
        if self._case_seconds:  # a rank may have no case
            self.results["seconds_per_case"] = statistics.median(self._case_seconds)
        self._case_seconds.clear()
        self.scores[stage].reset()

    def configure_optimizers(self) -> Any:
        """The injected optimizer and its schedule, stepped once per optimizer step."""
        optimizer = self._optimizer(parameter_groups(self.network, self._decay))
        if self._scheduler is None:
            return optimizer
        schedule = {"scheduler": self._scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts plain data into the checkpoint from which the network can be rebuilt."""
        checkpoint["mambaseg"] = self._description


def _seconds(device: torch.device) -> float:
    """A clock that waits for what a GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def parameter_groups(network: nn.Module, decay: str) -> list[dict[str, Any]]:
    """Parameters for the optimizer, with or without exceptions from weight decay.

    Args:
        network: whose parameters.
        decay: `all` (one group), or `matrices`: weight decay 0 for vectors (biases, norms) and what
            the network itself names (the scan's A_logs and Ds, position biases). The scan's step
            bias has a row per direction, so it counts as a matrix.
    """
    if decay == "all":
        return [{"params": list(network.parameters())}]
    named = names_without_decay(network)
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        (spared if name in named or parameter.ndim < 2 else decayed).append(parameter)
    return [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
