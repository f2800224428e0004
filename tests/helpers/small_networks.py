"""Every network of conf/model, made small: the contract's networks."""

from importlib.util import find_spec

from omegaconf import OmegaConf

from mambaseg.app.entry import CONF
from mambaseg.app.networks import build_network

ZOO = {"smp", "timm_u"} if find_spec("segmentation_models_pytorch") is None else set()
"""Networks of libraries that are not installed (extra `zoo`)."""
NAMES = sorted({path.stem for path in (CONF / "model").glob("*.yaml")} - ZOO)

RWKV = {"widths": [8, 16, 24, 32], "depths": [1, 1, 2, 2], "stem_width": 8, "mix_width": 8}
MEDNEXT = {
    "_target_": "monai.networks.nets.MedNeXt",
    "init_filters": 4,
    "encoder_expansion_ratio": [2, 3, 4, 4],
    "decoder_expansion_ratio": [4, 4, 3, 2],
    "bottleneck_expansion_ratio": 4,
}
# What makes a network small while every part of it stays; one that is not named is tested as it is.
SMALL = {
    "attention_unet": {"widths": [8, 16, 32, 64, 128]},
    "emcad_b2": {"widths": [64, 64, 64, 64], "depths": [1, 1, 1, 1], "heads": [1, 2, 2, 4]},
    "mamba_unet": {"embed_dim": 24, "depths": [1, 1, 1, 1], "d_state": 4},
    "mamba_unet_no_scan": {"embed_dim": 24, "depths": [1, 1, 1, 1]},
    "mednext_b": MEDNEXT,
    "mednext_m": MEDNEXT | {"blocks_down": [1, 2, 1, 1]},
    "mednext_l": MEDNEXT | {"blocks_down": [1, 2, 2, 2]},
    "mednext_s": {"_target_": "monai.networks.nets.MedNeXt", "init_filters": 4},  # S by default
    "mamba_unet_v2": {"embed_dim": 24, "depths": [1, 1, 1, 1]},
    "msvm_unet": {"embed_dim": 24, "depths": [1, 1, 1, 1]},
    "monai_basic_unet": {"features": [8, 8, 16, 16, 32, 8]},
    "monai_flexible_unet": {"decoder_channels": [16, 8, 8, 8, 8]},
    "nnunet_2d": {"filters": [4, 8, 16, 32, 32, 32]},
    "nnunet_2d_half": {"filters": [4, 8, 16, 32, 32]},
    "rwkv_unet_b": RWKV,
    "rwkv_unet_s": RWKV,
    "rwkv_unet_t": RWKV,
    "segresnet": {"init_filters": 8, "blocks_down": [1, 1, 1, 1]},
    "smp": {"encoder": "resnet18", "decoder_channels": [16, 8, 8, 8, 8]},
    "swin_umamba": {"embed_dim": 24, "depths": [1, 1, 1, 1], "d_state": 4},
    "swin_umamba_d": {"embed_dim": 24, "depths": [1, 1, 1, 1], "d_state": 4},
    "swin_unet": {"embed_dim": 24, "depths": [1, 1, 1, 1], "heads": [1, 2, 4, 8]},
    "swin_unetr": {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]},
    "timm_u": {"encoder": "convnext_atto", "decoder_channels": [16, 8, 8, 8, 8]},
    "trans_unet": {
        "units": [1, 1, 1],
        "dim": 48,
        "depth": 2,
        "heads": 4,
        "hidden": 96,
        "decoder_widths": [32, 16, 16, 8],
    },
    "u_mamba_bot": {"widths": [4, 8, 16, 16, 16], "blocks": 1, "d_state": 4},
    "u_mamba_enc": {"widths": [16, 32, 32], "blocks": 1, "d_state": 4},  # deeper, roundings grow
    "u_mamba_none": {"widths": [4, 8, 16, 16, 16], "blocks": 1},
    "ultralight_vm_unet": {"d_state": 4},
    "unet": {"widths": [4, 8, 16, 32, 64]},
    "uvm_net": {"widths": [4, 8, 16, 32, 32], "grid": 8, "d_state": 4},
    "vm_unet_v2": {"embed_dim": 64, "depths": [1, 1, 1, 1], "width": 16, "d_state": 4},
    "vm_unet": {
        "embed_dim": 24,
        "depths": [1, 1, 1, 1],
        "decoder_depths": [1, 1, 1, 1],
        "d_state": 4,
    },
}


def small_network(name, in_channels=1, num_classes=4, **changes):
    """A network for images of any size, small, with random weights."""
    return full_network(name, in_channels, num_classes, **{**SMALL.get(name, {}), **changes})


def full_network(name, in_channels=1, num_classes=4, **changes):
    """A network as its config describes it, but for `changes`."""
    data = {"in_channels": in_channels, "num_classes": num_classes}
    model = OmegaConf.load(CONF / "model" / f"{name}.yaml")
    # configs of MONAI networks leave some arguments to their defaults
    OmegaConf.set_struct(model, "mambaseg" in model._target_ and "zoo" not in model._target_)
    model = OmegaConf.merge(model, changes)
    return build_network(OmegaConf.create({"data": data, "model": model}).model)[0]
