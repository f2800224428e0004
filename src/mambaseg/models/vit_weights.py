"""The published R50+ViT-B/16 weights: their JAX names and layouts to those of `trans_unet`.

The format (google-research/vision_transformer): one `.npz` of arrays named by path; kernels lie as
(height, width, in, out) or (in, out), projections of attention as (in, heads, channels) and
(heads, channels, out); the first position embedding belongs to a class token.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseg.errors import UserError
from mambaseg.models.pretrained import read_weights

_POSITION = "Transformer/posembed_input/pos_embedding"
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
    """Read the `.npz` and translate what is known of it; unknown entries keep their name.

    The position embedding is resized to a square grid of side `grid`.

    Raises:
        UserError: the file is missing, no archive of plain arrays, or of no square grid of tokens.
    """
    arrays = read_weights(path)
    weights: dict[str, Tensor] = {}
    for name, array in arrays.items():
        if name == _POSITION:
            weights["encoder.position"] = _position(array, grid, path)
        elif f"{_ATTENTION}/query/" in name:
            weights |= _fused(name, arrays)
        elif f"{_ATTENTION}/key/" not in name and f"{_ATTENTION}/value/" not in name:
            weights |= _translated(name, array)
    return weights


def _translated(name: str, array: Tensor) -> dict[str, Tensor]:
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
        return {name: array}
    if part != "kernel":
        array = array.flatten()
    elif array.ndim == 4:
        array = array.permute(3, 2, 0, 1)
    else:
        array = array.flatten(0, -2).T  # (heads, channels, out) or (in, out)
    return {f"encoder.{target}.{_PARTS.get(part, part)}": array}


def _fused(name: str, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join query, key and value, (in, heads, channels) each, to one (3 heads channels, in)."""
    index = name.split("/")[1].removeprefix("encoderblock_")
    parts = [name.replace("/query/", f"/{which}/") for which in ("query", "key", "value")]
    if any(part not in arrays for part in parts):
        return {}
    kernel = name.endswith("/kernel")
    joined = torch.cat([arrays[p].flatten(1).T if kernel else arrays[p].flatten() for p in parts])
    return {f"encoder.blocks.{index}.attention.qkv.{'weight' if kernel else 'bias'}": joined}


def _position(array: Tensor, grid: int, path: Path) -> Tensor:
    """Resize (1, 1 + G², C) to (1, C, grid, grid), bilinear between corners as the original."""
    side = math.isqrt(max(array.shape[1] - 1, 0)) if array.ndim == 3 else 0
    if not side or array.shape[1] != 1 + side**2:
        raise UserError(
            f"model.pretrained: {path} has a position embedding of {tuple(array.shape)}, which is "
            "no class token and a square grid of tokens: give R50+ViT-B_16.npz"
        )
    square = array[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    return F.interpolate(square, (grid, grid), mode="bilinear", align_corners=True)
