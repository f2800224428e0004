"""Heads at several scales, of which a training uses the finest one or all."""

from collections.abc import Sequence

from torch import Tensor, nn


class ManyHeads(nn.Module):
    """A network with a head per scale in `heads`, coarse to fine.

    Coarse heads exist for the originals' weights. They are frozen and silent unless the loss asks
    for them (`loss=deep_supervision`).
    """

    heads: nn.ModuleList
    deep = False
    """Whether training gives the logits of all heads."""

    def supervise_deeply(self, deep: bool = True) -> None:
        """Train the coarse heads too: in training the output is a list of logits, finest first."""
        self.deep = deep
        self.heads[:-1].requires_grad_(deep)

    def logits(self, maps: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Logits of maps `(B, C_i, H_i, W_i)`, coarse to fine: of the finest, or of all."""
        if self.deep and self.training:
            return [head(x) for head, x in zip(self.heads, maps, strict=True)][::-1]
        finest: Tensor = self.heads[-1](maps[-1])
        return finest
