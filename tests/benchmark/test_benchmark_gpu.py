"""The measurement of a GPU machine: parts by the clock, what they leave, what its page tells."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mambaseg.benchmark import gpu
from mambaseg.benchmark.gpu import Machine, Part, affordable, measure_gpu
from mambaseg.benchmark.gpu_page import write_page
from mambaseg.storage.run_folder import RunFolder
from mambaseg.training.callbacks import RunRecorder
from runs import composed, small_overrides

ROOT = Path(__file__).parents[2]
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(60)
print("slept")
"""
POLITE = """
import signal, sys, time, pathlib
def save(*_):
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1]).write_text("listens")
time.sleep(60)
"""


def code(name, text, *words, limit_s=60.0):
    return Part(name, ("-c", text, *map(str, words)), limit_s)


def machine(out, seconds=60.0):
    return Machine(out, ROOT, time.monotonic() + seconds)


# ---- by the clock


def test_a_failed_part_costs_the_others_nothing(tmp_path, caplog):
    there = machine(tmp_path)
    there.run(code("bad", "import sys; print('the reason'); sys.exit(3)"), code("good", "print(1)"))
    there.run(code("next", "print(2)"))
    status = {part["name"]: part["status"] for part in there.parts}
    assert status == {"bad": "failed", "good": "done", "next": "done"}
    assert "the reason" in caplog.text
    assert (tmp_path / "logs" / "good.log").read_text() == "1\n"
    assert json.loads((tmp_path / "parts.json").read_text()) == there.parts
    assert "| bad | failed |" in (tmp_path / "table.md").read_text()


def test_a_part_is_asked_to_stop_at_its_limit_and_may_save(tmp_path, monkeypatch):
    there, state, wait = machine(tmp_path), tmp_path / "state", Machine._wait

    def limited(self, running, start):  # from when it listens, also on a slow machine
        process = next(iter(running.values()))
        while process.poll() is None and not (state.exists() and state.read_text()):
            time.sleep(0.05)
        wait(self, running, start - 30)

    monkeypatch.setattr(Machine, "_wait", limited)
    there.run(code("polite", POLITE, state, limit_s=30.0), code("quick", "print(1)"))
    assert {part["name"]: part["status"] for part in there.parts} == {
        "polite": "stopped", "quick": "done",
    }  # fmt: skip
    assert state.read_text() == "saved"


def test_what_does_not_listen_is_killed_before_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_S", 1.0)
    there = machine(tmp_path, seconds=2.0)
    there.run(code("stubborn", STUBBORN), code("another", STUBBORN))
    assert {part["status"] for part in there.parts} == {"stopped"}
    one, other = (part["seconds"] for part in there.parts)
    assert abs(one - other) < 0.6  # both were asked at once
    assert (tmp_path / "logs" / "stubborn.log").read_text() == ""  # it did not wake up


def test_a_part_is_noted_when_it_ends_and_not_after_those_before_it(tmp_path):
    waits = (
        "import pathlib, sys, time\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(.02)"
    )
    there = machine(tmp_path)
    there.run(code("slow", waits, tmp_path / "parts.json", limit_s=20.0), code("quick", "print(1)"))
    assert [(part["name"], part["status"]) for part in there.parts] == [
        ("quick", "done"), ("slow", "done"),
    ]  # fmt: skip


def test_parts_are_chosen_by_the_beginning_of_their_names(tmp_path):
    there = Machine(tmp_path, ROOT, time.monotonic() + 60, ("train", "report"))
    there.run(code("steps", "print(1)"), code("train-unet", "print(1)"))
    there.run(code("scan", "print(1)"))
    assert [part["name"] for part in there.parts] == ["train-unet"]


def test_what_nobody_asked_to_train_did_not_lack_the_time(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Machine, "run", lambda self, *parts: None)
    measure_gpu(tmp_path, tmp_path / "out", minutes=1, cwd=ROOT, only=("steps",))
    assert "no time" not in caplog.text
    measure_gpu(tmp_path, tmp_path / "out", minutes=1, cwd=ROOT)
    assert "no time" in caplog.text


@pytest.mark.parametrize(
    ("seconds", "each", "steps"),
    [(500, (0.02, 0.03, 0.05), 3200), (5000, (0.02, 0.03, 0.05), 10_000), (95, (0.1,), 0)],
)
def test_as_many_equal_steps_as_fit(seconds, each, steps):
    assert affordable(seconds, {"rows": [{"median_s": value} for value in each]}) == steps
    assert affordable(seconds, {"rows": []}) == affordable(seconds, None), "none fits into memory"


def test_the_report_has_its_time_where_trainings_use_all_of_theirs(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        Machine, "run", lambda self, *parts: seen.update({p.name: p for p in parts})
    )
    monkeypatch.setattr(gpu.time, "monotonic", lambda: 0.0)
    measure_gpu(tmp_path, tmp_path / "out", minutes=9, cwd=ROOT)
    asked = seen["train-unet"].limit_s  # to stop; they take all the grace to save, or are killed
    report = asked + gpu.GRACE_S
    stopped = min(report + seen["report"].limit_s, 9 * 60 - gpu.GRACE_S)
    assert stopped - report >= gpu.END_S >= 30
    fit = affordable(9 * 60, {"rows": [{"median_s": 0.1}]})
    assert gpu.START_S + fit * gpu.SLOWER * 0.1 + gpu.END_S <= asked


def test_the_parts_come_in_order_and_compose(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Machine, "run", lambda self, *parts: seen.extend(parts))
    measure_gpu(tmp_path, tmp_path / "out", minutes=90, cwd=ROOT, train=("seed=7",))
    names = [part.name for part in seen]
    assert names == [
        "environment", "smoke", "truth", "steps", "scan", "kernels", "loop-mamba_unet",
        "loop-unet", "loop-swin_unet", "train-mamba_unet", "train-unet", "train-swin_unet",
        "report",
    ]  # fmt: skip
    for part in seen:
        _, _, script, *words = part.words
        if script == "train":
            cfg = composed(*words)
            assert cfg.data.batch_size == 24 and cfg.seed == 7 and cfg.trainer.graph
            assert (cfg.data.steps == 10_000) == part.name.startswith("train")
        elif script == "benchmark":
            composed(f"what={words[0]}", *words[1:], script="benchmark")


@pytest.mark.slow
def test_everything_runs_on_a_processor_with_tiny_settings(phantom_root, tmp_path):
    train = ("trainer=cpu", *small_overrides(phantom_root, tmp_path / "runs"))
    bench = ("device=cpu", "size=32", "batch=2", "repeats=1", "graph=false")
    parts = measure_gpu(
        phantom_root, tmp_path, minutes=8, cwd=ROOT, networks=("unet",), graph=False,
        train=train, bench=bench,
    )  # fmt: skip
    status = {part["name"]: part["status"] for part in parts}
    assert status.pop("kernels") == "failed"  # there are none on a CPU
    assert set(status.values()) == {"done"}, status
    text = (tmp_path / "table.md").read_text()
    assert "| unet | done | 4 |" in text and "## Commands" in text


# ---- what the page says


def test_the_page_puts_the_trainings_step_beside_the_networks(tmp_path):
    run = tmp_path / "runs/acdc_paper/unet-acdc-seed7-00000000"
    run.mkdir(parents=True)
    cost = {"step_seconds": 0.02, "images_per_step": 24, "validation_seconds": 30.0}
    record = {"status": "running", "steps": 10, "fit_seconds": 120.0, "cost": cost}
    (run / "run.json").write_text(json.dumps(record))
    bench = tmp_path / "bench/steps"
    bench.mkdir(parents=True)
    times = {"median_s": 0.019, "min_s": 0.019, "max_s": 0.02, "ratio": 1.0, "images_per_s": 1263.0}
    row = {"network": "unet", "peak_bytes": None, "peak_added_bytes": None, **times}
    record = {
        "what": "train", "command": "mambaseg benchmark train", "rows": [row], "notes": [],
        "settings": {"size": 224, "batch": 24}, "device": "cpu", "precision": "32-true",
        "hardware": {"gpus": [], "cpu": "a CPU", "threads": 1}, "started": "2026-01-02T00:00",
        "code": {"commit": "0123456789abcdef"}, "versions": {"python": "3.11", "torch": "2.13"},
    }  # fmt: skip
    (bench / "a.json").write_text(json.dumps(record))
    report = tmp_path / "runs/acdc_paper/report/table.md"
    report.parent.mkdir()
    report.write_text("## hearts\n\n### Costs\n")
    text = write_page(tmp_path, []).read_text()
    assert "\n### hearts\n\n#### Costs\n" in text
    assert "| unet | running | 10 | 2.0 | 0.5 | 20.00 | 19.00 |" in text
    assert "a CPU, python 3.11, torch 2.13, lightning –; commit 0123456789" in text
    assert "| unet | 19.00 |" in text and "nothing pretrained" in text


def test_the_pace_of_a_training_leaves_validations_and_pauses_out(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("mambaseg.training.callbacks.time.monotonic", lambda: clock[0])
    recorder = RunRecorder(RunFolder(tmp_path), title="", views=None)
    task = SimpleNamespace(device=torch.device("cpu"), monitor="val/dice")
    trainer = SimpleNamespace(
        global_step=0, accumulate_grad_batches=1, callback_metrics={}, sanity_checking=False,
        training=True, is_global_zero=True, max_steps=190,
    )  # fmt: skip
    recorder.on_fit_start(trainer, task)
    for step in range(1, 191):
        clock[0] += 0.5
        trainer.global_step = step
        recorder.on_train_batch_end(trainer, task, None, None, step - 1)
        if step in (100, 170):  # between two windows, and amid one
            recorder.on_validation_start(trainer, task)
            clock[0] += 1000
            recorder.on_validation_end(trainer, task)
    recorder.on_exception(trainer, task, SystemExit(143))
    record = RunFolder(tmp_path).record
    assert record["cost"] == {"validation_seconds": 2000.0, "step_seconds": pytest.approx(0.5)}
    assert record["steps"] == 190 and record["fit_seconds"] == 2095.0
    assert recorder._paces == pytest.approx([0.5, 0.5, 0.5])
