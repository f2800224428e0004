"""The measurement in slices: what is done, stopped, gone on with, and what its page says."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mambaseg.benchmark import compare_curves, tuning
from mambaseg.benchmark.gpu_page import write_page
from mambaseg.benchmark.gpu_parts import gpu_parts
from mambaseg.benchmark.measure import Protocol
from mambaseg.benchmark.plan import Part, Plan, pack_results, unpack_results
from mambaseg.benchmark.scans import Shape
from mambaseg.benchmark.tuning import Sizes, measure_sizes
from mambaseg.callbacks import RunRecorder
from mambaseg.errors import UserError
from mambaseg.runs import RunFolder

ROOT = Path(__file__).parents[1]

# counts to `goal` in a file, and stops between two counts when it is asked to
COUNTER = """
import signal, sys, time, pathlib
path, goal = pathlib.Path(sys.argv[1]), int(sys.argv[2])
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
count = int(path.read_text()) if path.exists() else 0
while count < goal:
    count += 1
    path.write_text(str(count))
    time.sleep(0.02)
    if asked:
        sys.exit(143)
"""


def counter(name, path, goal, **options):
    return Part(name, ("-c", COUNTER, str(path), str(goal)), **{"least_s": 0.0, **options})


def noting(name, path, code=0):
    """A part that leaves a line in a file."""
    words = f"import sys; open({str(path)!r}, 'a').write({name!r} + '\\n'); sys.exit({code})"
    return Part(name, ("-c", words), least_s=0.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Slices of seconds."""
    monkeypatch.setattr("mambaseg.benchmark.plan.GRACE_S", 0.5)
    monkeypatch.setattr("mambaseg.benchmark.plan.SPARE_S", 0.1)


def statuses(plan):
    return [plan.state(part)["status"] for part in plan.parts]


def test_a_part_is_stopped_by_the_clock_and_gone_on_with(tmp_path):
    path, after = tmp_path / "count", tmp_path / "after"
    parts = [counter("long", path, 40), noting("next", after)]
    plan, slices = Plan(parts, tmp_path / "out", cwd=ROOT), 0
    while plan.left():
        slices += 1
        assert slices < 30, "it never ends"
        plan = Plan(parts, tmp_path / "out", cwd=ROOT)
        started = time.monotonic()
        plan.run(1.0)
        assert time.monotonic() - started < 1.5
        assert not after.exists() or statuses(plan)[0] == "done"
    assert path.read_text() == "40" and slices > 1  # nothing was lost, nothing done twice
    record = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert record["long"]["slices"] == slices - (record["next"]["slices"] > 1)
    assert record["long"]["status"] == record["next"]["status"] == "done"
    assert after.read_text() == "next\n"


def test_what_is_done_is_not_done_again_unless_its_command_changes(tmp_path):
    path = tmp_path / "lines"
    for _ in range(2):
        Plan([noting("one", path)], tmp_path, cwd=ROOT).run(5)
    assert path.read_text() == "one\n"
    words = noting("one", path).words
    Plan([Part("one", (*words, "more"), least_s=0.0)], tmp_path, cwd=ROOT).run(5)
    assert path.read_text() == "one\none\n"


def test_a_failed_part_keeps_nobody_waiting_and_is_tried_again(tmp_path, caplog):
    path = tmp_path / "lines"
    parts = [noting("bad", path, code=3), noting("good", path)]
    plan = Plan(parts, tmp_path, cwd=ROOT)
    plan.run(5)
    assert statuses(plan) == ["failed", "done"]
    assert "bad.log" in caplog.text
    Plan(parts, tmp_path, cwd=ROOT).run(5)
    assert path.read_text() == "bad\ngood\nbad\n"


def test_what_does_not_listen_is_killed_in_time(tmp_path):
    words = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    plan = Plan([Part("deaf", ("-c", words), least_s=0.0)], tmp_path, cwd=ROOT)
    started = time.monotonic()
    plan.run(1.5)
    assert time.monotonic() - started < 3
    assert statuses(plan) == ["stopped"] and plan.state(plan.parts[0])["code"] == -signal.SIGKILL


def test_no_part_is_begun_that_cannot_get_anywhere(tmp_path):
    path = tmp_path / "lines"
    Plan([Part("late", noting("late", path).words, least_s=60)], tmp_path, cwd=ROOT).run(30)
    assert not path.exists()


def test_a_signal_lets_the_part_save_its_state(tmp_path):
    path = tmp_path / "count"
    script = (
        "import sys; from pathlib import Path; from mambaseg.benchmark.plan import Part, Plan;"
        f"plan = Plan([Part('long', ('-c', {COUNTER!r}, {str(path)!r}, '5000'), least_s=0.0)],"
        f"Path({str(tmp_path)!r}), cwd=Path('.')); plan.run(100)"
    )
    with subprocess.Popen([sys.executable, "-c", script], env=os.environ) as process:
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["long"]["status"] == "stopped" and record["long"]["code"] == 143


@pytest.mark.parametrize("content", ["{", "[]", '{"long": 3}'])
def test_a_damaged_record_is_a_clear_error(content, tmp_path):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(UserError, match=r"plan\.json"):
        Plan([], tmp_path, cwd=ROOT)


# ---- the parts, and what travels


def test_the_parts_are_named_once_and_the_table_comes_before_the_rest(tmp_path):
    parts = gpu_parts(tmp_path / "data", tmp_path / "out", seeds=(1, 2), train=("a=1",))
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    assert names.index("report") < names.index("scan-bf16-24") < names.index("train-unet-2")
    assert names.index("train-unet-2") < names.index("modern-unet")
    trainings = [part for part in parts if part.words[0] == "src/train.py"]
    assert len(trainings) == 3 * 2 + 2 + 3
    assert all(part.words[-1] == "a=1" for part in trainings)  # what is typed wins
    chosen = gpu_parts(tmp_path, tmp_path, only=["train-unet", "report"])
    assert [part.name for part in chosen] == ["train-unet-1337", "report"]


def test_every_training_and_benchmark_of_the_plan_composes(tmp_path):
    from hydra import compose, initialize_config_dir

    from mambaseg.entry import CONF

    with initialize_config_dir(str(CONF), version_base="1.3"):
        for part in gpu_parts(tmp_path / "data", tmp_path / "out", seeds=(1, 2)):
            script, *words = part.words
            if script == "src/train.py":
                cfg = compose("config", overrides=words)
                assert cfg.data.batch_size == 24 and cfg.model.name in part.name + "mamba_unet"
                assert (cfg.data.steps == 10_000) != part.name.startswith("curve")
            elif script == "src/benchmark.py":
                compose("benchmark", overrides=[f"what={words[0]}", *words[1:]])


def test_results_travel_without_checkpoints_and_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr("mambaseg.benchmark.plan.MOST", 40_000)
    out, place = tmp_path / "out", tmp_path / "results"
    left = ("runs/a/checkpoints/last.ckpt", "runs/.locks/a", "runs/report/x", "runs/a/figures/b")
    large = {f"runs/{name}/overlays.npz": os.urandom(15_000) for name in "abcd"}
    content = {"plan.json": b"{}", "runs/a/run.json": b"{}", **large}
    for name, data in {**content, **dict.fromkeys(left, b"left")}.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    place.mkdir()
    (place / "results-9.zip").write_bytes(b"of an earlier slice")
    paths = pack_results(out, place)
    assert [path.name for path in paths] == ["results-1.zip", "results-2.zip"]
    assert sorted(place.iterdir()) == paths
    assert max(path.stat().st_size for path in paths) <= 40_000
    unpack_results(place, tmp_path / "new")
    files = [path for path in (tmp_path / "new").rglob("*") if path.is_file()]
    found = {str(path.relative_to(tmp_path / "new")): path.read_bytes() for path in files}
    assert found == content


def test_results_of_a_stranger_leave_no_file_outside(tmp_path):
    with zipfile.ZipFile(tmp_path / "results-1.zip", "w") as file:
        file.writestr("../outside", "x")
    unpack_results(tmp_path, tmp_path / "inside")
    assert not (tmp_path / "outside").exists()
    (tmp_path / "results-2.zip").write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"results-2\.zip"):
        unpack_results(tmp_path, tmp_path / "inside")


# ---- what the page says


def curve(folder, precision, losses):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"status": "done"}))
    (folder / "config.yaml").write_text(f"trainer: {{precision: {precision}}}\n")
    rows = "".join(f"{step},{loss}\n" for step, loss in enumerate(losses))
    (folder / "metrics.csv").write_text("step,train/loss\n" + rows)


@pytest.mark.parametrize(("shift", "verdict"), [(0.001, "**within"), (0.1, "**NOT within")])
def test_the_page_compares_both_curves(tmp_path, shift, verdict):
    curve(tmp_path / "runs/curves/a", "bf16-mixed", [1.0, 0.8, 0.6, 0.5, 0.4])
    curve(tmp_path / "runs/curves/b", "32-true", [v + shift for v in (1.0, 0.8, 0.6, 0.5, 0.4)])
    text = write_page(Plan([], tmp_path, cwd=ROOT), tmp_path).read_text()
    assert verdict in text
    assert len((tmp_path / "curves.csv").read_text().splitlines()) == 6


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
        "what": "train", "command": "python src/benchmark.py train", "rows": [row], "notes": [],
        "settings": {"size": 224, "batch": 24}, "device": "cpu", "precision": "32-true",
        "hardware": {"gpus": [], "cpu": "a CPU", "threads": 1}, "started": "2026-01-02T00:00",
        "code": {"commit": "0123456789abcdef"}, "versions": {"python": "3.11", "torch": "2.13"},
    }  # fmt: skip
    (bench / "a.json").write_text(json.dumps(record))
    text = write_page(Plan([noting("one", "x")], tmp_path, cwd=ROOT), tmp_path).read_text()
    assert "| unet | 7 | running | 10 | – | – | 2.0 | 0.5 | 20.00 | 19.00 | 5 % | 1200 |" in text
    assert "a CPU, Python 3.11, torch 2.13, lightning –; commit 0123456789" in text
    assert "| unet | 19.00 |" in text and "No network here was pretrained" in text


def test_the_pace_of_a_training_leaves_validations_and_pauses_out(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("mambaseg.callbacks.time.monotonic", lambda: clock[0])
    recorder = RunRecorder(RunFolder(tmp_path), title="", header={}, views=None)
    task = SimpleNamespace(device=torch.device("cpu"), monitor="val/dice")
    trainer = SimpleNamespace(
        global_step=0, accumulate_grad_batches=1, callback_metrics={}, sanity_checking=False,
        training=True, is_global_zero=True,
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


def test_curves_without_a_common_step_are_not_within():
    assert not compare_curves([(0, 1.0)], [(1, 1.0)])["within"]


# ---- sizes of kernels


def test_other_sizes_are_set_only_while_they_are_measured(monkeypatch):
    triton = pytest.importorskip("mambaseg.scan.triton", reason="needs Triton")
    seen = []

    def scan(x, *_, backend):
        seen.append((triton.BLOCK_D, triton.WARPS))
        if triton.BLOCK_D == 128:
            raise RuntimeError("too many registers")
        return x * 2

    monkeypatch.setattr(tuning, "FORMS", {"2d": scan})
    monkeypatch.setattr(tuning, "available_backends", lambda device: ("triton",))
    monkeypatch.setattr(tuning, "PASSES", ("forward",))
    own = (triton.BLOCK_D, triton.WARPS)
    found = measure_sizes(
        [Shape("tiny", 1, 2, 4)], [[64, 2, 16, 8, 4], [128, 4, 16, 8, 4]],
        protocol=Protocol(torch.device("cpu"), repeats=1), dtype=torch.float32,
    )  # fmt: skip
    assert [row["sizes"]["BLOCK_D"] for row in found["rows"]] == [own[0], 64]
    assert found["rows"][0]["own"] and found["rows"][0]["speedup"] == 1
    assert "too many registers" in found["notes"][0]
    assert set(seen) == {own, (64, 2), (128, 4)} and own == (triton.BLOCK_D, triton.WARPS)
    assert set(Sizes.__annotations__) <= set(vars(triton))


def test_sizes_need_triton_and_five_numbers(monkeypatch):
    protocol = Protocol(torch.device("cpu"), repeats=1)
    with pytest.raises(UserError, match="do not run on cpu"):
        measure_sizes([], [], protocol=protocol, dtype=torch.float32)
    monkeypatch.setattr(tuning, "available_backends", lambda device: ("triton",))
    pytest.importorskip("triton")
    with pytest.raises(UserError, match="five numbers"):
        measure_sizes([], [[1, 2]], protocol=protocol, dtype=torch.float32)
