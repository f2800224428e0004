"""`from mambaseg import ...`: its names, what the functions do, and the page that explains them."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import mambaseg
from mambaseg import UserError, evaluate, load_run, predict, train
from mambaseg.app import api
from mambaseg.app.entry import CONF
from runs import QUIET, UNET, own_overrides, trained

README = Path(__file__).parents[2] / "README.md"
PAGE = README.parent / "docs" / "python.md"


@pytest.fixture(scope="module")
def run(shared_run):
    """One finished run; tests only read it."""
    return train(*UNET, *shared_run, *QUIET, "trainer=cpu")


@pytest.fixture
def image(phantom_root):
    return next(phantom_root.glob("patient001/*_frame01.nii.gz"))


# ---- names --------------------------------------------------------------------------------------


def test_type_checkers_see_the_names_that_are_there():
    (block,) = [node for node in ast.parse(Path(mambaseg.__file__).read_text()).body
                if isinstance(node, ast.If)]  # fmt: skip
    seen = {name.asname: node.module for node in block.body for name in node.names}
    assert seen == mambaseg._HOMES and sorted(seen) == mambaseg.__all__
    assert set(mambaseg.__all__) <= set(dir(mambaseg))
    assert all(getattr(mambaseg, name).__name__ == name for name in mambaseg.__all__)
    with pytest.raises(AttributeError, match="'mambaseg' has no attribute 'MambaUnet'"):
        _ = mambaseg.MambaUnet


def test_the_package_alone_imports_nothing_heavy():
    code = "import sys, mambaseg; print(*{'torch', 'numpy', 'hydra', 'rich'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_options_are_the_keys_of_the_command():
    keys = set(yaml.safe_load((CONF / "predict.yaml").read_text()))
    others = {"defaults", "hydra", "data", "run", "outputs", "ensemble", "input", "output"}
    assert set(api.PredictOptions.__annotations__) == keys - others


# ---- a run --------------------------------------------------------------------------------------


def test_a_run_brings_its_network_config_classes_and_scores(run):
    assert run.classes == ("background", "RV", "MYO", "LV")
    assert run.config["data"]["size"] == run.preprocessing.size == 32
    assert run.network(torch.rand(2, 1, 50, 40)).shape == (2, 4, 50, 40)
    assert not run.network.training
    assert run.scores.mean == run.scores.summary["foreground"]["dice"]["mean"]
    assert {row["class_name"] for row in run.scores.cases} == set(run.classes)
    assert f"{run.scores.mean:.4f}" in str(run.scores)
    again = train(*UNET, "outputs=" + str(run.path.parents[1]), *_data(run), *QUIET, "trainer=cpu")
    assert again.path == run.path  # finished, not trained again


def _data(run):
    keys = ("root", "cache_dir", "size", "batch_size", "steps", "val_every")
    data = run.config["data"]
    return ["data=phantom", "data.prepare.patients=8", *(f"data.{key}={data[key]}" for key in keys)]


def test_a_file_and_its_array_get_the_labels_that_are_written(run, image, tmp_path):
    labels = run.predict(image)
    assert labels.dtype == np.uint8 and labels.ndim == 3
    array = np.asarray(nibabel.load(image).dataobj).T  # (Z, H, W)
    assert np.array_equal(run.predict(array), labels)
    assert np.array_equal(run.predict(torch.from_numpy(array[:, None].copy())), labels)
    assert run.predict(array[0]).shape == run.predict(array[0].tolist()).shape == array[0].shape
    for same in (array.astype(">f4"), array[::-1].copy()[::-1], np.asfortranarray(array),
                 torch.tensor(array.astype(np.float32), requires_grad=True)):  # fmt: skip
        assert np.array_equal(run.predict(same), labels)
    sides = nibabel.load(image).header.get_zooms()[::-1]
    assert np.array_equal(run.predict(array, spacing=np.array(sides)), labels)
    outcome = predict([run, run.path], image, tmp_path)  # an ensemble of twice the same
    assert outcome.done == [image.name.removesuffix(".nii.gz")]
    (written,) = tmp_path.glob("*.nii.gz")
    assert np.array_equal(np.asarray(nibabel.load(written).dataobj).T, labels)


def test_an_argument_beside_those_of_its_config_is_the_loaded_networks_too(shared_run):
    words = ["model=monai_basic_unet", "model.features=[4,4,4,4,4,4]", "+model.act=relu",
             "data.steps=1", "data.val_every=1", "test=false"]  # fmt: skip
    run = trained(*shared_run, *words, "trainer=cpu")
    loaded, image = load_run(run.folder.path).network, torch.randn(2, 1, 32, 32)
    assert "LeakyReLU" not in str(loaded)
    assert torch.equal(loaded(image), run.task.network.eval()(image))


def test_an_evaluation_gives_the_scores_of_the_training_again(run, tmp_path):
    scores = evaluate(run, f"outputs={tmp_path}", *QUIET, "trainer=cpu")
    assert scores.cases == run.scores.cases and scores.path.parent == tmp_path / "evaluate"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda run: train("modle=unet"), "there is no modle; did you mean model"),
        (lambda run: train("model=unett"), "did you mean unet"),
        (lambda run: train("data.size=big"), "data.size"),
        (lambda run: train("-m", "model=unet,swin_unet"), "options are for the command line"),
        (lambda run: train("model=unet", config_dir="nowhere"), "there is no such folder"),
        (lambda run: train(*_data(run), "data.preprocessing=odd"), "preprocessing"),
        (lambda run: train("experiment=dehazing"), "only networks that segment"),
        (lambda run: load_run("nowhere"), "there is no run folder, checkpoint or bundle nowhere"),
        (lambda run: run.predict(np.zeros((2, 3, 40, 40))), "3 channels, the network takes 1"),
        (lambda run: run.predict(np.zeros(40)), r"shape \(40,\): expected is \(H, W\)"),
        (lambda run: run.predict(np.full((40, 40), np.nan)), "not finite"),
        (lambda run: run.predict(np.zeros((40, 40), complex)), "expected are real numbers"),
        (lambda run: run.predict(np.array([[1e9, 1e9 + 1]])), "cannot be told apart"),
        *[
            (lambda run, spacing=spacing: run.predict(np.zeros((2, 40, 40)), spacing=spacing), said)
            for spacing, said in (
                ((1, 1), "three numbers"),
                (1.5, "three numbers"),
                ("8,1,1", "three numbers"),
                ((1, 1, 0), "the voxel size is"),
                ((1, 1, np.nan), "the voxel size is"),
            )
        ],
        (lambda run: predict(run, "x", "y", keep_largest="no"), "no file or folder x"),
        (lambda run: load_run(run.path, keep_largest="no"), "keep_largest=no: must be one of"),
        (lambda run: load_run(run.path, batch_size=0), "batch_size=0: must be a whole number"),
        (lambda run: predict([], run.config["data"]["root"], "y"), "no run is named"),
        (lambda run: load_run(run.path, tta_=True), "tta_: there is no such option.* mean tta"),
        (lambda run: train(["model=unet"]), "each override is a string of its own"),
        (lambda run: train("seed=1,2"), "seed=1,2: a call takes one value"),
        (lambda run: run.predict("nowhere.nii.gz"), "there is no file or folder"),
        (lambda run: run.predict(run.config["data"]["root"]), "images: name one of them"),
    ],
)
def test_what_cannot_be_done_is_a_user_error(call, said, run):
    with pytest.raises(UserError, match=said):
        call(run)


def test_an_image_that_fails_is_an_error_after_the_others(run, image, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/good.nii.gz").write_bytes(image.read_bytes())
    (tmp_path / "in/bad.nii.gz").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"1 of 2 failed:\n  bad: "):
        predict(run, tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out/good.nii.gz").is_file()


def test_a_run_stays_where_it_is_when_the_program_goes_elsewhere(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run.path.parent)
    loaded = load_run(run.path.name)
    monkeypatch.chdir(tmp_path)
    assert loaded.scores.mean == run.scores.mean


def test_a_program_that_uses_hydra_itself_goes_on_as_before(run):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        before = GlobalHydra.instance().hydra
        load_run(run.path)
        assert GlobalHydra.instance().hydra is before
        assert compose("predict", ["input=x", "output=y"]).input == "x"


def test_a_network_of_ones_own_needs_its_folder_of_configs(phantom_root, tmp_path, monkeypatch):
    (tmp_path / "my_conf/model").mkdir(parents=True)
    (tmp_path / "my_conf/model/conv.yaml").write_text(
        "name: conv\n_target_: torch.nn.Conv2d\nin_channels: 1\nout_channels: 4\nkernel_size: 1\n"
        "size_multiple: 1\n"
    )
    data = (f"data.root={phantom_root}", "data=phantom", "data.prepare.patients=8")
    small = (*own_overrides(tmp_path)[len(UNET) :], *data, "test=false")
    run = train("model=conv", *small, *QUIET, config_dir=tmp_path / "my_conf")
    assert run.network(torch.rand(1, 1, 5, 7)).shape == (1, 4, 5, 7)
    with pytest.raises(UserError, match=r"no conf/model/conv\.yaml"):
        load_run(run.path)


# ---- the page -----------------------------------------------------------------------------------


def test_the_code_of_the_page_runs_as_it_is_written(tmp_path, monkeypatch):
    """In an empty folder, with a smaller network and fewer steps."""
    small = [*UNET, *QUIET, "trainer=cpu", "data.prepare.patients=8", "data.size=32",
             "data.batch_size=4", "data.steps=4", "data.val_every=2"]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mambaseg, "train", lambda *words: api.train(*words, *small))
    monkeypatch.setattr(mambaseg, "evaluate", lambda run, *words: api.evaluate(run, *words, *QUIET))
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5 and len(blocks[0].splitlines()) <= 15
    namespace = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), namespace)
    assert namespace["trainer"].callback_metrics["test/dice"] >= 0
    assert (tmp_path / "outputs/quickstart/report/index.html").is_file()
    shutil.copytree("data/phantom/patient001", "scans")  # README names these
    shutil.copy("scans/patient001_frame01.nii.gz", "scan.nii.gz")
    (code,) = re.findall(r"## In Python\n\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(code, README.name, "exec"), {})
