import struct

import matplotlib._pylab_helpers
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from mambaseg.data.classes import IGNORED, UNLABELLED
from mambaseg.errors import UserError
from mambaseg.reporting import figures
from mambaseg.reporting.cards import deck
from mambaseg.reporting.figures import _error_map, case_slices, draw_cases, overlay
from mambaseg.reporting.views import SegmentationViews
from mambaseg.storage.colours import CLASS_COLOURS

NAMES = ("background", "RV", "MYO", "LV")


@pytest.fixture
def case():
    """Image, truth and prediction (9, 40, 50): discs that shrink from base to apex."""
    y, x = np.mgrid[:40, :50]
    distance = np.hypot(y - 20, x - 25)
    truth = np.zeros((9, 40, 50), np.uint8)
    for z in range(1, 9):
        truth[z][distance < 13 - z] = 2
        truth[z][distance < 9 - z] = 3
    image = np.random.default_rng(0).normal(100, 20, truth.shape) + 50 * truth
    return image, truth, np.roll(truth, 2, axis=2)


def size(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


def count_near(path, colour):
    rgb = imread(path)[..., :3]
    return int((np.abs(rgb - to_rgb(colour)).max(-1) < 0.12).sum())


def write(case, path, **options):
    options = {"class_names": NAMES, "title": "case · phantom", "path": path, **options}
    shown = {"": {"prediction": case_slices(*case)}}
    return draw_cases(shown, headings={"prediction": "prediction"}, **options)


def test_a_picture_is_written_and_no_global_figure_is_left(case, tmp_path):
    path = tmp_path / "new folder" / "case.png"
    assert write(case, path) == path
    assert [entry.name for entry in path.parent.iterdir()] == ["case.png"]
    assert min(size(path)) > 500
    assert not matplotlib._pylab_helpers.Gcf.figs


@pytest.mark.parametrize("kind", list(figures.ERROR_COLOURS))
def test_each_kind_of_error_shows_in_its_colour(case, tmp_path, kind):
    image, truth, _ = case
    wrong = {
        "false positive": np.where(truth == 0, 2, truth),
        "false negative": np.where(truth == 2, 0, truth),
        "wrong class": np.where(truth == 2, 3, truth),
    }[kind]
    colour = figures.ERROR_COLOURS[kind]
    right = count_near(write((image, truth, truth), tmp_path / "right.png"), colour)
    shown = count_near(write((image, truth, wrong), tmp_path / "wrong.png"), colour)
    assert shown > right + 2000


def test_without_truth_there_is_image_and_prediction_only(case, tmp_path):
    image, _, prediction = case
    full = size(write(case, tmp_path / "full.png"))
    part = size(write((image, None, prediction), tmp_path / "part.png"))
    assert part[0] < 0.6 * full[0]


@pytest.mark.parametrize("shape", [(1, 16, 20), (2, 16, 20)])
def test_empty_and_thin_volumes_are_drawn(shape, tmp_path):
    empty = np.zeros(shape, np.uint8)
    image = np.zeros(shape)
    assert size(write((image, empty, empty), tmp_path / "case.png"))[0] > 500


def test_a_failure_leaves_the_old_picture(case, tmp_path, monkeypatch):
    path = write(case, tmp_path / "case.png")
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(UserError, match="disk full"):
        write(case, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["case.png"]


def test_errors_are_told_apart():
    truth = np.array([[0, 0, 1, 1, 2]])
    prediction = np.array([[0, 3, 0, 1, 1]])
    assert _error_map(truth, prediction).tolist() == [[0, 1, 2, 0, 3]]


def test_the_overlay_tints_labels_and_leaves_the_background():
    rgb = overlay(np.array([[0.5, 0.5]]), np.array([[0, 2]]), ("#FF0000", "#0000FF"), tint=0.5)
    np.testing.assert_allclose(rgb, [[[0.5, 0.5, 0.5], [0.25, 0.25, 0.75]]])


def test_what_has_no_label_is_striped_and_no_error(case, tmp_path):
    assert (figures.IGNORED, figures.UNLABELLED) == (IGNORED, UNLABELLED)
    grey, labels = np.full((12, 12), 0.2), np.full((12, 12), IGNORED)
    striped = (overlay(grey, labels, CLASS_COLOURS) != 0.2).any(-1)
    assert 0.2 < striped.mean() < 0.5
    image, truth, prediction = case
    truth[0], truth[:, :20] = 0, IGNORED
    plain = write((image, np.where(truth == IGNORED, 0, truth), prediction), tmp_path / "plain.png")
    drawn = write((image, truth, prediction), tmp_path / "open.png")
    assert count_near(drawn, figures.HATCH) > count_near(plain, figures.HATCH) + 500
    kept = case_slices(image, truth, prediction)
    assert set(kept["slices"]) <= set(range(1, 9))  # those with structures, not all
    errors = _error_map(kept["truth"], kept["prediction"])
    assert (errors[kept["truth"] == IGNORED] == IGNORED).all()
    names = [{"": {"a": kept}}, {"": {"a": {**kept, "truth": kept["prediction"]}}}]
    legends = [deck(cases, headings={"a": "a"}, class_names=NAMES).legend for cases in names]
    assert [UNLABELLED in legend for legend in legends] == [True, False]
    views = SegmentationViews(NAMES)
    masks = [views.media({"overlay": cases[""]["a"]})["masks"] for cases in names]
    assert [own["truth"]["class_labels"].get(IGNORED) for own in masks] == [UNLABELLED, None]


def test_all_colours_of_thirteen_classes_and_errors_differ():
    colours = [*CLASS_COLOURS, *figures.ERROR_COLOURS.values(), figures.HATCH]
    rgb = np.array([to_rgb(colour) for colour in colours])
    apart = np.abs(rgb[:, None] - rgb).max(-1) + np.eye(len(rgb))
    assert len(CLASS_COLOURS) >= 13 and apart.min() > 0.15
    light = rgb @ (0.2126, 0.7152, 0.0722)
    assert light.min() > 0.1 and light.max() < 0.9  # neither black nor white
    names = ["background", *map(str, range(13))]
    assert len(set(figures.class_colours(names, errors=True).values())) == 16
