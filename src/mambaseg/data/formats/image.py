"""An image as its file holds it, whatever the format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Image:
    """An image as it was measured.

    Attributes:
        frames: (T, Z, C, H, W), finite, on any scale; T is 1 for what is no cine.
        spacing: mm as (z, y, x); None when unknown.
        geometry: what a NIfTI label map on the same grid takes over (see `nifti`).
        flat: whether it is one 2-D picture, whose labels are a picture too.
    """

    frames: np.ndarray
    spacing: tuple[float, float, float] | None
    geometry: dict[str, Any]
    flat: bool = False
