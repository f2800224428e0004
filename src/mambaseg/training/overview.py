"""What a run is, in a few lines at its start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mambaseg.data.sizes import sides_of
from mambaseg.errors import counted
from mambaseg.training.averaging import averaging

_NOT_SAID = ("_target_", "_partial_", "fused", "foreach")  # arguments that change no result


def overview(config: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, str]:
    """Network, optimizer, budget, data and device of a run: what -> a line about it.

    Args:
        config: the resolved configuration.
        record: `run.json` as `RunFolder.start` writes it.
    """
    data, trainer, optim = config["data"], config["trainer"], config["optim"]
    scan = config["model"].get("scan_backend")
    model = f"{config['model']['name']}, {record['parameters']:,} parameters"
    schedule = f", {_name(optim['scheduler'])}" if optim["scheduler"] else ""
    loss, split, decay = _name(config["loss"]), record["split"], averaging(config)
    averaged = "" if decay is None else f"; weights averaged over steps with decay {decay}"
    micro = trainer["accumulate_grad_batches"]
    batch = f"batches of {data['batch_size']}" + (f" in {micro} parts" if micro > 1 else "")
    place = f"CPU, {counted(record['threads'], 'thread')}"
    if trainer["accelerator"] != "cpu":
        gpus = record["hardware"]["gpus"]
        place = gpus[0] if gpus else "Apple GPU" if torch.backends.mps.is_available() else place
    devices, every = trainer["devices"], data["val_every"]
    validated = "each step" if every == 1 else f"every {every:,} steps"
    size = " × ".join(map(str, sides_of(data["size"])))
    several = f"{devices} × " if isinstance(devices, int) and devices > 1 else ""
    lines = {
        "model": model + (f", scan backend {scan}" if scan else ""),
        "optim": f"{_call(optim['optimizer'])}{schedule}; loss {loss}{averaged}",
        "budget": f"{counted(data['steps'], 'step')}, {batch}, {size} pixels, "
        f"validation {validated}",
        "data": f"{data['title']}, split {split['name']} ({split['hash']})"
        + _supervision(config, record),
        "device": f"{several}{place}, {trainer['precision']}",
    }
    if config.get("checkpoint"):  # nothing is trained
        del lines["optim"], lines["budget"]
    return lines


def _supervision(config: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """What the training reads of the labels, where it is less than all of them."""
    train = record.get("counts", {}).get("train", {})
    scribbles = config["data"].get("labels") == "scribble"
    if "labelled" in train:
        labels = "scribbles" if scribbles else "labels"
        return f", {labels} of {train['labelled']} of {counted(train['cases'], 'training case')}"
    return ", scribbles" if scribbles else ", labels in part" * ("labelled in part" in train)


def _name(config: Mapping[str, Any]) -> str:
    return str(config["_target_"]).rpartition(".")[2]


def _call(config: Mapping[str, Any]) -> str:
    """`SGD lr=0.01 momentum=0.9`."""
    named = {key: value for key, value in config.items() if key not in _NOT_SAID}
    return " ".join([_name(config), *(f"{key}={value}" for key, value in named.items())])
