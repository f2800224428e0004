"""A run that was interrupted goes on where it was and ends where it would have ended."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from mambaseg.training import checkpoints
from mambaseg.training.segmentation import SegmentationTask
from runs import QUIET, assert_same, built, entered, state_of, stop_before, trained
from small_disk import fill, no_space, small_disk

ROOT = Path(__file__).parents[2]
UNET = ["model=unet", "model.widths=[4,4,8,8,8]"]
NETWORKS = {
    "unet": UNET,
    "swin_unet": ["model=swin_unet", "model.embed_dim=24", "model.depths=[1,1,1,1]"],
    "mamba_unet": ["model=mamba_unet", "model.embed_dim=16", "model.depths=[1,1,1,1]"],
    "one cycle": [  # of rate and momentum, warm-up included; two micro-batches per step
        *UNET, "trainer.accumulate_grad_batches=2", "~optim.scheduler.total_iters",
        "~optim.scheduler.power", "optim.scheduler._target_=torch.optim.lr_scheduler.OneCycleLR",
        "+optim.scheduler.max_lr=0.05", "+optim.scheduler.total_steps=8",
    ],
    "nnU-Net's data": [
        "model=u_mamba_none", "model.widths=[4,8,8]", "model.blocks=1", "loss=deep_supervision",
        "augmentation=nnunet", "data.preprocessing=native", "data.intensity=zscore",
        "data.oversample=0.33", "data.neighbours=1", "data.split=kfold", "data.folds=4",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed_of(tmp_path_factory):
    """words -> the run that they make when nothing happens to it, trained once."""
    runs = {}

    def make(words):
        words = tuple(word for word in words if not word.startswith("outputs="))
        if words not in runs:
            runs[words] = trained(*words, f"outputs={tmp_path_factory.mktemp('undisturbed')}")
        return runs[words]

    return make


@pytest.mark.parametrize(
    ("network", "step"),  # amid two validations, and right after one
    [
        ("unet", 5),
        ("unet", 6),
        ("swin_unet", 5),
        ("mamba_unet", 5),
        ("one cycle", 5),
        ("nnU-Net's data", 5),
    ],
)
def test_an_interrupted_run_ends_as_an_undisturbed_one(
    network, step, small_run, undisturbed_of, monkeypatch
):
    words = [*small_run, "data.steps=8", "trainer.log_every_n_steps=1", *NETWORKS[network]]
    undisturbed = undisturbed_of(words)
    with monkeypatch.context() as patch:
        stop_before(step, patch)
        with pytest.raises(ZeroDivisionError):
            trained(*words)
    resumed = trained(*words)
    record = resumed.folder.record
    assert record["status"] == "done" and "error" not in record
    assert [pause["step"] for pause in record["resumed"]] == [step // 2 * 2]
    assert resumed.folder.path.name == undisturbed.folder.path.name
    assert_same(state_of(undisturbed), state_of(resumed))


@pytest.mark.parametrize("network", ["unet", "swin_unet"])
def test_a_resume_on_other_devices_says_what_changes(network, small_run, monkeypatch, caplog):
    """A folder of an earlier version, in which two devices kept batch norms of their own."""
    words = [*NETWORKS[network], *small_run, "test=false"]
    folder = interrupted(words, 2, monkeypatch).parent
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "devices": 2}))
    trained(*words)
    assert "devices 2, now 1: the same batches, but not the same rounding" in caplog.text
    assert ("batch norms" in caplog.text) == (network == "unet")


def test_a_run_without_a_checkpoint_starts_again(small_run, monkeypatch):
    with monkeypatch.context() as patch:
        stop_before(1, patch)
        with pytest.raises(ZeroDivisionError):
            trained(*UNET, *small_run)
    run = trained(*UNET, *small_run)
    assert run.folder.record["status"] == "done" and "resumed" not in run.folder.record


def test_a_run_that_died_in_its_test_part_is_only_tested(small_run, monkeypatch):
    def broken(self, batch, index):
        raise ZeroDivisionError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(SegmentationTask, "test_step", broken)
        with pytest.raises(ZeroDivisionError):
            trained(*UNET, *small_run)
    with monkeypatch.context() as patch:
        patch.setattr(SegmentationTask, "training_step", broken)
        run = trained(*UNET, *small_run)
    assert run.folder.finished and run.score is not None


def test_a_run_without_a_test_part_is_tested_when_it_is_wanted(small_run, monkeypatch):
    words = [*UNET, *small_run]
    first = trained(*words, "test=false")
    assert trained(*words, "test=false").finished and not first.folder.finished

    def broken(self, batch, index):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(SegmentationTask, "training_step", broken)
    tested = trained(*words)
    assert tested.folder.path == first.folder.path and tested.folder.finished
    assert tested.score == first.score


def flip(path):
    """Change one bit in the middle of a file: in some weight."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def interrupted(words, step, monkeypatch):
    """The checkpoints of a run that died when a step began."""
    with monkeypatch.context() as patch:
        stop_before(step, patch)
        with pytest.raises(ZeroDivisionError):
            trained(*words)
    outputs = next(word[8:] for word in words if word.startswith("outputs="))
    (last,) = Path(outputs).glob("default/*/checkpoints/last.ckpt")
    return last.parent


def test_where_the_newest_checkpoint_is_damaged_the_one_before_is_used(
    small_run, undisturbed_of, monkeypatch, caplog
):
    words = [*UNET, *small_run, "data.steps=6", "callbacks.checkpoint.every=1"]
    undisturbed = undisturbed_of(words)
    folder = interrupted(words, 5, monkeypatch)
    newest, before = folder / "step-00000005.ckpt", folder / "step-00000004.ckpt"
    assert newest.samefile(folder / "last.ckpt")
    flip(newest)
    with caplog.at_level("WARNING"):
        run = trained(*words)
    assert f"{newest} is damaged: resuming from {before} instead" in caplog.text
    assert [pause["step"] for pause in run.folder.record["resumed"]] == [4]
    assert {path.name for path in folder.iterdir()} == {"best.ckpt", "last.ckpt"}
    assert_same(state_of(undisturbed), state_of(run))


@pytest.mark.parametrize("name", ["best.ckpt", "last.ckpt"])
def test_one_that_dies_when_its_last_state_has_no_name_yet_ends_with_that_state(
    name, small_run, undisturbed_of, monkeypatch
):
    """Nothing is left to train then, and the only validation was that of the last step."""
    words = [*UNET, *small_run, "data.val_every=4", "callbacks.checkpoint.every=1"]
    undisturbed = undisturbed_of(words)
    whole = checkpoints.give_name

    def dying(path, other):
        if (path.name, other.name) == ("step-00000004.ckpt", name):
            raise ZeroDivisionError("on purpose")
        whole(path, other)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "give_name", dying)
        with pytest.raises(ZeroDivisionError):
            trained(*words)
    run = trained(*words)
    assert [pause["step"] for pause in run.folder.record["resumed"]] == [4]
    state = state_of(run)
    assert state["last"]["global_step"] == state["best"]["global_step"] == 4
    assert_same(state_of(undisturbed), state)


def test_where_all_checkpoints_are_damaged_the_training_starts_again(
    small_run, monkeypatch, caplog
):
    words = [*UNET, *small_run]
    last = interrupted(words, 3, monkeypatch) / "step-00000002.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    with caplog.at_level("WARNING"):
        run = trained(*words)
    assert (
        f"{last} is damaged: there is no other, the training starts from the beginning"
        in caplog.text
    )
    assert run.folder.finished and "resumed" not in run.folder.record
    assert run.folder.path.with_name(run.folder.path.name + ".previous").is_dir()


def test_a_training_that_lost_its_record_starts_again_and_says_so(small_run, monkeypatch, caplog):
    words = [*UNET, *small_run]
    folder = interrupted(words, 3, monkeypatch).parent
    (folder / "run.json").write_text("{")
    with caplog.at_level("WARNING"):
        run = trained(*words)
    assert f"{folder}/run.json is missing or damaged: the training begins anew" in caplog.text
    assert run.folder.finished and "resumed" not in run.folder.record
    assert any(folder.with_name(f"{folder.name}.previous").glob("checkpoints/*.ckpt"))


def test_a_network_that_draws_from_torchs_generator_goes_on_in_its_row(
    small_run, tmp_path, monkeypatch
):
    """As those of other packages do; ours are told what to drop."""
    from mambaseg.training import task as base_task

    monkeypatch.setattr(base_task, "drawing", lambda *_: contextlib.nullcontext())
    words = [*UNET, *small_run, "data.steps=6", "callbacks.checkpoint.every=1",
             "data.num_workers=1"]  # fmt: skip
    undisturbed = trained(*words, f"outputs={tmp_path / 'undisturbed'}")
    interrupted(words, 3, monkeypatch)
    assert_same(state_of(undisturbed), state_of(trained(*words)))


def test_another_number_of_threads_is_said_and_recorded(small_run, monkeypatch, caplog):
    words = [*UNET, *small_run]
    interrupted(words, 3, monkeypatch)
    torch.set_num_threads(2)
    with caplog.at_level("WARNING"):
        record = trained(*words).folder.record
    assert "threads 1, now 2" in caplog.text and "devices 1" not in caplog.text
    assert (record["threads"], record["resumed"][0]["threads"]) == (1, 2)
    assert record["devices"] == record["resumed"][0]["devices"] == 1
    assert record["resumed"][0]["hardware"]["threads"] == 2
    assert record["resumed"][0]["versions"] == record["versions"]


def test_a_disk_that_fills_in_training_leaves_the_checkpoint_before(
    small_run, tmp_path, undisturbed_of, monkeypatch
):
    words = [*UNET, *small_run, "data.steps=6", "callbacks.checkpoint.every=1"]
    undisturbed = undisturbed_of(words)
    whole = SegmentationTask.training_step

    def filling(self, batch, index):
        if batch["step"] == 4:
            fill(disk)
        return whole(self, batch, index)

    with small_disk(tmp_path / "disk", kibibytes=8192) as disk:
        words = [*words, f"outputs={disk}"]
        with monkeypatch.context() as patch:
            patch.setattr(SegmentationTask, "training_step", filling)
            with no_space(disk, "outputs="):
                trained(*words)
        assert not list(disk.rglob(".*.tmp"))
        (disk / "ballast").unlink()
        run = trained(*words)
        assert [pause["step"] for pause in run.folder.record["resumed"]] == [4]
        assert_same(state_of(undisturbed), state_of(run))


def test_other_code_is_said_when_a_run_goes_on(small_run, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        stop_before(3, patch)
        with pytest.raises(ZeroDivisionError):
            trained(*UNET, *small_run)
    from mambaseg.training import run as module

    other = {"digest": "0", "commit": "f" * 40, "dirty": False}
    monkeypatch.setattr(module, "code_state", lambda config: other)
    with caplog.at_level("WARNING"):
        trained(*UNET, *small_run)
    assert "now ffffffffff" in caplog.text


def test_a_rerun_that_was_interrupted_resumes_and_one_that_failed_starts_again(
    small_run, monkeypatch
):
    words = [*UNET, *small_run, "rerun=true"]
    for error, step in ((ZeroDivisionError, 0), (SystemExit, 2)):
        with monkeypatch.context() as patch:
            stop_before(3, patch, error)
            with pytest.raises(error):
                trained(*words)
        with built(*words) as run:
            assert run.step == step
    with built(*words) as run:  # the one before has ended well
        assert run.step == 0


def test_a_rerun_that_ends_before_it_has_begun_leaves_the_finished_run(small_run, monkeypatch):
    from mambaseg.training import run as module

    words = [*UNET, *small_run, "rerun=true"]
    folder = built(*words).folder
    folder.start(code={})
    folder.finish("done")

    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "environment", stopped)
    with pytest.raises(KeyboardInterrupt), built(*words):
        pass
    assert folder.trained and not folder.path.with_name(folder.path.name + ".previous").exists()


def test_other_data_are_said(small_run, phantom_root, tmp_path, caplog):
    words = [word for word in small_run if not word.startswith("data.root=")]
    root = tmp_path / "data"
    shutil.copytree(phantom_root, root)
    words = [*UNET, *words, f"data.root={root}", "data.steps=2", "test=false"]
    first = trained(*words)
    path = next(p for p in sorted(root.rglob("*_frame*.nii.gz")) if "_gt" not in p.name)
    image = nibabel.load(path)
    voxels = np.asarray(image.dataobj).copy()
    voxels[0, 0, 0] += 1
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine, image.header), path)
    assert "data have changed" not in caplog.text
    second = trained(*words)
    assert not second.finished and second.folder.path != first.folder.path
    assert f"data have changed since {first.folder.path}" in caplog.text


@pytest.mark.timeout(600)
def test_a_sweep_that_was_killed_does_only_what_is_left(small_run, tmp_path, capfd):
    """SIGKILL amid the second of three jobs; the same command finishes the sweep."""
    words = ["-m", *UNET, "seed=1,2,3", *small_run, "data.steps=40", "test=false",
             "data.val_every=10", *QUIET]  # fmt: skip
    experiment = tmp_path / "outputs" / "default"
    first = subprocess.Popen(
        [sys.executable, str(ROOT / "src" / "train.py"), *words], start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + 240
    try:
        while not list(experiment.glob("*-seed2-*/checkpoints/last.ckpt")):
            assert first.poll() is None and time.monotonic() < until
            time.sleep(0.05)
    finally:  # nor does a sweep outlive a test that fails
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()

    def records():
        return {
            json.loads(path.read_text())["key"]: json.loads(path.read_text())
            for path in experiment.glob("*-seed*/run.json")
        }

    before = records()
    assert sorted(record["status"] for record in before.values()) == ["done", "running"]
    assert entered("report.py", "status", str(experiment)) == 0
    status = capfd.readouterr().out
    for word in ("done", "interrupted", "missing", "seed=3"):
        assert word in status
    assert entered("train.py", *words) == 0
    said = capfd.readouterr().out
    assert said.count("already finished") == said.count("resuming from step") == 1
    after = records()
    assert {record["status"] for record in after.values()} == {"done"} and len(after) == 3
    for key, record in before.items():
        assert after[key]["started"] == record["started"]
