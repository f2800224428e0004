"""The published R50+ViT-B/16 weights: their JAX names and layouts to those of `trans_unet`.

The format (google-research/vision_transformer): one `.npz` of arrays named by path; kernels lie as
(height, width, in, out) or (in, out), projections of attention as (in, heads, channels) and
(heads, channels, out); the first position embedding belongs to a class token.
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mambaseg.errors import UserError
from mambaseg.storage.untrusted import printable

UNPACKED = 1 << 30  # bytes; the published file has half of it
_PARTS = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_ATTENTION = "MultiHeadDotProductAttention_1"
_BLOCK = {
    "LayerNorm_0": "norm1",
    "LayerNorm_2": "norm2",
    "MlpBlock_3/Dense_0": "mlp.0",
    "MlpBlock_3/Dense_1": "mlp.3",
    f"{_ATTENTION}/out": "attention.out",
}
_TOP = {
    "conv_root": "resnet.conv_root",
    "gn_root": "resnet.gn_root",
    "embedding": "embedding",
    "Transformer/encoder_norm": "norm",
}


def read_hybrid_vit(path: Path, *, grid: int) -> dict[str, Tensor]:
    """Read the file and translate what is known of it; unknown entries keep their name.

    Args:
        path: of the `.npz`.
        grid: side of the square grid that the position embedding is resized to.

    Raises:
        UserError: the file is missing, or no archive of plain arrays.
    """
    path = path.expanduser()
    if not path.is_file():
        raise UserError(f"there is no weights file {path}: give the path of R50+ViT-B_16.npz")
    try:
        with zipfile.ZipFile(path) as packed:
            if sum(info.file_size for info in packed.infolist()) > UNPACKED:
                raise ValueError(f"it unpacks to more than {UNPACKED >> 20} MiB")
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # foreign bytes make zipfile and NumPy raise nearly anything
        raise UserError(
            f"{path} cannot be read as weights ({printable(str(error)[:300])}): it must be the "
            ".npz of R50+ViT-B/16, an archive of plain arrays"
        ) from error
    weights: dict[str, Tensor] = {}
    for name, array in arrays.items():
        if f"{_ATTENTION}/query/" in name:
            weights |= _fused(name, arrays)
        elif f"{_ATTENTION}/key/" not in name and f"{_ATTENTION}/value/" not in name:
            weights |= _translated(name, array, grid)
    return weights


def _translated(name: str, array: NDArray[np.generic], grid: int) -> dict[str, Tensor]:
    if name == "Transformer/posembed_input/pos_embedding":
        return {"encoder.position": _position(array, grid)}
    stem, _, part = name.rpartition("/")
    unit = re.fullmatch(r"block(\d+)/unit(\d+)/(\w+)", stem)
    block = re.fullmatch(r"Transformer/encoderblock_(\d+)/(.+)", stem)
    if unit:
        target = f"resnet.blocks.{int(unit[1]) - 1}.{int(unit[2]) - 1}.{unit[3]}"
    elif block and block[2] in _BLOCK:
        target = f"blocks.{block[1]}.{_BLOCK[block[2]]}"
    elif stem in _TOP:
        target = _TOP[stem]
    else:
        return {name: torch.from_numpy(array)}
    return {f"encoder.{target}.{_PARTS.get(part, part)}": _laid_out(array, part)}


def _laid_out(array: NDArray[np.generic], part: str) -> Tensor:
    """Bring an array into torch's order of axes."""
    tensor = torch.from_numpy(np.asarray(array))
    if part != "kernel":
        return tensor.flatten()
    if tensor.ndim == 4:
        return tensor.permute(3, 2, 0, 1)
    return tensor.flatten(0, -2).T  # (heads, channels, out) or (in, out)


def _fused(name: str, arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, Tensor]:
    """Join query, key and value, (in, heads, channels) each, to one (3 heads channels, in)."""
    index = name.split("/")[1].removeprefix("encoderblock_")
    parts = [name.replace("/query/", f"/{which}/") for which in ("query", "key", "value")]
    if any(part not in arrays for part in parts):
        return {}
    joined = [torch.from_numpy(arrays[part]) for part in parts]
    if name.endswith("/kernel"):
        fused = torch.cat([kernel.flatten(1).T for kernel in joined])
        return {f"encoder.blocks.{index}.attention.qkv.weight": fused}
    return {f"encoder.blocks.{index}.attention.qkv.bias": torch.cat([b.flatten() for b in joined])}


def _position(array: NDArray[np.generic], grid: int) -> Tensor:
    """Resize (1, 1 + G², C) to (1, C, grid, grid), bilinear between corners as the original."""
    tokens = torch.from_numpy(np.asarray(array))[:, 1:]
    side = round(tokens.shape[1] ** 0.5)
    square = tokens.transpose(1, 2).unflatten(2, (side, -1))
    return F.interpolate(square, (grid, grid), mode="bilinear", align_corners=True)
