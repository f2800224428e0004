"""The contact sheet of data-check: one slice of each case with the outlines of its labels."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from tiny_acdc import write_patient

from mambaseg.app.commands.check import main
from mambaseg.data.case import Case
from mambaseg.data.check import check_dataset, sheet
from mambaseg.data.check.dataset import Examined
from mambaseg.data.classes import IGNORED
from mambaseg.data.volume import Volume


@pytest.fixture
def root(tmp_path):
    for number in (1, 2, 3):
        write_patient(tmp_path / "set" / f"patient00{number}", seed=number)
    return tmp_path / "set"


def test_the_command_writes_a_sheet_and_never_over_a_file(root, tmp_path, capsys):
    path = tmp_path / "labels.png"
    assert main([str(root), "--sheet", str(path)]) == 0
    assert "6 of 6 cases" in capsys.readouterr().out
    with Image.open(path) as picture:
        assert picture.width > picture.height > 100
    before = path.read_bytes()
    for other, problem in ((path, "is there already"), (tmp_path / "labels.pdf", "is a picture")):
        assert main([str(root), "--sheet", str(other)]) == 1
        assert problem in capsys.readouterr().out
    assert path.read_bytes() == before
    assert sorted(one.name for one in tmp_path.iterdir()) == ["labels.png", "set"]


def test_a_sheet_holds_so_many_cases_and_says_so(root, tmp_path, monkeypatch):
    monkeypatch.setattr(sheet, "MOST", 4)
    said = sheet.write_sheet(check_dataset(root), tmp_path / "labels.png")
    assert "4 of 6 cases (a sheet holds 4)" in said


def test_pixels_without_a_label_are_hatched_and_have_no_outline(tmp_path):
    label = np.full((1, 6, 6), IGNORED, np.uint8)
    label[0, 2:4, 1:5], label[0, 5] = 2, 0
    volume = Volume(np.zeros((1, 1, 6, 6), np.float32), label)
    case = Case("a", "a", None, None, tmp_path, tmp_path, lambda case: volume, ignore=IGNORED)
    axis = Figure().subplots()
    sheet._draw(axis, Examined(case), {2: "#ffffff"})
    hatched, outline = axis.collections
    assert hatched.hatches == [sheet._HATCH] and not outline.hatches[0]
    outer, hole = (path[:, 1] for path in hatched.get_paths()[0].to_polygons())
    assert (outer.min(), outer.max()) == (0, 5) and (hole.min(), hole.max()) == (2, 4)


def test_outlines_lie_on_the_labels_at_the_images_own_proportions(root, monkeypatch):
    one = check_dataset(root).examined[0]
    volume = one.case.load()
    label = np.zeros_like(volume.label)
    label[1, 2:4, 1:5] = 2  # rows 2 and 3, columns 1 to 4 of the second slice
    label[0, 0, 0] = 1

    def load(case):
        image = np.zeros_like(label[:, None], np.float32)
        return volume.__class__(image=image, label=label, spacing=(10.0, 2.0, 1.5))

    monkeypatch.setattr(type(one.case), "load", load)
    axis = Figure().subplots()
    sheet._draw(axis, one, {1: "#000000", 2: "#ffffff"})
    assert axis.get_title().endswith(f"slice 2 of {len(label)}")
    assert axis.get_aspect() == 1  # in mm
    assert axis.get_xlim() == (0, 1.5 * label.shape[2])
    assert axis.get_ylim() == (2.0 * label.shape[1], 0)  # the first row is on top
    (outline,) = axis.collections  # class 1 is not in this slice
    box = outline.get_paths()[0].get_extents()
    # half a pixel around, at most: rows of 2 mm, columns of 1.5 mm
    assert (box.x0, box.x1) == pytest.approx((1.5, 7.5))
    assert (box.y0, box.y1) == pytest.approx((4.0, 8.0))
