"""Deep adversarial network: unlabelled images should look as if they had been labelled."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from mambaseg.data.limits import Number
from mambaseg.errors import UserError
from mambaseg.training.methods.method import Method, Step, published_weight, require_numbers
from mambaseg.training.methods.terms import DropMaps
from mambaseg.training.ranks import averaged

SMALLEST = 16  # pixels of a side that the discriminator's layers leave something of


class Discriminator(nn.Module):
    """Tell from label map and image whether the image was labelled: logits (B, 2), 1 = labelled.

    Source: Zhang et al. 2017, Deep Adversarial Networks for Biomedical Image Segmentation Utilizing
    Unannotated Images; the layers are SSL4MIS'. There an average over 7 × 7 reduces the map of a
    224² image to 2 × 2; here an adaptive average does, for images of 16 × 16 pixels and more.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int = 64) -> None:
        super().__init__()
        self.of_map = nn.Conv2d(num_classes, width, 4, stride=2, padding=1)
        self.of_image = nn.Conv2d(in_channels, width, 4, stride=2, padding=1)
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.layers = nn.Sequential()
        for one, other in itertools.pairwise(widths):
            convolve = nn.Conv2d(one, other, 4, stride=2, padding=1)
            self.layers.extend([convolve, nn.LeakyReLU(0.2)])
            if other < widths[-1]:  # nothing is dropped after the last one
                self.layers.append(DropMaps(0.5))
        self.decide = nn.Linear(4 * widths[-1], 2)

    def forward(self, probability: Tensor, image: Tensor) -> Tensor:
        """Map (B, K, H, W) and (B, C, H, W) to (B, 2); `UserError` for images below `SMALLEST`."""
        if min(sides := image.shape[-2:]) < SMALLEST:
            raise UserError(
                f"method=deep_adversarial: the discriminator takes images from {SMALLEST} × "
                f"{SMALLEST} pixels on, these have {' × '.join(map(str, sides))} (data.size)"
            )
        x = self.layers(self.of_map(probability) + self.of_image(image))
        return self.decide(F.adaptive_avg_pool2d(x, 2).flatten(1))


class DeepAdversarial(Method):
    """The network learns to make the discriminator call unlabelled images labelled.

    The discriminator learns by Adam after each step of the network.

    Source: Zhang et al. 2017, see `Discriminator`; as SSL4MIS trains it.

    Args:
        networks: see `Method`.
        weight: of the adversarial term at the end of its ramp.
        lr: the discriminator's learning rate.
        width: channels after its first layer.
        in_channels: of the images.
        num_classes: K.
    """

    unlabelled = True
    narrow = False

    def __init__(
        self,
        networks: Sequence[nn.Module],
        *,
        in_channels: int,
        num_classes: int,
        weight: float = 0.1,
        lr: float = 1e-4,
        width: int = 64,
    ) -> None:
        super().__init__(networks)
        require_numbers(weight=weight)
        require_numbers(Number(above=0), lr=lr)
        require_numbers(Number(1, whole=True), width=width)
        # without gradients of their own, so that the network's optimizer and DDP leave them alone
        discriminator = Discriminator(in_channels, num_classes, width)
        self.discriminator = discriminator.requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr, betas=(0.9, 0.99))
        self.weight = weight
        self._seen: list[tuple[Step, Tensor]] = []  # a step's micro-batches, with probabilities

    def begin(self, data: Any) -> None:
        """Moves what the optimizer remembers to the device: it was restored before the network."""
        self.optimizer.load_state_dict(self.optimizer.state_dict())

    def terms(self, step: Step) -> dict[str, Tensor]:
        """`supervised` and `adversarial`."""
        logits, first = step.logits(self.network), step.labelled
        probability = logits.softmax(1)
        self._seen = [seen for seen in self._seen if seen[0].number == step.number]
        self._seen.append((step, probability.detach()))
        places = range(first, len(logits))
        judge = partial(self.discriminator, probability[first:])
        judged = step.run(judge, step.image[first:], places, 1)
        adversarial = told_apart(judged, len(judged))  # as if all were labelled
        weight = published_weight(step, self.weight)
        return {"supervised": step.supervised(logits), "adversarial": weight * adversarial}

    def after(self, step: int) -> None:
        """The discriminator learns from the same images."""
        seen, self._seen = self._seen, []
        own = dict(self.discriminator.named_parameters())
        weights = {name: one.detach().requires_grad_() for name, one in own.items()}
        with torch.enable_grad():
            losses = [
                told_apart(self._judged(weights, step, maps), step.labelled) for step, maps in seen
            ]
            gradients = torch.autograd.grad(torch.stack(losses).mean(), [*weights.values()])
        for parameter, gradient in zip(own.values(), gradients, strict=True):
            parameter.grad = averaged(gradient)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _judged(self, weights: dict[str, Tensor], step: Step, maps: Tensor) -> Tensor:
        """The decisions about a micro-batch by a discriminator of these weights."""

        def judge(image: Tensor) -> Tensor:
            decisions: Tensor = functional_call(self.discriminator, weights, (maps, image))
            return decisions

        decided: Tensor = step.run(judge, step.image, range(len(maps)), 2)
        return decided

    def get_extra_state(self) -> dict[str, Any]:
        """The state of the discriminator's optimizer, for a checkpoint."""
        return self.optimizer.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take it from a checkpoint."""
        self.optimizer.load_state_dict(state)


def told_apart(decision: Tensor, labelled: int) -> Tensor:
    """Cross entropy of decisions (B, 2) to 1 for the first `labelled` samples and 0 for others."""
    target = (torch.arange(len(decision), device=decision.device) < labelled).long()
    return F.cross_entropy(decision, target)
