"""Networks from the leaves of conf/model: fresh, or with the weights of a checkpoint."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from mambaseg.app.entry import CONF
from mambaseg.app.schema import EXTRAS
from mambaseg.errors import UserError
from mambaseg.storage.untrusted import printable

if TYPE_CHECKING:
    from torch import nn

    from mambaseg.inference.trained import Checkpoint

# what a checkpoint says of a network that is not taken from it
_NOT_A_CHECKPOINTS = ("name", "_target_", "pretrained", "mirror_encoder", "scan_backend")
log = logging.getLogger(__name__)


def build_network(model: DictConfig) -> tuple[nn.Module, dict[str, Any] | None]:
    """A network from its leaf, wrapped for any input size, with the report of pretrained weights.

    Args:
        model: a leaf of conf/model with its interpolations resolved against the data.

    Returns:
        The network (B, C, H, W) -> (B, K, H, W), and what was loaded (None: from scratch).
    """
    from mambaseg.models import AnySize

    network = instantiate(without(model, *EXTRAS["model"]), _convert_="all")
    report = None
    if path := model.get("pretrained"):
        path = Path(str(path)).expanduser()
        if not hasattr(network, "load_pretrained_encoder"):
            raise UserError(
                f"model.pretrained: {model.name} has no pretrained encoder; leave it null"
            )
        how = {"mirror": model.mirror_encoder} if "mirror_encoder" in model else {}
        loaded = network.load_pretrained_encoder(path, **how)
        report = asdict(loaded)
        log.info(loaded.summary())
    multiple = model.get("size_multiple") or network.size_multiple
    return AnySize(network, multiple, residual=bool(model.get("residual"))), report


def network_with_weights(
    model: DictConfig, checkpoint: Checkpoint | None
) -> tuple[nn.Module, dict[str, Any] | None]:
    """Like `build_network`; with a checkpoint, its weights instead of pretrained ones.

    Raises:
        UserError: the checkpoint does not fit the leaf.
    """
    if checkpoint is None:
        return build_network(model)
    try:
        _require_fit(model, checkpoint)
        network, _ = build_network(model)
        network.load_state_dict(checkpoint.weights)
    except Exception as error:  # arguments that no network can have raise nearly anything
        raise UserError(
            f"checkpoint: {checkpoint.path} does not fit the network that it names "
            f"({model.name}): {printable(str(error)[:2000])}"
        ) from error
    return network, {"checkpoint": str(checkpoint.path)}


def _require_fit(model: DictConfig, checkpoint: Checkpoint) -> None:
    """Compares the shapes before the network has any memory: a checkpoint chose its size.

    Raises:
        ValueError: a weight is of another shape.
    """
    import torch

    try:
        with torch.device("meta"):
            own = build_network(model)[0].state_dict()
    except (RuntimeError, NotImplementedError, InstantiationException):
        return  # a network that computes while it is built has no form without memory
    for key, value in own.items():
        if key in checkpoint.weights and checkpoint.weights[key].shape != value.shape:
            shape = tuple(checkpoint.weights[key].shape)
            raise ValueError(f"{key} is {shape} in the file, {tuple(value.shape)} in the network")


def restore_network(
    path: str | Path, *, scan_backend: str = "auto", original: DictConfig | None = None
) -> tuple[nn.Module, Checkpoint]:
    """The trained network of a run folder or checkpoint, for inference on the CPU.

    Args:
        path: a run folder (its best checkpoint) or a .ckpt file of this project.
        scan_backend: of a network that scans; a name of `mambaseg.scan`, or `auto`.
        original: `model` and `data` of weights of the original repository (`read_original`).

    Returns:
        The network (B, C, H, W) -> (B, K, H, W) for any size, and the checkpoint.

    Raises:
        UserError: the file is missing, damaged or not of this project, or does not fit.
    """
    checkpoint, model = read_with_leaf(path, original)
    if "scan_backend" in model:
        model.scan_backend = scan_backend
    return network_with_weights(model, checkpoint)[0].eval(), checkpoint


def read_with_leaf(path: str | Path, original: DictConfig | None) -> tuple[Checkpoint, DictConfig]:
    """A checkpoint and its leaf; of a file that names no network they are what is said of it."""
    from mambaseg.inference.trained import NamelessCheckpointError, read_checkpoint

    try:
        checkpoint = read_checkpoint(path)
    except NamelessCheckpointError:
        if original is None or "model" not in original:
            raise
        return read_original(path, original.model, original.data), original.model
    leaf = _leaf_of(checkpoint)
    if original is not None and "model" in original and original.model.name != leaf.name:
        log.warning("model=%s, but %s is of %s: that is used",
                    original.model.name, checkpoint.path, leaf.name)  # fmt: skip
    return checkpoint, leaf


def read_original(path: str | Path, model: DictConfig, data: DictConfig) -> Checkpoint:
    """Weights of the original repository, which say nothing about themselves, as a checkpoint.

    Args:
        path: a state dict, at the top of the file or under `model`.
        model: the leaf of the network that they are of.
        data: `preprocessing` with what belongs to it, `size`, `class_names`, `name` and `title` of
            what it was trained for.

    Raises:
        UserError: the file cannot be read safely, or is not of that network.
    """
    from mambaseg.data.classes import check_class_names
    from mambaseg.inference.trained import Checkpoint
    from mambaseg.models.pretrained import read_weights

    path = Path(path).expanduser()
    check_class_names(list(data.class_names), "data.class_names")
    network, _ = build_network(model)
    original: Any = network.network
    if not hasattr(original, "load_original_state_dict"):
        raise UserError(f"model={model.name}: the original repository has no such network")
    try:
        original.load_original_state_dict(read_weights(path))
    except UserError as error:
        raise UserError(f"run={path} with model={model.name}: {error}") from error
    about = {
        "model": {"name": model.name, "arguments": plain(without(model, "_target_"))},
        "preprocessing": _preprocessing_of(plain(data)),
        "classes": list(data.class_names),
        "data": {"name": data.name, "title": data.title},
        "task": data.get("task", "segmentation"),
        "views": data.get("views"),
    }
    return Checkpoint(path, about, network.state_dict())


def _preprocessing_of(data: dict[str, Any]) -> dict[str, Any]:
    keys = ("intensity", "window", "spacing", "longest_side")
    own = {key: data[key] for key in keys if data.get(key)}
    return {"name": data["preprocessing"], "size": data["size"], **own}


def _leaf_of(checkpoint: Checkpoint) -> DictConfig:
    """The leaf that a checkpoint names, with its plain arguments.

    Nothing of a foreign file is instantiated: the config is one of the installed conf/model, or of
    a folder that the user names. A checkpoint may set those arguments of it that are plain values.
    """
    from mambaseg.inference.trained import plain_argument

    about, path = checkpoint.about, checkpoint.path
    configs = _model_configs()
    name = about["model"].get("name")
    if name not in configs:
        raise UserError(
            f"checkpoint: {path} was trained with model={name}, but there is no conf/model/"
            f"{name}.yaml. Pass the folder that has model/{name}.yaml: --config-dir=<folder>"
        )
    model = OmegaConf.load(configs[name])
    assert isinstance(model, DictConfig)
    if "residual" in about["model"].get("arguments", {}):
        model.residual = False  # an argument that every network may have
    leaf: Any = OmegaConf.to_container(model, resolve=False)
    for key, value in about["model"].get("arguments", {}).items():
        if key in _NOT_A_CHECKPOINTS:
            continue
        like = None if OmegaConf.is_interpolation(model, key) else leaf.get(key)
        if key not in model or not plain_argument(value, like):
            log.warning("checkpoint: %s sets the argument %s of %s to something that it must not: "
                        "left out", path, key, name)  # fmt: skip
            continue
        model[key] = value
    return model


def _model_configs() -> dict[str, Path]:
    """Name -> file, of conf/model and of the folders added with --config-dir."""
    places = [CONF]
    if GlobalHydra.instance().is_initialized():
        found = GlobalHydra.instance().config_loader().get_search_path().get_path()
        paths = [str(one.path) for one in found if str(one.path).startswith("file://")]
        places += [Path(path.removeprefix("file://")) for path in paths]
    files = [file for place in places[::-1] for file in (place / "model").glob("*.yaml")]
    return {file.stem: file for file in files}


def without(cfg: DictConfig, *keys: str) -> DictConfig:
    """A configuration without some of its keys, its interpolations resolved."""
    return OmegaConf.create({k: v for k, v in plain(cfg).items() if k not in keys})


def plain(cfg: DictConfig) -> dict[str, Any]:
    """A configuration as dicts, lists and values, its interpolations resolved."""
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]
