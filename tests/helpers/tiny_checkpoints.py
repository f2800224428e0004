"""Checkpoints of untrained tiny networks, as a training writes them."""

from pathlib import Path

import torch

from mambaseg.data.geometry import Preprocessing
from mambaseg.models import AnySize, UNet

CLASSES = ["background", "RV", "MYO", "LV"]
WIDTHS = [2, 4]


def tiny_unet(seed: int = 0, *, channels: int = 1, classes: int = 4) -> AnySize:
    """A network whose labels vary over an image although it has learnt nothing."""
    torch.manual_seed(seed)
    unet = UNet(channels, classes, widths=WIDTHS, dropout=(0.0, 0.0))
    with torch.no_grad():
        for module in unet.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        images = torch.rand(4, channels, 32, 32)
        unet(images)  # the norms learn what images look like
        unet.eval().head.weight.mul_(20)
        unet.head.bias -= unet(images).mean((0, 2, 3))
    return AnySize(unet, unet.size_multiple).eval()


def write_checkpoint(
    path: Path,
    *,
    seed: int = 0,
    classes=CLASSES,
    preprocessing: str | Preprocessing = "paper",
    size: int = 32,
    channels: int = 1,
    **about,
) -> Path:
    """A .ckpt file of `tiny_unet`; `about` replaces what it says about itself."""
    network = tiny_unet(seed, channels=channels, classes=len(classes))
    if isinstance(preprocessing, str):
        preprocessing = Preprocessing(preprocessing, size)
    arguments = {
        "in_channels": channels, "num_classes": len(classes),
        "widths": WIDTHS, "dropout": [0.0, 0.0],
    }  # fmt: skip
    description = {
        "model": {"name": "unet", "arguments": arguments},
        "preprocessing": preprocessing.describe(),
        "augmentation": "paper",
        "classes": list(classes),
        "data": {"name": "phantom", "title": "synthetic phantom, not ACDC"},
        **about,
    }
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    torch.save({"mambaseg": description, "state_dict": state, "global_step": 1}, path)
    return path


def original_unet(network):
    """A tiny UNet's weights under the original repository's names."""
    names = {
        "encoder.0.": "encoder.in_conv.conv_conv.",
        "encoder.1.": "encoder.down1.maxpool_conv.1.conv_conv.",
        "decoder.0.reduce.": "decoder.up1.conv1x1.",
        "decoder.0.block.": "decoder.up1.conv.conv_conv.",
        "head.": "decoder.out_conv.",
    }
    state = {}
    for key, value in network.network.state_dict().items():
        start = next(start for start in names if key.startswith(start))
        state[names[start] + key.removeprefix(start)] = value
    return state
