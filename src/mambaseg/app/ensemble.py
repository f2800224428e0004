"""The networks of a prediction: from run folders and checkpoints to a `Predictor`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from mambaseg.app.calibrate import stored_calibration
from mambaseg.app.devices import usable_device
from mambaseg.app.networks import restore_network
from mambaseg.app.overrides import given_overrides, key_of
from mambaseg.data.formats.images import find_images, group_channels
from mambaseg.data.volume import slice_axis
from mambaseg.errors import UserError
from mambaseg.evaluation.largest import voted
from mambaseg.evaluation.summary import kept_in_words
from mambaseg.inference.found import distinct, find_run, find_runs
from mambaseg.inference.predictor import Options, Outcome, Predictor
from mambaseg.inference.results import require_folder
from mambaseg.inference.segment import Member, choose_precision, choose_views, learnt_views
from mambaseg.storage.run_folder import file_digest

if TYPE_CHECKING:
    from mambaseg.inference.trained import Checkpoint

log = logging.getLogger(__name__)


def chosen_runs(cfg: DictConfig) -> list[Path]:
    """The runs that `run=` or `ensemble=` names (`mambaseg.inference.found`)."""
    if (cfg.run is None) == (not cfg.ensemble):
        both = "" if cfg.run is None else ", not both"
        raise UserError(
            f"give run=<run folder or .ckpt>, run=newest, or several runs as ensemble=[...]{both}"
        )
    if cfg.run is not None:
        return [find_run(cfg.run, cfg.outputs, segmenting=True)]
    named = (find_runs(one, cfg.outputs, segmenting=True) for one in cfg.ensemble)
    runs = distinct(run for found in named for run in found)
    log.info("ensemble of %d: %s", len(runs), ", ".join(map(str, runs)))
    return runs


def predict_files(
    place: str, output: Path, load: Callable[[], Predictor]
) -> tuple[Predictor, Outcome]:
    """Labels what a file, folder or pattern stands for by networks that are loaded after a look."""
    require_folder(output)
    sources = find_images(place, outside=output)
    predictor = load()
    return predictor, predictor.predict(group_channels(sources, predictor.channels), output)


def restore_predictor(
    paths: Sequence[str | Path],
    *,
    device: str = "auto",
    precision: str = "auto",
    scan_backend: str = "auto",
    tta: bool | str = False,
    calibrated: bool = False,
    keep_largest: bool | str = "auto",
    original: Any = None,
    **options: bool | int,
) -> Predictor:
    """The networks of run folders or .ckpt files, on their device; UserError: they cannot be used.

    Most arguments are keys of conf/predict.yaml; `original` is as `restore_network` has it, and
    `options` are those of `mambaseg.inference.predictor.Options`.
    """
    where = usable_device(device)
    members, made_by, trained_on, seen, choices = [], [], [], [], []
    thresholds: list[float | None] = []
    ours = False
    told: dict[str, Any] = {}
    for path in paths:
        network, checkpoint = restore_network(path, scan_backend=scan_backend, original=original)
        about, name = checkpoint.about, checkpoint.path.name
        ours = ours or not about.get("original")
        if (made_for := checkpoint.task) != "segmentation":
            raise UserError(f"{checkpoint.path} was trained for {made_for}: it gives no labels")
        own = {
            "channels": checkpoint.channels,
            "class_names": list(about["classes"]),
            "slicing": about.get("slicing", "stored"),
            "regions": about.get("regions"),
        }
        slice_axis(None, own["slicing"])  # which must be a known rule
        told = told or own
        if other := [key for key in own if own[key] != told[key]]:
            raise UserError(
                f"ensemble: {checkpoint.path} has {', '.join(f'{key} {own[key]}' for key in other)}"
                f", those before it {', '.join(f'{key} {told[key]}' for key in other)}"
            )
        views = choose_views(tta, learnt_views(about, checkpoint.preprocessing.sides), name)
        members.append(Member(network.to(where), checkpoint.preprocessing, views))
        if calibrated or options.get("uncertainty"):
            stored = _calibration(checkpoint, needed=calibrated)
            how = "calibrated" if calibrated else "plain"
            thresholds.append(stored["flag"]["thresholds"][how] if stored else None)
            if calibrated and stored:
                members[-1] = members[-1]._replace(temperature=stored["temperature"])
        model = {"model": about["model"]["name"], "checkpoint": file_digest(checkpoint.path)}
        made_by.append({**model, "preprocessing": members[-1].preprocessing.describe()})
        trained_on.append(about["data"]["title"])
        seen.append(checkpoint.seen)
        choices.append(checkpoint.keep_largest)
    if ours and original is not None:
        words = [one for one in given_overrides() if key_of(one).startswith("data.")]
        if words:
            log.warning("%s: not used; the checkpoint says how its images are prepared",
                        ", ".join(words))  # fmt: skip
    chosen = choose_precision(precision, gpu=where.type == "cuda")
    log.info("device %s, precision %s", where, chosen)
    kept: Any = keep_largest
    if keep_largest == "auto":
        agreed = voted(choices)
        kept = agreed or False
        if any(choices):
            most = " by most of the networks" if len(members) > 1 else ""
            log.info("post-processing, chosen in validation%s: %s", most, kept_in_words(agreed))
    return Predictor(
        members,
        **told,
        made_by=made_by,
        trained_on=trained_on,
        seen=seen,
        flag_above=_mean(thresholds),
        options=Options(precision=chosen, keep_largest=kept, **options),  # type: ignore[arg-type]
    )


def _calibration(checkpoint: Checkpoint, *, needed: bool) -> dict[str, Any] | None:
    """What is stored beside a checkpoint; an error where it is needed, a warning where not."""
    stored = stored_calibration(checkpoint)
    if stored is None:
        how = f"mambaseg evaluate run={checkpoint.path} calibration=true makes it"
        if needed:
            raise UserError(f"calibrated=true: no temperature is stored for this network; {how}")
        log.warning("no threshold is stored, so no case is flagged; %s", how)
    return stored


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None without values, or where one is not known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
