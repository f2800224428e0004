"""Scores a checkpoint on the test part, or label maps in a folder against references.

mambaseg evaluate run=outputs/default/<run folder>
mambaseg evaluate run=best.ckpt data=acdc data.root=another_hospital
mambaseg evaluate run=unet_best_model.pth model=unet data=acdc
mambaseg evaluate predictions=labels references=truth
"""

import logging
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from mambaseg.app.build import build
from mambaseg.app.calibrate import prepare_calibration
from mambaseg.app.entry import entry
from mambaseg.app.overrides import given_overrides, key_of
from mambaseg.app.run_data import with_run_data
from mambaseg.app.sweeps import note_run
from mambaseg.errors import UserError
from mambaseg.storage.identity import OF_TRAINING

# keys that scores of label maps are made with; `evaluation` without those of networks
_OF_LABEL_MAPS = {
    "predictions", "references", "class_names", "ignore_label", "patient_pattern", "calibration",
    "evaluation", "metric", "outputs", "name", "rerun", "hydra",
}  # fmt: skip
_OF_NETWORKS = {"evaluation.tta", "evaluation.batch_size"}
log = logging.getLogger(__name__)


@entry("evaluate")
def main(cfg: DictConfig) -> float | None:
    """Returns the score of the test set: the mean foreground Dice."""
    if cfg.predictions or cfg.references:
        return _folders(cfg)
    from mambaseg.reporting.tables import headline

    _warn_of_unread()
    run = build(with_run_data(cfg))
    calibrate = prepare_calibration(run, cfg)  # what it refuses is said before anything is scored
    with run:
        if not run.finished:
            run.evaluate()
        run.report()
    calibrate()
    return headline(run.folder.summary)[1] if run.main else None


def _warn_of_unread() -> None:
    """Names overrides that only a training reads."""
    unread = [word for word in given_overrides()
              if any(f"{key_of(word)}.".startswith(f"{one}.") for one in OF_TRAINING)]  # fmt: skip
    if unread:
        more = " (evaluation.batch_size is what an evaluation reads)"
        log.warning("%s: not read, because nothing is trained%s", " ".join(unread),
                    more * any("batch_size" in word for word in unread))  # fmt: skip


def _folders(cfg: DictConfig) -> float | None:
    if cfg.checkpoint or not (cfg.predictions and cfg.references):
        raise UserError("give run=..., or both predictions=<folder> and references=<folder>")
    if cfg.calibration:
        raise UserError("calibration=true: label maps hold no probabilities; give run=...")
    keys = {word: key_of(word) for word in given_overrides()}
    unread = [word for word, key in keys.items()
              if key.partition(".")[0] not in _OF_LABEL_MAPS or key in _OF_NETWORKS]  # fmt: skip
    if unread:
        raise UserError(f"{' '.join(unread)}: not read with predictions=, only with run=")
    from rich import get_console

    from mambaseg.app.settle import metrics_of
    from mambaseg.inference.folder_scores import score_folders
    from mambaseg.reporting.tables import headline, table_of

    folder, config = score_folders(
        Path(cfg.predictions).expanduser(),
        Path(cfg.references).expanduser(),
        class_names=cfg.class_names and list(cfg.class_names),
        evaluation=OmegaConf.to_container(cfg.evaluation),  # type: ignore[arg-type]
        outputs=Path(cfg.outputs).expanduser() / cfg.name,
        metrics=metrics_of(cfg),
        metric_config=OmegaConf.to_container(cfg.metric) if cfg.metric else {},  # type: ignore[arg-type]
        ignore_label=cfg.ignore_label,
        patient_pattern=cfg.patient_pattern,
        rerun=cfg.rerun,
    )
    note_run(folder.path)
    get_console().print(table_of(folder.summary, config))
    words, score = headline(folder.summary)
    log.info("%s\nrun folder: %s", words, folder.path)
    return score
