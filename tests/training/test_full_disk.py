"""A full disk ends in one message with folder and remedy; what was there before is whole."""

import json
import logging

import numpy as np
import pytest

from mambaseg.storage.run_folder import RunFolder
from mambaseg.training.loggers import MetricsCsv, read_history
from runs import built
from small_disk import content, fill, no_space, small_disk


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", kibibytes=3072) as folder:
        yield folder


def test_the_files_of_a_run_folder(disk):
    folder = RunFolder(disk / "outputs" / "run")
    folder.start(key="1")
    metrics = MetricsCsv(folder.path)
    for step in range(3):
        metrics.log_metrics({"train/loss": 0.5}, step)
    folder.write_json("metrics.json", {"dice": 0.5})
    folder.write_rows("cases.csv", [{"case": "a", "dice": 0.5}])
    folder.write_arrays("overlays.npz", {"a": np.zeros(3)})
    before = content(disk)
    ballast = fill(disk)
    noise = np.random.default_rng(0).random(100_000)
    rows = [{"case": str(value)} for value in noise[:2000]]
    attempts = {
        "run.json": lambda: folder.update(note="x" * 9000),
        "metrics.json": lambda: folder.write_json("metrics.json", list(noise[:2000])),
        "cases.csv": lambda: folder.write_rows("cases.csv", rows),
        "overlays.npz": lambda: folder.write_arrays("overlays.npz", {"a": noise}),
    }
    for name, attempt in attempts.items():
        with no_space(folder.path / name, "outputs="):
            attempt()
        assert content(disk) == before, name
    with no_space(disk / "outputs" / "other", "outputs="):
        RunFolder(disk / "outputs" / "other").start(key="2")
    with no_space(folder.path / "metrics.csv", "outputs="):
        for step in range(3, 10_000):
            metrics.log_metrics({"train/loss": 0.5}, step)
    known = read_history(folder.path / "metrics.csv", before=10_000)
    assert list(known) == list(range(len(known))) and len(known) >= 3
    ballast.unlink()
    metrics.rewind(len(known))  # what a resumed training does first
    metrics.log_metrics({"train/loss": 0.25}, len(known))
    assert read_history(folder.path / "metrics.csv", before=10_000) == {
        **known, len(known): {"train/loss": 0.25}
    }  # fmt: skip


def test_a_run_that_cannot_begin(disk, small_run, capfd):
    fill(disk)
    run = built("model=unet", *small_run, f"outputs={disk}")
    with no_space(disk, "outputs="), run:
        pass
    assert not list(disk.glob("*/*/run.json"))
    assert "Traceback" not in capfd.readouterr().err


def test_the_log_of_a_run_gives_up_without_noise(disk, small_run, capfd, caplog):
    """The disk fills while the run goes on: the record fails, not each line of the log."""
    run = built("model=unet", *small_run, f"outputs={disk}")
    with caplog.at_level(logging.INFO), no_space(run.folder.path / "run.json", "outputs="), run:
        before = run.folder.record
        fill(disk)
        for _ in range(200):
            logging.getLogger("mambaseg").info("a line of the log " * 10)
        run.folder.update(note="x" * 9000)
    assert json.loads((run.folder.path / "run.json").read_text()) == before
    assert "run.json still says that the run is running" in caplog.text
    said = capfd.readouterr().err
    assert "Logging error" not in said and "Traceback" not in said
