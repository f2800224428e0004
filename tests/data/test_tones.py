"""nnU-Net's changes of intensity."""

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from scipy.ndimage import gaussian_filter1d

from mambaseg.app.entry import CONF
from mambaseg.data.augmentation import Augmentation
from mambaseg.data.geometry import Preprocessing
from mambaseg.data.tones import Blur, Brightness, Contrast, Gamma, LowResolution, Noise, about_one

KINDS = (Noise, Blur, Brightness, Contrast, LowResolution, Gamma)


def images(count=3, side=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, side, side, generator=generator)


def numbers(*rows):
    return torch.tensor(rows)[:, :, None, None, None]


@pytest.mark.parametrize("kind", KINDS)
def test_only_chosen_samples_change_and_each_as_it_does_alone(kind):
    operation, u = kind(probability=0.5), np.random.default_rng(1).random((3, kind.numbers))
    u[:, 0] = 0.2, 0.7, 0.4
    drawn = torch.tensor([operation.draw(row) for row in u]).float()
    drawn = drawn.T[:, :, None, None, None]
    image = images()
    changed = operation.paint(image, drawn, unit=False)
    assert torch.equal(changed[1], image[1])
    for place in (0, 2):
        assert not torch.allclose(changed[place], image[place], atol=1e-3)
        alone = operation.paint(image[place : place + 1], drawn[:, place : place + 1], unit=False)
        torch.testing.assert_close(alone[0], changed[place])
    assert operation.paint(image[1:2], drawn[:, 1:2], unit=False).equal(image[1:2])


def test_the_blur_is_a_gaussian_of_its_own_width_along_each_axis():
    image = images(2)
    blurred = Blur(sigma=(0.5, 1.0)).change(image, numbers([0.0, 1.0], [0.5, 0.2]))
    for place, (down, across) in enumerate([(0.5, 0.75), (1.0, 0.6)]):
        expected = image[place].numpy()
        for sigma, axis in ((down, -2), (across, -1)):
            expected = gaussian_filter1d(expected, sigma, axis, mode="nearest", radius=3)
        torch.testing.assert_close(blurred[place].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_low_resolution_is_nearest_down_and_bilinear_up():
    ramp = torch.arange(20.0).expand(2, 1, 20, 20)  # of ten columns the odd ones are taken
    half, more = LowResolution(smallest=0.5).change(ramp, numbers([0.0, 0.63]))
    torch.testing.assert_close(half[0], (ramp[0, 0] + 0.5).clamp(1, 19))
    assert (more[0] - ramp[0, 0]).abs().max() <= 0.8 and not torch.equal(more, ramp[0])
    torch.testing.assert_close(
        LowResolution(smallest=0.5).change(ramp.mT, numbers([0.0, 0.63]))[0, 0], half[0].T
    )


def test_tone_keeps_what_it_promises():
    image = images(2)
    contrast = Contrast().change(image, numbers([0.1, 0.9], [0.0, 1.0]))
    assert torch.equal(contrast.amax((1, 2, 3)) <= image.amax((1, 2, 3)), torch.tensor([True] * 2))
    assert (contrast.std((1, 2, 3)) < image.std((1, 2, 3))).tolist() == [True, False]
    torch.testing.assert_close(
        Brightness().change(image, numbers([0.9] * 2, [0.5] * 2)), 1.125 * image
    )
    for inverted in (False, True):
        gamma = Gamma(inverted=inverted).change(image, numbers([0.9] * 2, [1.0] * 2))
        for statistic in (torch.mean, torch.std):
            torch.testing.assert_close(statistic(gamma, (1, 2, 3)), statistic(image, (1, 2, 3)),
                                       rtol=1e-4, atol=1e-5)  # fmt: skip
    noise = Noise(most=0.1).change(image, numbers([1.0, 1.0], [0.3, 0.4])) - image
    torch.testing.assert_close(noise.std((1, 2, 3)) / image.std((1, 2, 3)), torch.full((2,), 0.1),
                               rtol=0.1, atol=0)  # fmt: skip
    assert not torch.allclose(noise[0], noise[1])


def test_the_preset_is_a_function_of_seed_step_and_place_with_nnunets_probabilities():
    preset = OmegaConf.load(CONF / "augmentation" / "nnunet.yaml")
    preset.rotate.degrees = 180  # of a square
    operations = {name: instantiate(one) for name, one in preset.items()}
    augmentation = Augmentation(operations, Preprocessing("native", 16, "zscore"), seed=4)
    assert augmentation.views == "flips"
    shapes = np.full((400, 2), 24)
    drawn = augmentation.draw(0, range(400), shapes)
    columns, at = {}, 8
    for name, operation in operations.items():
        if not hasattr(operation, "move"):
            columns[name], at = drawn[:, at].mean(), at + operation.numbers
    expected = {"noise": 0.1, "blur": 0.1, "brightness": 0.15, "contrast": 0.15,
                "low_resolution": 0.125, "gamma_inverted": 0.1, "gamma": 0.3}  # fmt: skip
    assert columns == pytest.approx(expected, abs=0.05)
    rigid = np.isclose(np.abs(drawn[:, :4]).sum(1), 2) & np.isclose(np.abs(drawn[:, 0]), 1)
    assert rigid.mean() == pytest.approx(0.64, abs=0.08)
    image, label = images(4), torch.ones(4, 24, 24, dtype=torch.uint8)
    given = torch.tensor(shapes[:4]), torch.from_numpy(drawn[:4])
    one, other = augmentation(image, label, *given), augmentation(image, label, *given)
    assert torch.equal(one[0], other[0]) and one[0].shape == (4, 2, 16, 16)


def test_factors_are_below_one_as_often_as_above():
    coins = torch.arange(0.05, 1, 0.1)
    factors = about_one((0.5, 2.0), coins, torch.full((10,), 0.5))
    assert factors.tolist() == [0.75] * 5 + [1.5] * 5
