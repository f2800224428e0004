"""What the page knows of somebody's images: labels, volumes, and the heart's indices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mambaseg.data.formats.files import DICOM, NIFTI, PICTURES, without_ending
from mambaseg.data.formats.images import Source
from mambaseg.data.validation import DataError
from mambaseg.data.volume import Volume as StoredVolume
from mambaseg.errors import UserError
from mambaseg.inference.predictor import Predictor, label_map
from mambaseg.reporting.clinical import VENTRICLES, indices
from mambaseg.reporting.views import drawn

ENDINGS = (*NIFTI, ".mha", *DICOM, *PICTURES)  # what is whole in one file


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: the arrays are large
class Segmented:
    """An image with its labels."""

    name: str  # what its owner called the file: text for the page, never a path
    image: StoredVolume
    labels: npt.NDArray[np.uint8]  # (T, Z, H, W)
    windows: list[tuple[float, float]]  # of each frame the intensities drawn black and white
    label_map: bytes  # that `mambaseg predict` would write

    @property
    def label_map_name(self) -> str:
        """A name for the label map, which says what it is of."""
        ending = ".png" if self.image.flat else ".nii.gz"
        return f"{without_ending(self.name, ENDINGS)}_labels{ending}"


class Volume(NamedTuple):
    """One volume to look at."""

    caption: str  # which it is of several; empty for the only one
    image: npt.NDArray[Any]  # (Z, H, W) on any scale, or colours (1, H, W, 3) as bytes
    labels: npt.NDArray[np.uint8]  # (Z, H, W)
    spacing: tuple[float, float, float] | None  # mm (z, y, x), None when unknown
    window: tuple[float, float] = (0.0, 1.0)  # the intensities drawn black and white

    @property
    def voxel_ml(self) -> float | None:
        """Millilitres of a voxel, None when unknown."""
        return None if self.spacing is None else prod(self.spacing) / 1000

    def voxels(self, num_classes: int) -> list[int]:
        """Voxels of the classes 0..K-1."""
        return np.bincount(self.labels.ravel(), minlength=num_classes).tolist()


def segment_file(predictor: Predictor, path: Path) -> Segmented:
    """Segments the one image of a file.

    Raises:
        UserError: it is none; the message says nothing of where it lies.
    """
    name = path.name
    if not name.lower().endswith(ENDINGS):
        raise UserError(f"{name} has none of the endings {', '.join(ENDINGS)}")
    try:
        image = predictor.read(Source("image", path))
    except DataError as error:
        raise UserError(f"{name}: {error.problem}. {error.remedy}".strip()) from error
    labels = predictor.segment(image).labels
    windows = [_window(drawn(frame)) for frame in image.image]
    return Segmented(name, image, labels, windows, label_map(image, labels))


def _window(image: npt.NDArray[Any]) -> tuple[float, float]:
    """The intensities (Z, H, W) drawn black and white; colours (1, H, W, 3) are drawn as is."""
    if image.ndim == 4:
        return 0.0, 255.0
    low, high = np.percentile(image, (0.5, 99.5))
    return float(low), float(high)


def volumes_of(first: Segmented | None, second: Segmented | None = None) -> list[Volume]:
    """The volumes of one file, or of end-diastole and end-systole.

    Raises:
        UserError: two files of which one is a cine.
    """
    files = [file for file in (first, second) if file is not None]
    if len(files) == 2:
        if any(len(file.labels) > 1 for file in files):
            raise UserError(
                "end-diastole and end-systole are two volumes (3-D), or two frames of one cine"
            )
        captions = ["end-diastole", "end-systole"]
    elif files:
        count = len(files[0].labels)
        captions = [f"frame {t} of {count}" for t in range(1, count + 1)] if count > 1 else [""]
    else:
        captions = []
    pairs = [(file, t) for file in files for t in range(len(file.labels))]
    return [
        Volume(caption, drawn(file.image.image[t]), file.labels[t], file.image.spacing,
               file.windows[t])
        for caption, (file, t) in zip(captions, pairs, strict=True)
    ]  # fmt: skip


def phases(volumes: Sequence[Volume], class_names: Sequence[str]) -> tuple[int, int]:
    """Which volumes are end-diastole and end-systole: with the largest and the smallest LV.

    Of two files they are the first and the second. Without the class LV, so of every cine.
    """
    if len(volumes) < 3 or VENTRICLES[0] not in class_names:
        return 0, len(volumes) - 1
    label = list(class_names).index(VENTRICLES[0])
    sizes = [int((volume.labels == label).sum()) for volume in volumes]
    return int(np.argmax(sizes)), int(np.argmin(sizes))


def heart_indices(
    ed: Volume, es: Volume, class_names: Sequence[str]
) -> list[tuple[str, float | None, str]]:
    """Name, value and unit of each ventricle's volumes and ejection fraction, and the LV's mass.

    Millilitres if both voxel sizes are known; else the ejection fraction alone, from voxel counts
    on one grid. A value is None if it is undefined.

    Raises:
        UserError: the classes have no LV, or nothing can be said without a voxel size.
    """
    names = list(class_names)
    if VENTRICLES[0] not in names:
        raise UserError(
            f"no ejection fraction: the network's classes ({', '.join(names[1:])}) have no LV"
        )
    known = None not in (ed.voxel_ml, es.voxel_ml)
    if not known and ed.labels.shape != es.labels.shape:
        raise UserError(
            "no ejection fraction: a voxel size is unknown and the two images differ in shape"
        )
    rows = []  # as in a cases.csv
    for phase, volume in (("ED", ed), ("ES", es)):
        for name, count in zip(names, volume.voxels(len(names)), strict=True):
            size: dict[str, float] = {"voxels": count}
            if volume.voxel_ml is not None:
                size["volume_ml"] = count * volume.voxel_ml
            reference = {f"reference_{key}": value for key, value in size.items()}
            about = {"patient": "", "class_name": name, "phase": phase}
            rows.append({**about, **size, **reference})
    return [(index.name, index.prediction, index.unit) for index in indices(rows)]
