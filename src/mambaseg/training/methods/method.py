"""What all learning methods share: their networks, and what a step offers them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from mambaseg.data.counter import LEARNING, draws, uniforms
from mambaseg.data.limits import AMOUNT, Number
from mambaseg.errors import UserError
from mambaseg.models.any_size import AnySize
from mambaseg.training.methods.terms import Teacher, ramp

Kind = TypeVar("Kind", bound=nn.Module)


@dataclass(frozen=True)
class Step:
    """A micro-batch of an optimizer step, and what a method may ask about it.

    Attributes:
        image: (B, C, H, W).
        label: (B, H, W), class indices, or IGNORED where nothing is known.
        labelled: number of labelled samples; they come first.
        number: optimizer step, counted from 0.
        steps: of the whole training.
        positions: of the samples in the global batch of the step, (B,).
        seed: of the run.
        run: (function of images, images, places in this batch, number of the pass) -> the
            function's tensors (logits (B, K, H, W) of a network), at least float32. Layers that
            drop something do so by the places and the number of the pass.
        supervised_loss: (logits, label) -> scalar, the config of the group `loss`.
    """

    image: Tensor
    label: Tensor
    labelled: int
    number: int
    steps: int
    positions: Sequence[int]
    seed: int
    run: Callable[[Callable[[Tensor], Any], Tensor, Sequence[int], int], Any]
    supervised_loss: Callable[[Any, Tensor], Tensor]

    def logits(
        self,
        network: nn.Module,
        image: Tensor | None = None,
        *,
        places: Sequence[int] | None = None,
        turn: int = 0,
    ) -> Tensor:
        """The network's logits of the batch's images, or of others.

        What is dropped in an image follows its place in the batch; without `places` these are the
        first ones. `turn` counts the passes of a step: passes of different numbers drop different
        things. `UserError` for a network that gives the logits of several heads.
        """
        image = self.image if image is None else image
        logits = self.run(network, image, range(len(image)) if places is None else places, turn)
        if isinstance(logits, list):
            raise UserError(
                f"the network gives {len(logits)} outputs while it trains, and this method "
                "compares single ones: add model.deep_supervision=false, or choose another network"
            )
        single: Tensor = logits
        return single

    def through(self, function: Callable[[Tensor], Any]) -> Any:
        """What a function (or network) makes of the batch's images, in the first pass."""
        return self.run(function, self.image, range(len(self.image)), 0)

    def supervised(self, logits: Tensor | list[Tensor]) -> Tensor:
        """The supervised loss of the logits of (at least) the labelled samples.

        A network that is supervised deeply gives a list of them, finest first.
        """
        several = isinstance(logits, list)
        known = [one[: self.labelled] for one in (logits if several else [logits])]
        return self.supervised_loss(known if several else known[0], self.label[: self.labelled])

    def uniform(self, count: int) -> list[float]:
        """Numbers in [0, 1) for the whole step, the same on all devices."""
        return uniforms(self.seed, LEARNING, step=self.number, count=count).tolist()

    def uniform_of(self, place: int, count: int) -> list[float]:
        """Numbers in [0, 1) for the sample in a place of this batch."""
        position = int(self.positions[place])
        drawn = uniforms(self.seed, LEARNING + 16, step=self.number, position=position, count=count)
        return drawn.tolist()

    def normal(self, like: Tensor, *, first: int = 0, turn: int = 0) -> Tensor:
        """Normal numbers for samples from place `first` on; a function of seed, step and place."""
        generator, noise = torch.Generator(like.device), torch.empty_like(like)
        for place, sample in enumerate(noise, start=first):
            position = int(self.positions[place])
            stream = LEARNING + 16 * (turn + 2)
            drawn = draws(self.seed, stream, step=self.number, position=position, count=1)
            number = int(drawn[0] >> np.uint64(1))
            sample.normal_(generator=generator.manual_seed(number))
        return noise


class Method(nn.Module, ABC):
    """Networks that learn together, and the loss of a step.

    Args:
        networks: the one of `model=...` first, then those of `method.partner`.

    Attributes:
        count: how many networks the method trains; None: any number from 2 on.
        unlabelled: whether it learns from images without labels.
        needs: what it needs of a network, in words; empty: nothing special.
        narrow: whether weights of its own train in 16 bits.
        batch_size: `evaluation.batch_size`, for a method that predicts whole cases.
    """

    count: ClassVar[int | None] = 1
    unlabelled: ClassVar[bool] = False
    needs: ClassVar[str] = ""
    narrow: ClassVar[bool] = True
    batch_size: int = 24

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.require_count(len(networks))
        self._first = (networks[0],)  # in a tuple: the task holds its weights
        self.partners = nn.ModuleList(networks[1:])

    @classmethod
    def require_count(cls, count: int) -> None:
        """`UserError` unless the method trains so many networks."""
        if count != cls.count if cls.count else count < 2:
            raise UserError(
                f"method: {cls.__name__} trains {cls.count or 'two or more'} network(s), not "
                f"{count}: model=... is the first, method.partner=... (a name, or a list) the "
                "others"
            )

    @property
    def networks(self) -> list[nn.Module]:
        """The networks that learn from a gradient, the first one first."""
        return [*self._first, *self.partners]

    @property
    def network(self) -> nn.Module:
        """The network of `model=...`."""
        return self._first[0]

    def begin(self, data: Any) -> None:
        """Told the data module before the first step, or the first one of a resumed training."""

    @abstractmethod
    def terms(self, step: Step) -> dict[str, Tensor]:
        """The weighted terms of the loss, by name; the loss is their sum."""

    def after(self, step: int) -> None:
        """What follows optimizer step `step`, counted from 0: a teacher, a running mean.

        Not called after a step that was skipped because of a loss or gradient that is not finite.
        """


def require_numbers(limits: Number = AMOUNT, /, **values: float) -> None:
    """`UserError` for an argument of a method that is beyond its limits."""
    for name, value in values.items():
        if not limits.holds(value):
            raise UserError(f"method.{name}={value}: it must be {limits}")


def published_weight(step: Step, most: float) -> float:
    """The weight of what unlabelled images say: rises to `most` over the training in 200 stairs."""
    return most * ramp(step.number, step.steps, stairs=200)


def require_network(method: Method, kind: type[Kind]) -> Kind:
    """The first network, which must be of a kind; `UserError` names what the method needs."""
    network = method.network.network if isinstance(method.network, AnySize) else method.network
    if not isinstance(network, kind):
        raise UserError(
            f"method: {type(method).__name__} needs the decoder of a {kind.__name__} (model="
            f"{kind.__name__.lower()}), and {type(network).__name__} has another"
        )
    return network


def at_any_size(
    method: Method, image: Tensor, outputs: Callable[[Tensor], list[Tensor]]
) -> list[Tensor]:
    """What parts of the first network give of an image of any size, as `AnySize` gives it."""
    padded = method.network.padded(image) if isinstance(method.network, AnySize) else image
    height, width = image.shape[-2:]
    return [output[..., :height, :width] for output in outputs(padded)]


def require_wide(method: Method, precision: str) -> None:
    """`UserError` where 16 bits cannot hold what a method has beside its networks."""
    if not method.narrow or any(isinstance(part, Teacher) for part in method.modules()):
        raise UserError(
            f"trainer.precision={precision}: {type(method).__name__} has a teacher (an average of "
            "weights) or a discriminator, which 16 bits cannot hold. Use 32-true or bf16-mixed."
        )


def names_apart(names: Sequence[str]) -> list[str]:
    """The names, with numbers where one is there several times: unet_1, unet_2."""
    counts = [names[: place + 1].count(name) for place, name in enumerate(names)]
    return [f"{name}_{count}" if names.count(name) > 1 else name
            for name, count in zip(names, counts, strict=True)]  # fmt: skip
