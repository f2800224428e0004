"""What a checkpoint says about itself: plain data and weights, read without executing anything."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambaseg.data.classes import Structures, check_class_names, structures_of
from mambaseg.data.geometry import Preprocessing
from mambaseg.data.intensity import is_ct, is_window
from mambaseg.data.seen import Seen
from mambaseg.data.sizes import is_spacing
from mambaseg.errors import UserError
from mambaseg.inference.found import weights_file
from mambaseg.storage.untrusted import ForeignFileError, printable, read_json

LARGEST = 8192  # number that a checkpoint may ask for as an argument of its network
LARGEST_SIDE = 8192  # pixels of the images that it may ask for
LARGEST_STACK = 64  # neighbours of a slice that its network may see
LARGEST_PICTURE = 65536  # pixels of the longer side that it may reduce pictures to


class NamelessCheckpointError(UserError):
    """A file does not say which network it holds: this project did not make it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of this project.

    `about` has `model` (name of its config, arguments), `task`, `preprocessing`, `slicing`,
    `views`, `classes`, `data`, `split`, `supervision` and `seen`; name -> labels in `regions`,
    where it has them, and in `keep_largest`, where post-processing was chosen.
    """

    path: Path
    about: dict[str, Any]
    weights: dict[str, Tensor]  # state dict of the network as `build_network` makes it

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing that its images need.

        Raises:
            UserError: there is none like that.
        """
        try:
            return Preprocessing.restored(self.about["preprocessing"])
        except UserError as error:
            raise UserError(f"checkpoint: {self.path}: {error}") from error

    @property
    def channels(self) -> int:
        """Channels of the images that it takes."""
        given = self.about["model"].get("arguments", {}).get("in_channels", 1)
        return int(self.about["data"].get("channels", given))

    @property
    def inputs(self) -> int:
        """Channels of what its network takes: those of an image, of neighbouring slices too."""
        return self.channels * (self.preprocessing.slices if self.task == "segmentation" else 1)

    @property
    def task(self) -> str:
        """What it was trained for; only the images of a segmentation have a `preprocessing`."""
        return str(self.about.get("task", "segmentation"))

    @property
    def structures(self) -> Structures:
        """What was scored in its training, by name: the classes, or regions."""
        return structures_of(self.about["classes"], self.about.get("regions"))

    @property
    def keep_largest(self) -> Structures:
        """Of which structures the largest component is kept, as chosen in validation."""
        chosen = self.about.get("keep_largest")
        return structures_of(self.about["classes"], chosen) if chosen else {}

    @property
    def supervision(self) -> dict[str, Any] | None:
        """Which labels its training read, in numbers of patients; None: it does not say."""
        return self.about.get("supervision")

    @property
    def seen(self) -> Seen:
        """The images that trained, validated and tested its network."""
        return Seen.restored(self.about.get("seen"))

    @property
    def split_hash(self) -> str:
        """Of the split that it was trained with; empty where it does not say."""
        split = self.about.get("split")
        return str(split.get("hash", "")) if isinstance(split, dict) else ""


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a .ckpt file, the best checkpoint of a run folder, or a bundle (`inference.bundle`).

    Raises:
        UserError: there is none, it cannot be read, or it is not one of this project.
    """
    path = weights_file(Path(path).expanduser())
    try:
        content = _bundled(path) if path.suffix == ".safetensors" else _saved(path)
    except UserError:
        raise
    except Exception as error:  # torch raises a zoo of types for damaged files
        if path.suffix.lower() not in (".ckpt", ".pt", ".pth", ".safetensors"):
            raise UserError(
                f"checkpoint: {path} is none: name a run folder, a .ckpt file or a bundle"
            ) from error
        reason = printable((str(error) or type(error).__name__).splitlines()[0][:300])
        raise UserError(
            f"checkpoint: {path} cannot be read ({reason}). It is damaged or "
            "holds code instead of weights; only plain weights are loaded."
        ) from error
    about = content.get("mambaseg") if isinstance(content, dict) else None
    if not isinstance(about, dict) or "model" not in about:
        raise NamelessCheckpointError(
            f"checkpoint: {path} does not say which network it holds, so this project did not make "
            "it. For weights of the original repository say model=<network>; in Python, networks "
            "take them with load_original_state_dict()."
        )
    if field := wrong_field(about):
        raise UserError(
            f"checkpoint: {path} says something else than this project would about {field}: it is "
            "damaged or was made by somebody else. Get it again."
        )
    about, start = _chosen_network(about)
    state = content.get("state_dict")
    named = state.items() if isinstance(state, dict) else ()
    weights = {k[len(start) :]: v for k, v in named if isinstance(k, str) and k.startswith(start)}
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"checkpoint: {path} holds no weights of a network. Get it again.")
    # The file must have every byte that its tensors claim: they are copied into the network.
    stored = [weight.untyped_storage() for weight in weights.values()]
    held = sum({storage.data_ptr(): storage.nbytes() for storage in stored}.values())
    unfolded = any(w.nbytes > s.nbytes() for w, s in zip(weights.values(), stored, strict=True))
    if unfolded or held > path.stat().st_size:
        raise UserError(
            f"checkpoint: {path} claims larger weights than it holds. It is damaged or was made "
            "to fill the memory: get it again from a source that you trust."
        )
    check_class_names(about["classes"], f"checkpoint: {path}: classes")
    return Checkpoint(path, about, weights)


def _chosen_network(about: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What is said of the network that is the result, and how the names of its weights begin."""
    if not (chosen := about.get("chosen", 0)):
        return about, "network."
    return {**about, "model": about["partners"][chosen - 1]}, f"method.partners.{chosen - 1}."


def wrong_field(about: dict[str, Any]) -> str:
    """What a checkpoint says that is not of the kind or size that it must have; empty: nothing."""
    model, used, data = (_dict(about.get(key)) for key in ("model", "preprocessing", "data"))
    classes = about.get("classes")
    rules = {
        f"its size (1 to {LARGEST_SIDE} pixels)": all(
            _is_whole(side, LARGEST_SIDE) for side in _pair(used.get("size"))
        ),
        f"its longest_side (1 to {LARGEST_PICTURE} pixels)": _is_whole(
            used.get("longest_side", 1), LARGEST_PICTURE
        ),
        f"its neighbours (1 to {LARGEST_STACK} slices)": _is_whole(
            used.get("neighbours", 1), LARGEST_STACK
        ),
        "its preprocessing": _is_name(used.get("name"))
        and _is_name(used.get("intensity", "minmax"))
        and is_window(used.get("window", (0, 1)))
        and is_spacing(used.get("spacing", 1.0))
        and is_ct(used.get("ct", [[0, 1, 0, 1]])),
        "its slicing": _is_name(about.get("slicing", "stored")),
        "its augmentation": _is_name(about.get("augmentation") or "none")
        and _is_name(about.get("views") or "none"),
        "its task": _is_name(about.get("task", "segmentation")),
        "its labels": _is_supervision(about.get("supervision")),
        "its classes": isinstance(classes, (list, tuple))
        and len(classes) <= 256
        and all(isinstance(name, str) and len(name) <= 100 for name in classes),
        "its regions": _are_parts(about.get("regions"), classes),
        "its post-processing": _are_parts(about.get("keep_largest"), classes),
        "its data": isinstance(data.get("name"), str)
        and re.fullmatch(r"[\w .+-]{1,200}", data["name"]) is not None
        and isinstance(data.get("title"), str)
        and len(data["title"]) <= 1000
        and _is_whole(data.get("channels", 1), LARGEST),
    }
    partners, chosen = about.get("partners", []), about.get("chosen", 0)
    rules["its networks"] = (
        isinstance(partners, list)
        and all(map(_is_network, (model, *partners)))
        and (chosen == 0 or (_is_whole(chosen, 16) and chosen <= len(partners)))
    )
    wrong = [field for field, right in rules.items() if not right]
    try:
        Seen.restored(about.get("seen"))
    except ValueError:
        wrong.append("the images that it has seen")
    return wrong[0] if wrong else ""


def _is_supervision(labels: Any) -> bool:
    """Whether these are labelled patients of some, and the kind of their labels, or nothing."""
    if labels is None:
        return True
    counts = [_dict(labels).get(key) for key in ("labelled", "patients")]
    return all(type(count) is int and count >= 0 for count in counts) and _is_name(
        labels.get("labels")
    )


def _are_parts(parts: Any, classes: Any) -> bool:
    """Whether these are labels of classes by name, or nothing."""
    if not parts:
        return parts in (None, {})
    try:
        structures_of(classes, parts)
    except (UserError, TypeError, LookupError):
        return False
    return len(parts) <= 257 and all(isinstance(name, str) and len(name) <= 100 for name in parts)


def _is_network(model: Any) -> bool:
    """Whether a network has a name and arguments; whether there is one is known elsewhere."""
    name, given = _dict(model).get("name"), _dict(model).get("arguments", {})
    named = isinstance(name, str) and len(name) <= 64
    named = named and isinstance(_dict(model).get("config", ""), str)
    return named and isinstance(given, dict) and all(map(_is_name, given))


def _pair(value: Any) -> Sequence[Any]:
    """Rows and columns of what may be one number for both."""
    return value if isinstance(value, (list, tuple)) and len(value) == 2 else (value,)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_whole(value: Any, highest: int) -> bool:
    return type(value) is int and 0 < value <= highest


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"[A-Za-z0-9_.+-]{1,64}", value))


def plain_argument(value: Any, like: Any) -> bool:
    """Whether a value of a checkpoint may replace a network's argument: numbers and plain words.

    Keys do not begin with `_`, so that nothing can ask for an object (`_target_`); words hold no
    `$`, so that nothing is interpolated. `like` is what the file in conf/model says; a list stays
    a list.
    """
    if like is not None and isinstance(value, (list, tuple)) != isinstance(like, (list, tuple)):
        return False
    left, count = [(value, 0)], 0
    while left:
        one, depth = left.pop()
        count += 1
        if depth > 4 or count > 256:
            return False
        if isinstance(one, dict):
            if not all(_is_name(key) and not key.startswith("_") for key in one):
                return False
            left += [(each, depth + 1) for each in one.values()]
        elif isinstance(one, (list, tuple)):
            left += [(each, depth + 1) for each in one]
        elif isinstance(one, (int, float)):
            if not abs(one) <= LARGEST:  # nor nan
                return False
        elif one is not None and not _is_name(one):
            return False
    return True


def _saved(path: Path) -> Any:
    """What torch.save wrote."""
    if _is_compressed(path):
        raise ValueError("it is compressed, which torch.save does not do")
    return torch.load(path, map_location="cpu", weights_only=True)


def _bundled(path: Path) -> dict[str, Any]:
    """The weights of a bundle and what the config.json beside them says, as in a .ckpt file."""
    from safetensors.torch import load_file

    try:
        told = read_json(path.with_name("config.json"))
    except FileNotFoundError:
        told = None
    except ForeignFileError as error:
        config = path.with_name("config.json")
        raise UserError(
            f"checkpoint: {config} cannot be read ({error}): copy the bundle again"
        ) from error
    about = told.get("mambaseg") if isinstance(told, dict) else None
    weights = {f"network.{key}": weight for key, weight in load_file(path).items()}
    return {"mambaseg": about, "state_dict": weights}


def _is_compressed(path: Path) -> bool:
    """Whether a part of the file unpacks to more than it has; torch.save compresses nothing."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return any(info.compress_type != zipfile.ZIP_STORED for info in file.infolist())
