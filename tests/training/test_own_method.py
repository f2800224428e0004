"""A learning method from outside the package: one file and one config, those of docs/methods.md."""

import csv
import re
from pathlib import Path

import pytest

from mambaseg.app.entry import CONF
from mambaseg.storage.run_folder import RunFolder
from runs import entered

PAGE = (CONF.parent / "docs" / "methods.md").read_text("utf-8")


@pytest.fixture
def project(tmp_path):
    """A folder with the two files of the page."""
    for language in ("python", "yaml"):
        pattern = rf"```{language}\n# (\S+)\n(.*?)```"
        (name, text), = re.findall(pattern, PAGE, re.DOTALL)  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_method_of_a_foreign_file_trains(project, small_run, capfd):
    words = ["--config-dir=conf", *small_run, "method=smooth", "data.labelled=2", "data.steps=2",
             "method.weight=0.5", "model=unet", "model.widths=[4,8]", "model.dropout=[0,0]",
             "logger=csv", "callbacks.progress=null", "trainer=cpu"]  # fmt: skip
    assert entered("train.py", *words, cwd=project) == 0
    (record,) = Path(next(w for w in small_run if w.startswith("outputs="))[8:]).glob(
        "*/*/run.json"
    )
    run = RunFolder(record.parent)
    assert run.finished
    with (run.path / "metrics.csv").open() as file:
        names = {name for row in csv.DictReader(file) for name, value in row.items() if value}
    assert {"train/loss", "train/supervised", "train/rough", "val/dice"} <= names
    assert entered("train.py", *words, "method.weigth=1", cwd=project) == 1
    assert "did you mean method.weight?" in capfd.readouterr().err
    assert entered("train.py", *words, "method.partner=unet", cwd=project) == 1
    assert "Smooth trains 1 network(s), not 2" in capfd.readouterr().err
