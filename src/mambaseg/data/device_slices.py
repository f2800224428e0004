"""All slices of a training in the memory of its device, gathered into batches by number."""

import math

import numpy as np
import torch
from torch import Tensor

from mambaseg.data.slices import SliceDataset

SHARE = 0.25
"""Of a GPU's free memory that `auto` takes for them; the rest is the network's."""


class DeviceSlices:
    """What `Collate` makes of slices on the CPU, made of the same values on the device.

    Args:
        slices: the training's slices, at native size.
        device: whose memory they are kept in, 5 bytes per voxel of one channel.
    """

    def __init__(self, slices: SliceDataset, device: torch.device) -> None:
        cache = slices.cache
        numbers = dict.fromkeys(slices.case_numbers.tolist())
        self.channels = cache.entries[next(iter(numbers))].shape[1]
        starts, voxels = {}, 0  # of a case in the flat label
        for number in numbers:
            starts[number] = voxels
            voxels += math.prod(cache.entries[number].label_shape)
        # one zero more, for what lies beyond a slice
        image = torch.zeros(voxels * self.channels + 1)
        label = torch.zeros(voxels + 1, dtype=torch.uint8)
        for number, start in starts.items():
            pixels = torch.from_numpy(cache.image(number).copy()).flatten()
            image[start * self.channels :][: len(pixels)] = pixels
            classes = torch.from_numpy(cache.label(number).copy()).flatten()
            label[start:][: len(classes)] = classes
        self.image, self.label = image.to(device), label.to(device)
        places = [
            starts[number] + z * math.prod(cache.entries[number].label_shape[1:])
            for number, z in zip(
                slices.case_numbers.tolist(), slices.slice_numbers.tolist(), strict=True
            )
        ]
        self.places = torch.from_numpy(np.array(places, np.int64)).to(device)

    @staticmethod
    def size(slices: SliceDataset) -> int:
        """Bytes that they would take."""
        entries = slices.cache.entries
        numbers = set(slices.case_numbers.tolist())
        return sum(
            4 * math.prod(entries[n].shape) + math.prod(entries[n].label_shape) for n in numbers
        )

    def gather(
        self, items: Tensor, shapes: Tensor, padded: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """The slices `items` (B,) as one batch, padded with zeros at the bottom and right.

        Args:
            items: numbers of slices, on the device like `shapes`.
            shapes: (B, 2) their heights and widths.
            padded: the largest of both, known on the host: nothing waits for the device.

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
        pixel = (place * self.channels + pixel)[:, None] + channel * size
        image = self.image[torch.where(inside[:, None], pixel, len(self.image) - 1)]
        return image, label


def fits(slices: SliceDataset, device: torch.device) -> bool:
    """Whether `auto` puts them on the device: a CUDA device with room enough."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return DeviceSlices.size(slices) <= SHARE * free
