"""The benchmark: the command as people type it, what it counts, and what it measures with."""

import json
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mambaseg.app.benchmarks import _labels, _overrides
from mambaseg.benchmark import growth as growth_of
from mambaseg.benchmark import measure, truth
from mambaseg.benchmark.blocks import MonaiSwinBlocks, swin_blocks
from mambaseg.benchmark.measure import Protocol, peak_memory, time_interleaved
from mambaseg.benchmark.networks import (
    Steps,
    inference,
    measure_networks,
    profile_networks,
    training,
)
from mambaseg.benchmark.scans import Shape, measure_scans, shapes_of
from mambaseg.errors import UserError
from mambaseg.evaluation.costs import count_operations, counter_of_products
from mambaseg.models import SS2D, MambaUNet, SwinUNet, UNet, WindowAttention
from mambaseg.models.trans_unet import TransformerBlock
from mambaseg.models.vss import CrossScan
from mambaseg.scan import chunked
from runs import composed

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TIMES = {"median_s": float, "min_s": float, "max_s": float, "first_s": float, "repeats": int,
         "calls": int}  # fmt: skip
MEMORY = {"peak_added_bytes": (int, type(None))}
NETWORK = {
    "network": str, "parameters": int, "scan_backend": (str, type(None)), "baseline": str,
    "ratio": float, "images_per_s": float, "peak_bytes": (int, type(None)), **TIMES, **MEMORY,
}  # fmt: skip
SCAN = {
    "shape": str, "form": str, "pass": str, "backend": str, "baseline": str, "speedup": float,
    "batch": int, "groups": int, "channels": int, "length": int, "states": int,
    "exp_s": float, "exps": float, **TIMES, **MEMORY,
}  # fmt: skip
COSTS = {
    "size_multiple": int,
    "layer_macs": int,
    "other_macs": int,
    "scan_flops": int,
    "flops": int,
}
RECORD = {
    "what": str, "command": str, "started": str, "device": str, "precision": str, "settings": dict,
    "instructions": dict, "code": dict, "versions": dict, "hardware": dict, "rows": list,
    "notes": list,
}  # fmt: skip


# ---- the command ----------------------------------------------------------------------------


@pytest.fixture
def typed(monkeypatch, capsys):
    """Runs a command as typed, in this process; gives what it prints and its errors."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
        monkeypatch.chdir(ROOT)
        said = ""
        try:
            runpy.run_path(str(ROOT / "src" / "benchmark.py"), run_name="__main__")
        except SystemExit as error:
            said = f"status {error.code}"
        out, errors = capsys.readouterr()
        return out, said and errors + said

    return run


@pytest.fixture
def measured(typed, tmp_path):
    """Runs a tiny benchmark; gives what it prints, and the record that it writes."""

    def run(word, *words):
        fixed = ("device=cpu", "size=32", "repeats=1", f"outputs={tmp_path}")
        out, errors = typed(word, *fixed, *words)
        assert not errors
        shown = [line for line in out.splitlines() if line[2:3] != ":"]  # no log lines
        assert max(map(len, shown)) <= 100
        (path,) = tmp_path.glob(f"{word}-*.json")
        assert not list(tmp_path.glob(".*"))  # no temporary file is left
        record = json.loads(path.read_text())
        assert_schema(record, RECORD)
        assert record["what"] == word and word in record["command"]
        assert record["settings"]["size"] == 32
        assert "torch" in record["versions"] and record["hardware"]["cpu"]
        return out, record

    return run


def assert_schema(value, schema):
    for key, kind in schema.items():
        assert isinstance(value[key], kind), (key, value[key])


def test_scan_compares_backends_with_the_loop_and_float64(measured):
    out, record = measured("scan", "shapes=[stage3]", "backends=[numba,reference]")
    rows = record["rows"]
    for row in rows:
        assert_schema(row, SCAN)
        assert row["min_s"] <= row["median_s"] <= row["max_s"]
        assert (row["batch"], row["channels"], row["length"]) == (1, 768, 4)
        assert row["exps"] == pytest.approx(row["median_s"] / row["exp_s"])
    kinds = {(row["form"], row["pass"], row["backend"]) for row in rows}
    for form in ("1d", "2d"):
        for what in ("forward", "forward+backward"):
            for backend in ("numba", "reference"):
                assert (form, what, backend) in kinds
    by_name = {row["backend"]: row for row in rows if row["form"] == "2d"}
    expected = by_name["reference"]["median_s"] / by_name["numba"]["median_s"]
    assert by_name["numba"]["speedup"] == pytest.approx(expected)
    assert by_name["reference"]["speedup"] == 1
    for row in record["errors"]:
        assert set(row["errors"]) == {"y", "x", "delta", "A", "B", "C", "D", "delta_bias"}
        assert 0 < row["worst"] == max(row["errors"].values()) < 1e-5
    assert "stage3: B=1 K=4 D=768 L=4 N=16" in out and "numba" in out and "× exp" in out
    torchs = torch.backends.cpu.get_cpu_capability()
    assert record["instructions"]["torch"] == torchs and record["instructions"]["numba"]
    assert f"instruction sets: torch {torchs}, numba " in out


def test_the_slow_loop_can_be_left_out_and_that_is_said(measured):
    words = "shapes=[stage4]", "forms=[2d]", "loop_limit=0", "precision=bf16-mixed"
    out, record = measured("scan", *words)
    assert {row["backend"] for row in record["rows"]} == {"numba", "torch"}
    assert {row["baseline"] for row in record["rows"]} == {"torch"}
    assert any("loop is left out" in note for note in record["notes"])
    errors = {row["backend"]: row["worst"] for row in record["errors"]}
    assert 1e-4 < errors["numba"] < 1e-2  # bfloat16 inputs, but a wide state
    assert "loop is left out" in out


SMALL_UNET = "unet widths=[4,4,4,4,4]"
SMALL_MAMBA = "mamba_unet embed_dim=8 scan_backend=torch"
MODELS = f'models=["{SMALL_UNET}","{SMALL_MAMBA}"]'


@pytest.mark.parametrize("word", ["inference", "train"])
def test_networks_are_compared_with_the_first(word, measured):
    out, record = measured(word, MODELS)
    first, second = record["rows"]
    for row in (first, second):
        assert_schema(row, NETWORK)
    assert (first["network"], second["network"]) == (SMALL_UNET, SMALL_MAMBA)
    assert (first["scan_backend"], second["scan_backend"]) == (None, "torch")
    assert first["ratio"] == 1
    assert second["ratio"] == pytest.approx(second["median_s"] / first["median_s"])
    images = 2 if word == "train" else 1
    assert first["images_per_s"] == pytest.approx(images / first["median_s"])
    assert "time ratio" in out and "embed_dim=8" in out


def test_truth_ends_with_an_error_where_numbers_are_wrong(tmp_path, monkeypatch):
    right = chunked.selective_scan

    def leaves_an_element_unwritten(*inputs):
        y = right(*inputs)
        return torch.where(torch.arange(y.shape[-1]) == 3, torch.empty_like(y), y)

    monkeypatch.setattr(truth, "SHAPES", {"tiny": Shape("tiny", 1, 3, 4)})
    settings = {"protocol": Protocol(CPU), "shapes": ["tiny"]}
    monkeypatch.setattr(truth, "available_backends", lambda device: ["torch"])
    assert truth.measure_truth({}, lambda network: None, **settings)["within"]
    monkeypatch.setattr(chunked, "selective_scan", leaves_an_element_unwritten)
    record = truth.measure_truth({}, lambda network: None, **settings)
    assert not record["within"]
    worst = {row["form"]: row["worst"] for row in record["rows"]}
    assert math.isnan(worst["1d"])


def test_truth_compares_a_network_with_float64(monkeypatch):
    class Rounded(nn.Conv2d):
        def forward(self, image):
            out = super().forward(image)
            return out if image.dtype == torch.float64 else out.half().to(out)

    def step(network):
        return lambda: network(torch.zeros(1, 1, 4, 4))

    for kind, within in ((nn.Conv2d, True), (Rounded, False)):
        builders = {"conv": lambda kind=kind: kind(1, 2, 3)}
        monkeypatch.setattr(truth, "NETWORK_LIMIT", 1e-5)
        record = truth.measure_truth(builders, step, Protocol(CPU), shapes=[])
        assert record["within"] is within


def test_kernels_are_timed_on_a_gpu_only(typed, tmp_path):
    _, errors = typed("kernels", "device=cpu", f"outputs={tmp_path}")
    assert "use device=cuda" in errors and "Traceback" not in errors


def test_blocks_are_compared_with_those_of_another_library(measured):
    out, record = measured("blocks")
    assert "8² × 96" in out and "Swin (MONAI)" in out
    kind = NETWORK | {"stage": int, "channels": int, "side": int}
    for row in record["rows"]:
        assert_schema(row, kind)
    rows = {(row["stage"], row["network"]): row for row in record["rows"]}
    assert len(rows) == 12
    for stage in (1, 2, 3, 4):
        assert rows[stage, "Swin (MONAI)"]["ratio"] == 1.0
        assert rows[stage, "Swin"]["parameters"] == rows[stage, "Swin (MONAI)"]["parameters"]


def test_the_other_librarys_block_is_the_same_block():
    """With equal weights both give the same map: the comparison is of equals."""
    dim, heads, side = 24, 3, 21
    theirs, ours = MonaiSwinBlocks(dim, heads, side).eval(), swin_blocks(dim, heads).eval()
    renamed = {
        name.replace("mlp.linear", "mlp.fc"): value
        for name, value in theirs.blocks.state_dict().items()
        if "relative_position_index" not in name
    }
    ours.load_state_dict(renamed)
    image = torch.randn(2, side, side, dim)
    torch.testing.assert_close(ours(image), theirs(image))


def test_profile_counts_the_scan(measured):
    out, record = measured("profile", MODELS)
    for row in record["rows"]:
        assert_schema(row, NETWORK | COSTS)
    assert {row["size_multiple"] for row in record["rows"]} == {16, 32}
    scans = [row["scan_flops"] for row in record["rows"]]
    # two blocks at each stage going down and up, but for the last: D = 16 to 128, L = 64 to 1
    elements = [4 * 64 * 16, 4 * 16 * 32, 4 * 4 * 64, 2 * 1 * 128]
    assert scans == [0, 4 * sum(elements) * (9 * 16 + 1)]
    assert "scan GFLOP" in out


def test_the_page_of_all_networks_times_a_training_step_too():
    image, label = torch.rand(2, 1, 32, 32), torch.zeros(2, 32, 32, dtype=torch.long)
    step = training(image, label, nn.CrossEntropyLoss(), torch.optim.SGD, autocast=False)
    builders = {"narrow": lambda: UNet(1, 4, widths=(4, 8), dropout=(0, 0))}
    (row,) = profile_networks(builders, image[:1], Protocol(CPU, 2), step)["rows"]
    assert 0 < row["median_s"] < row["step_s"] < 10 and row["layer_macs"] > 0


def test_a_network_that_does_not_fit_the_memory_costs_the_others_nothing(caplog):
    image, built = torch.rand(1, 1, 32, 32), []

    def too_large(times):
        built.append(None)
        if len(built) > times:
            raise torch.OutOfMemoryError
        return narrow()

    def narrow():
        return UNet(1, 4, widths=(4, 8), dropout=(0, 0))

    builders = {"large": lambda: too_large(0), "second": narrow, "beside": lambda: too_large(2)}
    step = inference(image, autocast=False)
    record = measure_networks(builders, step, Protocol(CPU, 1), images=1)
    assert [row["network"] for row in record["rows"]] == ["second"]
    assert set(record["notes"]) == {
        "large: out of memory", "beside: out of memory beside the others",
    }  # fmt: skip
    builders = {"large": lambda: too_large(0), "second": narrow}
    rows = list(growth_of._steps(builders, Steps(step), Protocol(CPU, 1)))
    assert [row["what"] for row in rows] == ["second"] and "large: out of memory" in caplog.text


def test_a_scan_without_a_backend_left_has_no_rows():
    shapes = shapes_of(["stage4"], size=32, batch=1)
    record = measure_scans(shapes, Protocol(CPU, 1), ["2d"], ["reference"], loop_limit=0)
    assert record["rows"] == [] and record["notes"] == ["stage4: the loop is left out (loop_limit)"]


def test_all_is_every_network_and_not_its_letters():
    labels = _labels(composed("what=loop", "models=all", script="benchmark"))
    assert {"unet", "mamba_unet"} < set(labels)
    assert _overrides("unet widths=[4,8]") == ["model=unet", "model.widths=[4,8]"]


def test_fused_attention_is_counted_on_every_device():
    tokens, dim = 50, 64
    block = TransformerBlock(dim, heads=4, hidden=96, dropout=0.0)
    for device in ("cpu", "meta"):
        cost = count_operations(block.to(device), torch.rand(2, tokens, dim, device=device))
        assert cost["layer_macs"] == 2 * tokens * (4 * dim * dim + 2 * dim * 96)
        assert cost["other_macs"] == 2 * 2 * tokens * tokens * dim  # Q Kᵀ and its product with V


def test_an_unknown_benchmark_is_answered_with_the_known_ones(typed):
    _, errors = typed("speed", "size=32")
    assert "scan|inference|train|blocks|profile" in errors and "'speed'" in errors


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("scan", "backends=[triton]"), "triton"),
        (("scan", "shapes=[stage9]"), "stage9"),
        (("train", "models=[unet]", "loss=l1", "size=32"), "L1Loss does not take"),
        (("truth", "models=[]", "scans=[]"), "name at least one config of conf/model"),
        (("gpu",), "root=<folder of ACDC>"),
        (("gpu", "root=.", "models=[unet,'unet widths=[4,8]']"), "not ['unet widths=[4,8]']"),
    ],
)
def test_what_cannot_be_measured_ends_in_one_message(typed, tmp_path, words, says):
    _, errors = typed(*words, "device=cpu", f"outputs={tmp_path}")
    assert says in errors and "Traceback" not in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure the GPU")
def test_a_gpu_is_not_measured_where_there_is_none(typed, tmp_path):
    _, errors = typed("gpu", f"root={tmp_path}", f"out={tmp_path / 'out'}")
    assert "no CUDA device" in errors and not (tmp_path / "out").exists()


def test_a_stopped_part_is_no_success(typed, tmp_path, monkeypatch):
    part = {"name": "steps", "status": "stopped"}
    monkeypatch.setattr("mambaseg.app.benchmarks.measure_gpu", lambda *args, **kwargs: [part])
    _, errors = typed("gpu", "device=cpu", f"root={tmp_path}", f"out={tmp_path}")
    assert "stopped: steps" in errors


def test_parts_that_there_are_not_measure_nothing_and_say_so(typed, tmp_path):
    words = ("gpu", "device=cpu", f"root={tmp_path}", f"out={tmp_path}", "parts=[step-]")
    _, errors = typed(*words)
    assert "nothing was measured: no part begins with one of ['step-']" in errors


# ---- what is counted ------------------------------------------------------------------------


def test_layers_are_counted_as_by_hand():
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),  # 6 x 5 outputs x 4 x (2 x 9)
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4),  # 3 x 3 x 4 x 9
        nn.ConvTranspose2d(4, 3, 2, stride=2),  # 3 x 3 x 4 inputs x (3 x 4)
        nn.Linear(6, 7),  # 6 x 3 rows x 6 x 7
    )
    macs = 6 * 5 * 4 * 18 + 3 * 3 * 4 * 9 + 3 * 3 * 4 * 12 + 6 * 3 * 6 * 7
    counted = count_operations(network, torch.zeros(1, 2, 6, 5))
    assert counted == {"layer_macs": macs, "other_macs": 0, "scan_flops": 0, "flops": 2 * macs}


def test_a_layer_of_attention_is_counted_as_by_hand():
    """Which PyTorch computes in one piece where no gradients are asked for."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    tokens, width, hidden = 10, 32, 64
    layers = tokens * (4 * width**2 + 2 * width * hidden)
    counted = count_operations(layer, torch.zeros(1, tokens, width))
    assert counted["flops"] == 2 * (layers + 2 * tokens**2 * width)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_scan_block_is_counted_as_by_hand():
    counted = count_operations(SS2D(32, d_state=8, scan_backend="torch"), torch.zeros(3, 2, 5, 32))
    positions, inner, rank = 3 * 2 * 5, 64, 2
    layers = positions * (32 * 2 * inner + inner * 9 + inner * 32)  # in_proj, conv, out_proj
    projections = positions * 4 * (inner * (rank + 2 * 8) + rank * inner)
    assert counted["layer_macs"] == layers
    assert counted["other_macs"] == projections
    assert counted["scan_flops"] == 4 * inner * positions * (9 * 8 + 1)
    assert counted["flops"] == 2 * (layers + projections) + counted["scan_flops"]


def test_zeros_that_a_gpu_multiplies_by_are_not_counted(monkeypatch):
    block, x = SS2D(32, d_state=8, scan_backend="torch"), torch.zeros(1, 2, 5, 32)
    expected = count_operations(block, x)
    monkeypatch.setattr(CrossScan, "dense", True)  # as on a GPU
    with counter_of_products() as counter:
        block(x)
    products = expected["layer_macs"] + expected["other_macs"]
    assert counter.get_total_flops() == 2 * (products + 2 * 5 * 3 * 2 * 4 * 64)  # 3 of 4 are zero
    assert count_operations(block, x) == expected
    assert block.dense  # and what comes after is as before


def test_attention_is_counted_as_by_hand():
    counted = count_operations(WindowAttention(8, 2, 4, shifted=False), torch.zeros(1, 8, 4, 8))
    assert counted["layer_macs"] == 32 * (8 * 24 + 8 * 8)
    assert counted["other_macs"] == 2 * (2 * 16 * 16 * 8)  # windows x (scores and values)


@pytest.mark.parametrize(
    ("network", "layers", "projections", "scan"),
    [(UNet, 2.26, 0, 0), (SwinUNet, 5.87, None, 0), (MambaUNet, 3.48, 0.96, 2.53)],
)
def test_networks_at_224_have_the_operations_found_by_others(network, layers, projections, scan):
    """Giga, to two decimals: counts made on the original networks, with another tool."""
    counted = count_operations(network(), torch.zeros(1, 1, 224, 224))
    assert counted["layer_macs"] / 1e9 == pytest.approx(layers, abs=0.005)
    assert counted["scan_flops"] / 1e9 == pytest.approx(scan, abs=0.005)
    if projections is not None:
        assert counted["other_macs"] / 1e9 == pytest.approx(projections, abs=0.005)


# ---- what is measured with ------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on when it is told: `clock.pass_(seconds)`."""
    now = SimpleNamespace(seconds=0.0)

    def pass_(seconds):
        now.seconds += seconds

    now.pass_ = pass_
    monkeypatch.setattr("mambaseg.evaluation.costs.time.perf_counter", lambda: now.seconds)
    return now


def test_candidates_take_turns_until_their_budget_is_spent(clock):
    order = []

    def candidate(name, seconds):
        def call():
            order.append(name)
            clock.pass_(seconds)

        return call

    candidates = {"quick": candidate("q", 0.002), "slow": candidate("s", 0.03)}
    protocol = Protocol(CPU, repeats=4, warmup=1, budget_s=0.08, least_s=0.001)
    timings, failures = time_interleaved(candidates, protocol)
    assert "".join(order) == "qs" + "qs" + "sq" + "q" + "q"
    assert (timings["quick"]["repeats"], timings["slow"]["repeats"]) == (4, 2)
    assert timings["slow"]["median_s"] == pytest.approx(0.03)
    assert not failures


def test_a_quick_call_is_repeated_within_a_repeat_and_a_failing_one_is_named(clock):
    def too_large():
        raise torch.OutOfMemoryError

    protocol = Protocol(CPU, repeats=2, least_s=0.05)
    calls = {"quick": lambda: clock.pass_(1e-4), "large": too_large}
    timings, failures = time_interleaved(calls, protocol)
    assert failures == {"large": "out of memory"}
    assert timings["quick"]["calls"] in (500, 501)
    assert timings["quick"]["median_s"] == pytest.approx(1e-4)


def test_peak_memory_is_what_the_call_adds_at_its_height(monkeypatch):
    monkeypatch.setattr(measure, "start_peak", lambda device: 100)
    monkeypatch.setattr(measure, "peak", lambda device: 130)
    assert peak_memory(list, CPU) == {"peak_bytes": 130, "peak_added_bytes": 30}
    monkeypatch.setattr(measure, "start_peak", lambda device: None)  # the system does not tell
    assert peak_memory(list, CPU) == {"peak_bytes": None, "peak_added_bytes": None}


def test_shapes_are_those_of_mamba_unet():
    names = ["headline", "stage1", "stage2", "stage3", "stage4"]
    shapes = shapes_of(names, size=224, batch=2)
    sizes = [(s.batch, s.channels, s.side**2) for s in shapes]
    assert sizes == [(4, 192, 3136), (2, 192, 3136), (2, 384, 784), (2, 768, 196), (2, 1536, 49)]
    with pytest.raises(UserError, match="multiple of 32"):
        shapes_of(names, size=100, batch=1)
    with pytest.raises(UserError, match="stage9"):
        shapes_of(["stage9"], size=224, batch=1)


# ---- growth ----------------------------------------------------------------------------------


def test_exponents_are_slopes_of_logarithms():
    rows = [{"part": "size", "what": "a network", "n": n, "seconds": 3 * n**2,
             "peak_added_bytes": None if n == 1 else 5 * n} for n in (1, 2, 8)]  # fmt: skip
    rows += [{**row, "what": "fixed", "seconds": 100.0 + row["n"]} for row in rows]
    growth, fixed = growth_of.exponents(rows)
    assert (growth["from"], growth["to"], growth["last_s"]) == (1, 8, 192)
    assert growth["time"] == pytest.approx(2) == growth["time_at_the_end"]
    assert growth["memory"] == pytest.approx(1)
    assert 0 < fixed["time"] < fixed["time_at_the_end"] < 0.1


def test_all_parts_of_growth_are_measured_and_shown(measured, monkeypatch):
    monkeypatch.setattr("mambaseg.reporting.report.draw", lambda *_: [])
    out, record = measured(
        "growth", "models=[unet]", "growth.size=[32,48]", "growth.batch=[1,2]",
        "growth.cases=[5,10]", "growth.runs=[3,4]",
    )  # fmt: skip
    assert [row["part"] for row in record["exponents"]] == (
        ["size", "batch"] + ["cases"] * 4 + ["runs"] * 2
    )
    assert {row["n"] for row in record["rows"]} == {32, 48, 1, 2, 5, 10, 3, 4}
    assert all(row["seconds"] > 0 for row in record["rows"])
    assert "summary of a test" in out and "time ~ n^" in out


@pytest.mark.parametrize("word", ["parts=[runs,others]", "growth.cases=[10]", "growth.sise=[1,2]"])
def test_a_growth_that_cannot_be_measured_is_refused(typed, tmp_path, word):
    _, errors = typed("growth", "device=cpu", "models=[unet]", word, f"outputs={tmp_path}")
    assert "growth" in errors and errors.endswith("status 1")


def test_a_loop_too_short_to_be_measured_is_refused(typed, tmp_path):
    words = "models=[unet]", "train=['data.steps=11']", f"outputs={tmp_path}"
    _, errors = typed("loop", "device=cpu", *words)
    assert "data.steps=11 is too short" in errors and errors.endswith("status 1")


def test_the_loop_is_measured_beside_its_bare_step(measured, phantom_root):
    words = [
        f"data.root={phantom_root}", f"data.cache_dir={phantom_root.parent}",
        "data.prepare.patients=8",
    ]  # fmt: skip
    network = "unet widths=[4,8] dropout=[0,0]"
    out, record = measured("loop", f"models=['{network}']", "size=32", "batch=2", f"train={words}")
    (row,) = record["rows"]
    assert row["network"] == network
    assert row["steps"] == 88 and row["loop_s"] > 0 < row["bare_s"]
    assert row["added"] == pytest.approx(row["loop_s"] / row["bare_s"] - 1)
    assert "the step alone" in out
