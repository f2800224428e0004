"""Geometries in which an image may be larger than the grid: `spacing` and `native`."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import affine_transform
from torch.nn import functional

from mambaseg.data.augmentation import Augmentation
from mambaseg.data.counter import uniforms
from mambaseg.data.geometry import Preprocessing
from mambaseg.errors import UserError

sides = st.integers(1, 120)
millimetres = st.floats(0.3, 4.0)


def at(spacing, size):
    return Preprocessing("spacing", size, spacing=spacing)


def disc(height, width, pixel, centre=(0.0, 0.0), radius=20.0):
    """A disc in mm about the image's centre, on pixels of (y, x) mm, with soft edges."""
    y = (np.arange(height)[:, None] - (height - 1) / 2) * pixel[0] - centre[0]
    x = (np.arange(width)[None] - (width - 1) / 2) * pixel[1] - centre[1]
    return np.clip(radius + 0.5 - np.hypot(y, x), 0, 1).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(sides, sides),
    st.tuples(millimetres, millimetres),
    st.tuples(millimetres, millimetres),
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
)
def test_images_are_resampled_as_by_scipy_about_the_common_centre(shape, pixel, to, size):
    h, w = shape
    image = np.random.default_rng(h + w).random(shape, np.float32)
    grid = at(to, size).to_grid(torch.from_numpy(image)[None, None], pixel)[0, 0].numpy()
    step = np.round(np.array(to) / pixel, 6)
    counts = [max(1, round(side / s)) for side, s in zip(shape, step, strict=True)]
    assert grid.shape == tuple(map(max, size, counts))
    # the centre of the resampled pixels is the image's; the grid adds whole pixels around them
    first = [(count - side) // 2 for count, side in zip(counts, grid.shape, strict=True)]
    offset = [(n - 1) / 2 + s * (f - (count - 1) / 2)
              for n, s, f, count in zip((h, w), step, first, counts, strict=True)]  # fmt: skip
    expected = affine_transform(
        image, step, offset, output_shape=grid.shape, order=1, mode="grid-constant"
    )
    assert np.allclose(grid, expected, atol=1e-4)


def test_half_the_spacing_agrees_with_torchs_interpolation():
    image = torch.rand(2, 3, 50, 40)
    grid = at(0.75, 64).to_grid(image, (1.5, 1.5))
    reference = functional.interpolate(image, scale_factor=2, mode="bilinear")
    assert grid.shape == reference.shape == (2, 3, 100, 80)
    assert torch.allclose(grid[..., 1:-1, 1:-1], reference[..., 1:-1, 1:-1], atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.integers(1, 150), st.sampled_from([0.7, 1.25, 1.5625, 2.3]))
def test_at_the_files_own_spacing_nothing_is_interpolated(height, width, size, spacing):
    image = torch.rand(2, 2, height, width)
    stored = float(np.float32(spacing))  # as in a header
    for preprocessing in (at(spacing, size), Preprocessing("native", size)):
        grid = preprocessing.to_grid(image, (stored, stored))
        extent = max(size, height), max(size, width)
        top, left = (-(-(e - n) // 2) for e, n in zip(extent, (height, width), strict=True))
        below, right = extent[0] - height - top, extent[1] - width - left
        assert torch.equal(grid, functional.pad(image, (left, right, top, below)))

        label = torch.randint(0, 4, (2, *extent))
        logits = functional.one_hot(label, 4).permute(0, 3, 1, 2).float()
        native = label[:, top : top + height, left : left + width].to(torch.uint8)
        assert torch.equal(
            preprocessing.labels_to_native(logits, (height, width), (stored, stored)), native
        )


@settings(max_examples=40, deadline=None)
@given(sides, sides, millimetres, millimetres, millimetres, st.integers(1, 90))
def test_there_and_back_gives_the_native_shape(height, width, down, across, to, size):
    preprocessing, pixel = at(to, size), (down, across)
    grid = preprocessing.to_grid(torch.rand(1, 1, height, width) + 0.5, pixel)
    logits = torch.cat([1 - grid, grid, torch.zeros_like(grid)], dim=1)
    native = preprocessing.logits_to_native(logits, (height, width), pixel)
    labels = preprocessing.labels_to_native(logits, (height, width), pixel)
    assert native.shape == (1, 3, height, width) and labels.dtype == torch.uint8
    assert torch.equal(labels, native.argmax(1).to(torch.uint8))


def form(mask):
    """Area of a mask, and the ratio of its two principal axes."""
    small, large = np.linalg.eigvalsh(np.cov(np.argwhere(mask).T))
    return mask.sum(), np.sqrt(large / small)


def test_a_disc_is_round_on_square_pixels_and_an_ellipse_on_the_files_own():
    pixel = (1.0, 2.0)
    image = disc(90, 60, pixel)
    assert form(image > 0.5)[1] == pytest.approx(2, abs=0.1)
    for spacing in (0.8, 1.0, 1.5):
        grid = at(spacing, 32).to_grid(torch.from_numpy(image)[None, None], pixel)[0, 0].numpy()
        area, axes = form(grid > 0.5)
        assert axes == pytest.approx(1, abs=0.04)
        assert area * spacing**2 == pytest.approx(np.pi * 20**2, rel=0.03)
        logits = torch.from_numpy(np.stack([1 - grid, grid]))[None]
        back = at(spacing, 32).labels_to_native(logits, (90, 60), pixel)[0].numpy() == 1
        both = (back & (image > 0.5)).sum()
        assert 2 * both / (back.sum() + (image > 0.5).sum()) > 0.95


# Training: augmentation and the part of an image that the grid shows ------------------------------


def augmented(augmentation, image, pixel, step=0, count=1, label=None):
    """One native image (H, W) as `count` samples of a step -> (count, S, S) twice."""
    label = np.zeros(image.shape, np.uint8) if label is None else label
    shapes = np.array([image.shape] * count)
    parameters = augmentation.draw(step, range(count), shapes, [pixel] * count)
    grid, mask = augmentation(
        torch.from_numpy(image).expand(count, 1, *image.shape),
        torch.from_numpy(label).expand(count, *image.shape),
        torch.from_numpy(shapes), torch.from_numpy(parameters),
    )  # fmt: skip
    return grid[:, 0], mask


@pytest.mark.parametrize("preset", ["paper", "modern"])
def test_what_is_turned_stays_round_although_pixels_are_not_square(preset):
    augmentation, pixel = Augmentation(preset, at(1.0, 160), seed=3), (1.0, 2.0)
    grids, _ = augmented(augmentation, disc(120, 60, pixel), pixel, count=24)
    for grid in grids.numpy():
        assert form(grid > (grid.min() + grid.max()) / 2)[1] == pytest.approx(1, abs=0.05)


def test_without_augmentation_training_sees_the_middle_of_what_evaluation_sees():
    rng, pixel = np.random.default_rng(0), (1.1, 0.7)
    image = rng.random((71, 140), np.float32)
    oblong = at((0.9, 1.2), (40, 64))
    for preprocessing in (at(0.9, 40), at(0.9, 99), Preprocessing("native", 40), oblong):
        grid, _ = augmented(Augmentation("none", preprocessing, 0), image, pixel)
        whole = preprocessing.to_grid(torch.from_numpy(image)[None, None], pixel)[0, 0]
        height, width = preprocessing.sides
        top, left = (whole.shape[0] - height) // 2, (whole.shape[1] - width) // 2
        part = whole[top : top + height, left : left + width]
        assert torch.allclose(grid[0], part, atol=1e-5)
        assert torch.equal(grid[0], part) or preprocessing.size != 99  # where all of it is seen


def test_flips_and_quarter_turns_are_those_of_the_resampled_image():
    """Parts included: each is where the counter's next two numbers say, within the image."""
    size, pixel, seen = (24, 16), (1.0, 2.0), set()
    image = np.random.default_rng(1).random((60, 20), np.float32)  # 60 x 40 mm
    label = (image > 0.5).astype(np.uint8)
    augmentation = Augmentation("paper", at(1.0, size), seed=7)
    whole = at(1.0, size).to_grid(torch.from_numpy(image)[None, None], pixel)[0, 0].numpy()
    assert whole.shape == (60, 40)
    grids, masks = augmented(augmentation, image, pixel, step=5, count=96, label=label)
    for position, (grid, mask) in enumerate(zip(grids.numpy(), masks.numpy(), strict=True)):
        u = uniforms(7, 1, step=5, position=position, count=11)
        if u[0] >= 0.5 > u[3]:
            continue  # a rotation
        turns, axis = (int(4 * u[1]), int(2 * u[2])) if u[0] < 0.5 else (0, None)
        turned = np.rot90(whole, turns)
        turned = turned if axis is None else np.flip(turned, axis)
        room = np.array(turned.shape) - size
        top, left = np.floor(u[9:11] * (room + 1)).astype(int)
        part = turned[top : top + size[0], left : left + size[1]]
        assert np.allclose(grid, part, atol=1e-5)
        assert 0.2 < mask.mean() < 0.8
        seen.add((turns, axis))
    assert len(seen) == 9


def test_every_part_of_an_image_is_seen_and_none_beyond_it():
    augmentation = Augmentation("paper", Preprocessing("native", 8), seed=1)
    image = np.arange(1, 121, dtype=np.float32).reshape(10, 12)
    grids, _ = augmented(augmentation, image, None, count=400)
    us = [uniforms(1, 1, step=0, position=p, count=4) for p in range(400)]
    rotated = [u[0] >= 0.5 > u[3] for u in us]
    straight = grids[~torch.tensor(rotated)]
    assert straight.min() >= 1
    assert {*straight.flatten().tolist()} == {*range(1, 121)}
    corners = [{1.0, 12.0, 109.0, 120.0} & {*grid.flatten().tolist()} for grid in straight]
    assert np.mean([bool(one) for one in corners]) == pytest.approx(4 / 15, abs=0.08)


def test_existing_draws_are_not_changed_by_the_two_new_numbers():
    for step in range(5):
        old = uniforms(1337, 1, step=step, position=3, count=10)
        assert np.array_equal(old, uniforms(1337, 1, step=step, position=3, count=11)[:10])


# What cannot be resampled -------------------------------------------------------------------------


def test_an_unknown_voxel_size_is_said_with_the_remedy():
    with pytest.raises(UserError, match=r"voxel size is unknown.*1.25 mm.*native or modern"):
        at(1.25, 32).to_grid(torch.rand(1, 1, 8, 8))
    with pytest.raises(UserError, match="voxel size is unknown"):
        Augmentation("none", at(1.25, 32), 0).draw(0, [0], np.array([[8, 8]]))
    assert Preprocessing("native", 32).to_grid(torch.rand(1, 1, 8, 8)).shape[-1] == 32


def test_an_image_is_not_blown_up_beyond_all_use():
    with pytest.raises(UserError, match=r"512 × 512 pixels would become 51200 × 51200.*larger"):
        at(0.01, 32).to_grid(torch.rand(1, 1, 512, 512), (1.0, 1.0))


def test_the_logits_of_a_reduced_picture_lie_under_the_pixels_they_were_made_of():
    logits = torch.arange(10.0).expand(1, 1, 10, 10)
    found = Preprocessing("native", 8).logits_to_native(logits, (20, 20), seen=(10, 10))
    expected = ((torch.arange(20) + 0.5) / 2 - 0.5).clamp(0, 9)
    assert torch.allclose(found[0, 0], expected.expand(20, 20))
