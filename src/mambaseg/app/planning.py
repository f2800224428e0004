"""nnU-Net's plan: every `auto` of data, network and augmentation becomes a value.

What the user gives is kept, and the rest is planned for it. The plan follows from the training
cases alone (docs/protocol.md).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from mambaseg.app.networks import made, plain
from mambaseg.app.schema import AUTO, EXTRAS, PLANNED
from mambaseg.app.targets import import_target
from mambaseg.errors import UserError

if TYPE_CHECKING:
    from mambaseg.data.plan import Plan2D
    from mambaseg.data.survey import Surveyed

_DATA = ("data.preprocessing", "data.spacing", "data.size", "data.batch_size", "data.intensity")
_KEYS = (*_DATA, "model.size_multiple", *PLANNED)
_STAGES = 3  # that MONAI's network has at least
_OBLONG = 1.5  # a side over the other, from which patches are turned little
_DEGREES, _FEW_DEGREES = 180, 15
log = logging.getLogger(__name__)


def settle_plan(cfg: DictConfig) -> None:
    """Gives every `auto` that is planned its value.

    Raises:
        UserError: the data set cannot be planned, or not for what is given.
    """
    if cfg.get("checkpoint") and cfg.data.get("batch_size") == AUTO:
        cfg.data.batch_size = 1  # the rest is the checkpoint's, and nothing is trained
    if cfg.data.get("preprocessing") == AUTO and cfg.data.get("spacing", AUTO) is None:
        cfg.data.spacing = AUTO  # which the preset spacing needs
    asked = [key for key in _KEYS if OmegaConf.select(cfg, key) == AUTO]
    count = _plan(cfg, asked) if asked else 0
    for key in ("data.size", "data.spacing", "model.size_multiple"):
        pair = OmegaConf.select(cfg, key)
        if OmegaConf.is_list(pair) and len(pair) == 2 and pair[0] == pair[1]:
            OmegaConf.update(cfg, key, pair[0])
    if asked:
        if cfg.data.get("ct"):
            asked = ["data.ct" if key == "data.intensity" else key for key in asked]
        cfg.planned = asked  # folds that are planned alike are one entry of a report
        said = " ".join(f"{key}={OmegaConf.select(cfg, key)}" for key in asked)
        log.info("planned from %d training cases, as nnU-Net plans: %s", count, said)
    if OmegaConf.select(cfg, "augmentation.rotate.degrees") == AUTO:
        from mambaseg.data.sizes import sides_of

        sides = sides_of(plain(cfg)["data"]["size"])
        oblong = max(sides) > _OBLONG * min(sides)
        cfg.augmentation.rotate.degrees = _FEW_DEGREES if oblong else _DEGREES


def _plan(cfg: DictConfig, asked: Sequence[str]) -> int:
    """Plans what is asked for; the number of cases that it is planned from."""
    from mambaseg.data.plan import plan_2d
    from mambaseg.data.sizes import is_spacing, sides_of

    data = cfg.data
    modality = [str(one) for one in data.get("modality") or ["MR"] * data.in_channels]
    ct = [name.casefold() == "ct" for name in modality]
    greys = data.get("intensity") == AUTO and any(ct) and not (data.window or data.ct)
    kept = {
        "preprocessing": "native", "spacing": None, "size": 64, "batch_size": 1, "intensity": None,
        "window": None, "ct": None,
    }  # fmt: skip
    if not hasattr(import_target("data", data["_target_"]), "survey"):
        raise UserError(f"{asked[0]}=auto: data={data.name} has no plan; give a value")
    if len(ct) != data.in_channels:
        raise UserError(
            f"data.modality={modality}: name every channel, data.in_channels={data.in_channels}"
        )
    cases = made(data, *EXTRAS["data"], **kept).survey(greys=greys)
    shapes, spacings = _measures(cfg, cases)
    given = plain(cfg)["data"]
    patch = None if given["size"] == AUTO else sides_of(given["size"])
    pixel = None if given["spacing"] in (AUTO, None) else given["spacing"]
    if pixel is not None and not is_spacing(pixel):
        raise UserError(f"data.spacing={pixel}: give the side of a pixel in mm, or [rows, columns]")
    plan = plan_2d(
        shapes, spacings, num_classes=data.num_classes, slices=0, pixel=pixel, patch=patch
    )  # fmt: skip
    _take_data(cfg, plan, cases, ct if greys else None)
    _take_model(cfg, plan)
    return len(cases)


def _measures(
    cfg: DictConfig, cases: Sequence[Surveyed]
) -> tuple[list[tuple[int, int, int]], list[tuple[float, float, float]]]:
    """Shapes and voxel sizes as the plan takes them; settles `data.preprocessing`."""
    from mambaseg.data.sizes import sides_of

    data = cfg.data
    unknown = [one.case for one in cases if one.spacing is None]
    if data.preprocessing == AUTO:
        if 0 < len(unknown) < len(cases):
            raise UserError(
                f"data.preprocessing=auto: the voxel size of {unknown[0]} is unknown, and those of "
                "others are known. Correct the file, or choose data.preprocessing=native"
            )
        given = data.spacing not in (AUTO, None)
        data.preprocessing = "spacing" if given or not unknown else "native"
    shapes = [one.shape for one in cases]
    if data.preprocessing == "spacing":
        if unknown:
            raise UserError(
                f"data.preprocessing=spacing: the voxel size of {unknown[0]} is unknown. Correct "
                "the file, or choose data.preprocessing=native"
            )
        return shapes, [one.spacing for one in cases if one.spacing is not None]
    if data.spacing == AUTO:
        data.spacing = None
    if data.preprocessing != "native":
        if data.size == AUTO:
            raise UserError(
                f"data.size=auto with data.preprocessing={data.preprocessing}: this brings every "
                "image to data.size, which you choose. To plan it, choose data.preprocessing=auto, "
                "spacing or native"
            )
        shapes = [(one.shape[0], *sides_of(plain(cfg)["data"]["size"])) for one in cases]
    return shapes, [(1.0, 1.0, 1.0)] * len(cases)  # pixels are what they are


def _take_data(
    cfg: DictConfig, plan: Plan2D, cases: Sequence[Surveyed], ct: Sequence[bool] | None
) -> None:
    """Fills in what is `auto`; `ct` says of each channel whether it is, None: does not matter."""
    from mambaseg.data.intensity import is_ct
    from mambaseg.data.survey import foreground_of

    data = cfg.data
    planned = {
        "spacing": [round(side, 6) for side in plan.spacing],
        "size": list(plan.patch),
        "batch_size": plan.batch,
    }
    for key, value in planned.items():
        if data[key] == AUTO:
            data[key] = value
    if data.intensity == AUTO:
        data.intensity = None if ct or data.window or data.ct else "zscore"
        if ct:
            found = [foreground_of(cases, k) if one else None for k, one in enumerate(ct)]
            if not is_ct(found):
                raise UserError(
                    "data.intensity=auto: the foreground of the training cases has no range of "
                    "grey values. Choose data.intensity=zscore or a window, data.window=[low,high]"
                )
            data.ct = found


def _take_model(cfg: DictConfig, plan: Plan2D) -> None:
    """Fills in the network's stages; given strides decide about the rest."""
    from math import prod

    from mambaseg.data.plan import features_of
    from mambaseg.data.sizes import pair_of, shortest

    model = cfg.model
    if AUTO not in [model.get(key.partition(".")[2]) for key in ("model.size_multiple", *PLANNED)]:
        return
    ours = model.get("strides", AUTO) == AUTO
    strides = plan.strides if ours else [pair_of(one) for one in plain(cfg)["model"]["strides"]]
    if len(strides) < _STAGES:
        sides = " × ".join(map(str, plan.patch))
        raise UserError(
            f"model.strides=auto: {sides} pixels are too few for a network of {_STAGES} stages, "
            "the least of nnunet_2d. Choose data.size=32 or more (images are padded), or another "
            "network"
        )
    stages = len(strides)
    kernels = plan.kernels if ours else [(3, 3)] * stages
    planned = {
        "strides": [shortest(one) for one in strides],
        "kernel_size": [shortest(one) for one in kernels],
        "upsample_kernel_size": [shortest(one) for one in strides[1:]],
        "filters": features_of(stages),
        "deep_supr_num": stages - 2,
        "size_multiple": [prod(one[axis] for one in strides) for axis in (0, 1)],
    }
    for key, value in planned.items():
        if model.get(key) == AUTO:
            model[key] = value
