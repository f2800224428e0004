"""A data set of mixed voxel sizes and oblong slices in the layout of nnU-Net v2."""

import json
from pathlib import Path

import numpy as np

from tiny_nnunet import write_volume

NAMES = ("background", "lesion", "wall")


def write_mixed(
    root: Path, *, ids: list[str], channels=("MRI",), shape=(30, 72, 4), **about
) -> Path:
    """Cases whose columns (x) and rows (y) are about `shape` (x, y, z) at about 1.5 x 1.2 mm.

    A disk with a ring in noise; grey values are those of CT where a channel is called so. No voxel
    is 0, so that nnU-Net crops nothing.
    """
    for place in ("imagesTr", "labelsTr"):
        (root / place).mkdir(parents=True, exist_ok=True)
    for case in ids:
        rng = np.random.default_rng(sum(map(ord, case)))
        sides = (*(int(side * rng.uniform(0.85, 1.2)) for side in shape[:2]), shape[2])
        zooms = (1.5 * rng.uniform(0.8, 1.25), 1.2 * rng.uniform(0.8, 1.25), 8.0)
        x, y, _ = np.meshgrid(*map(np.arange, sides), indexing="ij")
        radius = np.hypot(x - sides[0] / 2, y - sides[1] * rng.uniform(0.4, 0.6))
        label = np.where(radius < 4, 1, np.where(radius < 8, 2, 0)).astype(np.uint8)
        for number, name in enumerate(channels):
            offset, scale = (-900, 350) if name == "CT" else (100, 100)
            grey = offset + scale * label.astype(float) + rng.normal(0, 20, sides)
            image = np.where(np.rint(grey) == 0, 1, np.rint(grey)).astype(np.int16)
            write_volume(root / "imagesTr" / f"{case}_{number:04d}.nii.gz", image, zooms)
        write_volume(root / "labelsTr" / f"{case}.nii.gz", label, zooms)
    content = {
        "channel_names": {str(number): name for number, name in enumerate(channels)},
        "labels": {name: value for value, name in enumerate(NAMES)},
        "file_ending": ".nii.gz",
        "numTraining": len(ids),
    }
    (root / "dataset.json").write_text(json.dumps(content | about))
    return root
