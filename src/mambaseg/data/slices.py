"""Slices for training, in the loader or in the device's memory, and whole cases for evaluation."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mambaseg.data.augmentation import Augmentation
from mambaseg.data.batches import Draw
from mambaseg.data.cache import Entry, VolumeCache
from mambaseg.data.case import Case
from mambaseg.data.geometry import Preprocessing
from mambaseg.data.splits import listed
from mambaseg.errors import UserError

SHARE = 0.25
"""Of a GPU's free memory that `auto` takes for slices; the rest is the network's."""
log = logging.getLogger(__name__)


class SliceDataset(Dataset[dict[str, Any]]):
    """All slices of some cases (ids), at native size, then those of cases without labels.

    An item, asked for by a `Draw`, is `image` (C, H, W) float32 (C times 2 `neighbours` + 1, where
    a slice has these as channels), `label` (H, W) uint8, `shape` (H, W), `pixel` (its height and
    width in mm, or None), `case` (id), `slice` (number from 0), `labelled` (whether its label is
    known), and the draw's `step`, `position` and `about`.
    Without `arrays` it has `item`, the number of the slice, in place of image and label, for
    `DeviceSlices` to find them.
    """

    def __init__(
        self,
        cache: VolumeCache,
        cases: Sequence[str],
        unlabelled: Sequence[str] = (),
        *,
        preprocessing: Preprocessing,  # whose `stacked` gives slices their neighbours
    ) -> None:
        self.cache, self.arrays, self.preprocessing = cache, True, preprocessing
        numbers = [cache.position(case) for case in (*cases, *unlabelled)]
        depths = [cache.entries[number].shape[0] for number in numbers]
        self.labelled = sum(depths[: len(cases)])
        self.case_numbers = np.repeat(numbers, depths)
        self.slice_numbers = np.concatenate([np.arange(depth) for depth in depths])

    def __len__(self) -> int:
        return len(self.case_numbers)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        index = draw.item
        number, z = int(self.case_numbers[index]), int(self.slice_numbers[index])
        entry = self.cache.entries[number]
        if self.arrays:
            what = {"image": self._image(number, z), "label": self.cache.label(number)[z]}
        else:
            what = {"item": index}
        where = {"shape": entry.shape[2:], "pixel": entry.pixel, "case": entry.case, "slice": z}
        place = {"step": draw.step, "position": draw.position, "about": draw.about}
        return {**where, **what, **place, "labelled": index < self.labelled}

    def _image(self, number: int, z: int) -> NDArray[np.float32]:
        frame, z = divmod(z, depth := self.cache.entries[number].depth)
        image = self.cache.image(number)[frame * depth : (frame + 1) * depth]
        return self.preprocessing.stacked(image, z, z + 1)[0]


class CaseDataset(Dataset[dict[str, Any]]):
    """Whole cases at native size.

    An item is `case` (the `Case`), `image` (Z, C, H, W) float32, intensity-scaled, `label`
    (Z, H, W) uint8 and `spacing` in mm (z, y, x) or None.
    """

    def __init__(self, cache: VolumeCache, cases: Sequence[Case]) -> None:
        self.cache, self.cases = cache, list(cases)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> dict[str, Any]:
        case = self.cases[index]
        number = self.cache.position(case.id)
        return {
            "case": case,
            "image": torch.from_numpy(self.cache.image(number).copy()),
            "label": torch.from_numpy(self.cache.label(number).copy()),
            "spacing": self.cache.entries[number].spacing,
        }


class Collate:
    """Makes a training batch of slices, still at native size, with its augmentation drawn.

    NumPy only: it runs in forked worker processes.
    """

    def __init__(self, augmentation: Augmentation) -> None:
        self.augmentation = augmentation

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Join the items of one (part of a) step.

        Returns:
            `image` (B, C, H, W) float32 and `label` (B, H, W) uint8, padded with zeros at the
            bottom and right to the largest slice; `shape` (B, 2): their true sizes; `augmentation`
            (B, 8 + P): what `Augmentation` is to do; `step` (int) and `position` (B,): the places
            in the global batch; `case` (list of ids) and `slice` (list of numbers); `labelled`,
            the number of items with a label. Of items
            without arrays, `item` (B,) and `padded` (the size of the padded batch) in place of
            image and label.
        """
        columns = {key: [item[key] for item in items] for key in items[0]}
        shapes = np.array(columns["shape"])
        step, positions = columns["step"][0], columns["position"]
        about = columns["about"]
        drawn = self.augmentation.draw(step, positions, shapes, columns["pixel"], about)
        height, width = map(int, shapes.max(axis=0))
        batch = {
            "shape": torch.from_numpy(shapes),
            "augmentation": torch.from_numpy(drawn),
            "step": step,
            "position": torch.tensor(positions),
            "case": columns["case"],
            "slice": columns["slice"],
            "labelled": sum(columns["labelled"]),
        }
        if "image" not in columns:
            return {**batch, "item": torch.tensor(columns["item"]), "padded": (height, width)}
        for key in ("image", "label"):
            batch[key] = torch.from_numpy(_padded(columns[key], (height, width)))
        return batch


def _padded(arrays: Sequence[NDArray[Any]], size: tuple[int, int]) -> NDArray[Any]:
    """Arrays (..., h, w) as one (B, ..., H, W), zero beyond each."""
    joined = np.zeros((len(arrays), *arrays[0].shape[:-2], *size), arrays[0].dtype)
    for place, array in zip(joined, arrays, strict=True):
        place[..., : array.shape[-2], : array.shape[-1]] = array
    return joined


def require_neighbours(entries: Sequence[Entry], count: int) -> None:
    """Raise `UserError` where no training case has slices above and below; warn where some lack.

    `count` is `data.neighbours`. The only slice of a case is repeated in their place, which tells a
    network nothing.
    """
    flat = [entry.case for entry in entries if entry.depth == 1]
    said = f"data.neighbours={count}: {len(flat)} of {len(entries)} training cases have one slice"
    if entries and len(flat) == len(entries):
        raise UserError(f"{said}, so there are no neighbouring slices; leave it 0")
    if flat:
        log.warning("%s, which stands for its neighbours too: %s", said, listed(flat))


class DeviceSlices:
    """What `Collate` makes of slices on the CPU, made of the same values on the device.

    They take 5 bytes of its memory per voxel of one channel.
    """

    def __init__(self, slices: SliceDataset, device: torch.device) -> None:
        cache, numbers = slices.cache, _case_numbers(slices)
        self.channels = cache.entries[numbers[0]].shape[1]
        images = [cache.image(number).ravel() for number in numbers]
        labels = [cache.label(number).ravel() for number in numbers]
        # one zero more, for what lies beyond a slice
        image = np.concatenate([*images, np.zeros(1, np.float32)])
        label = np.concatenate([*labels, np.zeros(1, np.uint8)])
        self.image, self.label = (torch.from_numpy(flat).to(device) for flat in (image, label))
        starts = np.zeros(len(cache), np.int64)  # of a case in the flat label
        starts[numbers] = np.cumsum([0, *map(len, labels)])[:-1]
        areas = np.array([math.prod(entry.shape[2:]) for entry in cache.entries])
        places = starts[slices.case_numbers] + slices.slice_numbers * areas[slices.case_numbers]
        self.places = torch.from_numpy(places).to(device)
        near = slices.preprocessing.neighbours
        depths = np.array([entry.depth for entry in cache.entries])[slices.case_numbers]
        z, items = slices.slice_numbers % depths, np.arange(len(slices))
        self.near = [  # the items that are below, at and above each item
            torch.from_numpy(items + np.clip(z + step, 0, depths - 1) - z).to(device)
            for step in range(-near, near + 1)
        ]

    @staticmethod
    def size(slices: SliceDataset) -> int:
        """Bytes that they would take."""
        entries = [slices.cache.entries[number] for number in _case_numbers(slices)]
        return sum(4 * math.prod(entry.shape) + math.prod(entry.label_shape) for entry in entries)

    @classmethod
    def fit(cls, slices: SliceDataset, device: torch.device) -> bool:
        """Whether `auto` puts them on the device: a CUDA device with room enough."""
        if device.type != "cuda":
            return False
        free, _ = torch.cuda.mem_get_info(device)
        return cls.size(slices) <= SHARE * free

    def gather(
        self, items: Tensor, shapes: Tensor, padded: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Return the slices `items` (B,) as one batch, padded with zeros at the bottom and right.

        `shapes` (B, 2) are their heights and widths; `padded` is the largest of both, known on the
        host so that nothing waits for the device.

        Returns:
            Image (B, C, H, W) float32 and label (B, H, W) uint8.
        """
        height, width = padded
        heights, widths = (sides[:, None, None] for sides in shapes.unbind(1))
        rows = torch.arange(height, device=shapes.device)[None, :, None]
        columns = torch.arange(width, device=shapes.device)[None, None, :]
        inside = (rows < heights) & (columns < widths)
        pixel = rows * widths + columns  # within one channel of a slice
        place = self.places[items][:, None, None]
        label = self.label[torch.where(inside, place + pixel, len(self.label) - 1)]
        channel = torch.arange(self.channels, device=shapes.device)[None, :, None, None]
        size = (heights * widths)[:, None]
        images = []
        for near in self.near:
            first = self.places[near[items]][:, None, None] * self.channels
            places = (first + pixel)[:, None] + channel * size
            images.append(self.image[torch.where(inside[:, None], places, len(self.image) - 1)])
        return torch.cat(images, 1), label


def _case_numbers(slices: SliceDataset) -> list[int]:
    return list(dict.fromkeys(slices.case_numbers.tolist()))
