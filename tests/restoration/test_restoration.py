"""Dehazing from the command's words to its scores, and the scores against their formulas."""

import csv
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d

from mambaseg.app.networks import restore_network
from mambaseg.app.replay import replay
from mambaseg.errors import UserError
from mambaseg.models import AnySize
from mambaseg.reporting.report import write_report
from mambaseg.reporting.tables import headline
from mambaseg.restoration.phantom import write_haze_phantom
from mambaseg.restoration.scores import HIGHEST, ImageScores, image_scores
from mambaseg.restoration.task import RestorationTask
from runs import built, composed, entered, trained

# ---- scores


def test_psnr_is_the_hand_computed_one():
    clear = torch.full((1, 3, 12, 12), 0.5)
    image = clear.clone()
    image[0, 0, :6] += 0.3  # 72 of 432 values
    expected = 10 * math.log10(1 / (0.09 * 72 / 432))
    assert image_scores(image, clear)[0] == pytest.approx(expected, abs=1e-5)
    assert image_scores(clear, clear) == (HIGHEST, pytest.approx(1.0))


def ssim_by_formula(x, y):
    """Wang et al. 2004, equation 13, in float64 where the 11 × 11 window fits; (H, W) arrays."""
    window = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def local(a):
        return correlate1d(correlate1d(a, window, axis=0), window, axis=1)[5:-5, 5:-5]

    mx, my = local(x), local(y)
    vx, vy, both = local(x * x) - mx**2, local(y * y) - my**2, local(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    top, bottom = (2 * mx * my + c1) * (2 * both + c2), (mx**2 + my**2 + c1) * (vx + vy + c2)
    return (top / bottom).mean()


def test_ssim_is_the_formula():
    generator = np.random.default_rng(0)
    clear = generator.uniform(size=(3, 30, 41)).cumsum(axis=2) / 41
    image = np.clip(clear + generator.normal(0, 0.05, clear.shape), 0, 1)
    expected = np.mean([ssim_by_formula(a, b) for a, b in zip(image, clear, strict=True)])
    got = image_scores(torch.from_numpy(image)[None], torch.from_numpy(clear)[None])[1]
    assert 0.2 < expected < 0.99 and got == pytest.approx(expected, abs=1e-9)


def test_an_image_that_comes_twice_counts_once():
    scores = ImageScores()
    clear = torch.rand(1, 3, 16, 16)
    for name, noise in (("a", 0.1), ("b", 0.2), ("a", 0.1)):
        image = (clear + noise).clamp(0, 1)
        scores.update(SimpleNamespace(id=name, scene=name), image, clear, clear)
    summary = scores.compute()
    assert summary["cases"] == 2 and [row["case"] for row in scores.rows] == ["a", "b"]
    mean = np.mean([row["psnr"] for row in scores.rows])
    assert summary["scores"]["psnr"]["mean"] == pytest.approx(mean)


# ---- residual output


def test_a_residual_network_adds_the_image_at_any_size():
    image = torch.rand(2, 3, 13, 18)
    layer = torch.nn.Conv2d(3, 3, 1)
    expected = image + layer(image)
    torch.testing.assert_close(AnySize(layer, 8, residual=True)(image), expected)
    with pytest.raises(UserError, match=r"model\.residual"):
        AnySize(torch.nn.Conv2d(3, 4, 1), 8, residual=True)(image)


# ---- runs

WORDS = [
    "experiment=dehazing", "model=unet", "model.widths=[8,8,8,8,8]",
    "data.prepare={_target_: mambaseg.restoration.phantom.write_haze_phantom, "
    "_partial_: true, scenes: 5, height: 32, width: 40}",
    "data.size=32", "data.batch_size=4", "data.steps=8", "data.val_every=4",
    "trainer.log_every_n_steps=1",
]  # fmt: skip
LONG = ["data.steps=40", "data.val_every=20", "optim.scheduler.max_lr=0.003"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The words of a small run on five scenes, and the folder of its outputs."""
    place = tmp_path_factory.mktemp("dehazing")
    write_haze_phantom(place / "data", scenes=5, height=32, width=40)
    return [*WORDS, f"data.root={place / 'data'}", f"outputs={place / 'outputs'}"], place


@pytest.fixture(scope="module")
def finished(place):
    """A finished run."""
    return trained(*place[0], *LONG)


def table(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_restored_image_comes_from_one_head():
    class Heads(torch.nn.Module):
        def forward(self, image):
            return [image, image[..., ::2, ::2]] if self.training else image

    with pytest.raises(UserError, match=r"model\.residual: Heads gives 2 outputs while it trains"):
        AnySize(Heads(), 1, residual=True)(torch.zeros(1, 3, 8, 8))
    task = SimpleNamespace(network_name=lambda: "heads")
    image = torch.zeros(1, 3, 8, 8)
    with pytest.raises(UserError, match="heads gives 2 outputs while it trains, and one image"):
        RestorationTask.check(task, Heads()(image), {"clear": image})


def test_without_photographs_the_experiment_takes_the_phantom_and_with_them_those(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HAZE_ROOT", raising=False)
    cfg = composed("experiment=dehazing")
    assert cfg.model.name == "uvm_net" and cfg.data.name == "haze_phantom" and cfg.data.synthetic
    assert cfg.optim.optimizer.lr == 2e-4 and "AdamW" in cfg.optim.optimizer._target_
    assert "L1Loss" in cfg.loss._target_ and cfg.data.size == 128 and cfg.model.residual
    monkeypatch.setenv("HAZE_ROOT", str(tmp_path))
    cfg = composed("experiment=dehazing", "model=unet")
    assert cfg.data.name == "haze" and cfg.data.root == str(tmp_path)
    monkeypatch.setenv("HAZE_ROOT", str(tmp_path / "absent"))
    assert composed("experiment=dehazing", "model=unet").data.name == "haze"  # which is an error


def test_a_run_leaves_scores_figures_and_a_report(finished, place, caplog, capsys):
    caplog.set_level("INFO")
    again = trained(*place[0], *LONG)
    assert again.finished and again.score == finished.score
    assert "synthetic haze, not RESIDE" in caplog.messages[0]
    assert "HAZE_ROOT" in caplog.messages[0]
    assert sum("synthetic haze, not RESIDE" in message for message in caplog.messages) == 1
    said = capsys.readouterr().out
    assert "PSNR dB" in said and "Restored" in said
    folder = finished.folder.path
    losses = [
        float(row["train/loss"]) for row in table(folder / "metrics.csv") if row["train/loss"]
    ]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    rows = table(folder / "cases.csv")
    assert len(rows) == 3 * finished.data.counts["test"]["scenes"]
    summary = json.loads((folder / "metrics.json").read_text())
    for metric in ("psnr", "ssim", "psnr_hazy", "ssim_hazy"):
        mean = np.mean([float(row[metric]) for row in rows])
        assert summary["scores"][metric]["mean"] == pytest.approx(mean)
    assert headline(summary)[1] == summary["scores"]["psnr"]["mean"]
    assert summary["task"] == "restoration" and summary["val_psnr"] == finished.score
    assert finished.folder.record["val_psnr"] == finished.score > 5
    assert {path.name.split("_")[0] for path in (folder / "figures").glob("*.png")} == {
        "worst", "median", "best",
    }  # fmt: skip
    assert finished.folder.record["cost"]["image"] == [3, 32, 32]
    page = write_report(folder.parent)
    assert "Image restoration" in page.read_text()
    assert f"{summary['scores']['psnr']['mean']:.2f}" in (page.parent / "table.md").read_text()


def test_the_best_checkpoint_of_uvm_net_restores_what_the_run_restored(place):
    words = [word for word in place[0] if not word.startswith("model")]
    small = ["data.steps=2", "data.val_every=2", "model.widths=[4,4,4,4,4]", "model.grid=8"]
    run = trained(*words, *small)
    assert run.config["model"]["name"] == "uvm_net"
    network, checkpoint = restore_network(run.folder.path)
    assert checkpoint.about["task"] == "restoration"
    pair = next(iter(run.data.test_dataloader()))
    with torch.no_grad():
        restored = network(pair["image"]).clamp(0, 1)
    row = next(r for r in table(run.folder.path / "cases.csv") if r["case"] == pair["case"].id)
    assert image_scores(restored, pair["clear"])[0] == pytest.approx(float(row["psnr"]), abs=1e-4)


def test_a_training_starts_from_a_run(finished, place, tmp_path):
    words = [*place[0], f"init_from={finished.folder.path}", f"outputs={tmp_path}"]
    with built(*words, "data.steps=2", "data.val_every=2") as run:
        loaded = run.folder.record["pretrained"]
    assert not loaded["missing"] and not loaded["mismatched"] and loaded["loaded"]


def test_a_network_is_exported_as_a_program_but_not_as_a_bundle(finished, tmp_path, capsys):
    words = (f"run={finished.folder.path}", "size=16")
    assert entered("export.py", *words, f"output={tmp_path / 'net.pt2'}", "format=torch") == 0
    told = json.loads((tmp_path / "net.pt2.json").read_text())
    assert told["input"]["shape"] == [1, 3, 16, 16] and told["task"] == "restoration"
    assert entered("export.py", *words, f"output={tmp_path / 'bundle'}", "format=bundle") == 1
    assert "was trained for restoration" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_a_run_is_replayed_with_its_own_scores(finished, place, tmp_path):
    path = shutil.copytree(finished.folder.path, tmp_path / "run")
    record = json.loads((path / "run.json").read_text())
    (typed,) = (word for word in WORDS if "_target_" in word)  # not taken from a run folder
    record["overrides"] = [word for word in [*place[0], *LONG] if word != typed]
    (path / "run.json").write_text(json.dumps(record))
    found = replay(path, ["data=haze_phantom", typed], steps=2)
    assert (found.steps.difference, found.scores.difference) == (0.0, 0.0)
    rows = table(path / "cases.csv")
    assert found.scores.values == len(rows) * (len(rows[0]) - 1) > 0


def test_data_for_another_task_are_refused(finished):
    words = [f"checkpoint={finished.folder.path}", "data=phantom"]
    with pytest.raises(UserError, match="was trained for restoration, data=phantom"):
        built(*words, script="evaluate")
    with pytest.raises(UserError, match="data=phantom is for segmentation"):
        built("data=phantom", "+data.task=restoration", "data.root=nowhere")


@pytest.mark.parametrize("method", ["mean_teacher", "weak_mamba_unet", "gated_crf"])
def test_methods_for_label_maps_are_refused(method, place):
    with pytest.raises(UserError, match=f"method={method} learns label maps.*method=supervised"):
        built(*place[0], f"method={method}")


@pytest.mark.parametrize("loss", ["dice_ce", "cross_entropy"])
def test_losses_for_label_maps_are_refused(loss, place):
    with pytest.raises(UserError, match=r"Use.* loss=l1"):
        trained(*place[0], f"loss={loss}", "name=losses")


def test_a_run_folder_of_before_scores_as_it_did(finished, tmp_path):
    """As it was while the computed haze was in another module and metrics.json had no columns."""
    old = tmp_path / "old"
    shutil.copytree(finished.folder.path, old)
    text = (old / "config.yaml").read_text()
    moved = text.replace("mambaseg.restoration.phantom", "mambaseg.data.phantoms.haze_phantom")
    assert moved != text
    (old / "config.yaml").write_text(moved)
    words = [f"run={old}", f"outputs={tmp_path / 'outputs'}", "logger=csv", "trainer=cpu"]
    assert entered("evaluate.py", *words) == 0
    (again,) = (tmp_path / "outputs").glob("*/*/cases.csv")
    assert table(again) == table(old / "cases.csv")


def test_an_interrupted_training_ends_as_an_undisturbed_one(place, tmp_path, monkeypatch):
    undisturbed = trained(*place[0])
    whole = RestorationTask.training_step

    def training_step(self, batch, index):
        if batch["step"] == 5:
            raise ZeroDivisionError("on purpose")
        return whole(self, batch, index)

    words = [*place[0], f"outputs={tmp_path / 'outputs'}"]
    with monkeypatch.context() as patch:
        patch.setattr(RestorationTask, "training_step", training_step)
        with pytest.raises(ZeroDivisionError):
            trained(*words)
    resumed = trained(*words)
    assert [pause["step"] for pause in resumed.folder.record["resumed"]] == [4]
    one, other = (
        torch.load(run.folder.path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in (undisturbed, resumed)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    for name in ("cases.csv", "metrics.csv"):
        assert table(undisturbed.folder.path / name) == table(resumed.folder.path / name)
