"""A network from outside the package: one file and one config, and nothing else is edited."""

import runpy
import sys
from pathlib import Path

import pytest

from mambaseg.storage.run_folder import RunFolder
from runs import small_overrides

SOURCE = Path(__file__).parents[2] / "src"
NETWORK = '''
"""Two convolutions."""
from torch import nn


class MyNet(nn.Sequential):
    size_multiple = 1

    def __init__(self, in_channels=1, num_classes=4, *, width=8):
        first = nn.Conv2d(in_channels, width, 3, padding=1)
        super().__init__(first, nn.ReLU(), nn.Conv2d(width, num_classes, 3, padding=1))
'''
CONFIG = """# Two convolutions.
name: my_net
_target_: my_file.MyNet
in_channels: ${data.in_channels}
num_classes: ${data.num_classes}
width: 8
"""


def entry(script, words):
    """Run an entry script in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, words)])
        runpy.run_path(str(SOURCE / script), run_name="__main__")


def test_it_is_trained_evaluated_and_used_for_prediction(phantom_root, tmp_path, monkeypatch):
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/my_net.yaml").write_text(CONFIG)
    (tmp_path / "code").mkdir()
    (tmp_path / "code/my_file.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.chdir(tmp_path)
    folder = f"--config-dir={tmp_path / 'conf'}"
    small = small_overrides(phantom_root, tmp_path / "outputs")
    entry("train.py", [folder, "model=my_net", "model.width=4", *small, "logger=csv"])
    (record,) = tmp_path.glob("outputs/*/my_net-*/run.json")
    run = RunFolder(record.parent)
    assert run.finished and run.record["parameters"] == 4 * 9 + 4 + 4 * (4 * 9 + 1)
    entry("evaluate.py", [folder, f"run={run.path}", "outputs=scored", "logger=csv"])
    (cases,) = tmp_path.glob("scored/*/*/cases.csv")
    assert cases.read_text() == (run.path / "cases.csv").read_text()
    image = next(phantom_root.glob("patient001/*_frame01.nii.gz"))
    entry("predict.py", [folder, f"run={run.path}", f"input={image}", "output=maps"])
    assert list(tmp_path.glob("maps/*.nii.gz"))
    with pytest.raises(SystemExit):
        entry("predict.py", [f"run={run.path}", f"input={image}", "output=other"])
