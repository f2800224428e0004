"""Which run is which: what by design changes a number in cases.csv makes another run, nothing else.

Whatever is not listed here counts, including what we do not know (`+trainer.max_time=...`, a user's
callback): training once too often does less harm than taking a wrong run for the result.
`tests/storage/test_identity.py` states the side of every key of the configuration.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from mambaseg.storage.run_folder import RunFolder, file_digest
from mambaseg.storage.untrusted import ForeignFileError, read_yaml, with_values

RULE = 3
"""Of the identities in run.json; to be raised where existing runs would get another one. Records
without one are of the time when the scan backend counted and callbacks did not."""

# What changes no number beyond rounding, or only the place where it is computed. A name stands for
# all that is below it.
_LEFT_OUT = frozenset({
    "name", "outputs", "run_dir", "rerun", "test", "logger", "hydra",
    "planned",  # which values were; these count
    # of mambaseg evaluate, where `checkpoint` counts
    "run", "predictions", "references", "class_names", "ignore_label", "calibration",
    "patient_pattern",
    "callbacks",  # `_chosen` has what counts of them
    # the fingerprint of the data and the hash of the split say what these lead to
    "data.root", "data.unlabelled_images", "data.prepare", "data.cache_dir", "data.num_workers",
    "data.on_device", "data.find_cases.split",
    "data.title", "data.synthetic", "data.instead",
    "data.modality",  # what it leads to counts
    "evaluation.batch_size", "evaluation.val_distances",
    "evaluation.allow_seen",  # scores that need it are marked
    "model.scan_backend", "method.name",
    "optim.optimizer.fused", "optim.optimizer.foreach",
    # where each device has batch norms of its own `batch_norms` says so, and counts
    "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy",
    "trainer.sync_batchnorm", "trainer.deterministic", "trainer.benchmark",
    "trainer.inference_mode", "trainer.log_every_n_steps", "trainer.default_root_dir",
    "trainer.enable_model_summary", "trainer.enable_progress_bar", "trainer.profiler",
    "trainer.num_sanity_val_steps", "trainer.detect_anomaly", "trainer.graph",
    "trainer.compile",
})  # fmt: skip
# Likewise where a checkpoint is scored: nothing is trained.
OF_TRAINING = frozenset({
    "loss", "optim", "method", "data.labels", "data.labelled", "data.unlabelled",
    "data.oversample", "data.steps",
    "data.val_every", "data.batch_size", "data.accumulate", "augmentation", "data.augmentation",
    "trainer.accumulate_grad_batches", "trainer.gradient_clip_val",
    "trainer.gradient_clip_algorithm", "trainer.max_time",
})  # fmt: skip
# Keys that were not always there, and the value with which all is as it was before: with that value
# they are no part of the identity, so that older run folders keep theirs.
_ADDED: dict[str, Any] = {
    "metric": {},
    "init_from": None,
    "method": {"_target_": "mambaseg Supervised", "_partial_": True, "partner": []},
    "data.labels": "dense",
    "data.labelled": None,
    "data.ignore_label": None,
    "data.folds": 5,
    "data.minutes": None,
    "data.neighbours": 0,
    "data.ct": None,
    "data.regions": None,
    "data.split_by": None,
    "data.oversample": 0.0,
    "evaluation.tta": False,
    "optim.freeze_encoder": 0,
    "optim.layer_decay": 1.0,
    "loss.class_weights": None,
    "model.deep_supr_num": 1,
    "data.find_cases.ignore_label": None,
}

# What conf/augmentation holds, by its text, and what the key data.augmentation called the same.
_PRESETS = {"3833238a": "none", "656339af": "paper", "79a6d3bc": "modern"}

# Lightning's callbacks that change no number, by the names of their classes
_LIGHTNINGS = ("lightning.pytorch.callbacks", "pytorch_lightning.callbacks")
_ONLOOKERS = {
    "DeviceStatsMonitor", "LearningRateMonitor", "ModelCheckpoint", "ModelSummary",
    "OnExceptionCheckpoint", "ProgressBar", "RichModelSummary", "RichProgressBar",
    "ThroughputMonitor", "TQDMProgressBar",
}  # fmt: skip


def scientific(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration that by design can change a number in cases.csv."""
    left_out = _LEFT_OUT | OF_TRAINING if config.get("checkpoint") else _LEFT_OUT
    optim = config.get("optim") or {}
    if not optim.get("freeze_encoder") and optim.get("layer_decay", 1.0) == 1:
        left_out |= {"model.encoder_parts"}
    kept = _without(config, left_out)
    if not config.get("checkpoint"):
        kept["callbacks"] = _chosen(config)
        kept = _with_preset(kept)
    return kept


def _with_preset(kept: dict[str, Any]) -> dict[str, Any]:
    """The augmentation as operations in their order, or as the key of data that presets were."""
    if "augmentation" not in kept:  # of an earlier version
        return kept
    operations = [one for one in kept.pop("augmentation").values() if one]
    preset = _PRESETS.get(digest_of(operations))
    if preset is None:
        names = (str(one["_target_"]).rpartition(".")[2] for one in operations)
        by_place = {
            f"{place} {name}": one
            for place, (name, one) in enumerate(zip(names, operations, strict=True))
        }
        return {**kept, "augmentation": by_place}
    if "preprocessing" in kept["data"]:  # other data sets had no such key
        kept["data"] = {**kept["data"], "augmentation": preset}
    return kept


def _without(config: Mapping[str, Any], left_out: frozenset[str], start: str = "") -> Any:
    kept = {}
    for key, value in config.items():
        name = f"{start}{key}"
        if name in left_out:
            continue
        if isinstance(value, Mapping):
            value = _without(value, left_out, f"{name}.")
        elif key == "_target_":
            value = target_name(value)
        if name not in _ADDED or value != _ADDED[name]:
            kept[str(key)] = value
    return kept


def target_name(target: Any) -> Any:
    """What a `_target_` is: ours by the name of its class, so that modules may move."""
    ours = isinstance(target, str) and target.startswith("mambaseg.")
    return f"mambaseg {target.rpartition('.')[2]}" if ours else target


def _chosen(config: Mapping[str, Any]) -> dict[str, Any]:
    """What callbacks change: which state is the best one, and whatever others of them may do.

    `NonFinite` counts by its presence. Whether it stops or steps over a bad step is one run: where
    there is none both end alike, and where there is one only the second ends.
    """
    chosen: dict[str, Any] = {}
    others = []
    callbacks = config.get("callbacks")
    for callback in callbacks.values() if isinstance(callbacks, Mapping) else ():
        named = callback.get("_target_") if isinstance(callback, Mapping) else None
        target = str(target_name(named or ""))
        package, _, name = target.rpartition(".")
        if target == "mambaseg Checkpoints":
            chosen["checkpoint"] = {key: callback.get(key) for key in ("monitor", "mode")}
        elif target == "mambaseg NonFinite":
            chosen["nonfinite"] = True
        elif package.startswith(_LIGHTNINGS) and name in _ONLOOKERS:
            continue  # it changes no number
        elif target and target != "mambaseg ProgressBar":
            others.append(_without_place(callback, str(config.get("run_dir"))))
    for callback in sorted(others, key=_text):
        name = str(callback["_target_"]).rpartition(".")[2]
        chosen[name if name not in chosen else f"{name} {len(chosen)}"] = callback
    return chosen


def _without_place(value: Any, run_dir: str) -> Any:
    """A callback's arguments without the run folder, which is named after their identity."""

    def without(one: Any) -> Any:
        inside = isinstance(one, str) and (one + "/").startswith(run_dir + "/")
        return "<run folder>" + one[len(run_dir) :] if inside else one

    return with_values(value, without)


def monitor_of(config: Mapping[str, Any]) -> str:
    """The logged value that chooses a run's best state; empty where nothing is trained."""
    monitor: str = scientific(config).get("callbacks", {}).get("checkpoint", {}).get("monitor", "")
    return monitor


def better(monitor: str) -> Literal["max", "min"]:
    """Which way a logged value is better: `min` for losses and distances, `max` for scores."""
    name = monitor.rpartition("/")[2]  # of val/dice_glioblastoma: dice_...
    return "min" if name.startswith(("loss", "hd95", "assd")) else "max"


def with_digests(config: Mapping[str, Any], digests: Mapping[str, str]) -> dict[str, Any]:
    """The resolved configuration with the digests of weights (`weight_digests`) for their paths."""
    changed = dict(config)
    changed |= {key: digests[key] for key in ("checkpoint", "init_from") if key in digests}
    # always there, so that a network without the key and one with `pretrained: null` are the same
    model = config["model"]
    changed["model"] = {**model, "pretrained": digests.get("pretrained", model.get("pretrained"))}
    if partners := _partners(config):
        networks = [dict(one) for one in partners.values()]
        for key, network in zip(partners, networks, strict=True):
            network |= {"pretrained": digests[key]} if key in digests else {}
            network |= {"scan_backend": "auto"} if "scan_backend" in network else {}
        changed["method"] = {**config["method"], "networks": networks}
    return changed


def _partners(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The configs of `method.partner`'s networks, by the keys of their weights' digests."""
    networks = (config.get("method") or {}).get("networks") or ()
    return {f"partner {place}": one for place, one in enumerate(networks)}


def weight_digests(config: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the files of weights that a configuration names, by their keys."""
    model = config["model"]
    named = {"pretrained": model.get("pretrained")}
    named |= {key: config.get(key) for key in ("checkpoint", "init_from")}
    named |= {key: one.get("pretrained") for key, one in _partners(config).items()}
    files = {name: Path(path).expanduser() for name, path in named.items() if path}
    return {name: file_digest(file) for name, file in files.items() if file.is_file()}


def identity(config: Mapping[str, Any], *, split: str, data: str) -> str:
    """Eight hex digits over the scientific part of a configuration, which has `with_digests`.

    They count the split's hash and the data's fingerprint too (empty: a run's design).
    """
    return digest_of({"config": scientific(config), "split": split, "data": data})


def digest_of(value: Any) -> str:
    """Eight hex digits over plain data, whatever the order of its keys."""
    return hashlib.blake2b(_text(value).encode(), digest_size=4).hexdigest()


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


# ---- run folders by their content


def same_run(folder: Path, key: str) -> Path:
    """The run's `folder`, named `<readable name>-<key>`, or an older one that is the same run.

    Folders that were named by other rules are recognised by the configuration in them.
    """
    if (folder / "run.json").is_file():
        return folder
    found = [RunFolder(other) for other, theirs, _, _ in _alike(folder, key) if theirs == key]
    # of several the finished one, else the one that was begun last
    found.sort(key=lambda one: (one.finished, one.trained, str(one.record.get("started"))))
    return found[-1].path if found else folder


def made_from_other_data(folder: Path, key: str, design: str, fingerprint: str) -> Path | None:
    """A run beside this one that differs in its data only; None where there is none.

    `design` is the identity without the data, whose `fingerprint` is given apart.
    """
    alike = _alike(folder, key)
    found = (run for run, _, theirs, data in alike if data != fingerprint and theirs == design)
    return next(found, None)


def _alike(folder: Path, key: str) -> Iterator[tuple[Path, str, str, str]]:
    """Run folders of the same network and seed: path, identity, design, fingerprint of the data.

    The data between the two have had other names.
    """
    network, _, rest = folder.name.removesuffix(key).partition("-")
    seed = rest[rest.rfind("-seed") :]
    for path in sorted(file.parent for file in folder.parent.glob("*/run.json")):
        if not re.fullmatch(rf"{re.escape(network)}-.*{re.escape(seed)}[0-9a-f]{{8}}", path.name):
            continue
        record = RunFolder(path).record
        with contextlib.suppress(OSError, ForeignFileError, KeyError, TypeError, AttributeError):
            data = str(record["data"]["fingerprint"])  # of a damaged folder reports tell
            if record.get("rule") == RULE:
                yield path, str(record["key"]), str(record["design"]), data
                continue
            config = read_yaml(path / "config.yaml")
            config = with_digests(config, record.get("weights") or weight_digests(config))
            split = record["split"]["hash"]
            theirs = identity(config, split=split, data=data)
            yield path, theirs, identity(config, split=split, data=""), data
