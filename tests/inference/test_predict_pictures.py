"""Pictures without masks: colours, every ending, and labels on the pictures' own pixels."""

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from mambaseg.app.api import TrainedRun
from mambaseg.app.ensemble import restore_predictor
from mambaseg.data.formats.images import find_images, group_channels
from mambaseg.data.geometry import Preprocessing
from mambaseg.errors import UserError
from mambaseg.inference.arrays import volume_of
from mambaseg.inference.predictor import Options, Predictor
from mambaseg.inference.segment import Member, segment
from tiny_checkpoints import write_checkpoint

NAMES = ["background", "polyp"]


class Red(torch.nn.Module):
    """Foreground where red is above a half."""

    def forward(self, image):
        return torch.stack([0.5 - image[:, 0], image[:, 0] - 0.5], dim=1) * 20


def red(preset, size=64, longest_side=None):
    preprocessing = Preprocessing(preset, size, window=(0, 255), longest_side=longest_side)
    return Member(Red(), preprocessing)


def predict(members, place, output, **options):
    about = [{"model": "red", "preprocessing": one.preprocessing.describe()} for one in members]
    predictor = Predictor(members, channels=3, class_names=NAMES, made_by=about,
                          options=Options(**options))  # fmt: skip
    return predictor.predict(find_images(str(place), outside=output), output)


def scene(height, width):
    """A red ellipse off the centre on blue, and where it is."""
    rows, columns = np.mgrid[:height, :width]
    disc = (rows / height - 0.4) ** 2 / 0.06 + (columns / width - 0.6) ** 2 / 0.04 < 1
    return np.where(disc[..., None], (220, 40, 60), (30, 90, 140)).astype(np.uint8), disc


def labels_of(path):
    with Pillow.open(path) as picture:
        return np.asarray(picture)


@pytest.mark.parametrize("longest_side", [None, 128])
@pytest.mark.parametrize("preset", ["paper", "modern", "native"])
@pytest.mark.parametrize("shape", [(300, 200), (210, 420)], ids=str)
def test_labels_lie_on_the_pictures_own_pixels(preset, shape, longest_side, tmp_path):
    pixels, disc = scene(*shape)
    Pillow.fromarray(pixels).save(tmp_path / "a.png")
    members = [red(preset, longest_side=longest_side)]
    assert predict(members, tmp_path / "a.png", tmp_path / "out").done == ["a"]
    found = labels_of(tmp_path / "out" / "a.png") == 1
    assert found.shape == shape
    assert (found & disc).sum() / (found | disc).sum() > 0.93
    for axis in (0, 1):  # not even half a pixel of the grid aside
        middle, expected = (np.nonzero(mask)[axis].mean() for mask in (found, disc))
        assert abs(middle - expected) < 0.25 * max(shape) / 64


def test_networks_that_saw_other_sizes_are_averaged_on_the_pictures_pixels(tmp_path):
    pixels, disc = scene(240, 320)
    Pillow.fromarray(pixels).save(tmp_path / "a.png")
    members = [red("modern", longest_side=100), red("paper", longest_side=200), red("modern", 96)]
    members = [member._replace(views="all") for member in members]
    options = {"probabilities": True, "overlay": True}
    assert predict(members, tmp_path / "a.png", tmp_path / "out", **options).done == ["a"]
    found = labels_of(tmp_path / "out" / "a.png") == 1
    assert (found & disc).sum() / (found | disc).sum() > 0.95
    assert "longest_side" in (tmp_path / "out" / "a.json").read_text()


def test_a_network_is_shown_what_evaluation_shows_it(monkeypatch, tmp_path):
    """The same reduction, so the same picture, to the last bit."""
    from mambaseg.data.formats.pictures import read_pixels, reduced

    random = np.random.default_rng(0)
    Pillow.fromarray(random.integers(0, 255, (90, 130, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    member = red("modern", longest_side=50)
    shown = []

    def watched(members, images, **options):
        shown.extend(images)
        return segment(members, images, **options)

    monkeypatch.setattr("mambaseg.inference.predictor.segment", watched)
    assert predict([member], tmp_path / "a.png", tmp_path / "out").done == ["a"]
    cached = reduced(read_pixels(tmp_path / "a.png", 3), 50).astype(np.float32)
    assert np.array_equal(
        shown[0][0].numpy(), member.preprocessing.scale_intensity(cached[None])[0]
    )


def test_an_array_of_a_large_picture_gets_the_labels_of_its_file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (90, 130, 3), dtype=np.uint8)
    Pillow.fromarray(pixels).save(tmp_path / "a.png")
    member = red("modern", longest_side=50)
    about = [{"model": "red", "preprocessing": member.preprocessing.describe()}]
    run = TrainedRun(tmp_path, Predictor([member], channels=3, class_names=NAMES, made_by=about,
                                         options=Options()))  # fmt: skip
    array = run.predict(pixels.transpose(2, 0, 1)[None])
    assert np.array_equal(array[0], run.predict(tmp_path / "a.png")) and 0 < array.mean() < 1


@pytest.mark.parametrize("ending", ["jpg", "jpeg", "bmp", "tif", "png"])
def test_a_colour_picture_of_any_ending_is_predicted_by_a_network_for_colours(ending, tmp_path):
    path = write_checkpoint(tmp_path / "rgb.ckpt", channels=3, classes=NAMES)
    Pillow.fromarray(scene(40, 28)[0]).save(tmp_path / f"a.{ending}")
    Pillow.fromarray(scene(40, 28)[0][..., 0]).save(tmp_path / f"grey.{ending}")
    predictor = restore_predictor([path], device="cpu")
    outcome = predictor.predict(find_images(str(tmp_path), outside=tmp_path / "out"),
                                tmp_path / "out")  # fmt: skip
    assert outcome.failed == {} and sorted(outcome.done) == ["a", "grey"]
    assert labels_of(tmp_path / "out" / "a.png").shape == (40, 28)


def test_a_checkpoint_carries_the_size_that_pictures_are_reduced_to(tmp_path):
    preprocessing = Preprocessing("modern", 32, window=(0, 255), longest_side=96)
    path = write_checkpoint(tmp_path / "a.ckpt", channels=3, classes=NAMES,
                            preprocessing=preprocessing)  # fmt: skip
    predictor = restore_predictor([path], device="cpu")
    assert predictor.members[0].preprocessing == preprocessing
    for wrong in (0, -3, 10**9, "96", True):
        about = {**preprocessing.describe(), "longest_side": wrong}
        content = torch.load(path, weights_only=True)
        content["mambaseg"]["preprocessing"] = about
        torch.save(content, bad := tmp_path / "bad.ckpt")
        with pytest.raises(UserError, match="its longest_side"):
            restore_predictor([bad], device="cpu")


def test_a_picture_turned_by_exif_gets_labels_as_it_is_shown(tmp_path):
    pixels, disc = scene(60, 90)
    exif = Pillow.Exif()
    exif[274] = 6  # shown turned by a quarter, clockwise
    Pillow.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    predict([red("modern", 90)], tmp_path / "a.jpg", tmp_path / "out")
    found = labels_of(tmp_path / "out" / "a.png") == 1
    assert found.shape == (90, 60)
    assert (found == np.rot90(disc, -1)).mean() > 0.97


@pytest.mark.parametrize("count", [2, 3, 4])
def test_numbered_grey_pictures_are_no_channels_of_a_network_that_reduces_pictures(count, tmp_path):
    for number in range(count):
        grey = np.random.default_rng(number).integers(0, 255, (20, 30), dtype=np.uint8)
        Pillow.fromarray(grey).save(tmp_path / f"video_{number:04d}.png")
    about = [{"model": "red", "preprocessing": {}}]
    predictor = Predictor([red("modern", longest_side=512)], channels=3, class_names=NAMES,
                          made_by=about, options=Options())  # fmt: skip
    sources = group_channels(find_images(str(tmp_path), outside=tmp_path / "out"), 3)
    outcome = predictor.predict(sources, tmp_path / "out")
    assert outcome.failed == {} and outcome.done == [f"video_{n:04d}" for n in range(count)]
    run = TrainedRun(tmp_path, predictor)
    for name in outcome.done:
        labels = labels_of(tmp_path / "out" / f"{name}.png")
        assert np.array_equal(labels, run.predict(tmp_path / f"{name}.png"))
    with pytest.raises(UserError, match=r"holds . images|is one of 3 pictures"):
        run.predict(tmp_path)


def test_files_of_channels_stay_one_image_of_a_network_that_reduces_none(tmp_path):
    planes = scene(20, 30)[0].transpose(2, 0, 1)
    for number, plane in enumerate(planes):
        Pillow.fromarray(plane).save(tmp_path / f"a_{number:04d}.png")
    predictor = Predictor([red("modern")], channels=3, class_names=NAMES,
                          made_by=[{"model": "red"}], options=Options())  # fmt: skip
    sources = group_channels(find_images(str(tmp_path), outside=tmp_path / "out"), 3)
    assert predictor.predict(sources, tmp_path / "out").done == ["a"]
    run = TrainedRun(tmp_path, predictor)
    assert np.array_equal(labels_of(tmp_path / "out" / "a.png"), run.predict(planes[None])[0])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, ">u2", bool])
@pytest.mark.parametrize("shape", [(40, 30), (1, 40, 30), (1, 1, 40, 30)], ids=str)
def test_an_array_of_any_greys_gets_the_labels_of_its_file(dtype, shape, tmp_path):
    grey = np.random.default_rng(0).integers(0, 2**16, (40, 30)).astype(np.uint16)
    grey = grey > 30000 if dtype is bool else grey if dtype != np.uint8 else grey // 256
    grey = grey.astype(dtype)
    place = tmp_path / ("a.tif" if dtype == ">u2" else "a.png")
    Pillow.fromarray(grey).save(place)
    with Pillow.open(place) as picture:
        array = np.asarray(picture)
    assert array.dtype == dtype
    predictor = Predictor([red("native")], channels=1, class_names=NAMES,
                          made_by=[{"model": "red"}], options=Options())  # fmt: skip
    run = TrainedRun(tmp_path, predictor)
    expected = run.predict(place)
    assert np.array_equal(run.predict(array.reshape(shape)).reshape(40, 30), expected)
    assert 0.2 < expected.mean() < 0.8


def test_a_slice_of_a_scan_keeps_its_grey_values():
    grey = np.full((4, 4), 514, np.uint16)
    assert volume_of(grey, channels=1).image.max() == 2
    assert volume_of(grey, channels=1, spacing=(8, 1, 1)).image.max() == 514
    assert volume_of(np.stack([grey] * 2), channels=1).image.max() == 514
