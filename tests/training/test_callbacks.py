import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image

from mambaseg.reporting.figures import case_slices
from mambaseg.reporting.views import SegmentationViews, drawn
from mambaseg.storage.run_folder import RunFolder
from mambaseg.training import callbacks
from mambaseg.training.callbacks import RunRecorder
from mambaseg.training.progress import ProgressBar
from mambaseg.training.signals import Interrupted
from runs import UNET, built


@pytest.fixture
def recorder(tmp_path):
    views = SegmentationViews(("background", "A", "B"))
    recorder = RunRecorder(RunFolder(tmp_path), title="synthetic", views=views)
    recorder._cases = {name: {} for name in "abcde"}
    return recorder


def rows(**dice):
    """Rows of two foreground classes and a perfect background per case."""
    return [
        {"case": case, "class": label, "dice": value}
        for case, values in dice.items()
        for label, value in enumerate((1.0, *values))
    ]


def test_worst_median_and_best_case_are_shown_by_mean_foreground_dice(recorder):
    found = rows(a=(0.1, 0.9), b=(0.9, 0.9), c=(0.2, 0.3), d=(0.8, 0.7), e=(0.4, 0.3))
    assert recorder._shown(found) == {"worst": "c", "median": "a", "best": "b"}


def test_undefined_scores_are_left_out_and_cases_of_other_ranks_are_not(recorder):
    found = rows(a=(None, 0.5), b=(None, None), elsewhere=(0.0, 0.0))
    assert recorder._shown(found) == {"worst": "elsewhere", "median": "a", "best": "a"}


def test_no_scored_case_shows_nothing(recorder):
    assert recorder._shown(rows(a=(None, None))) == {}


@pytest.mark.parametrize(
    ("pace", "said"),
    [
        (0.5, "0.50 s a step: 1 min 30 s for the 180 that are left"),
        (90, "90.00 s a step: 4 h 30 min for the 180 that are left. data.minutes=60 trains for an "
             "hour"),
    ],
)  # fmt: skip
def test_a_resumed_training_says_early_how_long_the_rest_takes(
    recorder, monkeypatch, caplog, pace, said
):
    caplog.set_level("INFO")
    task = SimpleNamespace(device=torch.device("cpu"))
    trainer = SimpleNamespace(
        global_step=20, max_steps=211, accumulate_grad_batches=2, is_global_zero=False
    )
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    recorder.on_fit_start(trainer, task)
    for batch in range(60):
        trainer.global_step += batch % 2
        now += pace / 2 if batch > 1 else 500  # the first step does not count
        recorder.on_train_batch_end(trainer, task, None, None, batch)
    assert caplog.messages == [said]
    trainer.global_step = 20
    recorder.on_fit_start(trainer, task)
    for step in range(21, 60):
        trainer.global_step = step
        recorder.on_train_batch_end(trainer, task, None, None, 1)
        if step == 25:
            recorder.on_validation_start(trainer, task)
    assert caplog.messages == [said]


def test_the_time_left_is_that_of_this_session_and_not_of_a_slower_one_before(
    recorder, monkeypatch, caplog
):
    caplog.set_level("INFO")
    monkeypatch.setattr(RunFolder, "record", {"fit_seconds": 7200.0})
    task = SimpleNamespace(device=torch.device("cpu"), monitor="val/dice")
    trainer = SimpleNamespace(
        global_step=0, max_steps=300, is_global_zero=False, sanity_checking=False,
        callback_metrics={"val/dice": 0.5}, checkpoint_callbacks=[],
    )  # fmt: skip
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    recorder.on_fit_start(trainer, task)
    trainer.global_step = 100  # Lightning restores the step after the fit has begun
    recorder.on_train_start(trainer, task)
    trainer.global_step, now = 200, 1050.0
    recorder.on_validation_start(trainer, task)
    recorder.on_validation_end(trainer, task)
    assert caplog.messages == ["step 200 of 300: val/dice 0.5000, 50 s left"]


def test_long_phases_say_every_few_minutes_that_the_run_is_alive(recorder, monkeypatch):
    beats = []
    monkeypatch.setattr(RunFolder, "beat", lambda self, **fields: beats.append(fields))
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    trainer = SimpleNamespace(global_step=7, accumulate_grad_batches=2, is_global_zero=True)
    batch = {"case": Case}
    recorder.views = SimpleNamespace(keep=lambda *_: {})
    for hook in ("train", "validation", "predict", "test"):
        for _ in range(3):
            now += 400
            getattr(recorder, f"on_{hook}_batch_end")(trainer, None, {}, batch, 0)
    assert beats == [{"steps": 7}, {}, {}, {}, {}, {}]


def fitted(folder, *, steps, killed=False, seconds=0.0, peak=None):
    """The record after a session of so many steps that took some seconds each."""
    with pytest.MonkeyPatch.context() as patch:
        now = time.monotonic()
        patch.setattr(time, "monotonic", lambda: now)
        patch.setattr(callbacks, "peak", lambda device: peak)
        recorder = RunRecorder(RunFolder(folder), title="", views=None)
        task = SimpleNamespace(device=torch.device("cpu"))
        trainer = SimpleNamespace(
            global_step=0, max_steps=99, accumulate_grad_batches=1, is_global_zero=True,
            datamodule=SimpleNamespace(batch_size=2),
        )  # fmt: skip
        recorder.on_fit_start(trainer, task)
        for step in range(steps):
            now += seconds
            recorder.on_train_batch_end(trainer, task, None, None, step)
        recorder.on_save_checkpoint(trainer, task, {})
        if not killed:
            recorder.on_fit_end(trainer, task)
    return RunFolder(folder).record


def test_the_peak_of_memory_is_of_the_sessions_that_trained(tmp_path):
    for steps, peak, known in ((3, 500, 500), (0, 90, 500), (2, 700, 700), (2, 600, 700)):
        record = fitted(tmp_path, steps=steps, peak=peak)
        assert record["cost"]["peak_memory_bytes"] == known
    assert "peak_memory_bytes" not in fitted(tmp_path / "new", steps=0, peak=90)["cost"]


def test_the_time_before_a_hard_kill_counts(tmp_path):
    """That of the steps after the last validation too, up to the newest checkpoint."""
    fitted(tmp_path, steps=5, seconds=100, killed=True)
    assert fitted(tmp_path, steps=2, seconds=100)["fit_seconds"] == 700


def test_without_a_bar_steps_end_quietly():
    bar = ProgressBar(refresh_rate=0)
    trainer = SimpleNamespace(global_step=0, max_steps=2, accumulate_grad_batches=1)
    bar.on_train_start(trainer, None)
    for batch in range(2):
        trainer.global_step += 1
        bar.on_train_batch_end(trainer, None, None, None, batch)


class Case:
    id = "patient001_ED"


def volume(labelled, depth=10):
    """(depth, 6, 5) labels with a voxel of class 2 in each of the slices named."""
    labels = np.zeros((depth, 6, 5), np.int64)
    labels[labelled, 3, 2] = 2
    return labels


def test_overlays_are_the_quarters_of_the_slices_with_foreground():
    image = np.linspace(-1, 3, 300).reshape(10, 6, 5)
    kept = case_slices(image, volume(range(1, 9)), volume([0]))
    assert kept["slices"].tolist() == [3, 5, 7]
    assert {kept[name].dtype for name in ("image", "truth", "prediction")} == {np.dtype(np.uint8)}
    assert (kept["truth"] == 2).sum() == 3 and kept["prediction"].max() == 0
    low, high = np.percentile(image, (1, 99))
    expected = 255 * (image[5] - low) / (high - low)
    assert np.abs(kept["image"][1] - expected).max() <= 0.5


@pytest.mark.parametrize(
    ("truth", "prediction", "slices"), [([4], [0], [4]), ([], [2, 3], [2, 3]), ([], [], [2, 5, 7])]
)
def test_overlays_of_few_or_no_slices_with_foreground(truth, prediction, slices):
    image = np.zeros((10, 6, 5))  # constant: nothing to divide by
    kept = case_slices(image, volume(truth), volume(prediction))
    assert kept["slices"].tolist() == slices and kept["image"].max() == 0


def test_the_recorder_leaves_the_overlays_of_every_case(recorder, tmp_path):
    recorder._cases.clear()
    batch = {
        "case": Case,
        "image": torch.rand(10, 1, 6, 5),
        "label": torch.from_numpy(volume(range(10))),
        "spacing": None,
    }
    outputs = {"prediction": torch.from_numpy(volume([5]).astype(np.uint8))}
    recorder.on_test_batch_end(None, None, outputs, batch, 0)
    recorder.folder.write_arrays("overlays.npz", recorder._gather_overlays())
    with np.load(tmp_path / "overlays.npz") as arrays:
        assert {name: arrays[name].shape for name in arrays} == {
            "patient001_ED/image": (3, 6, 5),
            "patient001_ED/truth": (3, 6, 5),
            "patient001_ED/prediction": (3, 6, 5),
            "patient001_ED/slices": (3,),
        }
        assert arrays["patient001_ED/prediction"].sum() == 2  # slice 5 alone
    assert not list(tmp_path.glob(".*.tmp"))


def test_overlays_of_all_ranks_are_gathered(recorder, monkeypatch):
    mine, other = case_slices(*[volume([1])] * 3), case_slices(*[volume([2])] * 3)

    def gather(ranks, own):
        assert list(own) == ["b"]
        ranks[:] = [own, {"a": other}]

    recorder._cases = {"b": {"overlay": mine}}
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    overlays = recorder._gather_overlays()
    assert overlays["a/slices"].tolist() == other["slices"].tolist()
    assert overlays["b/slices"].tolist() == mine["slices"].tolist()


# ---- pictures


def picture(side, channels=3):
    """A batch of one picture, left half red, and its outputs."""
    image = torch.zeros(1, channels, side, side // 2)
    image[:, 0, :, : side // 4] = 1
    label = (image[:, 0] > 0).to(torch.uint8)
    batch = {"case": Case, "image": image, "label": label, "spacing": None}
    return batch, {"prediction": label.clone()}


def test_a_picture_is_kept_small_and_in_colour():
    views = SegmentationViews(("background", "A"))
    kept = views.keep(*picture(600))
    assert kept["overlay"]["image"].shape == (1, 200, 100, 3)
    assert kept["overlay"]["image"][0, 0, 0].tolist() == [255, 0, 0]
    assert kept["overlay"]["truth"].shape == (1, 200, 100)
    media = views.media(kept)
    assert media["image"].shape == (200, 100, 3) and media["image"].dtype == np.uint8
    assert media["masks"]["truth"]["mask_data"].shape == (200, 100)


def test_a_pictures_figure_shows_it_whole_and_in_colour(tmp_path):
    views = SegmentationViews(("background", "A"))
    kept = views.keep(*picture(120))
    assert kept["overlay"]["image"].shape == (1, 120, 60, 3)
    with Image.open(views.draw(kept, title="x", path=tmp_path / "a.png")) as figure:
        pixels = np.asarray(figure.convert("RGB")).reshape(-1, 3)
    assert (pixels == (255, 0, 0)).all(axis=1).mean() > 0.02


def test_a_grey_picture_stays_grey_and_scores_on_any_scale_have_colours():
    batch, outputs = picture(40, channels=1)
    assert SegmentationViews(("background", "A")).keep(batch, outputs)["overlay"]["image"].ndim == 3
    z_scores = np.linspace(-2, 3, 48, dtype=np.float32).reshape(1, 3, 4, 4)
    shown = drawn(z_scores)
    assert shown.shape == (1, 4, 4, 3) and (shown.min(), shown.max()) == (0, 255)
    assert drawn(np.zeros((2, 3, 4, 4))).shape == (2, 4, 4)  # a volume of three channels


class LateSignal(Callback):
    """Asks the run to end while Lightning puts a training away."""

    def on_train_end(self, trainer, pl_module):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_after_the_last_step_is_obeyed(small_run):
    words = [*small_run, *UNET, "trainer=cpu", "data.steps=1"]
    with pytest.raises(Interrupted) as ended, built(*words) as run:
        run.trainer.callbacks.append(LateSignal())
        run.fit()
    assert ended.value.code == 128 + signal.SIGTERM
    assert run.folder.record["status"] == "interrupted"
    with built(*words) as run:
        assert run.step == 1
        run.fit()
    assert run.folder.record["status"] == "done"
