"""A data set from outside the package: one file and one config, and nothing else is edited."""

import importlib
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from mambaseg.app.commands.check import main
from mambaseg.data.cache import open_cache
from mambaseg.data.geometry import Preprocessing
from mambaseg.storage.run_folder import RunFolder
from tiny_nnunet import arrays, write_volume

SOURCE = Path(__file__).parents[2] / "src"
READER = '''
"""Hearts: h0.nii.gz with its label h0_truth.nii.gz."""
from mambaseg.data.case import Case
from mambaseg.data.readers.nnunet import read
from mambaseg.data.readers.reader import reader
from mambaseg.data.validation import DataError


@reader(
    example="hearts (h0.nii.gz and h0_truth.nii.gz)",
    recognises=lambda root: any(root.glob("*_truth.nii.gz")),
    remarks=lambda volume: ["the cavity is missing"] if not (volume.label == 1).any() else [],
)
def find_cases(root, *, first=0):
    for path in sorted(root.glob("h?.nii.gz")):
        label = path.with_name(path.name.replace(".nii", "_truth.nii"))
        if int(path.name[1]) < first:
            continue
        if label.exists():
            yield Case(path.name[:2], path.name[:2], None, None, path, label, read)
        else:
            yield DataError("has no truth", path, "Draw it.")


def plain(root):
    return find_cases(root)
'''
CONFIG = """# Hearts.
defaults:
  - acdc
  - _self_
name: hearts
find_cases: {_target_: my_hearts.find_cases, _partial_: true, first: 1}
root: ???
split: random
class_names: [background, cavity, wall]
num_classes: 3
"""


def entry(script, words):
    """Run an entry script in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, words)])
        runpy.run_path(str(SOURCE / script), run_name="__main__")


@pytest.fixture
def hearts(tmp_path, monkeypatch):
    """Six hearts, and a folder with two configs and the file that they name."""
    configs = tmp_path / "conf" / "data"
    configs.mkdir(parents=True)
    (configs / "hearts.yaml").write_text(CONFIG)
    (configs / "listed.yaml").write_text(
        CONFIG.replace("find_cases, _", "plain, _").replace(", first: 1", "")
    )
    (tmp_path / "my_hearts.py").write_text(READER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    (root := tmp_path / "hearts").mkdir()
    for number in range(6):
        image, label = arrays(number)
        write_volume(root / f"h{number}.nii.gz", image[0], (1.5, 1.25, 8.0))
        write_volume(root / f"h{number}_truth.nii.gz", label * (number != 1), (1.5, 1.25, 8.0))
    return root


def test_it_is_recognised_checked_and_trained_on(hearts, tmp_path, capsys):
    folder = f"--config-dir={tmp_path / 'conf'}"
    assert main([str(hearts), folder]) == 0
    said = capsys.readouterr().out
    assert f"5 cases of 5 patients in {hearts}: 0 errors, 2 warnings" in said
    assert "the cavity is missing" in said and "  - hearts\n" in said
    words = [folder, "data=hearts", f"data.root={hearts}", f"data.cache_dir={tmp_path / 'cache'}",
             f"outputs={tmp_path / 'outputs'}", "model=unet", "model.widths=[4,8]", "logger=csv",
             "model.dropout=[0,0]", "data.size=32", "data.batch_size=2", "data.steps=1",
             "data.val_every=1", "trainer=cpu"]  # fmt: skip
    entry("train.py", words)
    (record,) = tmp_path.glob("outputs/*/*/run.json")
    run = RunFolder(record.parent)
    assert run.finished and list(run.summary["classes"]) == ["background", "cavity", "wall"]
    (hearts / "h3_truth.nii.gz").unlink()
    assert main([str(hearts), folder]) == 1
    assert "h3.nii.gz: has no truth" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        entry("train.py", [*words, "name=again"])


def test_a_function_that_returns_a_list_is_checked_where_its_config_is_named(
    hearts, tmp_path, capsys
):
    words = [str(hearts), "--config-dir", str(tmp_path / "conf"), "--layout", "listed"]
    assert main(words) == 0
    assert "6 cases of 6 patients" in capsys.readouterr().out
    (hearts / "h3_truth.nii.gz").unlink()
    assert main(words) == 1
    assert "h3.nii.gz: has no truth" in capsys.readouterr().out


def test_what_a_reader_with_a_fault_has_read_is_read_again_when_it_is_mended(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (root := tmp_path / "hearts").mkdir()
    image, label = arrays(0)
    write_volume(root / "h0.nii.gz", image[0], (1.5, 1.25, 8.0))
    write_volume(root / "h0_truth.nii.gz", label, (1.5, 1.25, 8.0))
    text = (
        READER.replace("label, read)", "label, load)")
        + """

def load(case):
    from dataclasses import replace
    volume = read(case)
    return replace(volume, label=volume.label[:, ::STEP])
"""
    )
    for step in (-1, 1):
        (tmp_path / "her_hearts.py").write_text(text.replace("STEP", str(step)))
        sys.modules.pop("her_hearts", None)
        importlib.invalidate_caches()
        cases = importlib.import_module("her_hearts").find_cases(root)
        cache = open_cache(
            cases, Preprocessing("paper", 32), cache_dir=tmp_path / "cache", num_classes=3
        )
        assert np.array_equal(cache.label(0), label.T[:, ::step])
    sys.modules.pop("her_hearts")
