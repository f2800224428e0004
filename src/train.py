"""Trains one network, tests its best checkpoint, hands the validation score to a sweeper.

python src/train.py model=mamba_unet
python src/train.py -m model=unet,swin_unet,mamba_unet
python src/train.py --help
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


if __name__ == "__main__":
    main()
