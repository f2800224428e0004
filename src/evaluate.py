"""Scores a checkpoint on the test part; network and preprocessing come from the checkpoint itself.

python src/evaluate.py checkpoint=outputs/default/<run folder>
python src/evaluate.py checkpoint=best.ckpt data=acdc data.split=transunet
"""

from omegaconf import DictConfig

from mambaseg.build import build
from mambaseg.entry import entry
from mambaseg.reporting.tables import headline


@entry("evaluate")
def main(cfg: DictConfig) -> float | None:
    """Returns the score that stands for the test part: the mean foreground Dice."""
    with build(cfg) as run:
        if not run.finished:
            run.evaluate()
        run.report()
    return headline(run.folder.summary)[1] if run.main else None


if __name__ == "__main__":
    main()
