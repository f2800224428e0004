"""What a benchmark does where a part of it fails, or a GPU would do something else than a CPU."""

import gc
import math
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mambaseg.app import benchmarks
from mambaseg.app.check import CONF, checked
from mambaseg.app.commands import benchmark
from mambaseg.app.schema import BENCHMARKS
from mambaseg.benchmark import kernels, loop, measure, networks, scans, truth
from mambaseg.benchmark.gpu_page import write_page
from mambaseg.benchmark.kernels import measure_kernels
from mambaseg.benchmark.loop import EVERY, Paces
from mambaseg.benchmark.measure import Protocol
from mambaseg.benchmark.networks import measure_networks, profile_networks, training
from mambaseg.benchmark.scans import Shape, measure_scans
from mambaseg.benchmark.tables import tables
from mambaseg.errors import UserError
from mambaseg.storage.run_folder import RunFolder
from runs import composed

CPU = torch.device("cpu")
TINY = Shape("tiny", 1, 3, 4)
IMAGE, LABEL = torch.rand(2, 1, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long)


def fails(*_, **__):
    raise RuntimeError("CUDA, cuLaunchKernel: invalid argument\nand more lines")


# ---- a benchmark that there is not


def test_every_kind_of_benchmark_is_listed_and_no_other_is_taken():
    header = (CONF / "benchmark.yaml").read_text().splitlines()[0]
    listed = next(word for word in header.split() if "|" in word)
    assert tuple(listed.split("|")) == BENCHMARKS
    with pytest.raises(UserError, match="'methods' is not a benchmark"):
        benchmark.main(["methods"])
    with pytest.raises(UserError, match="what=methods"):
        checked(composed("what=methods", script="benchmark"), "benchmark")


# ---- a backend that fails


@pytest.fixture
def broken(monkeypatch):
    """A backend `broken` beside those that run here: it raises an error at every call."""

    def form(compute, *inputs, backend):
        return fails() if backend == "broken" else compute(*inputs, backend=backend)

    forms = {name: partial(form, compute) for name, compute in scans.FORMS.items()}
    for module in (scans, truth):
        monkeypatch.setattr(module, "FORMS", forms)
        monkeypatch.setattr(module, "available_backends", lambda device: ["broken", "torch"])
    monkeypatch.setattr(truth, "SHAPES", {"tiny": TINY})


def test_a_backend_that_fails_costs_the_others_none_of_their_times(broken):
    record = measure_scans([TINY], Protocol(CPU, 1), ["1d", "2d"], [], loop_limit=0)
    assert [row["backend"] for row in record["rows"]] == ["torch"] * 4
    assert [(row["form"], row["backend"]) for row in record["errors"]] == [
        ("1d", "torch"), ("2d", "torch"),
    ]  # fmt: skip
    said = "broken: RuntimeError: CUDA, cuLaunchKernel: invalid argument"
    assert f"errors 2d: {said}" in record["notes"]
    assert f"tiny 1d forward+backward: {said}" in record["notes"]


def test_a_device_that_a_backend_leaves_unusable_costs_no_rows_from_before(monkeypatch):
    usable = scans.scan_inputs

    def inputs(shape, *arguments):
        return fails() if shape.name == "next" else usable(shape, *arguments)

    monkeypatch.setattr(scans, "scan_inputs", inputs)
    shapes = [TINY, TINY._replace(name="next")]
    record = measure_scans(shapes, Protocol(CPU, 1), ["2d"], ["torch"], loop_limit=0)
    assert {row["shape"] for row in record["rows"]} == {"tiny"}
    assert any(note.startswith("next 2d: RuntimeError: CUDA") for note in record["notes"])


def test_a_candidate_that_fails_later_on_is_named():
    calls = iter([None, None])  # of the warm-up
    protocol = Protocol(CPU, repeats=3, least_s=0.0)
    candidates = {"bad": lambda: next(calls, 0) is None or fails(), "good": lambda: None}
    found, failures = measure.time_interleaved(candidates, protocol)
    assert list(found) == ["good"] and found["good"]["repeats"] == 3
    assert failures["bad"].startswith("RuntimeError: CUDA")


def test_a_backend_that_fails_makes_the_truth_wrong_and_is_named(broken, tmp_path):
    record = truth.measure_truth({}, lambda network: None, Protocol(CPU), shapes=["tiny"])
    rows = {row["backend"]: row for row in record["rows"]}
    assert len(record["rows"]) == 8 and rows["torch"]["repeats"]
    assert rows["torch"]["worst"] < rows["torch"]["limit"]
    assert math.isnan(rows["broken"]["worst"]) and not record["within"]
    assert (
        "tiny bfloat16 2d: broken: RuntimeError: CUDA, cuLaunchKernel: invalid argument"
        in (record["notes"])
    )
    # written and read again, as the page of a GPU machine reads it
    hardware = {"gpus": [], "cpu": "a CPU", "threads": 1}
    about = {
        "what": "truth",
        "settings": {"size": 8},
        "device": "cpu",
        "hardware": hardware,
        "precision": "32-true",
        "command": "",
        "started": "",
        "versions": {},
        "code": {},
    }
    assert len(list(tables({**about, **record}))) == 2
    RunFolder(tmp_path / "bench" / "truth").write_json("a.json", {**about, **record})
    text = write_page(tmp_path, []).read_text()
    assert "| tiny | float32 | 1d | broken | – | 1e-04 | no |" in text


def test_truth_ends_with_an_error_where_a_backend_fails(broken, tmp_path):
    cfg = composed(
        "what=truth", "models=[]", "scans=[tiny]", "device=cpu", f"outputs={tmp_path}",
        script="benchmark",
    )  # fmt: skip
    with pytest.raises(UserError, match="wrong numbers"):
        benchmarks.run_benchmark(cfg, command="")
    assert list(tmp_path.glob("truth-*.json"))


# ---- a network that fails


conv = partial(nn.Conv2d, 1, 4, 3, padding=1)


class Odd(nn.Conv2d):
    """A network that cannot be recorded."""


odd = partial(Odd, 1, 4, 3, padding=1)


@pytest.fixture
def recorded(monkeypatch):
    """Stands in for recording: weak references to the networks that were recorded, in order."""
    references = []

    def record(network, image, layers):
        gc.collect()
        if isinstance(network, Odd):
            fails()
        references.append(weakref.ref(network))
        forward = network.forward
        network.forward = lambda image: forward(image)  # refers to itself, as a recorded one does

    monkeypatch.setattr(networks, "GraphedNetwork", record)
    return references


@pytest.fixture
def step(recorded):
    loss, optimizer = nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1)
    return training(IMAGE, LABEL, loss, optimizer, autocast=False, graph=True)


NOTE = (
    "odd: measured without CUDA graphs, it cannot be recorded "
    "(RuntimeError: CUDA, cuLaunchKernel: invalid argument)"
)


def test_a_network_that_cannot_be_recorded_is_measured_without(step, recorded):
    builders = {"odd": odd, "conv": conv}
    record = measure_networks(builders, step, Protocol(CPU, 1), images=2)
    assert [row["network"] for row in record["rows"]] == ["odd", "conv"]
    assert record["notes"] == [NOTE]
    assert len(recorded) == 2  # once for its memory, once for its time
    record = profile_networks(builders, IMAGE, Protocol(CPU, 1), step)
    assert all(row["step_s"] > 0 for row in record["rows"]) and record["notes"] == [NOTE]


def test_its_kernels_are_timed_without(step, monkeypatch):
    def built(build, protocol):
        if build is None:
            raise torch.OutOfMemoryError
        return build()

    monkeypatch.setattr(kernels, "built", built)
    monkeypatch.setattr(kernels, "_profile", lambda call: {"kernels": call()})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    builders = {"large": None, "odd": odd, "conv": conv}
    record = measure_kernels(builders, step, Protocol(torch.device("cuda")))
    assert [row["network"] for row in record["rows"]] == ["odd", "conv"]
    assert record["notes"] == [NOTE, "large: out of memory"]


def test_truth_compares_the_other_networks_where_one_fails(step):
    def bad():
        raise ValueError("no such network")

    builders = {"bad": bad, "odd": odd, "conv": conv}
    record = truth.measure_truth(builders, step, Protocol(CPU), shapes=[])
    rows = {row["network"]: row for row in record["networks"]}
    assert rows["conv"]["worst"] <= rows["conv"]["limit"] and rows["odd"]["repeats"]
    assert math.isnan(rows["bad"]["worst"]) and not record["within"]
    assert record["notes"] == ["bad: ValueError: no such network", NOTE]


def test_no_recorded_network_outlives_the_next_recording_where_they_follow_each_other(
    step, recorded
):
    """Its end would take memory from the next one's graphs: see `GraphedNetwork`."""

    def build():
        gc.collect()
        assert not any(earlier() for earlier in recorded)
        return conv()

    gc.disable()
    try:
        truth.measure_truth({"a": build, "b": build}, step, Protocol(CPU), shapes=[])
    finally:
        gc.enable()
    assert len(recorded) == 8


def test_the_memory_of_cuda_graphs_is_that_of_their_recording(monkeypatch):
    events, memory = [], SimpleNamespace(now=100, peak=100)

    def start_peak(device):
        events.append("start")
        memory.peak = memory.now
        return memory.now

    def peak(device):
        events.append("peak")
        return memory.peak

    def step(network):
        events.append("record")
        memory.peak = max(memory.peak, 500)  # of a pool that its launches take from
        memory.now = 120

        def call():
            events.append("call")
            memory.now = 130  # with the optimizer's state
            memory.peak = max(memory.peak, 140)

        return call

    monkeypatch.setattr(measure, "start_peak", start_peak)
    monkeypatch.setattr(measure, "peak", peak)
    (row,) = measure_networks({"conv": conv}, step, Protocol(CPU, 1), images=2)["rows"]
    assert events[:7] == ["start", "record", "peak", "call", "start", "call", "peak"]
    assert (row["peak_bytes"], row["peak_added_bytes"]) == (500, 400)


# ---- what a GPU does otherwise


def test_truth_computes_in_whole_float32(monkeypatch):
    seen = []

    class Watched(nn.Conv2d):
        def forward(self, image):
            precise = torch.get_float32_matmul_precision() == "highest"
            seen.append((image.dtype, precise and not torch.backends.cudnn.allow_tf32))
            return super().forward(image)

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        truth._network_error(lambda: Watched(1, 2, 3), CPU, 0)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert dict(seen)[torch.float32] and torch.backends.cudnn.allow_tf32


def test_the_loop_waits_for_the_device(monkeypatch):
    devices, clock = [], iter(range(1000))

    def seconds_on(device):
        devices.append(device)
        return float(next(clock))

    monkeypatch.setattr(loop, "seconds_on", seconds_on)
    paces = Paces(lambda network, batch: lambda: None)
    task = SimpleNamespace(network=conv(), device=torch.device("cuda"))
    for index in range(EVERY):
        paces.on_train_batch_end(None, task, None, {}, index)
    assert paces.loop == [1.0] * (EVERY - 1) and paces.bare == [1.0] * loop.ALONE
    assert set(devices) == {torch.device("cuda")}


@pytest.mark.parametrize(("device", "accelerator"), [("cuda", "gpu"), ("cpu", "cpu")])
def test_the_loop_runs_where_and_as_precisely_as_it_was_told(monkeypatch, device, accelerator):
    class Built(Exception):  # noqa: N818
        pass

    def build(config):
        raise Built(config.trainer.accelerator, config.trainer.precision)

    monkeypatch.setattr(benchmarks, "build", build)
    monkeypatch.setattr(benchmarks, "compose", lambda name, words: composed(*words, script=name))
    cfg = composed("what=loop", "precision=bf16-mixed", "batch=2", script="benchmark")
    with pytest.raises(Built) as raised:
        benchmarks._loop(cfg, "unet", torch.device(device))
    assert raised.value.args == (accelerator, "bf16-mixed")
