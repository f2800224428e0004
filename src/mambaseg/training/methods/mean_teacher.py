"""Mean Teacher: the student agrees with the average of its weights on a noisy view."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mambaseg.data.limits import SHARE
from mambaseg.training.methods.method import Method, Step, published_weight, require_numbers
from mambaseg.training.methods.terms import Teacher, squared_difference


class MeanTeacher(Method):
    """Squared difference to the teacher's probabilities of noisy unlabelled images.

    Source: Tarvainen and Valpola 2017, Mean teachers are better role models; as SSL4MIS trains it.

    Args:
        networks: see `Method`.
        decay: of the teacher's parameters, at most.
        weight: of the consistency at the end of its ramp.
        start: share of the training before the consistency begins.
        noise: standard deviation of the noise on the teacher's images.
        clip: largest absolute value of that noise.
    """

    unlabelled = True

    def __init__(
        self,
        networks: Sequence[nn.Module],
        *,
        decay: float = 0.99,
        weight: float = 0.1,
        start: float = 1 / 30,
        noise: float = 0.1,
        clip: float = 0.2,
    ) -> None:
        super().__init__(networks)
        require_numbers(weight=weight, noise=noise, clip=clip)
        require_numbers(SHARE, decay=decay, start=start)
        self.teacher = Teacher(self.network, decay)
        self.weight, self.start, self.noise, self.clip = weight, start, noise, clip

    def terms(self, step: Step) -> dict[str, Tensor]:
        """`supervised` and `consistency`."""
        logits = step.logits(self.network)
        taught = self.taught(step, turn=1)
        consistency = self.consistency(step, logits[step.labelled :].softmax(1), taught.softmax(1))
        weight = published_weight(step, self.weight) * self.begun(step)
        return {"supervised": step.supervised(logits), "consistency": weight * consistency}

    def begun(self, step: Step) -> bool:
        """Whether the consistency counts yet."""
        return step.number >= round(self.start * step.steps)

    def taught(self, step: Step, turn: int, view: Tensor | None = None) -> Tensor:
        """The teacher's logits of the unlabelled images, or a view of all images, with noise."""
        first = step.labelled if view is None else 0
        image = step.image[first:] if view is None else view
        noise = self.noise * step.normal(image, first=first, turn=turn)
        with torch.no_grad():
            noisy = image + noise.clamp(-self.clip, self.clip)
            places = range(first, first + len(noisy))
            return step.logits(self.teacher.network, noisy, places=places, turn=turn)

    def consistency(self, step: Step, student: Tensor, teacher: Tensor) -> Tensor:
        """How far the student's probabilities are from the teacher's."""
        return squared_difference(student, teacher)

    def after(self, step: int) -> None:
        """The teacher follows."""
        self.teacher.follow(self.network, step)
