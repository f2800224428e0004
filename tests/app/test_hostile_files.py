"""Checkpoints, pretrained weights, caches and run folders of others never execute code."""

import json
import os
import zipfile

import numpy as np
import pytest
import torch
import yaml

from mambaseg.app.networks import build_network
from mambaseg.data.cache import open_cache
from mambaseg.data.fingerprint import digest_of
from mambaseg.data.geometry import Preprocessing
from mambaseg.errors import UserError
from mambaseg.inference.trained import read_checkpoint
from mambaseg.models.vit_weights import read_hybrid_vit
from payload import Payload, armed, claiming_npy, npz, object_npy
from runs import built, composed

SMALL = ["model=unet", "model.widths=[4,8,8,8,8]"]


@pytest.fixture
def payload(tmp_path):
    """Would write `tmp_path/ran`; no test may leave that file behind."""
    payload = armed(tmp_path / "ran")
    yield payload
    assert not payload.marker.exists(), "foreign code ran"


@pytest.fixture(scope="module")
def finished(shared_run):
    """A finished run of a small network; tests only read it."""
    with built(*SMALL, *shared_run) as run:
        run.fit()
        run.evaluate()
    return run


@pytest.fixture
def checkpoint(finished):
    path = finished.folder.path / "checkpoints" / "best.ckpt"
    return torch.load(path, weights_only=True, map_location="cpu")


def saved(content, path):
    torch.save(content, path)
    return path


# ---- checkpoints ---------------------------------------------------------------------------------


def places(payload):
    yield "everywhere", payload
    yield "in its description", {"mambaseg": {"model": payload}, "state_dict": {}}
    yield "beside the weights", {"mambaseg": {}, "state_dict": {}, "optimizer_states": [payload]}


def test_evaluating_a_checkpoint_runs_nothing(payload, small_run, tmp_path):
    for where, content in places(payload):
        for new in (True, False):  # torch's two formats
            path = tmp_path / "best.ckpt"
            torch.save(content, path, _use_new_zipfile_serialization=new)
            with pytest.raises(UserError, match="only plain weights"):
                read_checkpoint(path)
            assert not payload.marker.exists(), where
    with pytest.raises(UserError, match="only plain weights"):
        built(f"checkpoint={path}", *small_run, script="evaluate")


def test_resuming_runs_nothing_and_leaves_the_folder_as_it_is(payload, small_run):
    with built(*SMALL, *small_run, "test=false") as run:
        pass
    folder = run.folder
    folder.update(status="running")
    for name in ("last.ckpt", "best.ckpt"):
        torch.save({"global_step": 2, "loops": payload}, folder.path / "checkpoints" / name)
    before = sorted(path.name for path in folder.path.parent.rglob("*"))
    said = r"last\.ckpt is whole, but it holds \S+\.system, .*rerun=true"
    with pytest.raises(UserError, match=said), built(*SMALL, *small_run, "test=false") as run:
        run.fit()
    assert sorted(path.name for path in folder.path.parent.rglob("*")) == before


def test_scoring_the_last_checkpoint_of_a_folder_runs_nothing(payload, small_run):
    with built(*SMALL, *small_run) as run:
        run.fit()
        for path in run.folder.path.glob("checkpoints/*.ckpt"):
            torch.save({"state_dict": payload}, path)
        with pytest.raises(UserError, match=r"best\.ckpt is whole, but it holds \S+\.system"):
            run.evaluate()


def test_arguments_of_a_checkpoint_are_neither_objects_nor_interpolated(
    finished, checkpoint, small_run, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("SOME_SECRET", "hush-4711")
    target = {"_target_": "os.system", "_args_": [f"touch {tmp_path / 'ran'}"]}
    arguments = checkpoint["mambaseg"]["model"]["arguments"]
    arguments.update(
        name="../../../escaped", size_multiple=target, num_classes="${oc.env:SOME_SECRET}",
        dropout=[target, target, target, target, target], pretrained="/etc/passwd",
        scan_backend="${oc.env:SOME_SECRET}", _args_=[target], _convert_="all", unknown=target,
    )  # fmt: skip
    path = saved(checkpoint, tmp_path / "a.ckpt")
    with built(f"checkpoint={path}", *small_run, script="evaluate") as run:
        run.evaluate()
    assert not (tmp_path / "ran").exists()
    assert run.folder.path.parent == tmp_path / "outputs" / "evaluate"
    assert run.config["model"]["name"] == "unet" and run.config["model"]["num_classes"] == 4
    assert "dropout" in caplog.text and "unknown" in caplog.text
    for file in run.folder.path.rglob("*"):
        assert not file.is_file() or b"hush-4711" not in file.read_bytes(), file


SECRET = "${oc.env:SOME_SECRET}"
LAUGHS = [["ha"] * 10]
for _ in range(30):
    LAUGHS = [LAUGHS] * 10


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["model"], "unet"), (["model", "name"], ["unet"]), (["model", "name"], "x" * 65),
        (["model", "arguments"], ["x"]), (["model", "arguments"], {"../x": 1}),
        (["preprocessing"], None), (["preprocessing", "name"], SECRET),
        (["preprocessing", "size"], 10**6), (["preprocessing", "size"], SECRET),
        (["preprocessing", "size"], 0), (["preprocessing", "intensity"], LAUGHS),
        (["preprocessing", "window"], LAUGHS), (["preprocessing", "window"], [0, 1e300]),
        (["preprocessing", "window"], [1, 0]), (["preprocessing", "spacing"], LAUGHS),
        (["preprocessing", "spacing"], 1e-9), (["preprocessing", "spacing"], float("nan")),
        (["classes"], LAUGHS), (["classes"], "x" * 10**6),
        (["supervision"], ["7"]), (["supervision"], {"labelled": "7", "patients": 70}),
        (["supervision"], {"labelled": 7, "patients": 70, "labels": SECRET}),
        (["data"], LAUGHS), (["data", "title"], LAUGHS), (["data", "name"], "../x"),
    ],
)  # fmt: skip
def test_a_checkpoint_says_what_it_may_or_is_refused(checkpoint, tmp_path, keys, value):
    place = checkpoint["mambaseg"]
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path = saved(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"a\.ckpt"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("data", "name", "Herz MR"), ("data", "name", "Gefäße"), ("data", "title", "T" * 300),
        ("preprocessing", "size", 4096),
    ],
)  # fmt: skip
def test_what_a_config_may_name_a_checkpoint_may_say(checkpoint, tmp_path, part, key, value):
    checkpoint["mambaseg"][part][key] = value
    assert read_checkpoint(saved(checkpoint, tmp_path / "a.ckpt")).about[part][key] == value


@pytest.mark.parametrize("value", [LAUGHS, {"_target_": "os.getcwd"}, [10**9], "a b", 1e300])
def test_arguments_beyond_the_bounds_are_left_out(checkpoint, small_run, tmp_path, value, caplog):
    checkpoint["mambaseg"]["model"]["arguments"]["dropout"] = value
    path = saved(checkpoint, tmp_path / "a.ckpt")
    with built(f"checkpoint={path}", *small_run, script="evaluate") as run:
        assert run.config["model"]["dropout"] == [0.05, 0.1, 0.2, 0.3, 0.5]
    assert "left out" in caplog.text


def test_a_network_larger_than_the_weights_is_refused_before_it_has_memory(
    checkpoint, small_run, tmp_path, monkeypatch
):
    checkpoint["mambaseg"]["model"]["arguments"]["widths"] = [8192] * 5  # 100 GiB
    path = saved(checkpoint, tmp_path / "a.ckpt")
    with (
        pytest.raises(UserError, match="does not fit"),
        built(f"checkpoint={path}", *small_run, script="evaluate"),
    ):
        pass


def unfolded(checkpoint):
    checkpoint["state_dict"]["network.x"] = torch.zeros(1).expand(1 << 20, 1 << 20)


def no_weights(checkpoint):
    checkpoint["state_dict"] = {1: torch.zeros(1), "network.x": "text"}


@pytest.mark.parametrize("change", [unfolded, no_weights])
def test_weights_are_tensors_that_the_file_holds(checkpoint, tmp_path, change):
    change(checkpoint)
    with pytest.raises(UserError, match="weights"):
        read_checkpoint(saved(checkpoint, tmp_path / "a.ckpt"))


def test_a_compressed_checkpoint_is_not_unpacked(tmp_path):
    path = saved({"state_dict": {"network.x": torch.zeros(1 << 20)}}, tmp_path / "a.ckpt")
    packed = tmp_path / "b.ckpt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    assert packed.stat().st_size < path.stat().st_size / 100
    with pytest.raises(UserError, match="compressed"):
        read_checkpoint(packed)


# ---- pretrained weights --------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pt"])
def test_pretrained_weights_run_nothing(payload, tmp_path, suffix):
    cfg = composed("model=swin_unet", "data=phantom")
    path = tmp_path / f"swin{suffix}"
    for content in (payload, {"model": payload}, {"model": {"x": torch.zeros(1), "y": payload}}):
        for new in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=new)
            cfg.model.pretrained = str(path)
            with pytest.raises(UserError, match=f"swin{suffix} cannot be read as weights"):
                build_network(cfg.model)
            assert not payload.marker.exists()


def test_a_safetensors_file_that_lies_about_its_size_is_an_error(tmp_path):
    cfg = composed("model=swin_unet", "data=phantom")
    claim = {"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    for header in (json.dumps(claim).encode(), b"[" * 10_000):
        path = tmp_path / "swin.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
        cfg.model.pretrained = str(path)
        with pytest.raises(UserError, match="cannot be read as weights"):
            build_network(cfg.model)


def test_pretrained_arrays_run_nothing_and_are_not_unpacked_without_end(
    payload, tmp_path, monkeypatch
):
    path = tmp_path / "vit.npz"
    deep = b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000
    for content in (npz({"x": object_npy(payload)}), npz({"x": deep}), object_npy(payload), b"PK"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as weights"):
            read_hybrid_vit(path, grid=14)
    monkeypatch.setattr("mambaseg.models.pretrained.UNPACKED", 1 << 20)
    path.write_bytes(
        npz({str(name): claiming_npy((1 << 19,), bytes(1 << 19)) for name in range(3)})
    )
    with pytest.raises(UserError, match="unpacks to more"):
        read_hybrid_vit(path, grid=14)


# ---- the decoded cache ---------------------------------------------------------------------------


@pytest.fixture
def cached(finished, tmp_path):
    """() -> a cache of three cases, opened."""
    cases = finished.data.cases["train"][:3]

    def opened():
        return open_cache(
            cases, Preprocessing("paper", 32), cache_dir=tmp_path / "cache", num_classes=4
        )

    return opened


def index_with(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index["cases"])
    index["digest"] = digest_of(index["cases"])  # an attacker can do that too
    (folder / "index.json").write_text(json.dumps(index))


def set_case(number, **values):
    return lambda cases: cases[number].update(values)


@pytest.mark.parametrize(
    "change",
    [
        set_case(0, shape=[-1, -1, 1]), set_case(0, shape=[1 << 40, 1 << 40, 1 << 40]),
        set_case(1, offset=0), set_case(1, offset=-5), set_case(1, offset=1.0),
        set_case(0, shape=["1", "1", "1"]), set_case(0, case="../../etc"), set_case(0, case=[]),
        set_case(0, source="another"), set_case(0, extra=1), set_case(0, spacing="abc"),
        lambda cases: cases.clear(), lambda cases: cases.reverse(), lambda cases: cases.pop(),
    ],
)  # fmt: skip
def test_an_index_that_lies_is_built_again(cached, caplog, change):
    before = cached()
    expected = [np.array(before.image(i)) for i in range(3)]
    index_with(before.folder, change)
    after = cached()
    assert "building it again" in caplog.text
    assert all((after.image(i) == expected[i]).all() for i in range(3))


def test_arrays_of_a_cache_run_nothing(cached, payload, caplog):
    folder = cached().folder
    size = (folder / "images.npy").stat().st_size
    for content in (
        object_npy(payload), claiming_npy((1 << 40,), descr="<f4"), b"\x93NUMPY\x01\x00\x10\x27(",
        __import__("pickle").dumps(payload), b"", b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000,
    ):  # fmt: skip
        (folder / "images.npy").write_bytes(content)
        caplog.clear()
        cached()
        assert "building it again" in caplog.text
        assert (folder / "images.npy").stat().st_size == size


# ---- run folders that train.py reads -------------------------------------------------------------


def test_a_foreign_run_folder_beside_ours_harms_no_training(payload, small_run, tmp_path):
    experiment = tmp_path / "outputs" / "default"
    records = [
        "[]",
        '"text"',
        "[" * 100_000,
        '{"data": "x", "design": 1}',
        '{"data": {"fingerprint": []}}',
    ]
    for number, content in enumerate(records):
        (experiment / f"foreign{number}").mkdir(parents=True)
        (experiment / f"foreign{number}" / "run.json").write_text(content)
    (experiment / "pipe").mkdir()
    os.mkfifo(experiment / "pipe" / "run.json")
    with built(*SMALL, *small_run, "test=false") as run:
        run.fit()
    assert run.folder.record["status"] == "done"


@pytest.mark.parametrize(
    "score", [1e400, "0.9", ["x"], {"_target_": "os.getcwd"}, "${oc.env:SOME_SECRET}"]
)
def test_a_finished_folder_of_somebody_else_is_only_data(
    finished, shared_run, payload, score, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("SOME_SECRET", "hush-4711")
    folder = finished.folder
    record, config = folder.record, (folder.path / "config.yaml").read_text()
    hostile = {"_target_": "os.system", "_args_": [f"touch {payload.marker}"]}
    try:
        folder.update(val_dice=score, code=hostile, wandb_id="../../x")
        text = yaml.safe_dump({"model": hostile, "secret": SECRET})
        attack = f"x: !!python/object/apply:os.system ['touch {payload.marker}']\n"
        folder.write_text("config.yaml", text + attack)
        with built(*SMALL, *shared_run) as run:
            assert run.finished and run.score is None
            run.report()
    finally:
        folder.write_json("run.json", record)
        folder.write_text("config.yaml", config)
    assert "hush-4711" not in capsys.readouterr().out


def test_the_payload_of_these_tests_works(tmp_path):
    assert isinstance(armed(tmp_path / "ran"), Payload)
