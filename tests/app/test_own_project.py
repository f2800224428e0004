"""A project of one's own in a folder of its own: every command works with its runs."""

import contextlib
import importlib.util
import json
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import mambaseg
from mambaseg.app.console import main
from mambaseg.app.networks import restore_network
from mambaseg.app.new import SKELETON, new_project
from mambaseg.errors import UserError
from mambaseg.inference.trained import read_checkpoint
from mambaseg.storage.run_folder import RunFolder
from mambaseg.storage.untrusted import read_yaml
from runs import small_overrides

PARTS = '''
from torch import nn
from mambaseg.evaluation.metrics import Metric


class Halved(nn.CrossEntropyLoss):
    def forward(self, logits, label):
        return super().forward(logits, label) / 2


class Voxels(Metric):
    def __init__(self):
        super().__init__("share", "share of the reference")

    def measure(self, prediction, reference, spacing):
        return min(1.0, prediction.sum() / reference.sum()) if reference.any() else None


class Block(nn.Conv2d):
    def __init__(self, channels, width):
        super().__init__(channels, width, 3, padding=1)


class Nested(nn.Sequential):
    """Without size_multiple, of an object of its own."""

    def __init__(self, block, width, classes):
        super().__init__(block, nn.ReLU(), nn.Conv2d(width, classes, 1))
'''
CONFIGS = {
    "loss/halved": "_target_: my_parts.Halved",
    "metric/share": "share: {_target_: my_parts.Voxels}",
    "model/mine/wide": "defaults: [/model/tiny_net@_here_, _self_]\nname: wide\nwidth: 6",
    "model/nested": """
name: nested
_target_: my_parts.Nested
block: {_target_: my_parts.Block, channels: "${data.in_channels}", width: 4}
width: 4
classes: ${data.num_classes}
""",
    "experiment/all": """
# @package _global_
defaults:
  - first
  - override /model: mine/wide
  - override /loss: halved
  - override /metric: [share]
name: all
""",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A new project with further parts, which is the current folder meanwhile."""
    folder = new_project(tmp_path_factory.mktemp("own") / "heart")
    (folder / "my_parts.py").write_text(PARTS)
    for name, text in CONFIGS.items():
        (folder / f"conf/{name}.yaml").parent.mkdir(exist_ok=True)
        (folder / f"conf/{name}.yaml").write_text(text.lstrip())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        yield folder
        for name in ("my_nets", "my_parts"):
            sys.modules.pop(name, None)


def command(*words: str) -> int:
    """`mambaseg ...` in this process; its exit status."""
    try:
        main([*map(str, words)])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


@pytest.fixture(scope="module")
def small(phantom_root, project):
    return [*small_overrides(phantom_root, Path("outputs")), "logger=csv", "trainer=cpu"]


@pytest.fixture(scope="module")
def run(project, small):
    """A run of a network whose config inherits another one, with a loss and a metric."""
    assert command("train", "--config-dir", "conf", "experiment=all", *small) == 0
    (record,) = project.glob("outputs/all/wide-*/run.json")
    return RunFolder(record.parent)


@pytest.fixture(scope="module")
def image(phantom_root):
    return next(phantom_root.glob("patient001/*_frame01.nii.gz"))


@pytest.fixture(scope="module")
def bundle(run, project):
    words = ("--config-dir=conf", f"run={run.path}", "format=bundle", "output=bundle")
    assert command("export", *words) == 0
    return project / "bundle"


def test_code_in_the_current_folder_is_found_and_hides_no_module(run, project):
    assert run.finished and "share" in json.dumps(run.summary["foreground"])
    assert read_yaml(run.path / "config.yaml")["loss"] == {"_target_": "my_parts.Halved"}
    assert sys.path[-1] == str(project)
    assert run.record["config_dirs"] == [str(project / "conf")]
    assert set(run.record["code"]["own"]) == {"my_nets", "my_parts"}


def test_it_is_scored_again_to_the_same_numbers(run):
    words = (f"run={run.path}", "outputs=again", "logger=csv", "metric=[share]")
    assert command("evaluate", "--config-dir=conf", *words) == 0
    (cases,) = Path().glob("again/*/*/cases.csv")
    assert cases.read_text() == (run.path / "cases.csv").read_text()


def test_a_bundle_predicts_what_its_run_predicts(run, bundle, image):
    assert sorted(path.name for path in bundle.iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    for name, source in (
        ("one", run.path),
        ("two", bundle),
        ("three", bundle / "model.safetensors"),
    ):
        words = (f"run={source}", f"input={image}", f"output={name}")
        assert command("predict", "--config-dir=conf", *words) == 0
    maps = [next(Path(name).glob("*.nii.gz")).read_bytes() for name in ("one", "two", "three")]
    assert maps[0] == maps[1] == maps[2]
    card = (bundle / "README.md").read_text()
    assert "my_nets.TinyNet" in card and "| RV |" in card and "1 RV, 2 MYO, 3 LV" in card
    assert "patient" not in (bundle / "config.json").read_text().replace('"patients":', "")


def test_a_bundle_is_written_to_a_new_folder_only(run, bundle, capsys):
    before = (bundle / "config.json").read_bytes()
    words = ("--config-dir=conf", f"run={run.path}", "format=bundle", f"output={bundle}")
    assert command("export", *words) == 1
    assert "is there already" in capsys.readouterr().err
    assert (bundle / "config.json").read_bytes() == before


def test_a_damaged_bundle_is_refused(bundle, tmp_path):
    for name, content in {
        "config.json": b'{"mambaseg": {"model": {"name": "wide", "arguments": {"../x": 1}}}}',
        "model.safetensors": b'\x08\x00\x00\x00\x00\x00\x00\x00{"a": 1}',
    }.items():
        shutil.copytree(bundle, tmp_path / name)
        (tmp_path / name / name).write_bytes(content)
        with pytest.raises(UserError, match=r"model\.safetensors"):
            read_checkpoint(tmp_path / name)
    (tmp_path / "model.safetensors" / "config.json").unlink()
    shutil.copy(bundle / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="does not say which network"):
        read_checkpoint(tmp_path / "model.safetensors")


def test_the_demo_shows_its_network_and_the_report_its_row(run, bundle, monkeypatch):
    shown = []

    @contextlib.contextmanager
    def serve(predictor, **how):
        shown.append(predictor.title)
        yield "http://127.0.0.1"

    monkeypatch.setattr("mambaseg.inference.demo.page.serve", serve)
    monkeypatch.setattr(threading.Event, "wait", lambda self, timeout=None: True)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    for source in (run.path, bundle):
        assert command("demo", "--config-dir=conf", f"run={source}") == 0
    assert shown == ["wide", "wide"]
    assert command("report", "outputs/all") == 0
    assert "wide" in Path("outputs/all/report/index.html").read_text()


def test_what_is_missing_is_named_with_the_option_that_gives_it(
    run, project, image, tmp_path, monkeypatch, capsys
):
    words = (f"run={run.path.resolve()}", f"input={image}", f"output={tmp_path / 'labels'}")
    assert command("predict", *words) == 1
    shown = capsys.readouterr().err
    assert "trained with model=mine/wide" in shown and "add --config-dir=conf" in shown
    assert command("train", "model=tiny_net") == 1
    assert "but conf has one: add --config-dir=conf" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert command("predict", *words) == 1
    assert f"which was {project / 'conf'} in the training" in capsys.readouterr().err
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(project)])
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)
    assert command("predict", f"--config-dir={project / 'conf'}", *words) == 1
    shown = capsys.readouterr().err
    assert f"the folder that holds my_nets.py, {project}" in shown and "PYTHONPATH" in shown
    assert not (tmp_path / "labels").exists()


def test_a_data_set_is_checked_by_a_reader_of_the_current_folder(project, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(project)])
    (project / "my_reader.py").write_text("def find_cases(root):\n    return []\n")
    (project / "conf/data").mkdir()
    config = "find_cases: {_target_: my_reader.find_cases, _partial_: true}\n"
    (project / "conf/data/mine.yaml").write_text(config)
    assert command("check", "conf", "--config-dir=conf", "--layout=other") == 1
    assert "mine" in capsys.readouterr().out.partition("unknown layout 'other': choose one of")[2]


def test_a_checkpoint_imports_nothing_that_no_config_names(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nNet = None\n")
    content = torch.load(run.path / "checkpoints/best.ckpt", weights_only=True)
    about = content["mambaseg"]["model"]
    for name in ("evil", "evil.Net", "../evil", str(tmp_path / "evil")):
        about.update(name="unet", config=name, _target_="evil.Net")
        about["arguments"].update(_target_="evil.Net", widths={"_target_": "evil.Net"})
        torch.save(content, tmp_path / "a.ckpt")
        with pytest.raises(UserError, match="there is no conf/model"):
            restore_network(tmp_path / "a.ckpt")
    about["config"] = "unet"
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="does not fit"):
        restore_network(tmp_path / "a.ckpt")
    assert not (tmp_path / "ran").exists() and importlib.util.find_spec("evil") is None


def test_objects_inside_a_network_come_from_its_config(project, small, image, capsys):
    words = ("--config-dir=conf", "model=nested", "model.block.width=3", "model.width=3")
    assert command("train", *words, *small, "name=nested", "test=false") == 0
    (record,) = project.glob("outputs/nested/nested-*/run.json")
    about = read_checkpoint(record.parent).about
    assert "_target_" not in json.dumps(about)
    trained = mambaseg.load_run(record.parent, config_dir="conf")
    assert trained.network.network[0].out_channels == 3 and trained.network.multiples == (1, 1)
    assert trained.predict(image).shape[0] == 10
    assert "left out" not in capsys.readouterr().out


def test_a_training_starts_from_another_run(run, bundle, small, capsys, monkeypatch):
    seen, base = [], ["--config-dir=conf", "experiment=all", *small, "test=false"]

    def first(self, network, *rest, **more):
        seen.append({key: value.clone() for key, value in network.state_dict().items()})
        raise UserError("far enough")

    monkeypatch.setattr("mambaseg.app.build.Assembly.task_and_trainer", first)
    weights = read_checkpoint(run.path).weights
    command("train", *base, f"init_from={bundle}", "name=same")
    assert all(torch.equal(seen[0][key], weights[key]) for key in weights)
    shown = capsys.readouterr().out
    assert "matched" in shown and "new head" not in shown
    command(
        "train", *base, f"init_from={run.path}", "name=o", "data.class_names=[background,a,b,c]"
    )
    other = {key for key in weights if not torch.equal(seen[1][key], weights[key])}
    assert other == {"network.head.weight", "network.head.bias"}
    shown = capsys.readouterr().out
    assert "new head" in shown and "classes of its own head: background, RV, MYO, LV" in shown
    (record,) = Path().glob("outputs/o/*/run.json")
    assert "new head" in record.with_name("train.log").read_text()
    report = json.loads(record.read_text())["pretrained"]
    assert set(report["missing"]) == other and report["init_from"].endswith("best.ckpt")


def test_a_start_counts_by_its_content_and_keeps_what_was_seen(run, small, tmp_path):
    configs = {"config_dir": "conf"}
    base = ["experiment=all", *small, "data.steps=1", "data.val_every=1"]
    copy = tmp_path / "copy.ckpt"
    shutil.copy(run.path / "checkpoints/best.ckpt", copy)
    first = mambaseg.train(*base, f"init_from={run.path}", **configs)
    assert mambaseg.train(*base, f"init_from={copy}", **configs).path == first.path
    seen = read_checkpoint(first.path).seen
    assert seen.earlier == read_checkpoint(run.path).seen.train | read_checkpoint(run.path).seen.val
    with pytest.raises(UserError, match="has seen"):
        mambaseg.train(*base, f"init_from={copy}", "+data.split_seed=1", **configs)


@pytest.mark.parametrize(("words", "message"), [
    (["model=unet"], "trained with model=mine/wide"),
    (["model.width=5"], "trained with model=mine/wide model.width=6"),
    (["model=mamba_unet", "model.pretrained=x.pth"], "choose one"),
])  # fmt: skip
def test_a_start_of_another_network_is_refused(run, small, capsys, words, message):
    words = ["--config-dir=conf", "experiment=all", *small, *words, f"init_from={run.path}"]
    assert command("train", *words) == 1
    assert message in capsys.readouterr().err


def test_an_evaluation_has_no_start(run, capsys):
    assert command("evaluate", f"run={run.path}", f"init_from={run.path}", "--config-dir=conf") == 1
    assert "leave it out of an evaluation" in capsys.readouterr().err


def test_the_test_of_a_new_project_passes(project, tmp_path, monkeypatch):
    """As `python -m pytest` runs it, in this process."""
    spec = importlib.util.spec_from_file_location("own_tests", project / "tests/test_my_nets.py")
    tests = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(project)
    spec.loader.exec_module(tests)
    tests.test_every_pixel_gets_a_logit_per_class()
    tests.test_two_steps_of_training(tmp_path, monkeypatch)


def test_new_leaves_a_folder_alone_that_holds_something(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    for name in ("full", "full/mine.txt"):
        assert command("new", tmp_path / name) == 1
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert command("new", tmp_path / "empty") == 0
    made = {path.relative_to(tmp_path / "empty") for path in (tmp_path / "empty").rglob("*.*")}
    kept = {path.relative_to(SKELETON) for path in SKELETON.rglob("*.*") if path.suffix != ".pyc"}
    assert kept <= made and (tmp_path / "empty/.gitignore").is_file()
    assert OmegaConf.load(tmp_path / "empty/conf/model/tiny_net.yaml").name == "tiny_net"
