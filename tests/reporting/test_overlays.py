"""Pictures of patients in a report: which ones, what is told of them, and their proportions."""

import base64
import io

import numpy as np
import pytest
import torch
from fake_runs import write_run
from PIL import Image

from mambaseg.reporting.cards import deck
from mambaseg.reporting.collect import collect
from mambaseg.reporting.figures import case_slices, draw_cases
from mambaseg.reporting.overlays import overlay_pictures
from mambaseg.reporting.scores import best_middle_worst, patient_scores
from mambaseg.reporting.views import SegmentationViews

NAMES = ("background", "RV", "MYO", "LV")


@pytest.mark.parametrize(
    ("patients", "places"),
    [((1,), ["best"]), ((1, 2), ["best", "worst"]), ((1, 2, 3), ["best", "median", "worst"])],
)
def test_a_patient_is_shown_once(tmp_path, patients, places):
    write_run(tmp_path, patients=patients, size=16)
    ((comparison,), _, _) = collect(tmp_path)
    assert list(best_middle_worst(comparison.entries)) == places
    pictures = overlay_pictures(comparison, tmp_path / "figures", "")
    assert [picture.title for picture in pictures] == [f"The {place} patient" for place in places]


def test_a_caption_tells_the_mean_by_which_its_patient_was_chosen(tmp_path):
    write_run(tmp_path, "unet", patients=(1, 2), size=16, error=0.1)
    path = write_run(tmp_path, "mamba_unet", patients=(1, 2), size=16, error=0.9)
    (path / "overlays.npz").unlink()
    ((comparison,), _, _) = collect(tmp_path)
    both = [patient_scores(entry, "dice") for entry in comparison.entries]
    for picture in overlay_pictures(comparison, tmp_path / "figures", ""):
        patient = picture.caption.partition(":")[0]
        mean = sum(own[patient] for own in both) / 2
        assert f"mean foreground Dice {mean:.3f} over networks" in picture.caption


def kept(aspect=None):
    """Slices of a disc (3, 30, 40)."""
    y, x = np.mgrid[:30, :40]
    disc = np.repeat((np.hypot(y - 15, x - 20) < 8)[None].astype(np.uint8), 3, axis=0)
    return case_slices(disc, disc, disc, aspect)


def card_size(aspect):
    cards = deck({"": {"a": kept(aspect)}}, headings={"a": "a"}, class_names=NAMES).cards
    return Image.open(io.BytesIO(base64.b64decode(cards[0].png))).size


def test_pictures_and_cards_have_the_proportions_of_the_body(tmp_path):
    (width, height), (wide, same), (narrow, tall) = map(card_size, (None, 0.5, 2.0))
    gap = 2 * 3  # between cells
    assert (narrow, tall - gap) == (width, 2 * (height - gap))
    assert (wide - gap, same) == (2 * (width - gap) + 2, height)
    assert card_size(1.0) == (width, height)
    for value in (1e9, 1e-9):
        assert max(card_size(value)) < 3100  # a file may say anything
    shapes = []
    for name, aspect in (("square", None), ("tall", 2.0)):
        path = draw_cases({"": {"a": kept(aspect)}}, headings={"a": "a"}, class_names=NAMES,
                          path=tmp_path / f"{name}.png")  # fmt: skip
        shapes.append(Image.open(path).size)
    assert shapes[0][0] == shapes[1][0] and shapes[1][1] > 1.6 * shapes[0][1]


def test_a_run_keeps_the_aspect_and_a_report_reads_it(tmp_path):
    path = write_run(tmp_path, patients=(1,), size=16)

    def sizes():
        ((comparison,), _, _) = collect(tmp_path)
        (picture,) = overlay_pictures(comparison, tmp_path / "figures", "")
        return Image.open(io.BytesIO(base64.b64decode(picture.deck.cards[0].png))).size

    square = sizes()  # of an earlier version
    labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
    batch = {"image": torch.zeros(1, 1, 4, 4), "label": labels, "spacing": (8.0, 3.0, 1.0)}
    aspect = SegmentationViews(NAMES).keep(batch, {"prediction": labels})["overlay"]["aspect"]
    assert aspect == 3 and aspect.shape == ()
    with np.load(path / "overlays.npz") as file:
        arrays = dict(file)
    cases = {name.partition("/")[0] for name in arrays}
    for value in (aspect, np.array(np.nan, np.float32)):
        more = {f"{case}/aspect": value for case in cases}
        np.savez(path / "overlays.npz", **arrays, **more)
        if np.isnan(value):
            assert not overlay_pictures(collect(tmp_path)[0][0], tmp_path / "figures", "")
        else:
            assert sizes()[0] == square[0] and sizes()[1] > 2.5 * square[1]
