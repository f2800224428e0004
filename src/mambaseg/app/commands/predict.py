"""Label maps of images without a reference, from a trained network.

mambaseg predict run=outputs/default/<run folder> input=images output=labels
mambaseg predict run=best.ckpt input='scans/*_4d.nii.gz' output=labels tta=true overlay=true
mambaseg predict run=newest input=scan.nii.gz output=labels
mambaseg predict ensemble=[run1,run2,run3] input=scan.nii.gz output=labels
mambaseg predict run=unet_best_model.pth model=unet input=scan.nii.gz output=labels
"""

import logging
from pathlib import Path

from omegaconf import DictConfig

from mambaseg.app.entry import entry
from mambaseg.storage.untrusted import printable

_HOW = ("device", "precision", "scan_backend", "tta", "keep_largest", "probabilities",
        "uncertainty", "calibrated", "overlay", "dicom_seg", "batch_size", "rerun")  # fmt: skip
log = logging.getLogger(__name__)


@entry("predict")
def main(cfg: DictConfig) -> None:
    """Writes a label map and what its labels mean for every image."""
    from mambaseg.app.ensemble import chosen_runs, predict_files, restore_predictor

    output, how = Path(cfg.output).expanduser(), {name: cfg[name] for name in _HOW}
    predictor, outcome = predict_files(
        cfg.input, output, lambda: restore_predictor(chosen_runs(cfg), original=cfg, **how)
    )
    if outcome.skipped:
        log.info("there already: %d (rerun=true predicts them again)", len(outcome.skipped))
    if outcome.done:
        log.info(
            "images: %d with %d slices in %.1f s, %.1f slices/s with reading and writing",
            len(outcome.done), outcome.slices, outcome.seconds, outcome.slices / outcome.seconds,
        )  # fmt: skip
        total = sum(outcome.voxels.values())
        shares = (f"{name} {count / total:.2%}" for name, count in outcome.voxels.items())
        log.info("share of the voxels: %s", printable(", ".join(shares)))
    if outcome.empty:
        log.warning(
            "nothing but background was found in %d of %d images (%s): compare their intensities, "
            "channels and orientation with those of the training images",
            len(outcome.empty), len(outcome.done),
            printable(", ".join(outcome.empty[:5]) + ", ..." * (len(outcome.empty) > 5)),
        )  # fmt: skip
    if outcome.flagged:
        log.warning("%d of %d images deserve a look (uncertainty.csv): %s",
                    len(outcome.flagged), len(outcome.done) + len(outcome.skipped),
                    printable(", ".join(outcome.flagged[:5])
                              + ", ..." * (len(outcome.flagged) > 5)))  # fmt: skip
    if outcome.done or outcome.skipped:
        log.info("label maps: %s (values 0..%d look black in most viewers; overlay=true draws "
                 "them)", output, len(predictor.class_names) - 1)  # fmt: skip
    outcome.require_all()
