"""After a resume the curves are one line: nothing twice, nothing missing, offline and online."""

import csv
from types import SimpleNamespace

import lightning as L
import pytest
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, LearningRateMonitor

from mambaseg.app.schema import EXTRAS
from mambaseg.data.geometry import Preprocessing
from mambaseg.models import UNet
from mambaseg.training.checkpoints import Checkpoints
from mambaseg.training.loggers import MetricsCsv, read_history
from mambaseg.training.segmentation import SegmentationTask
from mambaseg.training.wandb_logger import StepRows, finish_wandb, wandb_logger
from runs import composed
from wandb_file import curves, read_run

STEPS, EVERY = 7, 2


def say(loggers, first, last, noise=0.0):
    """Logs steps first..last-1 as Lightning does: rate, loss, after every second step scores."""
    for step in range(first, last):
        rows = [{"lr-SGD": 0.1 / (step + 1)}, {"train/loss": 1 / (step + 3) + noise, "epoch": 0}]
        if (step + 1) % EVERY == 0:
            rows.append({"val/dice": step / 7 + noise, "val/hd95_mm": float("nan"), "epoch": 0})
        for row in rows:
            for logger in loggers:
                logger.log_metrics(row, step)


def both(folder, **resumed):
    folder.mkdir(exist_ok=True)
    history = folder / "metrics.csv"
    board = wandb_logger(save_dir=folder, name="x", run_id="1-a", history=history, **resumed)
    return [MetricsCsv(folder), board]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    say(both(folder), 0, STEPS)
    finish_wandb(failed=False)
    return folder


# ---- metrics.csv ---------------------------------------------------------------------------------


def test_rewind_keeps_what_lies_before_the_checkpoint_and_goes_on(tmp_path, whole):
    say([MetricsCsv(tmp_path)], 0, 6)
    resumed = MetricsCsv(tmp_path)
    resumed.rewind(4)
    steps = [int(row["step"]) for row in csv.DictReader(resumed.path.open())]
    assert steps == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    say([resumed], 4, STEPS)
    assert resumed.path.read_bytes() == (whole / "metrics.csv").read_bytes()


@pytest.mark.parametrize("cut", ["4,0.0", "4", "6,,0.125,,"])
def test_a_line_that_the_dying_process_left_half_written_goes(tmp_path, whole, cut):
    say([MetricsCsv(tmp_path)], 0, 4)
    with (tmp_path / "metrics.csv").open("a") as stream:
        stream.write(cut)  # "4" may be the begin of 41
    resumed = MetricsCsv(tmp_path)
    resumed.rewind(5)
    say([resumed], 4, STEPS)
    assert resumed.path.read_bytes() == (whole / "metrics.csv").read_bytes()


def test_rewind_to_the_begin_or_without_a_file_begins_anew(tmp_path, whole):
    for step in (4, 0):  # at first there is no file
        logger = MetricsCsv(tmp_path)
        logger.rewind(step)
        say([logger], 0, STEPS)
        assert logger.path.read_bytes() == (whole / "metrics.csv").read_bytes()


def test_history_joins_the_rows_of_a_step_exactly(whole):
    history = read_history(whole / "metrics.csv", before=5)
    assert list(history) == [0, 1, 2, 3, 4]
    assert history[2] == {"lr-SGD": 0.1 / 3, "train/loss": 1 / 5}  # to the last bit
    assert history[3].keys() == {"lr-SGD", "train/loss", "val/dice", "val/hd95_mm"}


# ---- W&B -----------------------------------------------------------------------------------------


def test_an_offline_run_that_was_killed_and_resumed_is_one_line(tmp_path, whole):
    say(both(tmp_path), 0, 6, noise=0.0)
    finish_wandb(failed=True)
    (killed,) = tmp_path.glob("wandb/offline-run-*")
    loggers = both(tmp_path, resume_step=4)
    loggers[0].rewind(4)
    say(loggers, 4, STEPS)
    finish_wandb(failed=False)
    said = read_run(tmp_path)  # there is one directory that `wandb sync` takes
    assert said["run"].run_id == "1-a" and said["exit_code"] == 0
    assert curves(said) == curves(read_run(whole))
    assert [step for step, _ in curves(said)] == list(range(STEPS))
    assert (tmp_path / "wandb" / "superseded" / killed.name).is_dir()


def test_rows_beyond_the_checkpoint_do_not_come_back(tmp_path):
    say(both(tmp_path), 0, 6, noise=0.5)
    finish_wandb(failed=True)
    say(both(tmp_path, resume_step=4), 4, 5, noise=0.25)  # metrics.csv is not rewound yet
    finish_wandb(failed=False)
    losses = [row["train/loss"] for _, row in curves(read_run(tmp_path))]
    assert losses == [1 / (s + 3) + (0.25 if s == 4 else 0.5) for s in range(5)]


def fake_run(starting_step=0):
    sent = []
    return SimpleNamespace(
        starting_step=starting_step,
        define_metric=lambda *_, **__: None,
        log=lambda row, step, commit: sent.append((step, row)),
        finish=lambda exit_code: sent.append(("exit", exit_code)),
        sent=sent,
    )


def test_online_only_what_the_server_lacks_is_sent():
    first, second = fake_run(), fake_run(starting_step=5)  # W&B says: rows 0..4 are there
    board = StepRows(first, ".")
    say([board], 0, 6)
    board.finish(failed=True)
    assert [step for step, _ in first.sent] == [0, 1, 2, 3, 4, "exit"]  # 5 may not be whole
    resumed = StepRows(second, ".")
    say([resumed], 0, 4)  # the replay of metrics.csv
    say([resumed], 4, STEPS)
    resumed.finish(failed=False)
    assert [step for step, _ in second.sent] == [5, 6, "exit"]
    sent = dict(first.sent + second.sent)
    assert sent["exit"] == 0 and all({"lr-SGD", "train/loss"} < sent[s].keys() for s in range(7))


def test_no_row_is_lost_to_a_step_that_does_not_rise():
    run = fake_run()
    board = StepRows(run, ".")
    say([board], 0, 2)
    board.finalize("success")
    board.log_metrics({"test/dice": 0.5}, 0)  # a test without a fit counts from 0
    board.log_metrics({"test/cases": "table"})
    board.finish(failed=False)
    assert [step for step, _ in run.sent] == [0, 1, 2, "exit"]
    assert run.sent[2][1].keys() == {"test/dice", "test/cases", "trainer/global_step"}


# ---- the same with Lightning ---------------------------------------------------------------------


class KilledError(Exception):
    pass


class Kill(Callback):
    def __init__(self, hook, step):
        setattr(self, hook, lambda trainer, *_: self._at(trainer, step))

    def _at(self, trainer, step):
        if trainer.global_step == step:
            raise KilledError


def train(small_run, folder, *extra, checkpoint=None, **resumed):
    """Trains a small network without dropout: every run of it sees and does the same."""
    cfg = composed(*small_run, f"data.steps={STEPS}", "data.num_workers=0")
    L.seed_everything(1, verbose=False)
    data = {key: value for key, value in cfg.data.items() if key not in EXTRAS["data"]}
    task = SegmentationTask(
        UNet(widths=(4, 4, 8, 8, 8), dropout=(0.0,) * 5), instantiate(cfg.loss),
        instantiate(cfg.optim.optimizer), None,
        preprocessing=Preprocessing("paper", 32), class_names=cfg.data.class_names,
    )  # fmt: skip
    loggers = both(folder, **resumed)
    if resumed:
        loggers[0].rewind(resumed["resume_step"])
    last = Checkpoints(folder, every=None)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=STEPS, max_epochs=1, log_every_n_steps=1,
        val_check_interval=EVERY, check_val_every_n_epoch=None, use_distributed_sampler=False,
        num_sanity_val_steps=0, logger=loggers, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
        callbacks=[LearningRateMonitor("step"), last, *extra],
    )  # fmt: skip
    data = instantiate(data, _convert_="all")
    try:
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    finally:
        finish_wandb(failed=trainer.state.status != "finished")


@pytest.fixture(scope="module")
def uninterrupted(shared_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(shared_run, folder)
    return folder


@pytest.mark.parametrize(
    ("hook", "step", "saved"),
    [
        ("on_train_batch_start", 5, 4),  # a rate without its loss
        ("on_train_batch_end", 4, 2),  # the step is done and not logged
        ("on_validation_start", 4, 2),  # logged and not validated
    ],
)
def test_killed_anywhere_the_resumed_curves_are_the_uninterrupted_ones(
    shared_run, tmp_path, uninterrupted, hook, step, saved
):
    import torch

    with pytest.raises(KilledError):
        train(shared_run, tmp_path, Kill(hook, step))
    checkpoint = tmp_path / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == saved
    train(shared_run, tmp_path, checkpoint=checkpoint, resume_step=saved)
    assert (tmp_path / "metrics.csv").read_bytes() == (uninterrupted / "metrics.csv").read_bytes()
    assert curves(read_run(tmp_path)) == curves(read_run(uninterrupted))
