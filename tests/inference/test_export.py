"""Exported networks run without this package and do the same."""

import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from mambaseg.errors import UserError
from mambaseg.inference.export import SUFFIX, export_network
from mambaseg.models import AnySize, MambaUNet, ScanBlock, UNet
from runs import entered
from small_networks import NAMES, small_network
from tiny_checkpoints import WIDTHS, write_checkpoint

onnxruntime = pytest.importorskip("onnxruntime")

ABOUT = {"classes": ["background", "RV", "MYO", "LV"]}


def unet():
    return AnySize(UNet(widths=(4, 8, 16), dropout=(0.1, 0.1, 0.1)), 4).eval()


def mamba_unet():
    return AnySize(
        MambaUNet(embed_dim=16, depths=(1, 1), d_state=4, scan_backend="torch"), 8
    ).eval()


@pytest.mark.parametrize("make", [unet, mamba_unet], ids=lambda make: make.__name__)
def test_onnx_gives_the_same_logits_on_other_images(make, tmp_path):
    network = make()
    export_network(network, torch.rand(2, 1, 21, 34), tmp_path / "n.onnx", format="onnx", about={})
    session = onnxruntime.InferenceSession(tmp_path / "n.onnx")
    assert [node.name for node in session.get_inputs()] == ["image"]
    image = torch.rand(2, 1, 21, 34)
    logits = session.run(["logits"], {"image": image.numpy()})[0]
    with torch.no_grad():
        expected = network(image).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert (logits.argmax(1) == expected.argmax(1)).mean() >= 0.9999


# quick ones; the others are for `make test-long`
QUICK = (("nnunet_2d", "onnx"), ("trans_unet", "onnx"))


@pytest.mark.parametrize(
    ("name", "format"),
    [
        pytest.param(name, format, marks=() if (name, format) in QUICK else pytest.mark.slow)
        for name in NAMES
        for format in SUFFIX
    ],
)
def test_every_network_is_exported_in_silence(name, format, tmp_path, capfd):
    scans = any(isinstance(module, ScanBlock) for module in small_network(name).modules())
    backend = {"scan_backend": "torch"} if scans else {}
    network = small_network(name, in_channels=3, num_classes=5, **backend).eval()
    path = tmp_path / f"network{SUFFIX[format]}"
    parity = export_network(network, torch.rand(1, 3, 61, 80), path, format=format, about={})
    assert parity.difference <= 1e-4 and parity.labels_equal >= 0.9999
    assert path.is_file()
    assert capfd.readouterr() == ("", "")


def test_a_program_runs_where_only_torch_is(tmp_path):
    network, image = mamba_unet(), torch.rand(1, 1, 16, 24)
    path = tmp_path / "network.pt2"
    export_network(network, image, path, format="torch", about={})
    torch.save(image, tmp_path / "image.pt")
    code = f"""
import sys, torch
sys.modules["mambaseg"] = None
program = torch.export.load({str(path)!r}).module()
torch.save(program(torch.load({str(tmp_path / "image.pt")!r})), {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.load(tmp_path / "logits.pt"), network(image), atol=1e-5, rtol=0
        )


def test_the_description_says_what_a_user_of_the_file_must_know(tmp_path):
    parity = export_network(
        unet(), torch.rand(1, 1, 16, 24), tmp_path / "n.onnx", format="onnx", about=ABOUT
    )
    facts = json.loads((tmp_path / "n.onnx.json").read_text())
    assert facts["input"] == {"name": "image", "shape": [1, 1, 16, 24], "dtype": "float32"}
    assert facts["output"] == {"name": "logits", "classes": ABOUT["classes"]}
    assert facts["difference"] == parity.difference < 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["n.onnx", "n.onnx.json"]


def test_the_command_tells_all_and_writes_nothing_outside_the_folder(tmp_path, monkeypatch):
    arguments = {"in_channels": 1, "num_classes": 4, "widths": WIDTHS, "dropout": [0.0, 0.0]}
    model = {"name": "../../x", "config": "unet", "arguments": arguments}
    parts = {"regions": {"heart": [1, 2, 3]}, "keep_largest": {"heart": [1, 2, 3]}}
    path = write_checkpoint(tmp_path / "tiny.ckpt", model=model, **parts)
    (here := tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(here)
    assert entered("export.py", f"run={path}", "format=torch") == 0
    file, description = sorted(here.iterdir())
    assert file.suffix == ".pt2" and not list(tmp_path.glob("*.pt2"))
    facts = json.loads(description.read_text())
    assert {key: facts[key] for key in parts} == parts
    before = file.read_bytes()
    assert entered("export.py", f"run={path}", "format=torch") == 1  # it is another's, perhaps
    assert file.read_bytes() == before


class Noisy(nn.Module):
    """A network that export freezes: it draws anew at every call."""

    def forward(self, image):
        return image.repeat(1, 4, 1, 1) + torch.rand_like(image)


def test_a_network_that_does_not_do_the_same_leaves_no_file(tmp_path):
    with pytest.raises(UserError, match=r"noisy.onnx is not written.*tolerance"):
        export_network(
            Noisy(), torch.rand(1, 1, 8, 8), tmp_path / "noisy.onnx", format="onnx", about={}
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("format", "name", "message"), [
    ("tflite", "n.tflite", "choose one of onnx, torch"),
    ("torch", "n.onnx", r"ends in \.pt2"),
])  # fmt: skip
def test_a_wrong_word_is_answered_with_the_right_ones(tmp_path, format, name, message):
    with pytest.raises(UserError, match=message):
        export_network(unet(), torch.rand(1, 1, 8, 8), tmp_path / name, format=format, about={})


def test_exporters_are_quiet_and_leave_the_log_as_it_was(tmp_path, caplog):
    level = logging.getLogger("torch.onnx").level
    export_network(unet(), torch.rand(1, 1, 8, 8), tmp_path / "n.onnx", format="onnx", about={})
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert logging.getLogger("torch.onnx").level == level
