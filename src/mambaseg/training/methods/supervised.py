"""Learning from labels alone."""

from torch import Tensor

from mambaseg.training.methods.method import Method, Step


class Supervised(Method):
    """The loss of the labelled images; pixels that are ignored teach nothing."""

    def terms(self, step: Step) -> dict[str, Tensor]:
        """`supervised`."""
        return {"supervised": step.supervised(step.through(self.network))}
