"""The doctor finds what is broken, says the remedy, and keeps looking."""

import http.server
import importlib
import shutil
import socket
import threading
from importlib import metadata

import pytest
import torch

from mambaseg.app import doctor
from mambaseg.benchmark import scans
from mambaseg.data.phantoms.synthetic import NOTE
from mambaseg.scan import dispatch
from small_disk import fill, small_disk
from tiny_nnunet import write_nnunet


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Words for a healthy machine, whatever this one is."""
    monkeypatch.delenv("ACDC_ROOT", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: os_usage(50 * doctor.GIB))
    return ["data=phantom", f"outputs={tmp_path / 'outputs'}", f"data.cache_dir={tmp_path}"]


def os_usage(free):
    return doctor.shutil._ntuple_diskusage(total=2 * free, used=free, free=free)


def the(findings, about):
    (one,) = [finding for finding in findings if finding.about == about]
    return one


def broken(findings):
    return [finding.about for finding in findings if finding.level == "error"]


def test_a_healthy_machine_is_ready(words, capsys, tmp_path):
    assert doctor.main(words) == 0
    said = capsys.readouterr().out
    for part in ("Python: 3", f"torch: {torch.__version__}", "scan numba on cpu: agrees",
                 "numba threads: layer", "50.0 GiB free", "synthetic phantom", "W&B: offline",
                 "ready to train"):  # fmt: skip
        assert part in said
    assert not (tmp_path / "outputs").exists() and not list(tmp_path.iterdir())


# ---- the scan


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("No module named 'numba'"), "needs numba"),
        (SystemError("initialization of _internal failed"), "installed but does not load"),
    ],
)
def test_a_numba_that_does_not_load(error, said, words, monkeypatch, capsys):
    import_module = importlib.import_module

    def refuse(name):
        if name == "mambaseg.scan.numba":
            raise error
        return import_module(name)

    monkeypatch.setattr(dispatch.importlib, "import_module", refuse)
    assert doctor.main(words) == 1
    printed = capsys.readouterr().out
    assert said in printed and str(error) in printed and "pip install numba" in printed
    assert "broken: scan numba on cpu" in printed
    assert "scan torch on cpu: agrees" in printed
    assert dispatch.choose_backend("auto", "cpu") == "torch"


def test_a_numba_that_fails_or_computes_nonsense(words, monkeypatch):
    module = importlib.import_module("mambaseg.scan.numba")
    scan = module.selective_scan_2d
    monkeypatch.setattr(module, "selective_scan_2d", lambda *inputs: scan(*inputs) * 1.01)
    found = the(doctor.examine(words), "scan numba on cpu")
    assert found.level == "error" and "wrong numbers" in found.said and found.remedy

    def fail(*_):
        raise RuntimeError("no threading layer could be loaded")

    monkeypatch.setattr(module, "selective_scan_2d", fail)
    found = the(doctor.examine(words), "scan numba on cpu")
    assert found.level == "error" and "no threading layer" in found.said


def test_a_backend_that_is_wrong_for_long_sequences_only(words, monkeypatch):
    module = importlib.import_module("mambaseg.scan.numba")
    scan = module.selective_scan_2d

    def wrong(x, *others):
        y = scan(x, *others)
        return y if x[0, ..., 0].numel() < 256 else y * 1.01

    monkeypatch.setattr(module, "selective_scan_2d", wrong)
    found = the(doctor.examine(words), "scan numba on cpu")
    assert found.level == "error" and "wrong numbers" in found.said


def test_backends_are_also_compared_in_the_dtype_of_mixed_precision(monkeypatch):
    dtypes, device = (torch.float32, torch.bfloat16), torch.device("cpu")
    found = doctor._compared("torch", device, dtypes)
    assert found.level == "ok" and "in float32" in found.said and "in bfloat16" in found.said
    compute = scans.errors_of

    def wrong(forms, names, dtype, *others, **shape):
        (row,) = compute(forms, names, dtype, *others, **shape)
        return [{**row, "worst": 0.1}] if dtype == torch.bfloat16 else [row]

    monkeypatch.setattr(scans, "errors_of", wrong)
    found = doctor._compared("torch", device, dtypes)
    assert found.level == "error" and "in bfloat16" in found.said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_and_not_there(words, monkeypatch):
    assert the(doctor.examine([*words, "trainer=gpu"]), "GPU").level == "error"
    monkeypatch.setattr(doctor, "_driver", lambda: "570.1")
    found = the(doctor.examine(words), "GPU")
    assert found.level == "warning" and "570.1" in found.said and "docs/gpu.md" in found.remedy


# ---- packages


def test_versions_outside_the_declared_ranges(words, monkeypatch):
    version = metadata.version
    others = {"hydra-core": "1.2.0", "ruff": "0.1"}
    monkeypatch.setattr(metadata, "version", lambda name: others.get(name) or version(name))
    findings = doctor.examine(words)
    hydra, ruff = the(findings, "hydra-core"), the(findings, "ruff")
    assert hydra.level == "error" and "1.2.0" in hydra.said and "hydra-core" in hydra.remedy
    assert ruff.level == "warning"  # of an extra
    assert broken(findings) == ["hydra-core"]


def test_a_package_that_is_missing(words, monkeypatch):
    version = metadata.version

    def missing(name):
        if name in ("einops", "ruff"):
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", missing)
    findings = doctor.examine(words)
    assert (
        broken(findings) == ["einops"] and "pip install 'einops" in the(findings, "einops").remedy
    )


def test_a_check_that_breaks_down_does_not_hide_the_others(words, monkeypatch):
    def fall_over():
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(torch.cuda, "is_available", fall_over)
    findings = doctor.examine(words)
    assert broken(findings) == ["torch and devices", "scan backends"]
    assert the(findings, "data").level == "ok"


def test_words_that_are_no_configuration(words):
    findings = doctor.examine([*words, "model=vgg"])
    assert broken(findings) == ["configure"] and "vgg" in the(findings, "configure").said
    assert the(findings, "scan torch on cpu").level == "ok"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("data.sise=64", "there is no data.sise; did you mean data.size?"),
        ("data.size=big", "data.size=big: must be"),
        ("model.width=[4,8]", "there is no model.width; did you mean model.widths?"),
        ("hydra/launcher=jobs", "is hydra/launcher=joblib now"),
    ],
)
def test_mistakes_in_words_get_the_answers_of_a_training(word, said, words, monkeypatch):
    for check in ("scan_backends", "torch_and_devices", "packages"):
        monkeypatch.setattr(doctor, check, lambda _: iter(()))
    found = doctor.examine([*words, "model=unet", word])[0]
    assert found.level == "error" and said in found.said and not found.remedy


def test_configs_of_ones_own_are_found(words, monkeypatch, tmp_path, capsys):
    for check in ("scan_backends", "torch_and_devices", "packages"):
        monkeypatch.setattr(doctor, check, lambda _: iter(()))
    (tmp_path / "conf/data").mkdir(parents=True)
    (tmp_path / "conf/data/heart.yaml").write_text("defaults: [phantom, _self_]\ntitle: hearts\n")
    assert doctor.main([f"--config-dir={tmp_path / 'conf'}", "data=heart", *words[1:]]) == 0
    assert "data: hearts in data/phantom" in capsys.readouterr().out


# ---- places


@pytest.mark.parametrize(("gibibytes", "level"), [(20, "ok"), (3, "warning"), (0.2, "error")])
def test_the_room_on_the_disk(gibibytes, level, words, monkeypatch):
    free = int(gibibytes * doctor.GIB)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: os_usage(free))
    findings = doctor.examine(words)
    for option in ("outputs", "data.cache_dir"):
        found = the(findings, option)
        assert found.level == level and f"{gibibytes:.1f} GiB free" in found.said
        assert ("choose another folder" in found.remedy) == (level != "ok")


def test_a_disk_that_is_full(words, tmp_path):
    with small_disk(tmp_path / "disk", kibibytes=512) as disk:
        fill(disk)
        findings = doctor.examine([*words, f"outputs={disk / 'outputs'}"])
        assert [path.name for path in disk.iterdir()] == ["ballast"]
    found = the(findings, "outputs")
    assert found.level == "error" and str(disk) in found.said and "No space left" in found.said
    assert broken(findings) == ["outputs"]


def test_an_acdc_root_that_is_not_there(words, monkeypatch, tmp_path):
    monkeypatch.setenv("ACDC_ROOT", str(tmp_path / "absent"))
    found = the(doctor.examine([*words[1:], "data=acdc"]), "ACDC_ROOT")
    assert found.level == "error" and str(tmp_path / "absent") in found.said and found.remedy
    assert the(doctor.examine(words), "ACDC_ROOT").level == "warning"  # a training of the phantom


def test_the_data_that_are_found(words, monkeypatch, phantom_root, tmp_path):
    root = shutil.copytree(phantom_root, tmp_path / "hearts")
    monkeypatch.setenv("ACDC_ROOT", str(root))
    assert "data=phantom" in the(doctor.examine([*words, "data=acdc"]), "data").said
    (root / NOTE).unlink()
    found = the(doctor.examine([*words, "data=acdc"]), "data")
    assert found.level == "ok" and "16 cases of 8 patients" in found.said
    few = [*words, "data=acdc", "data.split=random", "data.labels=scribble"]
    found = the(doctor.examine([*few, "data.labelled=2"]), "labels")
    assert found.level == "ok" and "Labels of 2 of 5 training patients are read" in found.said
    assert "Training reads scribbles" in found.said
    assert broken(doctor.examine([*few, "data.labelled=9"])) == ["labels"]
    assert the(doctor.examine(few), "split").said.startswith("random-seed0: 5 / 1 / 2 patients")
    findings = doctor.examine([*words, "data=acdc"])
    assert broken(findings) == ["split"] and "patient" in the(findings, "split").said
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("ACDC_ROOT", str(empty))
    assert broken(doctor.examine([*words, "data=acdc"])) == ["data"]


def test_data_of_ones_own_are_looked_for_where_they_are_said_to_be(words, tmp_path):
    root = write_nnunet(tmp_path / "Dataset001_Own")
    words = [*words[1:], "data=nnunet"]
    found = the(doctor.examine([*words, f"data.root={root}"]), "data")
    assert found.level == "ok" and "Dataset001_Own in" in found.said and "5 cases" in found.said
    assert the(doctor.examine(words), "data").said == "data.root is not set"


# ---- W&B


@pytest.fixture
def with_key(words, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "s3cret" * 7)
    return words


def test_a_server_that_answers(with_key, monkeypatch, capsys):
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("WANDB_BASE_URL", url)
    assert doctor.main(with_key) == 0
    server.shutdown()
    server.server_close()
    said = capsys.readouterr()
    assert f"{url} answers" in said.out and "s3cret" not in said.out
    assert "s3cret" not in said.err


def test_a_server_that_does_not_answer_is_no_obstacle(with_key, monkeypatch, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("WANDB_BASE_URL", url)
    assert doctor.main(with_key) == 0
    said = capsys.readouterr().out
    assert f"{url} does not answer" in said and "logged offline" in said and "s3cret" not in said


def test_a_file_where_outputs_should_be_is_found(words, tmp_path):
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        found = the(doctor.examine([*words, f"outputs={tmp_path / place}"]), "outputs")
        assert (found.level, found.remedy) == ("error", "choose outputs=...")
        assert found.said == f"{tmp_path / 'file'} is not a folder"
