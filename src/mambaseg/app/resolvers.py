"""What a configuration may ask of the machine: `${found_data:}`, `${nnunet:title}` and others.

No other part of a configuration reads the environment. Importing this module registers them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from mambaseg.app.schema import TABLE, words
from mambaseg.app.targets import import_target
from mambaseg.errors import UserError
from mambaseg.storage.files import conf_folder, home_file

# of a data module that names no `tasks`: value of data.task -> the task that trains for it
_TASKS = {"segmentation": "mambaseg.training.segmentation.SegmentationTask"}


# configs of a layout: the data set itself is named by its folder
_LAYOUTS = ("nnunet", "nifti", "folder")


def task_class(data: Any) -> Any:
    """The task that trains on the data: of those that the data module names, `data.task`."""
    tasks = getattr(import_target("data", data["_target_"]), "tasks", _TASKS)
    kind = data.get("task", "segmentation")
    if kind not in tasks:
        raise UserError(f"data.task={kind}: data={data['name']} is for {' or '.join(tasks)}")
    return get_class(tasks[kind])


def _data_root(variable: str = "ACDC_ROOT", folder: str = "data/ACDC") -> str:
    return os.environ.get(variable) or folder


def _found_data(
    variable: str = "ACDC_ROOT",
    folder: str = "data/ACDC",
    real: str = "acdc",
    computed: str = "phantom",
) -> str:
    """Also real where the variable names a folder that is not there: then that is the error."""
    local = conf_folder() / "local/data" / f"{real}.yaml"  # the user's own, which names a root
    there = os.environ.get(variable) or Path(folder).is_dir() or local.is_file()
    return real if there else computed


def weights_folder() -> Path:
    """Where published weights are kept: MAMBASEG_WEIGHTS if set, otherwise data/pretrained."""
    return Path(os.environ.get("MAMBASEG_WEIGHTS") or "data/pretrained").expanduser()


def wandb_mode() -> str:
    """W&B's mode where no config says it: online with a key, otherwise offline."""
    if given := os.environ.get("WANDB_MODE"):
        mode = {"dryrun": "offline", "run": "online"}.get(given, given)
        if mode not in (modes := TABLE["logger.wandb.mode"]):
            raise UserError(f"WANDB_MODE={given}: must be {words(modes)}")
        return mode
    netrc = Path(named) if (named := os.environ.get("NETRC")) else home_file(".netrc")
    try:
        known = netrc is not None and b"api.wandb.ai" in netrc.expanduser().read_bytes()
    except (OSError, RuntimeError):
        known = False
    return "online" if known or os.environ.get("WANDB_API_KEY") else "offline"


def data_name(data: Any) -> str:
    """The data set in names of run folders: the config's name, or its folder's for a layout.

    The name of a synthetic one says that it is.
    """
    name = str(data["name"])
    if name in _LAYOUTS:
        return _name_of(Path(str(data["root"]))).replace(" ", "-")
    real = not data.get("synthetic") or "phantom" in name or "synthetic" in name
    return name if real else f"{name}-synthetic"


def _name_of(root: Path) -> str:
    return re.sub(r"[^\w .+-]", "-", root.expanduser().absolute().name)[:100]


def _nnunet(what: str, *, _root_: DictConfig) -> Any:
    """What the data set at data.root, in nnU-Net's layout, says about itself."""
    from mambaseg.data.readers.dataset_json import read_dataset_json
    from mambaseg.data.readers.nnunet import split_of

    if OmegaConf.is_missing(_root_.data, "root"):
        raise UserError("data=nnunet: say where the data set is, data.root=<its folder>")
    root = Path(_root_.data.root).expanduser()
    if what == "title":
        return _name_of(root)
    if what == "split":
        return split_of(root)
    about = read_dataset_json(root)
    if what == "in_channels":
        return len(about.channels)
    if what == "ignore_label":
        return about.ignore
    if what == "modality":
        return list(about.channels)
    if what == "regions":  # whose numbers are of the file's own classes
        raw: Any = OmegaConf.to_container(_root_.data, resolve=False)
        own = "${nnunet:" in str(raw.get("class_names")) and not raw.get("label_map")
        return about.regions if own else None
    return len(about.class_names) if what == "num_classes" else list(about.class_names)


def _partners(*names: str, _root_: DictConfig) -> list[str]:
    """Of a method's networks, those that `model=...` is not; a network beside them is the first."""
    others = [name for name in names if name != _root_.model.name]
    return others if len(others) < len(names) else others[1:]


_RESOLVERS: dict[str, Any] = {
    "monitor": lambda *, _root_: str(task_class(_root_.data).monitor),  # chooses best.ckpt
    "data_root": _data_root,
    "acdc_root": _data_root,
    "found_data": _found_data,
    "data_name": lambda *, _root_: data_name(_root_.data),
    "wandb_mode": wandb_mode,
    "expanded": lambda path: str(Path(path).expanduser()),
    "nnunet": _nnunet,
    "partners": _partners,
}
for _name, _resolver in _RESOLVERS.items():
    OmegaConf.register_new_resolver(_name, _resolver, replace=True)
