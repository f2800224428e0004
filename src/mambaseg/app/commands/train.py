"""Trains one network, tests its best checkpoint, hands the validation score to a sweeper.

mambaseg train model=mamba_unet
mambaseg train -m model=unet,swin_unet,mamba_unet
mambaseg train --help
"""

from omegaconf import DictConfig

from mambaseg.app.build import build
from mambaseg.app.entry import entry


@entry("config")
def main(cfg: DictConfig) -> float | None:
    """Returns the best validation score: the mean Dice, or `callbacks.checkpoint.monitor`."""
    with build(cfg) as run:
        if not run.finished:
            run.fit()
            run.evaluate()
        run.report()
    return run.score
