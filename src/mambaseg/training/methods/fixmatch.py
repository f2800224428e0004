"""FixMatch: confident predictions for a weak view become the labels of a strong view."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mambaseg.data.classes import IGNORED
from mambaseg.data.limits import SHARE, Number
from mambaseg.training.methods.method import Method, Step, published_weight, require_numbers
from mambaseg.training.methods.terms import ce_dice, cross_entropy, dice, ratio


class FixMatch(Method):
    """Cross entropy plus Dice of a strong view to the sure pixels of the weak one's labels.

    The weak view is the batch as it is augmented, the strong one has its brightness and then its
    contrast changed too, each cut to the image's own range.

    Source: Sohn et al. 2020, FixMatch, equations 3-4; as in SSL4MIS' standard augmentation.

    Args:
        networks: see `Method`.
        weight: of the pseudo-labels at the end of the ramp.
        threshold: probability above which a pixel is sure; the others cost nothing, in a mean of
            the cross entropy over all pixels.
        jitter: largest relative change of brightness and of contrast.
        released: as the published code does it. A pixel is kept where (p - min p) / max p of some
            class is above the threshold, which it nearly always is; what is not kept becomes
            background rather than ignored; and a complementary loss on the whole batch is added,
            which takes 1 - p for logits and squares its weight.
    """

    unlabelled = True

    def __init__(
        self,
        networks: Sequence[nn.Module],
        *,
        weight: float = 0.1,
        threshold: float = 0.8,
        jitter: float = 0.8,
        released: bool = False,
    ) -> None:
        super().__init__(networks)
        require_numbers(weight=weight)
        require_numbers(SHARE, jitter=jitter)
        require_numbers(Number(0, below=1), threshold=threshold)
        self.weight, self.threshold, self.jitter = weight, threshold, jitter
        self.released = released

    def terms(self, step: Step) -> dict[str, Tensor]:
        """`supervised` on the weak view, and `pseudo` on the strong one."""
        first = step.labelled
        weak = step.logits(self.network)
        strong = step.logits(self.network, self.strong(step), turn=1)
        pseudo = self.pseudo(strong, weak, first)
        weight = published_weight(step, self.weight)
        return {"supervised": step.supervised(weak), "pseudo": weight * pseudo}

    def pseudo(self, strong: Tensor, weak: Tensor, first: int) -> Tensor:
        """The loss of the samples from `first` on, by both views' logits of the whole batch."""
        if self.released:
            label = released_label(weak[first:], self.threshold)
            share, complement = complementary(strong, weak)
            return ce_dice(strong[first:], label) + share * complement
        strong, label = strong[first:], sure_label(weak[first:], self.threshold)
        sure = (label != IGNORED).to(strong)
        share = ratio(sure.sum(), torch.tensor(sure.numel()))
        return share * cross_entropy(strong, label) + dice(strong, label)

    def strong(self, step: Step) -> Tensor:
        """The batch with its brightness, then its contrast changed, within each image's range."""
        image = step.image
        drawn = torch.tensor([step.uniform_of(place, 2) for place in range(len(image))])
        factors = (1 + self.jitter * (2 * drawn - 1)).to(image)
        brightness, contrast = factors.view(-1, 2, 1, 1, 1).unbind(1)
        low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
        bright = (low + (image - low) * brightness).clamp(low, high)
        mean = bright.mean((1, 2, 3), keepdim=True)
        changed: Tensor = mean + (bright - mean) * contrast
        return changed.clamp(low, high)


def sure_label(logits: Tensor, threshold: float) -> Tensor:
    """The likeliest class where its probability is above the threshold, elsewhere IGNORED."""
    probability, label = logits.detach().softmax(1).max(1)
    return label.where(probability > threshold, IGNORED)


def released_label(logits: Tensor, threshold: float) -> Tensor:
    """The published code's: by probabilities less their minimum, over their maximum."""
    probability = logits.detach().softmax(1)
    low, high = probability.amin(1, keepdim=True), probability.amax(1, keepdim=True)
    return (probability * ((probability - low) / high > threshold)).argmax(1)


def complementary(strong: Tensor, weak: Tensor) -> tuple[Tensor, Tensor]:
    """The published code's complementary loss: its weight, and the loss with that weight in it."""
    probability = strong.softmax(1)
    flat = probability.flatten(2)
    share = flat / flat.sum(2, keepdim=True)
    share = share.clamp(min=torch.finfo(share.dtype).eps)
    spread = -(share * share.log()).sum(2) / math.log(flat.shape[2])
    weight = (1 - spread).mean()
    unlikely = weak.detach().softmax(1).argmin(1)
    return weight, weight * cross_entropy(1 - probability, unlikely)
