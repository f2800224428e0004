"""Foreign weights: checkpoints of the original repositories and ImageNet backbones.

A network translates names by two small maps: prefixes (the first that fits) and parts inside a
name. Nothing in a file is ever executed: pickles are read with `weights_only=True`.
"""

import zipfile
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from mambaseg.errors import UserError
from mambaseg.storage.untrusted import printable

Weights: TypeAlias = Mapping[str, Tensor]

DERIVED = ("relative_position_index", "attn_mask")
"""Entries of original state dicts that follow from the geometry; here they are computed."""

SENSIBLE_SHARE = 0.5
"""Least share of the encoder's parameters that a pretrained file must fill."""

COLOURS = 3  # channels of the images of ImageNet

ENTRIES = ("model", "state_dict")  # of a file, in which its weights may lie

UNPACKED = 1 << 30  # bytes that an .npz may unpack to; R50+ViT-B/16 has half of it


@dataclass(frozen=True)
class LoadReport:
    """What a pretrained file gave to a network.

    `loaded`, `mirrored` (an encoder block's, in the decoder) and `missing` are keys of the network
    and together all of them; `mismatched`, a part of `missing`, names both shapes. `ignored` are
    keys of the file that nothing used. `unfilled`, a part of `missing`, are those of the encoder
    that such a file usually has. `parameters` counts each list's numbers.
    """

    path: str
    loaded: tuple[str, ...]
    mirrored: tuple[str, ...]
    missing: tuple[str, ...]
    mismatched: tuple[str, ...]
    ignored: tuple[str, ...]
    parameters: dict[str, int]
    unfilled: tuple[str, ...] = ()

    def summary(self) -> str:
        """Describe the load in a few lines, for the log."""
        lines = [f"pretrained weights from {self.path}:"]
        for name, text in {
            "loaded": "loaded into the encoder",
            "mirrored": "mirrored to the decoder",
            "missing": "left as initialised",
            "ignored": "ignored in the file",
        }.items():
            count, keys = self.parameters[name], len(getattr(self, name))
            lines.append(f"  {text:<25}{count:>12,} parameters, {keys} keys")
        if self.mismatched:
            lines.append("  of another shape: " + "; ".join(self.mismatched))
        if self.unfilled:
            more = f" and {len(self.unfilled) - 5} more" if self.unfilled[5:] else ""
            lines.append(f"  of the encoder, not filled: {', '.join(self.unfilled[:5])}{more}")
        return "\n".join(lines)


class Original(nn.Module):
    """A network that takes the weights of its original repository's network."""

    original_parts: ClassVar[dict[str, str]] = {}
    """Original part of a key -> ours."""
    original_wrapper: ClassVar[str] = ""
    """Prefix that all keys may or may not carry: of the original's wrapper class."""
    original_unused: tuple[str, ...] = ()
    """Parts of the keys that are left out: no such module here, or named twice there."""

    @abstractmethod
    def original_names(self) -> dict[str, str]:
        """Map the original network's key prefixes to ours."""

    def own_name(self, key: str) -> str | None:
        """Translate a key of the original network; None: it is left out here."""
        if any(part in key for part in self.original_unused):
            return None
        key = key.removeprefix(self.original_wrapper)
        return _renamed(key, self.original_names(), self.original_parts)

    def load_original_state_dict(self, state_dict: Weights) -> None:
        """Load the original network's weights, strictly; on an error the network stays as it was.

        Raises:
            UserError: a key is missing or left over, or a shape differs.
        """
        translated = {
            name: value
            for key, value in _without_derived(state_dict).items()
            if (name := self.own_name(key)) is not None
        }
        own = self.state_dict()
        problems = [f"{key} is missing" for key in own if key not in translated]
        problems += [f"{key} is left over" for key in translated if key not in own]
        problems += _mismatches(own, translated)
        if problems:
            more = f"; and {len(problems) - 5} more" if problems[5:] else ""
            raise UserError(
                f"the state dict is not one of {type(self).__name__} with these settings: "
                f"{'; '.join(problems[:5])}{more}. Check the network's kind, depths, channels and "
                "number of classes."
            )
        self.load_state_dict(translated)


class Pretrained(nn.Module):
    """A network whose encoder takes an ImageNet backbone's weights."""

    backbone: ClassVar[str] = "VMamba-T (vssmtiny_dp01_ckpt_epoch_292.pth)"
    """Which weights, for messages."""
    original_parts: ClassVar[dict[str, str]] = {}
    """The backbone's part of a key -> ours."""
    fresh_parts: ClassVar[tuple[str, ...]] = ("num_batches_tracked",)
    """Parts of the encoder's keys that the backbone may lack."""

    @abstractmethod
    def backbone_names(self) -> dict[str, str]:
        """Map the backbone's key prefixes to the encoder's; other keys are ignored."""

    def mirrored_names(self) -> dict[str, str]:
        """Map encoder prefixes to decoder prefixes that get the same weights."""
        return {}

    def read_backbone(self, path: Path) -> dict[str, Tensor]:
        """Read a file of weights."""
        return read_weights(path)

    def load_pretrained_encoder(self, path: str | Path, *, mirror: bool = True) -> LoadReport:
        """Fill what fits of the encoder from a backbone's weights.

        Args:
            path: weights with the backbone's own key names, as `.pth` or `.safetensors` at the top
                or under `model`; TransUNet takes the published `.npz`.
            mirror: also give each encoder block's weights to the decoder block of the same width
                and index, where the original's code does.

        Raises:
            UserError: not a weights file, or less than half of the encoder's parameters matched;
                the network is unchanged then.
        """
        prefixes, mirrored = self.backbone_names(), self.mirrored_names() if mirror else {}
        file = _without_derived(self.read_backbone(Path(path)))
        names = _names(file, prefixes, self.original_parts)
        own = self.state_dict()
        direct = {name: _for_channels(file[key], own.get(name)) for key, name in names.items()}
        reflected = {name: direct[key] for key, name in _names(direct, mirrored).items()}
        loaded, copied = (
            {k: v for k, v in weights.items() if k in own and _fits(own[k], v)}
            for weights in (direct, reflected)
        )
        encoder = {k: v for k, v in own.items() if k.startswith(tuple(prefixes.values()))}
        share = _count(loaded.values()) / _count(encoder.values())
        if share < SENSIBLE_SHARE:
            ignored = [key for key in file if names.get(key) not in loaded]
            empty = [key for key in encoder if key not in loaded]
            what = f"not used: {', '.join(ignored[:3])}, ..."
            if not ignored:
                what = f"not filled: {', '.join(empty[:3])}, ...; do model.depths fit the file?"
            raise UserError(
                f"model.pretrained: {path} fills only {share:.0%} of the encoder of "
                f"{type(self).__name__}, which takes {self.backbone} ({what})"
            )
        self.load_state_dict(loaded | copied, strict=False)
        left = {key: value for key, value in file.items() if names.get(key) not in loaded}
        report = _report(own, loaded, left, _mismatches(own, direct | reflected), copied, str(path))
        known = (k for k in encoder if not any(part in k for part in self.fresh_parts))
        return replace(report, unfilled=tuple(k for k in known if k not in loaded))


def load_matching(network: nn.Module, weights: Weights, *, fresh: Iterable[str] = ()) -> LoadReport:
    """Fill what fits of a network, by name and shape, from the weights of another one like it.

    Keys in `fresh` stay as they are initialised.
    """
    own, left = network.state_dict(), set(fresh)
    fit = {
        key: value
        for key, value in weights.items()
        if key in own and key not in left and _fits(own[key], value)
    }
    network.load_state_dict(fit, strict=False)
    ignored = {key: value for key, value in weights.items() if key not in fit}
    return _report(own, fit, ignored, _mismatches(own, weights))


def _report(
    own: Weights,
    loaded: Weights,
    ignored: Weights,
    mismatched: Iterable[str],
    mirrored: Weights = MappingProxyType({}),
    path: str = "",
) -> LoadReport:
    """What became of the weights of a network (`own`) and of a file."""
    missing = {key: own[key] for key in own if key not in loaded and key not in mirrored}
    lists = {"loaded": loaded, "mirrored": mirrored, "missing": missing, "ignored": ignored}
    return LoadReport(
        path=path,
        mismatched=tuple(mismatched),
        parameters={name: _count(weights.values()) for name, weights in lists.items()},
        **{name: tuple(weights) for name, weights in lists.items()},
    )


def _for_channels(weight: Tensor, own: Tensor | None) -> Tensor:
    """Filters of three colours for images of more or fewer channels; other weights as they are.

    The colours are taken in turn and scaled, so that an image whose channels are all the same
    gives about what it gave; one channel gets their sum.
    """
    if own is None or weight.ndim != 4 or own.ndim != 4 or weight.shape[1] != COLOURS:
        return weight
    channels = own.shape[1]
    if channels == COLOURS or own[:, :1].shape != weight[:, :1].shape:
        return weight
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight[:, torch.arange(channels) % COLOURS] * (COLOURS / channels)


def _renamed(key: str, prefixes: Mapping[str, str], parts: Mapping[str, str]) -> str:
    """Translate one key: the first prefix that fits, then every part."""
    start = next((old for old in prefixes if key.startswith(old)), "")
    key = prefixes.get(start, "") + key.removeprefix(start)
    for old, new in parts.items():
        key = key.replace(old, new)
    return key


def _names(
    keys: Iterable[str], prefixes: Mapping[str, str], parts: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Key -> ours, of those that have one of the prefixes."""
    known = (key for key in keys if key.startswith(tuple(prefixes)))
    return {key: _renamed(key, prefixes, parts or {}) for key in known}


def _without_derived(weights: Weights) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if not key.endswith(DERIVED)}


def _mismatches(network: Weights, file: Weights) -> list[str]:
    """Describe the keys that both have in different shapes."""
    return [
        f"{key} is {_kind(file[key])} in the file, {_kind(value)} in the network"
        for key, value in network.items()
        if key in file and not _fits(value, file[key])
    ]


def _fits(own: Tensor, value: Tensor) -> bool:
    """Whether a tensor can take another's place: the same shape, and numbers of the same kind."""
    both = (own, value)
    kinds = {(one.is_floating_point(), one.is_complex()) for one in both}
    return own.shape == value.shape and len(kinds) == 1


def _kind(tensor: Tensor) -> str:
    """Its shape, and its data type where that is not float32."""
    name = str(tensor.dtype).removeprefix("torch.")
    return str(tuple(tensor.shape)) + ("" if name == "float32" else f" {name}")


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a `.safetensors`, `.npz` or `.pth` file, at the top or in an entry.

    That is `model`, or `state_dict`, as Lightning saves them: there, what all names begin with is
    the network's in Lightning's module. `module.` of `nn.DataParallel` goes anywhere.

    Raises:
        UserError: the file does not exist or holds no weights that can be read safely.
    """
    path = path.expanduser()
    if not path.is_file():
        raise UserError(
            f"there is no weights file {path}: give the path of a .pth, .safetensors or .npz file."
        )
    try:
        content = _content(path)
    except Exception as error:  # foreign bytes make the readers raise nearly anything
        reason = printable(str(error).strip().partition("\n")[0][:300])
        raise UserError(
            f"{path} cannot be read as weights ({reason}). It must be a .safetensors file, an "
            ".npz of plain arrays, or a .pth that holds tensors only; if it holds other objects "
            "too and you trust its source, save its 'model' entry alone with torch.save."
        ) from error
    within = content if isinstance(content, Mapping) else {}
    entry = next((key for key in ENTRIES if isinstance(within.get(key), Mapping)), "")
    entries = within.get(entry, within).items()
    named = ((key, value) for key, value in entries if isinstance(key, str))
    tensors = {printable(key): value for key, value in named if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(
            f"{path} holds no tensors, neither at the top nor under {' or '.join(ENTRIES)}: give a "
            "weights file."
        )
    first = {key.partition(".")[0] for key in tensors}
    if first == {"module"} or (entry == "state_dict" and len(first) == 1):
        return {key.removeprefix(f"{min(first)}."): value for key, value in tensors.items()}
    return tensors


def _content(path: Path) -> object:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as packed:
            if sum(info.file_size for info in packed.infolist()) > UNPACKED:
                raise ValueError(f"it unpacks to more than {UNPACKED >> 20} MiB")
        with np.load(path, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    return torch.load(path, map_location="cpu", weights_only=True)
