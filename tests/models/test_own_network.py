"""A network from outside the package: one file and one config, and nothing else is edited."""

from mambaseg.storage.run_folder import RunFolder
from runs import entered, small_overrides

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


def test_it_is_trained_evaluated_and_used_for_prediction(
    phantom_root, tmp_path, monkeypatch, capsys
):
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/my_net.yaml").write_text(CONFIG)
    (tmp_path / "code").mkdir()
    (tmp_path / "code/my_file.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.chdir(tmp_path)
    folder = f"--config-dir={tmp_path / 'conf'}"
    small = small_overrides(phantom_root, tmp_path / "outputs")
    assert entered("train.py", folder, "model=my_net", "model.width=4", *small, "logger=csv") == 0
    (record,) = tmp_path.glob("outputs/*/my_net-*/run.json")
    run = RunFolder(record.parent)
    assert run.finished and run.record["parameters"] == 4 * 9 + 4 + 4 * (4 * 9 + 1)
    assert entered("evaluate.py", folder, f"run={run.path}", "outputs=scored", "logger=csv") == 0
    (cases,) = tmp_path.glob("scored/*/*/cases.csv")
    assert cases.read_text() == (run.path / "cases.csv").read_text()
    image = next(phantom_root.glob("patient001/*_frame01.nii.gz"))
    assert entered("predict.py", folder, f"run={run.path}", f"input={image}", "output=maps") == 0
    assert list(tmp_path.glob("maps/*.nii.gz"))
    assert entered("predict.py", f"run={run.path}", f"input={image}", "output=other") != 0
    assert "there is no conf/model/my_net.yaml" in capsys.readouterr().err
