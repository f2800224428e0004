"""nnU-Net's changes of intensity, each on a part of the samples.

Source: nnU-Net v2 (`nnUNetTrainer.get_training_transforms`) with batchgeneratorsv2. Differs: one
draw for all channels of a sample, where the original draws for each; the noise is a share of the
sample's standard deviation, which is about 1 in a z-score, so that it also fits other intensities.

A sample that is not chosen is returned as it is. B: batch, C: channels, S: side of the grid.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaseg.data.augmentation import Array, Intensity
from mambaseg.data.limits import AMOUNT, FACTORS, PART, SHARE, limited

RADIUS = 3  # pixels of the blur's kernel
OVER = (-3, -2, -1)  # a sample's channels, rows and columns


class Sometimes(Intensity):
    """A change of some samples: the first number decides which."""

    probability: float

    def draw(self, u: Array) -> Sequence[float]:
        """Return whether the sample is changed, and numbers in [0, 1)."""
        return [float(u[0] < self.probability), *u[1:]]

    def paint(self, image: Tensor, drawn: Tensor, *, unit: bool) -> Tensor:
        """Change the chosen samples."""
        chosen = drawn[0].flatten() > 0
        if not chosen.any():
            return image
        changed = image.clone()
        changed[chosen] = self.change(image[chosen], drawn[1:, chosen])
        return changed

    @abstractmethod
    def change(self, image: Tensor, drawn: Tensor) -> Tensor:
        """Return the changed samples (B, C, S, T), given numbers in [0, 1), (N, B, 1, 1, 1)."""


def between(low: float, high: float, u: Tensor) -> Tensor:
    """A number from `low` to `high`."""
    return low + (high - low) * u


def about_one(bounds: Sequence[float], coin: Tensor, u: Tensor) -> Tensor:
    """A factor that is as often below 1 as above, evenly within each half of the range."""
    return torch.where(coin < 0.5, between(bounds[0], 1.0, u), between(1.0, bounds[1], u))


@dataclass
class Noise(Sometimes):
    """Gaussian noise of up to `most` of the sample's standard deviation."""

    most: float = limited(0.1, AMOUNT)
    probability: float = limited(0.1, SHARE)
    numbers = 3

    def change(self, image: Tensor, drawn: Tensor) -> Tensor:
        """Add noise; its pixels are drawn on the device, by the sample's own number."""
        amount, number = drawn
        noise, generator = torch.empty_like(image), torch.Generator(image.device)
        for sample, seed in zip(noise, (number.flatten() * 2**24).long().tolist(), strict=True):
            sample.normal_(generator=generator.manual_seed(seed))
        return image + self.most * amount * image.std(OVER, keepdim=True) * noise


@dataclass
class Blur(Sometimes):
    """A Gaussian whose standard deviation is drawn for rows and columns, in pixels."""

    sigma: Sequence[float] = limited((0.5, 1.0), FACTORS)
    probability: float = limited(0.1, SHARE)
    numbers = 3

    def change(self, image: Tensor, drawn: Tensor) -> Tensor:
        """Blur."""
        count, channels, height, width = image.shape
        place = torch.arange(-RADIUS, RADIUS + 1, device=image.device, dtype=image.dtype)
        flat = F.pad(image, [RADIUS] * 4, mode="replicate").reshape(1, -1, height + 6, width + 6)
        for number, shape in zip(drawn, ((-1, 1, 7, 1), (-1, 1, 1, 7)), strict=True):
            sigma = between(self.sigma[0], self.sigma[1], number.reshape(count, 1))
            kernel = (-0.5 * (place / sigma).square()).exp()
            kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
            flat = F.conv2d(flat, kernel.reshape(shape), groups=count * channels)
        return flat.reshape(image.shape)


@dataclass
class Brightness(Sometimes):
    """Multiplication by a factor."""

    factor: Sequence[float] = limited((0.75, 1.25), FACTORS)
    probability: float = limited(0.15, SHARE)
    numbers = 3

    def change(self, image: Tensor, drawn: Tensor) -> Tensor:
        """Multiply."""
        return image * about_one(self.factor, *drawn)


@dataclass
class Contrast(Sometimes):
    """Stretch about the sample's mean, within its own smallest and largest value."""

    factor: Sequence[float] = limited((0.75, 1.25), FACTORS)
    probability: float = limited(0.15, SHARE)
    numbers = 3

    def change(self, image: Tensor, drawn: Tensor) -> Tensor:
        """Stretch."""
        mean = image.mean(OVER, keepdim=True)
        low, high = image.amin(OVER, keepdim=True), image.amax(OVER, keepdim=True)
        return ((image - mean) * about_one(self.factor, *drawn) + mean).clamp(low, high)


@dataclass
class LowResolution(Sometimes):
    """Down to a share of the size by nearest neighbour, and up again bilinearly."""

    smallest: float = limited(0.5, PART)
    probability: float = limited(0.125, SHARE)
    numbers = 2

    def change(self, image: Tensor, drawn: Tensor) -> Tensor:
        """Lose resolution, each sample as much as its own number says."""
        shares = between(self.smallest, 1.0, drawn[0]).flatten().tolist()
        changed, size = [], image.shape[-2:]
        for sample, share in zip(image.split(1), shares, strict=True):
            few = [max(1, round(share * side)) for side in size]
            small = F.interpolate(sample, few, mode="nearest-exact")
            changed.append(F.interpolate(small, size, mode="bilinear"))
        return torch.cat(changed)


@dataclass
class Gamma(Sometimes):
    """An exponent on the sample's range; mean and standard deviation stay."""

    gamma: Sequence[float] = limited((0.7, 1.5), FACTORS)
    inverted: bool = False  # of the negative
    probability: float = limited(0.3, SHARE)
    numbers = 3

    def change(self, image: Tensor, drawn: Tensor) -> Tensor:
        """Take to the power."""
        image = -image if self.inverted else image
        mean, spread = image.mean(OVER, keepdim=True), image.std(OVER, keepdim=True)
        low = image.amin(OVER, keepdim=True)
        extent = (image.amax(OVER, keepdim=True) - low).clamp(min=1e-7)
        powered = ((image - low) / extent) ** about_one(self.gamma, *drawn)
        deviation = powered - powered.mean(OVER, keepdim=True)
        scale = spread / powered.std(OVER, keepdim=True).clamp(min=1e-7)
        changed = deviation * scale + mean
        return -changed if self.inverted else changed
