"""Foreign weights: checkpoints of the original repositories and ImageNet backbones.

Names are translated by two small maps: prefixes (first that fits) and parts inside a name. Nothing
in a file is ever executed: pickles are read with `weights_only=True`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mambaseg.errors import UserError
from mambaseg.storage.untrusted import printable

DERIVED = ("relative_position_index", "attn_mask")
"""Entries of original state dicts that follow from the geometry; here they are computed."""

SENSIBLE_SHARE = 0.5
"""Least share of the encoder's parameters that a pretrained file must fill."""


@dataclass(frozen=True)
class LoadReport:
    """What a pretrained file gave to a network.

    `loaded`, `mirrored` and `missing` are keys of the network and together all of them: filled as
    the file says, filled in the decoder with an encoder block's weights, left as initialised.
    `mismatched` (also part of `missing`) names both shapes. `ignored` are keys of the file that
    nothing used. `parameters` counts each list's numbers.
    """

    path: str
    loaded: tuple[str, ...]
    mirrored: tuple[str, ...]
    missing: tuple[str, ...]
    mismatched: tuple[str, ...]
    ignored: tuple[str, ...]
    parameters: dict[str, int]

    def as_dict(self) -> dict[str, object]:
        """Return plain dicts, lists, strings and integers, for a JSON record."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    def summary(self) -> str:
        """Describe the load in a few lines, for the log."""
        rows = {
            "loaded into the encoder": ("loaded", self.loaded),
            "mirrored to the decoder": ("mirrored", self.mirrored),
            "left as initialised": ("missing", self.missing),
            "ignored in the file": ("ignored", self.ignored),
        }
        lines = [f"pretrained weights from {self.path}:"]
        lines += [
            f"  {text:<25}{self.parameters[name]:>12,} parameters, {len(keys)} keys"
            for text, (name, keys) in rows.items()
        ]
        if self.mismatched:
            lines.append("  of another shape: " + "; ".join(self.mismatched))
        return "\n".join(lines)


def rename(key: str, prefixes: Mapping[str, str], parts: Mapping[str, str]) -> str:
    """Translate one key: the first prefix that fits, then every part."""
    for old, new in prefixes.items():
        if key.startswith(old):
            key = new + key.removeprefix(old)
            break
    for old, new in parts.items():
        key = key.replace(old, new)
    return key


def _without_derived(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the entries that are computed here."""
    return {key: value for key, value in weights.items() if not key.endswith(DERIVED)}


def _mismatches(network: Mapping[str, Tensor], file: Mapping[str, Tensor]) -> list[str]:
    """Describe the keys that both have in different shapes."""
    return [
        f"{key} is {tuple(file[key].shape)} in the file, {tuple(value.shape)} in the network"
        for key, value in network.items()
        if key in file and file[key].shape != value.shape
    ]


def load_renamed(
    network: nn.Module,
    state_dict: Mapping[str, Tensor],
    prefixes: Mapping[str, str],
    parts: Mapping[str, str] | None = None,
    *,
    wrapper: str = "",
) -> None:
    """Load a state dict with other key names, strictly; on an error the network stays as it was.

    Args:
        network: gets the weights.
        state_dict: original key -> tensor.
        prefixes: original prefix -> ours.
        parts: original part of a key -> ours.
        wrapper: prefix that all keys may or may not carry.

    Raises:
        UserError: a key is missing or left over, or a shape differs.
    """
    translated = {
        rename(key.removeprefix(wrapper), prefixes, parts or {}): value
        for key, value in _without_derived(state_dict).items()
    }
    own = network.state_dict()
    problems = [f"{key} is missing" for key in own if key not in translated]
    problems += [f"{key} is left over" for key in translated if key not in own]
    problems += _mismatches(own, translated)
    if problems:
        shown = "; ".join(problems[:5]) + (
            f"; and {len(problems) - 5} more" if problems[5:] else ""
        )
        raise UserError(
            f"the state dict is not one of {type(network).__name__} with these settings: {shown}. "
            f"Check the network's kind, depths, channels and number of classes."
        )
    network.load_state_dict(translated)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a `.safetensors` or `.pth` file, at the top or under `model`.

    Raises:
        UserError: the file does not exist or holds no weights that can be read safely.
    """
    path = path.expanduser()
    if not path.is_file():
        raise UserError(
            f"there is no weights file {path}: give the path of a .pth or .safetensors file."
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: object = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes make the unpickler raise nearly anything
        reason = printable(str(error).strip().partition("\n")[0][:300])
        raise UserError(
            f"{path} cannot be read as weights ({reason}). It must be a .safetensors file or a "
            f".pth that holds tensors only; if it holds other objects too and you trust its "
            f"source, save its 'model' entry alone with torch.save."
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    tensors = (
        {
            printable(key): value
            for key, value in content.items()
            if isinstance(key, str) and isinstance(value, Tensor)
        }
        if isinstance(content, Mapping)
        else {}
    )
    if not tensors:
        raise UserError(
            f"{path} holds no tensors, neither at the top nor under 'model': give a weights file."
        )
    return tensors


def load_encoder(
    network: nn.Module,
    path: Path,
    prefixes: Mapping[str, str],
    parts: Mapping[str, str],
    *,
    mirrored: Mapping[str, str],
    weights: Mapping[str, Tensor] | None = None,
) -> LoadReport:
    """Fill what fits of a U-shaped network from a backbone's weights file.

    Args:
        network: gets the weights; its encoder is what the file's own keys translate to.
        path: of the file.
        prefixes: the backbone's key prefixes -> the encoder's; other keys are ignored.
        parts: the backbone's parts of a key -> the encoder's.
        mirrored: encoder prefixes -> decoder prefixes that get the same weights.
        weights: what the file holds, where another reader is needed; None: it is read here.

    Raises:
        UserError: not a weights file, or too little of it fits; the network is unchanged then.
    """
    file = _without_derived(read_weights(path) if weights is None else weights)
    names = {key: rename(key, prefixes, parts) for key in file if key.startswith(tuple(prefixes))}
    direct = {name: file[key] for key, name in names.items()}
    reflected = {
        rename(key, mirrored, {}): value
        for key, value in direct.items()
        if key.startswith(tuple(mirrored))
    }
    own, encoder = network.state_dict(), tuple(prefixes.values())

    def fitting(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}

    loaded, copied = fitting(direct), fitting(reflected)
    report = LoadReport(
        path=str(path),
        loaded=tuple(loaded),
        mirrored=tuple(copied),
        missing=tuple(key for key in own if key not in loaded and key not in copied),
        mismatched=tuple(_mismatches(own, direct | reflected)),
        ignored=tuple(key for key in file if names.get(key) not in loaded),
        parameters={},
    )
    report.parameters.update(
        loaded=_count(loaded, report.loaded),
        mirrored=_count(copied, report.mirrored),
        missing=_count(own, report.missing),
        ignored=_count(file, report.ignored),
    )
    share = report.parameters["loaded"] / _count(own, [k for k in own if k.startswith(encoder)])
    _require_sensible(network, report, share)
    network.load_state_dict(loaded | copied, strict=False)
    return report


def _count(tensors: Mapping[str, Tensor], keys: Iterable[str]) -> int:
    """Add up the numbers in the tensors of these keys."""
    return sum(tensors[key].numel() for key in keys)


def _require_sensible(network: nn.Module, report: LoadReport, share: float) -> None:
    """Raise `UserError` when a file fills less than `SENSIBLE_SHARE` of the encoder."""
    if share < SENSIBLE_SHARE:
        name = type(network).__name__
        raise UserError(
            f"model.pretrained: {report.path} fills only {share:.0%} of the encoder of {name}, so "
            f"it does not hold weights of its backbone (not used: "
            f"{', '.join(report.ignored[:3])}, ...). Mamba-UNet and "
            f"Swin-UMamba take VMamba-T (vssmtiny_dp01_ckpt_epoch_292.pth), VM-UNet takes "
            f"VMamba-S (vssmsmall_dp03_ckpt_epoch_238.pth), Swin-UNet takes Swin-T "
            f"(swin_tiny_patch4_window7_224.pth), TransUNet takes R50+ViT-B/16 (R50+ViT-B_16.npz)."
        )
