"""`calibration=true` of mambaseg evaluate: the calibration of the network that a run has scored."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mambaseg.app.devices import device_type
from mambaseg.app.networks import restore_network
from mambaseg.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import nn

    from mambaseg.inference.trained import Checkpoint
    from mambaseg.training.run import Run

log = logging.getLogger(__name__)


def prepare_calibration(run: Run, cfg: DictConfig) -> Callable[[], None]:
    """Checks what `calibration=true` needs; returns what writes calibration.json to the run folder.

    That is to be called after the run, whose scores stand whatever comes of it. On the data of its
    own training, the network's temperature is fitted and stored beside the checkpoint too; on other
    data the stored one is measured.

    Raises:
        UserError: the task has no class probabilities, there are no validation cases, or nothing
            was stored for other data.
    """
    if not (cfg.get("calibration") and run.main):
        return lambda: None
    from mambaseg.evaluation.calibration import calibration_file

    config, data = run.config, run.data
    if config["data"].get("task", "segmentation") != "segmentation":
        raise UserError("calibration=true: this task gives no probabilities of classes")
    backend = config["model"].get("scan_backend", "auto")
    network, checkpoint = restore_network(config["checkpoint"], scan_backend=backend, original=cfg)
    fitted = None
    if not _is_own(checkpoint, data):
        fitted = stored_calibration(checkpoint)
        if fitted is None:
            raise UserError(
                f"calibration=true: {calibration_file(checkpoint.path)} is not there. The "
                "temperature is fitted on the validation set of the training: mambaseg evaluate "
                f"run={config['checkpoint']} calibration=true first, without other data"
            )
    elif not data.split.val:
        raise UserError("calibration=true: the data have no validation set, which fits it")
    return functools.partial(_calibrate, run, network, checkpoint, fitted)


def _calibrate(
    run: Run, network: nn.Module, checkpoint: Checkpoint, fitted: dict[str, Any] | None
) -> None:
    import torch

    from mambaseg.evaluation.calibration import FILE, calibration_file
    from mambaseg.inference.calibration import calibrate
    from mambaseg.inference.segment import Member
    from mambaseg.storage.files import write_whole
    from mambaseg.storage.run_folder import file_digest

    config, data = run.config, run.data
    device = torch.device(device_type(config["trainer"]["accelerator"]))
    member = Member(network.to(device), checkpoint.preprocessing)
    digest, stored = file_digest(checkpoint.path), calibration_file(checkpoint.path)
    bf16 = config["trainer"]["precision"] == "bf16-mixed"
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        validation, test = (data.evaluation_data(part) for part in ("val", "test"))
        size = config["evaluation"]["batch_size"]
        found = calibrate(member, validation, test, fitted=fitted, batch_size=size)
        found = {"checkpoint": digest, **found}
    same = set(data.split.val) & set(data.split.test)
    found["note"] = "The validation set is the test set: these errors are optimistic." * bool(same)
    run.folder.write_json(FILE, found)
    if fitted is None:
        otherwise = "evaluate a copy of the checkpoint"
        write_whole(stored, json.dumps(found, indent=2) + "\n", otherwise=otherwise)
    _tell(found)


def _is_own(checkpoint: Checkpoint, data: Any) -> bool:
    """Whether these are the data of its training; of weights from elsewhere nobody knows better."""
    if not checkpoint.split_hash:
        return True
    trained_on = checkpoint.about["data"].get("fingerprint", data.fingerprint)
    return checkpoint.split_hash == data.split.hash and trained_on == data.fingerprint


def stored_calibration(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The calibration beside a checkpoint; None: there is none.

    Raises:
        UserError: it is damaged, or of another checkpoint.
    """
    from mambaseg.evaluation.calibration import calibration_file, read_calibration
    from mambaseg.storage.run_folder import file_digest
    from mambaseg.storage.untrusted import ForeignFileError

    path = calibration_file(checkpoint.path)
    again = "mambaseg evaluate calibration=true makes it again; or remove it"
    try:
        found = read_calibration(path)
    except FileNotFoundError:
        return None
    except (ForeignFileError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): {again}") from error
    if found["checkpoint"] != file_digest(checkpoint.path):
        raise UserError(f"{path} is of another checkpoint than {checkpoint.path}: {again}")
    return found


def _tell(found: dict[str, Any]) -> None:
    fit = found["fitted_on"]
    log.info("temperature: %.4f, fitted on %d validation cases", found["temperature"], fit["cases"])
    for region in ("all", "foreground"):
        before, after = (found["test"][region][how] for how in ("plain", "calibrated"))
        if before["ece"] is not None:
            log.info(
                "calibration of the test set, %s voxels: ECE %.4f, with the temperature %.4f",
                region, before["ece"], after["ece"],
            )  # fmt: skip
    if found["note"]:
        log.warning(found["note"])
