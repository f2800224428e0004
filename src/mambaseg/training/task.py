"""What all tasks share: the loss of a step, the optimizer, what a checkpoint says about itself."""

from __future__ import annotations

import functools
import logging
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from mambaseg.data.counter import DROPPING, draws
from mambaseg.errors import UserError
from mambaseg.evaluation.costs import seconds_on
from mambaseg.models import GraphedNetwork, keep_layout
from mambaseg.models.any_size import wide_enough
from mambaseg.models.stochastic import drawing, stochastic_layers
from mambaseg.training.compiled import Compiled
from mambaseg.training.methods.method import Method, Step, names_apart
from mambaseg.training.methods.supervised import Supervised
from mambaseg.training.monitors import worth_of
from mambaseg.training.parameters import encoder_parameters, lay_out_states, parameter_groups

log = logging.getLogger(__name__)
OptimizerFactory = Callable[[Iterable[Any]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


class Task(L.LightningModule, ABC):
    """Trains a network on batches of images and scores whole cases; knows no concrete network.

    A task adds what is scored, and how: see the abstract methods. It sets `scores` (`val` and
    `test`: a `CaseRows` each; `val_1`, `test_1` for the second network of its method, ...) and
    `views` (what a run shows of its test cases).

    Args:
        network: image (B, C, H, W) -> output (B, K, H, W).
        loss: (output, truth) -> scalar.
        optimizer: parameter groups -> optimizer.
        scheduler: optimizer -> learning-rate schedule, stepped once per optimizer step.
        decay: `all` puts weight decay on every parameter, `matrices` spares vectors (biases,
            norms) and the scan's A_logs and Ds.
        layer_decay: learning rate of each stage of an encoder, relative to the next one.
        freeze_encoder: steps in which encoders do not learn.
        frozen: whose encoders; empty: those of all networks.
        seed: of what is dropped in training.
        graph: run the training pass as CUDA graphs (`mambaseg.models.GraphedNetwork`).
        compile: compile it (`mambaseg.training.compiled`).
        method: what a step learns from (`mambaseg.training.methods`); None: from labels alone.
        steps: optimizer steps of the whole training, for a method's ramps.
        description: plain data that lets a checkpoint describe itself.
        evaluation: how cases are scored (conf/config.yaml); each task takes what concerns it.

    Attributes:
        monitor: the validation score that chooses the best checkpoint, unless another is named.
        truth: key of a training batch under which the loss finds what is true.
        chosen: number of the network that is the result: it was best in the last validation, by
            the score that chooses the run's best state.
        results: of the last validation or test: `stage`, `rows` (one per line of cases.csv),
            `others` (rows of the other networks, by name), `summary` (of metrics.json), `means`
            (the few numbers that stand for it), `seconds_per_case` where there was a case.
    """

    monitor: ClassVar[str]
    truth: ClassVar[str]
    scores: Any
    views: Any

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        *,
        decay: str = "all",
        layer_decay: float = 1.0,
        freeze_encoder: int = 0,
        frozen: Sequence[nn.Module] = (),
        seed: int = 1337,
        graph: bool = False,
        compile: bool = False,
        method: Method | None = None,
        steps: int = 1,
        description: Mapping[str, Any] | None = None,
        evaluation: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.method = method or Supervised([network])
        self.loss, self.steps, self.seed = loss, steps, seed
        self._step = 0  # of the last training batch
        self.skipped = False  # whether its optimizer step changed nothing (`NonFinite` says so)
        self._terms: dict[str, Tensor] = {}  # of its loss
        self._logged: list[dict[str, Tensor]] = []  # by the micro-batches of its step
        self.results: dict[str, Any] = {}
        self.evaluation = dict(evaluation or {})
        self._stochastic = [*stochastic_layers(network), *stochastic_layers(self.method)]
        self.graph = graph
        self._graphed: GraphedNetwork | None = None  # recorded at the first step
        self._compiled = Compiled(self.method.networks if compile else ())
        self._optimizer, self._scheduler, self._decay = optimizer, scheduler, decay
        self._layer_decay, self._freeze, self._frozen = layer_decay, freeze_encoder, (*frozen,)
        self._encoders: list[nn.Parameter] = []  # which do not learn at first
        self._description = dict(description or {})
        networks = [self._description.get("model", {}), *self._description.get("partners", ())]
        self.names = names_apart([one.get("name", "network") for one in networks])
        self.chosen = 0  # which of the networks is the result
        self._checked = False  # that the network's output fits
        self._case_seconds: list[float] = []

    # ---- what a task adds

    @abstractmethod
    def check(self, output: Any, batch: Mapping[str, Any]) -> None:
        """Makes sure, before the first step, that the network gives what the loss takes."""

    def taken(self, truth: Tensor) -> Tensor:
        """What is true of training samples, as the loss takes it."""
        return truth

    @abstractmethod
    def predict(self, batch: dict[str, Any], network: nn.Module) -> Any:
        """What a network makes of one case; this is what is timed."""

    @abstractmethod
    def score(self, batch: dict[str, Any], prediction: Any, scores: Any) -> dict[str, Any]:
        """Scores one case into `scores`; returns what `views` may want to show of it."""

    @classmethod
    @abstractmethod
    def logged(cls, data: Any) -> list[str]:
        """Names of `values` of the validation on loaded `data`: they may choose the best state."""

    @abstractmethod
    def values(self, stage: str, summary: Mapping[str, Any]) -> dict[str, float | None]:
        """The scores that are logged: name in the curves -> value; None: of no case at all."""

    @abstractmethod
    def means(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """The few numbers that stand for a test."""

    # ---- training

    def on_fit_start(self) -> None:
        """Tells the method the data."""
        self.method.begin(self.trainer.datamodule)  # type: ignore[attr-defined]

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, C, H, W) -> output (B, K, H, W), at least float32 whatever the network is."""
        output: Tensor = self.passed(self.network, image)
        return output

    def passed(self, function: Callable[[Tensor], Any], image: Tensor) -> Any:
        """What a network, or a function of a method, makes of an image."""
        parameter = next(self.network.parameters(), image)
        with wide_enough(self.network_name(), image):
            output = function(image.to(parameter.dtype))
        if isinstance(output, Tensor) and output.ndim == 5:  # heads, as MONAI's networks have them
            output = list(output.unbind(1))
        return [_wide(one) for one in output] if isinstance(output, list) else _wide(output)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Loss of one micro-batch; logs the mean over those of its step, and of several terms."""
        loss = self.training_loss(batch)
        logged = {"loss": loss.detach(), **(self._terms if len(self._terms) > 1 else {})}
        self._logged = [*(self._logged if batch["step"] == self._step else ()), logged]
        for name in logged:  # Lightning keeps what the last micro-batch of a step logs
            mean: Any = sum(one.get(name, 0.0) for one in self._logged) / len(self._logged)
            how: Any = {"batch_size": len(batch["image"]), "prog_bar": name == "loss"}
            self.log(f"train/{name}", mean, sync_dist=True, **how)
        self._step = batch["step"]
        return loss

    def training_loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Loss of a micro-batch; what is dropped or drawn depends on seed, step and position."""
        terms = self.method.terms(self._offered(batch))
        self._terms = {name: term.detach() for name, term in terms.items()}
        return functools.reduce(torch.add, terms.values())

    def _offered(self, batch: Mapping[str, Any]) -> Step:
        """What a method may ask about a micro-batch."""
        if self.graph and self._graphed is None:
            self._record(batch["image"])
        step, positions = batch["step"], [int(place) for place in batch["position"]]

        def run(function: Any, image: Tensor, places: Sequence[int], turn: int) -> Any:
            numbers = self._numbers(step, [positions[place] for place in places], turn)
            if self.graph and self._graphed:
                dropping = self._graphed.drawing(numbers)
            else:
                dropping = drawing(self._stochastic, numbers, self.device)
            with dropping:
                return self.passed(self._compiled.pass_of(function), image)

        def supervised(output: Any, label: Tensor) -> Tensor:
            if not self._checked:
                self.check(output, {**batch, self.truth: label})
                self._checked = True
            loss: Tensor = self.loss(output, self.taken(label))
            return loss

        return Step(
            image=batch["image"],
            label=batch[self.truth],
            labelled=batch.get("labelled", len(positions)),
            number=step,
            steps=self.steps,
            positions=positions,
            seed=self.seed,
            run=run,
            supervised_loss=supervised,
        )

    def optimizer_step(self, *arguments: Any, **how: Any) -> None:
        """Steps; then the method's teachers follow, unless a callback has skipped the step."""
        self.skipped = False
        super().optimizer_step(*arguments, **how)
        self.zero_grad()  # Lightning would keep the gradients through the next forward pass
        if not self.skipped:
            self.method.after(self._step)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Takes the gradients of encoders that do not learn yet."""
        for parameter in self._encoders if self._step < self._freeze else ():
            parameter.grad = None

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clips the gradient of each network apart, as if each had its own optimizer."""
        if not len(self.method.partners) or gradient_clip_algorithm == "value":
            how = {"gradient_clip_algorithm": gradient_clip_algorithm}
            super().configure_gradient_clipping(optimizer, gradient_clip_val, **how)
        elif gradient_clip_val:
            for network in self.method.networks:
                nn.utils.clip_grad_norm_(network.parameters(), gradient_clip_val)

    def _numbers(self, step: int, positions: Iterable[int], turn: int = 0) -> Tensor:
        """Numbers for `drawing`, (B, layers): one per sample and layer, others in each turn."""
        layers, stream = len(self._stochastic), DROPPING + 16 * turn
        drawn = [
            draws(self.seed, stream, step=step, position=position, count=layers)
            for position in positions
        ]
        return torch.from_numpy((np.stack(drawn) >> np.uint64(1)).astype(np.int64))

    def _record(self, image: Tensor) -> None:
        """Records the training pass, where it can be recorded."""
        image = image.to(next(self.network.parameters()).dtype)
        try:
            self._graphed = GraphedNetwork(self.network, image, self._stochastic)
        except RuntimeError as error:  # e.g. a network that looks at its own numbers
            self.graph = False
            log.warning("trainer.graph: %s cannot be recorded, so the training runs without (%s)",
                        self.network_name(), str(error).splitlines()[0])  # fmt: skip

    @contextmanager
    def module_by_module(self) -> Iterator[None]:
        """Runs the network as it is for a while, so that hooks on its modules are called."""
        graph, self.graph = self.graph, False
        compiled, self._compiled = self._compiled, Compiled(())
        try:
            with self._graphed.off() if self._graphed else nullcontext():
                yield
        finally:
            self.graph, self._compiled = graph, compiled

    def network_name(self) -> str:
        """The network's config where it is known, for messages."""
        name = self._description.get("model", {}).get("name")
        return f"model={name} (conf/model/{name}.yaml)" if name else type(self.network).__name__

    # ---- scores

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Any]:
        """Scores one whole case."""
        return self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Any]:
        """Scores one whole case."""
        return self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Any], stage: str) -> dict[str, Any]:
        outcomes = []
        for number, network in enumerate(self.method.networks):
            start = seconds_on(self.device)
            prediction = self.predict(batch, network)
            if number == self.chosen:
                self._case_seconds.append(seconds_on(self.device) - start)
            outcomes.append(self.score(batch, prediction, self._scores(stage, number)))
        return outcomes[self.chosen]

    def _scores(self, stage: str, number: int) -> Any:
        """Where a network's scores of a stage come together."""
        return self.scores[stage if number == 0 else f"{stage}_{number}"]

    def on_validation_epoch_end(self) -> None:
        """Logs the scores of the validation set, `monitor` among them."""
        self._log_summary("val")

    def on_test_epoch_end(self) -> None:
        """Likewise for the test set."""
        self._log_summary("test")

    def _log_summary(self, stage: str) -> None:
        """Logs the scores of all networks; a validation chooses the best by the run's monitor."""
        scores = [self._scores(stage, number) for number in range(len(self.method.networks))]
        summaries = [one.compute() for one in scores]
        # an average over no case at all (every mask empty) is nan in the curves, never 0
        values = [
            {key: math.nan if v is None else v for key, v in self.values(stage, one).items()}
            for one in summaries
        ]
        if stage == "val" and len(scores) > 1:
            worth = [worth_of(one, self.trainer, self.monitor) for one in values]
            self.chosen = worth.index(max(worth))
        own = dict(values[self.chosen])
        summary = dict(summaries[self.chosen])
        if len(scores) > 1:
            each = dict(zip(self.names, values, strict=True))
            own |= {f"{stage}/{name}/{key.partition('/')[2]}": value
                    for name, its in each.items() for key, value in its.items()}  # fmt: skip
            summary |= {
                "network": self.names[self.chosen],
                "networks": dict(zip(self.names, summaries, strict=True)),
            }
        self.log_dict(own, rank_zero_only=False, sync_dist=False)
        self.results = {
            "stage": stage,
            "rows": scores[self.chosen].rows,
            "others": {name: one.rows for name, one in zip(self.names, scores, strict=True)
                       if one is not scores[self.chosen]},
            "summary": summary,
            "means": self.means(summary),
        }  # fmt: skip
        if self._case_seconds:  # a rank may have no case
            self.results["seconds_per_case"] = statistics.median(self._case_seconds)
        self._case_seconds.clear()
        for one in scores:
            one.reset()

    # ---- optimizer and checkpoint

    def configure_optimizers(self) -> Any:
        """The injected optimizer and its schedule, stepped once per optimizer step."""
        networks = self.method.networks
        modules = [self.network, self.method]
        groups = parameter_groups(modules, self._decay, networks, self._layer_decay)
        optimizer = self._optimizer(groups)
        for group in optimizer.param_groups:
            group["lr"] *= group.pop("share", 1.0)
        optimizer.register_load_state_dict_post_hook(lay_out_states)
        self._encoders = encoder_parameters(self._frozen or networks) if self._freeze else []
        if self._scheduler is None:
            return optimizer
        try:
            schedule = {"scheduler": self._scheduler(optimizer), "interval": "step"}
        except ZeroDivisionError as error:  # PyTorch divides by the warm-up's steps minus one
            raise UserError(
                f"optim.scheduler: of data.steps={self.steps} the warm-up would be exactly one, "
                f"which PyTorch cannot do; take data.steps={self.steps + 1}, or another "
                "optim.scheduler.pct_start"
            ) from error
        if self._layer_decay != 1 and "max_lr" in optimizer.param_groups[0]:
            raise UserError(
                "optim.layer_decay: this schedule gives all parameters one rate; take optim=adamw's"
            )
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts plain data into the checkpoint from which the network can be rebuilt."""
        chosen = {"chosen": self.chosen} if len(self.names) > 1 else {}
        checkpoint["mambaseg"] = {**self._description, **chosen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes from the checkpoint which network is the chosen one, and how weights lie."""
        self.chosen = int(checkpoint["mambaseg"].get("chosen", 0))
        if self.device.type == "cpu":
            keep_layout(self, checkpoint["state_dict"])


def _wide(output: Tensor) -> Tensor:
    return output.to(torch.promote_types(output.dtype, torch.float32))
