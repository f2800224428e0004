"""Notebooks run from top to bottom; their stored outputs are small, and of the phantom."""

import json
import re
import warnings
from pathlib import Path

import pytest

import mambaseg
from mambaseg.app import api
from runs import UNET

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
LARGEST = 700_000  # bytes of a notebook with its outputs
SMALL = (*UNET, "data.size=32", "data.steps=4", "data.val_every=4")


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def code_cells(path):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    """With trainings of four steps."""
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setattr(mambaseg, "train", lambda *words: api.train(*words, *SMALL))
    sources = ["".join(cell["source"]) for cell in code_cells(path)]
    if path.stem == "03_read_a_sweep":
        steps = "tiny_run(folder, name, network, cases, steps=20)"
        assert sum(source.count(steps) for source in sources) == 1
        sources = [source.replace(steps, steps.replace("20", "4")) for source in sources]
    namespace = {}
    with warnings.catch_warnings():
        # of numpy, where a tensor is drawn: it would stand among the stored outputs
        warnings.filterwarnings("error", "__array__ implementation doesn't accept a copy")
        for source in sources:
            exec(compile(source, path.name, "exec"), namespace)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_small_and_say_nothing_of_a_machine(path):
    assert path.stat().st_size < LARGEST
    for cell in code_cells(path):
        figures = 0
        for output in cell["outputs"]:
            assert output["output_type"] in ("display_data", "execute_result")  # no error, no log
            figures += "image/png" in output["data"]
            text = "".join(output["data"].get("text/plain", ""))
            assert not re.search(r"/home|/root|/tmp|/work|/Users|[A-Z]:\\\\|0x[0-9a-f]{6}", text)
        # once each: a figure that is also the cell's value would be shown twice
        assert figures <= "".join(cell["source"]).count("plt.subplots") + 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_images_are_those_of_the_phantom(path):
    text = path.read_text()
    images = [o for c in code_cells(path) for o in c["outputs"] if "image/png" in o["data"]]
    assert not images or "notebook_phantom" in text or "synthetic phantom" in text


def test_notebooks_are_numbered():
    assert [path.name[:2] for path in NOTEBOOKS] == [
        f"{n:02}" for n in range(1, len(NOTEBOOKS) + 1)
    ]
