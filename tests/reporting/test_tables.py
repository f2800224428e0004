import io

import numpy as np
import pytest
from rich.console import Console

from mambaseg.evaluation.metrics import score_case
from mambaseg.evaluation.summary import summarise
from mambaseg.reporting.tables import score_cells, score_table, to_markdown

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
    header, rows = score_cells(summary, NAMES)
    assert header == [
        "structure", "Dice", "HD95 mm", "ASSD mm", "NSD 2 mm", "missed", "false +",
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
    header, _ = score_cells(make_summary(spacings), NAMES)
    assert header[2:5] == ["HD95 vox", "ASSD vox", "NSD 1 vox"]


@pytest.mark.parametrize(("spacing", "unit"), [((8.0, 1.5, 1.5), "mm"), (None, "vox")])
def test_the_unit_follows_the_spacing_also_where_nothing_was_found(spacing, unit):
    truth = np.zeros((3, 8, 8), np.uint8)
    truth[:, 2:5, 2:5] = 1
    rows = score_case(np.zeros_like(truth), truth, num_classes=len(NAMES), spacing=spacing)
    summary = summarise([{"case": "a", "phase": None, **row} for row in rows], NAMES)
    assert score_cells(summary, NAMES)[0][2] == f"HD95 {unit}"
    del summary["convention"]["distances"]  # of a file written before it was recorded
    assert score_cells(summary, NAMES)[0][2] == f"HD95 {unit}"


def test_without_surface_scores_there_are_no_distances():
    header, _ = score_cells(make_summary([None, None], surface=False), NAMES)
    assert header == ["structure", "Dice", "missed", "false +"]


def test_a_structure_never_found_has_no_distance():
    empty = np.zeros_like(labels())
    rows = score_case(empty, labels(), num_classes=4, spacing=(10.0, 1.5, 1.5))
    _, cells = score_cells(summarise(rows, NAMES), NAMES)
    assert cells[0][:5] == ["RV", "0.000", "–", "–", "0.000"]
    assert cells[-2][-2:] == ["3", "0"]


@pytest.mark.parametrize(("spacing", "unit"), [((10.0, 1.5, 1.5), "2 mm"), (None, "1 vox")])
def test_the_terminal_table_fits_80_characters_uncut(spacing, unit):
    summary = make_summary([spacing] * 2)
    table = score_table(summary, title="unet · synthetic phantom, not ACDC", class_names=NAMES,
                        note="split random")  # fmt: skip
    text = printed(table, 80)
    for expected in ("synthetic phantom, not ACDC", "0.500 ± 0.707", "foreground", "missed",
                     "split random", "2 cases", "strict"):  # fmt: skip
        assert expected in text
    assert f"HD95 {unit[2:]}" in text and f"NSD {unit}" in text
    assert "…" not in text


def test_the_markdown_table_has_the_same_cells(summary):
    text = to_markdown(summary, class_names=NAMES, note="A note.")
    lines = text.splitlines()
    assert lines[0].startswith("| structure | Dice |")
    assert lines[1].count("---") == lines[0].count("|") - 1
    assert lines[5] == "| foreground | 0.833 | 0.00 | 0.00 | 0.833 | 1 | 0 |"
    assert "A note." in text and "2 cases" in text
