"""Networks from the configs of conf/model: fresh, or with the weights of a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from mambaseg.app.check import check_imports, plain_tree
from mambaseg.app.entry import CONF
from mambaseg.app.own import config_dirs, config_remedy, is_config_name, search_path
from mambaseg.app.resolvers import weights_folder
from mambaseg.app.schema import EXTRAS
from mambaseg.app.targets import arguments_of, import_target
from mambaseg.errors import UserError
from mambaseg.storage.run_folder import RunFolder
from mambaseg.storage.untrusted import printable, with_values

if TYPE_CHECKING:
    from mambaseg.inference.trained import Checkpoint
    from mambaseg.models import AnySize

# what a checkpoint says of a network that is not taken from it
_NOT_A_CHECKPOINTS = ("name", "_target_", "pretrained", "mirror_encoder", "scan_backend")
log = logging.getLogger(__name__)


def plain(cfg: Any) -> dict[str, Any]:
    """A configuration as dicts, lists and values, its interpolations resolved."""
    if OmegaConf.is_config(cfg):
        return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]
    return dict(cfg)


def escaped(value: Any) -> Any:
    """Plain data as a configuration in which nothing is interpolated."""
    return with_values(
        value, lambda one: one.replace("${", "\\${") if isinstance(one, str) else one
    )


def bare(value: Any) -> Any:
    """A configuration without the names of what makes its objects."""
    if isinstance(value, Mapping):
        return {key: bare(one) for key, one in value.items() if key != "_target_"}
    return [bare(one) for one in value] if isinstance(value, list) else value


def made(config: Any, *left_out: str, **more: Any) -> Any:
    """What the `_target_` of a configuration makes of the other keys and of `more`.

    A value that it refuses with a ValueError is a UserError.
    """
    kept = {key: value for key, value in plain(config).items() if key not in (*left_out, *more)}
    try:
        return instantiate(escaped(kept), **more, _convert_="all")
    except InstantiationException as error:
        if not isinstance(reason := error.__cause__, ValueError):
            raise
        raise UserError(f"{kept.get('_target_')}: {reason}") from error


def build_network(model: Any) -> tuple[AnySize, dict[str, Any] | None]:
    """A network (B, C, H, W) -> (B, K, H, W) of any size, and what was loaded (None: nothing).

    `model` is a config of conf/model with its interpolations resolvable or resolved.
    """
    from mambaseg.models import AnySize, channels_last, is_faster_channels_last

    model = plain(model)
    network = made(model, *EXTRAS["model"])
    report = None
    if path := model.get("pretrained"):
        how = {"mirror": model["mirror_encoder"]} if "mirror_encoder" in model else {}
        loaded = network.load_pretrained_encoder(Path(str(path)).expanduser(), **how)
        report = asdict(loaded)
        partly = loaded.mismatched or loaded.unfilled
        log.log(logging.WARNING if partly else logging.INFO, loaded.summary())
    multiple = model.get("size_multiple") or getattr(network, "size_multiple", 1)
    if is_faster_channels_last(network):
        channels_last(network)
    residual, parts = bool(model.get("residual")), model.get("encoder_parts")
    return AnySize(network, multiple, residual=residual, encoder_parts=parts), report


def image_channels(data: Any) -> int:
    """Channels of the images as networks get them, those of neighbouring slices too."""
    return int(data.in_channels * (2 * (data.get("neighbours") or 0) + 1))


def require_channels(cfg: DictConfig) -> None:
    """Refuses networks for images of other channels than the data have; `UserError`.

    Those of other projects may make their channels of the image's, so they are not asked.
    """
    for model in (cfg.model, *((cfg.get("method") or {}).get("networks") or [])):
        ours = str(model.get("_target_")).startswith(("mambaseg.", "monai."))
        if ours and model.get("in_channels") not in (None, image_channels(cfg.data)):
            raise UserError(
                f"model.in_channels={model.in_channels} (model={model.name}): the images of "
                f"data={cfg.data.name} have {image_channels(cfg.data)} channels. Leave "
                "model.in_channels out, or set it to ${data.in_channels} in a config of your own"
            )


def settle_weights(model: Any) -> None:
    """Replaces `pretrained: auto` by the path of the published file, fetched if it is not there."""
    if model.get("pretrained") != "auto":
        return
    from mambaseg.app.terminal import download
    from mambaseg.models.published import fetched, published_weights

    target = import_target("model", model["_target_"])
    entry = published_weights(getattr(target, "backbone", "none"))
    with download(entry["file"]) as report:
        model["pretrained"] = str(fetched(entry, weights_folder(), report))


def network_with_weights(
    model: Any, checkpoint: Checkpoint | None
) -> tuple[AnySize, dict[str, Any] | None]:
    """Like `build_network`; with a checkpoint, its weights instead of pretrained ones."""
    if checkpoint is None:
        return build_network(model)
    try:
        _require_shapes(model, checkpoint.weights)
        network, _ = build_network(model)
        network.load_state_dict(checkpoint.weights)
    except Exception as error:  # arguments that no network can have raise nearly anything
        raise UserError(
            f"checkpoint: {checkpoint.path} does not fit the network that it names "
            f"({model['name']}): {printable(str(error)[:2000])}"
        ) from error
    return network, {"checkpoint": str(checkpoint.path)}


def shapes_without_memory(model: Any) -> dict[str, tuple[int, ...]] | None:
    """Shapes of a network's weights by key; None: it computes while it is built."""
    import torch

    try:
        with torch.device("meta"):
            return shapes(build_network(model)[0])
    except (RuntimeError, NotImplementedError, InstantiationException, UserError):
        return None


def shapes(network: AnySize) -> dict[str, tuple[int, ...]]:
    """Shapes of a network's weights by key."""
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def _require_shapes(model: Any, weights: Mapping[str, Any]) -> None:
    """Compares the shapes before the network has any memory: a checkpoint chose its size."""
    for key, network in (shapes_without_memory(model) or {}).items():
        if key in weights and (file := tuple(weights[key].shape)) != network:
            raise ValueError(f"{key} is {file} in the file, {network} in the network")


def restore_network(
    path: str | Path, *, scan_backend: str = "auto", original: DictConfig | None = None
) -> tuple[AnySize, Checkpoint]:
    """The trained network of a run folder (its best checkpoint) or .ckpt file, on the CPU.

    It is (B, C, H, W) -> (B, K, H, W) for any size. `original` has `model` and `data` of a file
    with weights of the original repository.

    Raises:
        UserError: no backend has the name `scan_backend`, whether the network scans or not; the
            file is none that can be used.
    """
    from mambaseg.scan.dispatch import check_name

    check_name(scan_backend)
    checkpoint, model = read_with_config(path, original)
    if "scan_backend" in model:
        model.scan_backend = scan_backend
    return network_with_weights(model, checkpoint)[0].eval(), checkpoint


def read_with_config(
    path: str | Path, original: DictConfig | None
) -> tuple[Checkpoint, DictConfig]:
    """A checkpoint and the config of its network; `original` is as `restore_network` has it."""
    from mambaseg.inference.trained import NamelessCheckpointError, read_checkpoint

    given = original.model if original is not None and "model" in original else None
    try:
        checkpoint = read_checkpoint(path)
    except NamelessCheckpointError:
        if original is None or given is None:
            raise
        return _original(Path(path).expanduser(), given, plain(original.data)), given
    model = _config_of(checkpoint)
    if given is not None and given.name != model.name:
        log.warning("model=%s, but %s is of %s: that is used",
                    given.name, checkpoint.path, model.name)  # fmt: skip
    return checkpoint, model


def _original(path: Path, model: DictConfig, data: dict[str, Any]) -> Checkpoint:
    """Weights of the original repository (a state dict, at the top or under `model`)."""
    from mambaseg.data.classes import check_class_names
    from mambaseg.inference.trained import Checkpoint
    from mambaseg.models.pretrained import read_weights

    check_class_names(data["class_names"], "data.class_names")
    network, _ = build_network(model)
    original: Any = network.network
    if not hasattr(original, "load_original_state_dict"):
        raise UserError(
            f"model={model.name}: weights of the original repository cannot be read for this "
            "network. Give a checkpoint that this project has trained"
        )
    try:
        original.load_original_state_dict(read_weights(path))
    except UserError as error:
        raise UserError(f"run={path} with model={model.name}: {error}") from error
    arguments = {key: value for key, value in plain(model).items() if key != "_target_"}
    keys = ("intensity", "window", "spacing", "longest_side", "ct")
    given = {key: data[key] for key in keys if data.get(key)}
    about = {
        "model": {"name": model.name, "arguments": arguments},
        "preprocessing": {"name": data["preprocessing"], "size": data["size"], **given},
        "classes": data["class_names"],
        "data": {"name": data["name"], "title": data["title"]},
        "task": data.get("task", "segmentation"),
        "views": data.get("views"),
        "original": True,
    }
    return Checkpoint(path, about, network.state_dict())


def _config_of(checkpoint: Checkpoint) -> DictConfig:
    """The config that a checkpoint names, with its plain arguments.

    It is one of the installed conf/model or of a folder that the user names, so nothing of a
    foreign file is instantiated.
    """
    about = checkpoint.about["model"]
    name = str(about.get("config") or about["name"])
    model = _composed(name)
    if model is None:
        remedy = config_remedy("model", name, RunFolder(checkpoint.path.resolve().parent.parent))
        raise UserError(
            f"checkpoint: {checkpoint.path} was trained with model={name}, but there is no "
            f"conf/model/{name}.yaml. {remedy}"
        )
    given, takes = about.get("arguments", {}), _named_arguments(model)
    left_out = _fill(model, given, keep=_NOT_A_CHECKPOINTS, takes=takes)
    for key in left_out:
        known = key.partition(".")[0] in {*plain_tree(model), *takes}
        why = "to something that it must not" if known else "which it does not have"
        log.warning("checkpoint: %s sets the argument %s of %s, %s: left out",
                    checkpoint.path, printable(key), name, why)  # fmt: skip
    check_imports("model", plain_tree(model))
    return model


def composed_model(name: str) -> DictConfig:
    """A config of conf/model by its name; `UserError` where there is none."""
    model = _composed(name)
    if model is None:
        raise UserError(f"method.partner={name}: there is no conf/model/{name}.yaml")
    return model


def _composed(name: str) -> DictConfig | None:
    """A config of conf/model, or of model/ in a folder of --config-dir; None: there is none."""
    if not is_config_name(name):
        return None
    dirs = config_dirs()
    places = [place / "model" / f"{name}.yaml" for place in (CONF, *dirs)]
    files = [file for file in places if file.is_file()]
    if not files:
        return None
    model: Any = OmegaConf.load(files[0])
    if "defaults" not in model:  # nothing to compose, which takes 0.1 s
        return model
    loader = ConfigLoaderImpl(search_path(dirs))  # beside that of a running command
    cfg = loader.load_configuration(None, [f"+model={name}"], RunMode.RUN)
    cfg.model._set_parent(None)
    return cfg.model


def _named_arguments(model: DictConfig) -> set[str]:
    """What may stand in a network's config besides the keys that are there; `**kwargs` do not."""
    return {*arguments_of(import_target("model", model["_target_"]))[0], *EXTRAS["model"]}


def require_lasting(model: DictConfig, config: str) -> None:
    """Refuses a network that later commands could not make from its config and its checkpoint."""
    own, given = _composed(config), plain(model)
    if own is None:
        return
    lost = _fill(own, bare(given), keep=_NOT_A_CHECKPOINTS, takes=_named_arguments(own))
    if lost := [*lost, *_unlike(plain_tree(own), given)]:
        raise UserError(
            f"model.{lost[0]}: a checkpoint cannot hold this change of conf/model/{config}.yaml, "
            "so later commands would build another network. Copy the file to a config of your own, "
            "conf/model/mine.yaml, and change it there (docs/own-project.md)"
        )


def _unlike(own: Mapping[str, Any], given: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """Keys of a network's config that are gone, and targets that are others."""
    for key, value in own.items():
        other = given.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            yield from _unlike(value, other, f"{at}{key}.")
        elif (key == "_target_" and value != other) or key not in (*given, *_NOT_A_CHECKPOINTS):
            yield f"{at}{key}"


def _fill(
    model: DictConfig,
    arguments: Mapping[str, Any],
    at: str = "",
    *,
    keep: Sequence[str] = (),
    takes: Collection[str] = (),
) -> list[str]:
    """Puts a checkpoint's plain arguments into the config of its network, except those to `keep`.

    They replace what the config has, or are arguments that the network `takes`. What the config
    makes by a `_target_` of its own stays such an object, with the checkpoint's arguments. Returns
    the keys of what must not be there.
    """
    from mambaseg.inference.trained import plain_argument

    ours: Any = plain_tree(model)
    left_out = []
    for key, value in arguments.items():
        free = key == "size_multiple" or OmegaConf.is_interpolation(model, key)
        like = None if free else ours.get(key)  # size_multiple: one number or two
        if key in keep or (key in ours and value == bare(like)):
            continue
        if isinstance(like, dict) and isinstance(value, dict) and bare(like) != like:
            left_out += _fill(model[key], value, f"{at}{key}.")
        elif (key in ours or key in takes) and plain_argument(value, like):
            model[key] = value
        else:
            left_out.append(f"{at}{key}")
    return left_out
