"""What a command leaves in a terminal of 80 and of 160 columns, in a pipe, and with no colours."""

import json
import os
import re
import sys

import pytest
import rich

from runs import UNET, entered, small_overrides

pytest.importorskip("pty")  # Windows has none
from terminals import in_terminals

BAR = re.compile(r"[━╸╺]|step \d+/")
WORDS = [*UNET, "logger=csv", "trainer=cpu"]


@pytest.fixture(scope="module")
def seen(phantom_root, tmp_path_factory):
    place = tmp_path_factory.mktemp("terminal")
    words = [*WORDS, *small_overrides(phantom_root, "outputs")]
    steps = [*words, "data.steps=8"]
    long = [*words, "data.steps=4000", "data.val_every=20", "seed=5"]
    return in_terminals(
        {
            "80": {"words": [*steps, "test=false"], "columns": 80},
            "160": {
                "words": [*steps, "seed=2", "-m", "optim.optimizer.lr=0.01,1e30"],
                "columns": 160,
            },
            "stopped": {"words": long, "columns": 80, "at": "step 20 of 4000"},
        },
        place,
    )


@pytest.mark.parametrize("columns", ["80", "160"])
def test_every_validation_is_there_afterwards_and_no_bar(seen, columns):
    lines, text = seen[columns]["lines"], "\n".join(seen[columns]["lines"])
    assert seen[columns]["code"] == (columns == "160") and "━" in seen[columns]["drawn"]
    assert "step 0/8" in seen[columns]["drawn"] and "Epoch" not in seen[columns]["drawn"]
    for step in (2, 4, 6, 8):
        found = [
            line for line in lines if re.search(rf"step {step} of 8: val/dice \d\.\d{{4}}", line)
        ]
        assert len(found) == 1 and "best" in found[0]
        assert ("left" in found[0]) == (step < 8)
    assert not BAR.search(text)
    assert text.count("***") == 2  # the phantom, once


def test_a_run_says_what_it_is_and_what_can_be_typed_next(seen):
    text = "\n".join(seen["160"]["lines"])
    for line in (
        r"model:  unet, [\d,]+ parameters",
        r"optim:  SGD lr=0\.01 momentum=0\.9 weight_decay=0\.0001, PolynomialLR; loss DiceCE",
        r"budget: 8 steps, batches of 4, 32 × 32 pixels, validation every 2 steps",
        r"data:   synthetic phantom, not ACDC, split random-seed0 \(\w+\)",
        r"device: CPU, 1 thread, 32-true",
        r"val: 1 patient, 2 cases, \d+ slices",
    ):
        assert re.search(line, text)
    assert re.search(r"predict: .*predict.* run=\S+-seed2-\w{8} input=<images>", text)


def test_a_sweep_ends_with_one_table_and_the_command_of_its_report(seen):
    text = "\n".join(seen["160"]["lines"])
    table, after = text.split("outputs/default\n", 1)[1].split("report:")
    assert re.search(r"job +state +val/dice +test Dice +(test HD95 mm +)?time", table)
    assert re.search(r"lr=0\.01 +done +0\.\d{4}", table)
    assert re.search(r"lr=1e\+?30 +failed +–", table)
    assert "mambaseg report outputs/default" in after and "val/dice" not in after


def test_ctrl_c_in_the_middle_of_a_bar_leaves_lines_only(seen):
    text = "\n".join(seen["stopped"]["lines"])
    assert seen["stopped"]["code"] == 130 and not BAR.search(text)
    assert re.search(r"Ctrl-C: finishing and saving the current step", text)
    assert re.search(r"Stopped and saved at step \d+", text)


def test_an_error_in_the_middle_of_a_training_leaves_lines_and_the_error(seen):
    text = "\n".join(seen["160"]["lines"])
    assert re.search(r"the (loss|gradient) is not finite", text) and "Traceback" not in text


def test_a_pipe_gets_plain_lines(phantom_root, tmp_path, capsys, monkeypatch):
    long = tmp_path / ("long" * 30)
    assert entered("train.py", *WORDS, *small_overrides(phantom_root, long), "test=false") == 0
    lines = capsys.readouterr().out.splitlines()
    assert not BAR.search("\n".join(lines)) and "\x1b" not in "\n".join(lines)
    assert sum("val/dice" in line for line in lines) == 2
    assert any(str(long) in line and line[8] == " " for line in lines)  # not wrapped


def test_no_color_is_obeyed(monkeypatch):
    import io
    import logging

    import rich

    from mambaseg.app.terminal import Console

    monkeypatch.setenv("NO_COLOR", "1")
    stream = io.StringIO()
    console = rich.console.Console(file=stream, force_terminal=True, width=80)
    monkeypatch.setattr(rich, "get_console", lambda: console)
    Console().emit(logging.makeLogRecord({"msg": "[red]a[/red] 0.5 /some/path"}))
    assert stream.getvalue() == "[red]a[/red] 0.5 /some/path\n"


def test_a_training_goes_on_where_nobody_reads_its_output(phantom_root, tmp_path, monkeypatch):
    """As behind `| head`, which ends after its lines: no result is lost."""
    reader, writer = os.pipe()
    os.close(reader)
    words = [*WORDS, *small_overrides(phantom_root, tmp_path / "outputs"), "data.steps=4"]
    with monkeypatch.context() as patch, os.fdopen(writer, "w") as nobody:
        patch.setattr(sys, "stdout", nobody)
        patch.setattr(rich.get_console(), "quiet", False)  # and again afterwards
        assert entered("train.py", *words) == 0
    (record,) = tmp_path.glob("outputs/*/*/run.json")
    assert json.loads(record.read_text())["status"] == "done"
