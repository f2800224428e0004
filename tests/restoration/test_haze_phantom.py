import numpy as np
import pytest
from PIL import Image

from mambaseg.errors import UserError
from mambaseg.restoration.phantom import (
    FAR,
    add_haze,
    draw_scene,
    transmission,
    write_haze_phantom,
)


@pytest.fixture
def clear():
    return np.random.default_rng(0).uniform(size=(5, 7, 3))


def test_haze_is_the_scattering_model_pixel_by_pixel(clear):
    depth = np.linspace(0, 2, 35).reshape(5, 7)
    hazy = add_haze(clear, transmission(depth, 1.3), 0.9)
    t = np.exp(-1.3 * depth[3, 4])
    assert hazy[3, 4] == pytest.approx(clear[3, 4] * t + 0.9 * (1 - t))


def test_without_scattering_the_image_is_clear_and_far_away_all_is_airlight(clear):
    assert np.array_equal(add_haze(clear, transmission(np.full((5, 7), 3.0), 0.0), 0.8), clear)
    assert np.array_equal(add_haze(clear, transmission(np.zeros((5, 7)), 1.5), 0.8), clear)
    far = add_haze(clear, transmission(np.full((5, 7), 60.0), 1.5), 0.8)
    assert far == pytest.approx(np.full_like(clear, 0.8), abs=1e-12)


def test_a_scene_has_depth_from_the_ground_before_us_to_the_sky():
    image, depth = draw_scene(np.random.default_rng(1), 60, 80)
    assert image.shape == (60, 80, 3) and image.min() >= 0 and image.max() <= 1
    assert depth.min() > 0 and depth.max() == FAR and image.std() > 0.1
    assert (depth[0] >= depth[-1]).all() and len(np.unique(depth)) > 20


def test_the_folder_is_a_function_of_its_parameters_and_says_that_it_is_synthetic(tmp_path):
    options = {"seed": 1, "height": 24, "width": 32}
    one = write_haze_phantom(tmp_path / "one", scenes=3, **options)
    more = write_haze_phantom(tmp_path / "more", scenes=4, **options)
    names = sorted(path.relative_to(one) for path in one.rglob("*.png"))
    assert len(names) == 3 + 3 * 3
    for name in names:
        assert (one / name).read_bytes() == (more / name).read_bytes()
    assert "no photographs" in (one / "SYNTHETIC.md").read_text()
    assert write_haze_phantom(one, scenes=3, **options) == one  # there already
    with pytest.raises(UserError, match="seed 1 ≠ 2"):
        write_haze_phantom(one, scenes=3, **{**options, "seed": 2})


def test_from_a_pair_its_depth_and_its_beta_follows_one_airlight(tmp_path):
    root = write_haze_phantom(tmp_path / "data", scenes=3, height=48, width=64)
    for path in sorted((root / "hazy").iterdir()):
        clear = np.asarray(Image.open(root / "clear" / f"{path.name.split('_')[0]}.png"), float)
        hazy = np.asarray(Image.open(path), float)
        number, _, beta = path.stem.split("_")
        _, depth = draw_scene(np.random.default_rng([0, int(number)]), 48, 64)
        t = np.exp(-float(beta) * depth)[..., None]
        airlight = ((hazy - clear * t) / (1 - t) / 255)[depth > 0.3]
        assert 0.7 <= airlight.mean() <= 1.0
        assert np.abs(airlight - airlight.mean()).max() < 0.02  # 8 bits, amplified
