"""Augmentation: drawn per sample by a counter, applied to a whole batch on its device.

An operation moves the image (`Spatial`) or changes its intensities (`Intensity`). The spatial ones
are affine maps, composed with the way onto the grid (`Preprocessing`), so each image is read once.
The map runs backwards, from where a pixel of the augmented native-size image is to where it comes
from; positions are (row, column) in pixels, and centres are at (size - 1) / 2.

B: batch, H, W: native size padded to the batch's largest, S, T: rows, columns of the grid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mambaseg.data.counter import AUGMENTATION, uniforms
from mambaseg.data.geometry import Pixel, Preprocessing
from mambaseg.data.intensity import CT
from mambaseg.data.limits import AMOUNT, FACTORS, PART, RANGE, SHARE, limited
from mambaseg.data.sampling import precision, read_affine
from mambaseg.errors import UserError

Array = NDArray[np.float64]

_MATRIX, _OFFSET, _SHAPE, _DRAWN = slice(0, 4), slice(4, 6), slice(6, 8), 8  # columns of `draw`
WITHIN = 1e-3  # pixels from the border: more than rounding, less than is seen
_WINDOW = [9, 10]  # of a sample's random numbers: where the grid lies in a larger image

_QUARTER_TURN = np.array([[0.0, 1.0], [-1.0, 0.0]])  # np.rot90, backwards
_FLIPS = (np.diag([-1.0, 1.0]), np.diag([1.0, -1.0]))  # of the rows, of the columns


@dataclass
class View:
    """How the augmented image is read from the native one, about the centres of both."""

    matrix: Array = field(default_factory=lambda: np.eye(2))
    shift: Array = field(default_factory=lambda: np.zeros(2))  # as a share of the native size


class Operation:
    """One step of an augmentation, a pure function of random numbers in [0, 1)."""

    numbers = 1  # random numbers that a sample takes
    mirrors = turns = False  # whether images are mirrored along each axis, turned by 90 degrees

    def __post_init__(self) -> None:
        """Dataclasses call this: fields with `limits` are held to them."""
        for one in fields(self):  # type: ignore[arg-type]  # every operation is a dataclass
            limits, value = one.metadata.get("limits"), getattr(self, one.name)
            if limits and not limits.holds(value):
                raise UserError(
                    f"augmentation: {type(self).__name__} has {one.name}={value}: give {limits}"
                )


class Spatial(Operation):
    """Moves the image and its label."""

    def move(self, view: View, u: Array) -> None:
        """Change the view, given `numbers` random numbers."""
        raise NotImplementedError


class Intensity(Operation):
    """Changes the intensities of an image on the grid."""

    def draw(self, u: Array) -> Sequence[float]:
        """Return `numbers` parameters of a sample, given as many random numbers."""
        return u.tolist()

    def paint(self, image: Tensor, drawn: Tensor, *, unit: bool) -> Tensor:
        """Return the changed image (B, C, S, T); what lies outside the native image stays zero.

        `drawn` are the parameters (numbers, B, 1, 1, 1); `unit` is for intensities in [0, 1].
        """
        raise NotImplementedError


@dataclass
class Rotate(Spatial):
    """Rotation by up to `degrees` in both directions, of a part of the samples."""

    degrees: float = limited(30, AMOUNT)
    probability: float = limited(1.0, SHARE)

    def move(self, view: View, u: Array) -> None:
        """Rotate."""
        if u[0] < self.probability:
            share = u[0] / self.probability
            view.matrix = view.matrix @ _rotation(2 * self.degrees * share - self.degrees)


@dataclass
class Scale(Spatial):
    """Scaling by `smallest` to 1 / `smallest`, reduction as likely as enlargement."""

    smallest: float = limited(0.8, PART)

    def move(self, view: View, u: Array) -> None:
        """Scale."""
        view.matrix = view.matrix / self.smallest ** (1 - 2 * u[0])


@dataclass
class Zoom(Spatial):
    """Scaling of a part of the samples, evenly by `scale` native pixels per pixel."""

    scale: Sequence[float] = limited((0.7, 1.4), FACTORS)
    probability: float = limited(1.0, SHARE)

    def move(self, view: View, u: Array) -> None:
        """Scale."""
        if u[0] < self.probability:
            low, high = self.scale
            view.matrix = view.matrix * (low + (high - low) * (u[0] / self.probability))


@dataclass
class Flip(Spatial):
    """Mirroring of each axis with a probability."""

    probability: float = limited(0.5, SHARE)
    numbers = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mirrors = self.probability > 0

    def move(self, view: View, u: Array) -> None:
        """Mirror the rows, the columns, both or neither."""
        for flip, coin in zip(_FLIPS, u, strict=True):
            view.matrix = view.matrix @ flip if coin < self.probability else view.matrix


@dataclass
class Shift(Spatial):
    """Translation along each axis by up to a share of the native size."""

    share: float = limited(0.05, SHARE)
    numbers = 2

    def move(self, view: View, u: Array) -> None:
        """Translate."""
        view.shift = view.shift + (2 * self.share * u - self.share)


@dataclass
class TurnOrRotate(Spatial):
    """The augmentation of Mamba-UNet (after SSL4MIS), at native aspect before the resize.

    50 %: np.rot90 by 0-3 quarter turns, then always a flip of axis 0 or 1; otherwise, 50 %:
    rotation by a whole number of degrees in [-`degrees`, `degrees`), zeros outside.

    The original samples twice by nearest neighbour: scipy.ndimage.rotate with order 0, then zoom
    with order 0. Here the two index maps are composed, with the rounding in between, and the image
    is read once: flips, quarter turns and the identity equal the two steps exactly, and rotations
    do up to positions that floating point cannot tell from a tie. (Rounding once, at the end, would
    be the other way to compose them; it moves the border of a structure by at most a pixel.) Our
    differences: the random numbers, and that the original's worker seeding repeats the same coin
    flips every epoch.
    """

    degrees: int = limited(20, AMOUNT)
    numbers = 5
    mirrors = turns = True

    def move(self, view: View, u: Array) -> None:
        """Turn and mirror, or rotate, or neither."""
        if u[0] < 0.5:
            turns = np.linalg.matrix_power(_QUARTER_TURN, int(4 * u[1]))
            view.matrix = view.matrix @ turns @ _FLIPS[int(2 * u[2])]
        elif u[3] < 0.5:
            degrees = int(2 * self.degrees * u[4]) - self.degrees
            view.matrix = view.matrix @ _rotation(degrees)


@dataclass
class Tone(Intensity):
    """Contrast and gamma (factor and exponent) and brightness, each on a part of the samples.

    About the middle of the intensity range; a z-score has no range and no gamma.
    """

    contrast: Sequence[float] = limited((0.75, 1.25), FACTORS)
    brightness: Sequence[float] = limited((-0.1, 0.1), RANGE)
    gamma: Sequence[float] = limited((0.7, 1.5), FACTORS)
    probability: float = limited(0.5, SHARE)
    numbers = 3

    def draw(self, u: Array) -> Sequence[float]:
        """Return contrast, brightness and gamma."""
        ranges = (self.contrast, 1.0), (self.brightness, 0.0), (self.gamma, 1.0)
        return [
            low + (high - low) * (number / self.probability) if number < self.probability else same
            for number, ((low, high), same) in zip(u, ranges, strict=True)
        ]

    def paint(self, image: Tensor, drawn: Tensor, *, unit: bool) -> Tensor:
        """Change the tone."""
        contrast, brightness, gamma = drawn
        if not unit:
            return image * contrast + brightness
        return ((image - 0.5) * contrast + 0.5 + brightness).clamp(0, 1) ** gamma


PRESETS: dict[str, tuple[Operation, ...]] = {
    "none": (),
    "paper": (TurnOrRotate(),),
    "modern": (Rotate(), Scale(), Flip(), Shift(), Tone()),
}
"""The operations of `conf/augmentation/`, for use without a configuration."""


class Augmentation:
    """Operations in their order: a pure function of (seed, step, position in the global batch).

    Images are read as `preprocessing` reads them (nearest neighbour or bilinear), so training sees
    what evaluation sees; labels always by nearest neighbour. Where an image may be larger than the
    grid (`Preprocessing.windowed`), the map is one of the grid's pixels rather than of the image's,
    so that what is turned keeps its form in pixels of `data.spacing` (in mm where these are
    squares; nnU-Net turns pixels too), and of a larger image the grid shows a part that lies within
    it (as it is before it is turned or scaled): any such part, all equally likely, or the middle
    where there is no operation. A sample that is `about` a pixel shows the part around it.

    `operations` is a name of `PRESETS`, or operations by name; None removes one. `views` are those
    that it makes alike to a network: none, flips, rot90 or all. `beyond` is the label of what lies
    beyond the image: background, or IGNORED where labels are partial.

    Raises:
        UserError: There is no such preset, or something is no operation.
    """

    def __init__(
        self,
        operations: str | Mapping[str, Operation | None],
        preprocessing: Preprocessing,
        seed: int,
        beyond: int = 0,
    ) -> None:
        if isinstance(operations, str):
            if operations not in PRESETS:
                raise UserError(f"augmentation={operations}: choose one of {', '.join(PRESETS)}")
            operations = dict(enumerate(PRESETS[operations]))  # type: ignore[arg-type]
        for name, operation in operations.items():
            if not isinstance(operation, Spatial | Intensity | None):
                raise UserError(
                    f"augmentation.{name}: {type(operation).__name__} is no operation; it must be "
                    "a Spatial or an Intensity of mambaseg.data.augmentation"
                )
        self.operations = tuple(one for one in operations.values() if one is not None)
        self.preprocessing, self.seed, self.beyond = preprocessing, seed, beyond
        mirrors = any(one.mirrors for one in self.operations)
        turns = any(one.turns for one in self.operations)
        self.views = ("all" if turns else "flips") if mirrors else ("rot90" if turns else "none")

    def draw(
        self,
        step: int,
        positions: Sequence[int],
        shapes: NDArray[np.integer],
        pixels: Sequence[Pixel | None] | None = None,
        about: Sequence[tuple[int, int] | None] | None = None,
    ) -> Array:
        """Draw what happens to the samples at these positions of the global batch of a step.

        Shapes are (B, 2) native heights and widths, `pixels` the same of a native pixel in mm,
        `about` native (row, column) that a sample is to show, or None.

        Returns:
            (B, 8 + P): matrix (2x2) and offset (2) from the augmented image (of a `windowed`
            preprocessing, from the grid) to the native one, height and width of the augmented image
            (the grid), and the parameters of the intensity operations.
        """
        count = 11 + sum(operation.numbers for operation in self.operations)
        rows = []
        nothing = [None] * len(shapes)
        for position, shape, pixel, shown in zip(
            positions, shapes, pixels or nothing, about or nothing, strict=True
        ):
            u = uniforms(self.seed, AUGMENTATION, step=step, position=position, count=count)
            numbers = np.delete(u, _WINDOW), u[_WINDOW]
            rows.append(self._parameters(*numbers, shape, pixel, shown))
        return np.array(rows)

    def _parameters(
        self,
        u: Array,
        window: Array,
        shape: NDArray[np.integer],
        pixel: Pixel | None,
        about: tuple[int, int] | None,
    ) -> list[float]:
        """Return what `draw` returns for one sample."""
        view = View()
        drawn: list[float] = []
        for operation in self.operations:
            own, u = np.split(u, [operation.numbers])
            if isinstance(operation, Spatial):
                operation.move(view, own)
            elif isinstance(operation, Intensity):
                drawn += operation.draw(own)
        native, matrix = shape.astype(np.float64), view.matrix
        # An odd number of quarter turns exchanges height and width.
        turned = slice(None, None, -1 if matrix[0, 0] == 0 == matrix[1, 1] else 1)
        extent, centre = native[turned], (native - 1) / 2
        if self.preprocessing.windowed:
            image = self.preprocessing.resampled((int(shape[0]), int(shape[1])), pixel)
            resampled = np.array(image.shape[turned])
            room = resampled - self.preprocessing.sides
            lead = room // 2
            if self.operations:
                lead = np.where(room > 0, np.floor(window * (room + 1)), lead)
            matrix = np.array(image.step)[:, None] * matrix
            if about is not None:
                beside = centre + native * view.shift
                shown = np.linalg.solve(matrix, about - beside) + resampled / 2 - 0.5
                if (shown % 1).any():  # of a pixel at the border rounding could miss the image
                    last = np.maximum(native - 1 - WITHIN, centre)
                    within = np.clip(about, np.minimum(WITHIN, centre), last)
                    shown = np.linalg.solve(matrix, within - beside) + resampled / 2 - 0.5
                lead = _lead_about(shown, room, self.preprocessing.sides)
            offset = centre + matrix @ (lead + 0.5 - resampled / 2)
            extent = np.array(self.preprocessing.sides)
        else:
            offset = centre - matrix @ ((extent - 1) / 2)
        return [*matrix.ravel(), *(offset + native * view.shift), *extent, *drawn]

    def __call__(
        self, image: Tensor, label: Tensor, shapes: Tensor, parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Augment a batch and bring it onto the grid, all tensors on one device.

        Image (B, C, H, W) float32 is intensity-scaled, and like label (B, H, W) uint8 padded at the
        bottom and right; `shapes` (B, 2) are true sizes, `parameters` (B, 8 + P) are of `draw`.

        Returns:
            Image (B, C, S, T) float32 and label (B, S, T) int64.
        """
        if self.preprocessing.windowed:
            rows, columns = (
                torch.arange(side, device=image.device, dtype=precision(image.device))[None]
                for side in self.preprocessing.sides
            )
        else:
            rows, columns = self.preprocessing.grid_positions(parameters[:, _SHAPE])
        view = parameters[:, _MATRIX].to(rows.dtype), parameters[:, _OFFSET].to(rows.dtype)
        smooth = self.preprocessing.interpolation == "bilinear"
        grid, labels, inside = read_affine(
            image, label, shapes, (rows, columns), view, smooth=smooth, beyond=self.beyond
        )
        # one image at a time fits a CPU's cache, a batch does not
        size = 1 if image.device.type == "cpu" else len(image)
        parts = zip(*(x.split(size) for x in (grid, inside, parameters)), strict=True)
        return torch.cat([self._painted(*part) for part in parts]), labels.long()

    def _painted(self, grid: Tensor, inside: Tensor, parameters: Tensor) -> Tensor:
        """The images (B, C, S, T) with changed intensities, where they are `inside` (B, S, T)."""
        painted, drawn = grid, parameters[:, _DRAWN:, None, None, None].to(grid.dtype).movedim(1, 0)
        for operation in self.operations:
            if isinstance(operation, Intensity):
                own, drawn = drawn.tensor_split([operation.numbers])
                unit = self.preprocessing.intensity not in ("zscore", CT)
                painted = operation.paint(painted, own, unit=unit)
        return grid if painted is grid else torch.where(inside[:, None], painted, grid)


def _lead_about(shown: Array, room: Array, sides: tuple[int, int]) -> Array:
    """Where a grid of `sides` begins that has a position in its middle, or nearer the border.

    It lies within the image, or beyond it as far as the position would else not be seen. One of the
    grid's pixels is at the very position, so that a label of one pixel is not read past.
    """
    size = np.array(sides)
    middle = np.floor(shown - (size - 1) / 2)
    lead = np.where(room > 0, np.clip(middle, 0, room), room // 2)
    lead = np.clip(lead, np.ceil(shown) - size + 1, np.floor(shown))
    pixel = np.where(lead < np.maximum(room, 0), np.floor(shown - lead), np.ceil(shown - lead))
    return shown - pixel


def _rotation(degrees: float) -> Array:
    """Return the matrix with which scipy.ndimage.rotate reads, for axes (1, 0)."""
    cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[cosine, sine], [-sine, cosine]])
