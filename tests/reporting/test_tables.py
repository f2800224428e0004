import io

import numpy as np
import pytest
from rich.console import Console

from mambaseg.evaluation.metrics import Metric, score_case
from mambaseg.evaluation.summary import summarise
from mambaseg.reporting.tables import run_grid, table_of

NAMES = ("background", "RV", "MYO", "LV")


def labels():
    """(4, 20, 20) with three nested or neighbouring boxes."""
    volume = np.zeros((4, 20, 20), np.uint8)
    volume[:, 4:16, 6:18] = 2
    volume[:, 7:13, 9:15] = 3
    volume[:, 6:12, 2:6] = 1
    return volume


@pytest.fixture
def summary():
    """Two cases: one perfect, one without its right ventricle."""
    return make_summary(spacings=[(10.0, 1.5, 1.5)] * 2)


def make_summary(spacings, **options):
    missing = np.where(labels() == 1, 0, labels())
    rows = []
    for prediction, spacing in zip((labels(), missing), spacings, strict=True):
        rows += score_case(prediction, labels(), num_classes=4, spacing=spacing, **options)
    return summarise(rows, NAMES)


def printed(table, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def test_structures_have_a_row_each_and_then_come_both_means(summary):
    grid = run_grid(summary, "a run", NAMES)
    header, rows = grid.header, grid.rows
    assert header == [
        "structure", "Dice", "HD95 mm", "ASSD mm", "NSD mm", "missed", "false +",
    ]  # fmt: skip
    assert rows == [
        ["RV", "0.500 ± 0.707", "0.00", "0.00", "0.500", "1", "0"],
        ["MYO", "1.000 ± 0.000", "0.00", "0.00", "1.000", "0", "0"],
        ["LV", "1.000 ± 0.000", "0.00", "0.00", "1.000", "0", "0"],
        ["foreground", "0.833", "0.00", "0.00", "0.833", "1", "0"],
        ["+ background", *rows[-1][1:5], "1", "0"],
    ]
    background = summary["classes"]["background"]["dice"]["mean"]
    assert rows[-1][1] == f"{(0.5 + 1 + 1 + background) / 4:.3f}"


@pytest.mark.parametrize("spacings", [[None, None], [(10.0, 1.5, 1.5), None]])
def test_distances_are_in_voxels_when_a_spacing_is_unknown(spacings):
    header = run_grid(make_summary(spacings), "a run", NAMES).header
    assert header[2:5] == ["HD95 vox", "ASSD vox", "NSD vox"]


@pytest.mark.parametrize(("spacing", "unit"), [((8.0, 1.5, 1.5), "mm"), (None, "vox")])
def test_the_unit_follows_the_spacing_also_where_nothing_was_found(spacing, unit):
    truth = np.zeros((3, 8, 8), np.uint8)
    truth[:, 2:5, 2:5] = 1
    rows = score_case(np.zeros_like(truth), truth, num_classes=len(NAMES), spacing=spacing)
    summary = summarise([{"case": "a", "phase": None, **row} for row in rows], NAMES)
    assert run_grid(summary, "a run", NAMES).header[2] == f"HD95 {unit}"
    del summary["convention"]["distances"]  # of a file written before it was recorded
    assert run_grid(summary, "a run", NAMES).header[2] == f"HD95 {unit}"


def test_without_surface_scores_there_are_no_distances():
    header = run_grid(make_summary([None, None], surface=False), "a run", NAMES).header
    assert header == ["structure", "Dice", "missed", "false +"]


def test_a_structure_never_found_has_no_distance():
    empty = np.zeros_like(labels())
    rows = score_case(empty, labels(), num_classes=4, spacing=(10.0, 1.5, 1.5))
    cells = run_grid(summarise(rows, NAMES), "a run", NAMES).rows
    assert cells[0][:5] == ["RV", "0.000", "–", "–", "0.000"]
    assert cells[-2][-2:] == ["3", "0"]


def test_metrics_that_find_no_room_in_the_terminal_are_named_below():
    names = [f"a_score_of_my_own_{index}" for index in range(4)]
    summary = make_summary([(10.0, 1.5, 1.5)] * 2)
    summary["metrics"] += [Metric(name, name).plain() for name in names]
    for part in (*summary["classes"].values(), summary["foreground"], summary["all"]):
        part |= {name: {"mean": 0.25, "sd": None, "count": 2, "classes": 3} for name in names}
    about = {"split": {"name": "s", "hash": "h", "note": ""}, "seen": {}, **summary}
    config = {"model": {"name": "unet"}, "data": {"title": "hearts", "class_names": NAMES}}
    text = printed(table_of(about, config), 80)
    assert "structure" in text and "foreground" in text and "…" not in text
    assert f"{names[3]} 0.250" in " ".join(text.split())
    assert [name for name in run_grid(about, "a run", NAMES).header if name in names] == names


def test_a_long_name_of_a_structure_keeps_its_row_and_its_dice():
    names = [*NAMES[:-1], "the left ventricle of the heart with all of its papillary muscles"]
    about = {"split": {"name": "s", "hash": "h", "note": ""}, "seen": {}}
    about |= make_summary([(10.0, 1.5, 1.5)] * 2)
    about["classes"][names[-1]] = about["classes"].pop(NAMES[-1])
    config = {"model": {"name": "unet"}, "data": {"title": "hearts", "class_names": names}}
    text = " ".join(printed(table_of(about, config), 120).split())
    assert f"{names[-1]} 1.000" in text and "structure Dice" in text


@pytest.mark.parametrize(("spacing", "unit"), [((10.0, 1.5, 1.5), "2 mm"), (None, "1 vox")])
def test_the_terminal_table_fits_80_characters_uncut(spacing, unit):
    summary = make_summary([spacing] * 2)
    grid = run_grid(summary, "unet · synthetic phantom, not ACDC", NAMES, ["split random"])
    text = printed(grid.terminal(), 80)
    for expected in ("synthetic phantom, not ACDC", "0.500 ± 0.707", "foreground", "missed",
                     "split random", "2 cases", "strict"):  # fmt: skip
        assert expected in text
    assert f"HD95 {unit[2:]}" in text and f"NSD at {unit}" in text
    assert "…" not in text


def test_the_markdown_table_has_the_same_cells(summary):
    text = run_grid(summary, "a run", NAMES, ["A note."]).markdown()
    lines = text.splitlines()[2:]
    assert lines[0].startswith("| structure | Dice |")
    assert lines[1].count("---") == lines[0].count("|") - 1
    assert lines[5] == "| foreground | 0.833 | 0.00 | 0.00 | 0.833 | 1 | 0 |"
    assert "A note." in text and "2 cases" in text
