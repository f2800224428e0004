"""The commands people type, in processes of their own."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml

from forked_commands import typed_all
from frozen_norms import freeze
from mambaseg.errors import UserError
from mambaseg.training.segmentation import SegmentationTask
from runs import QUIET, entered, stop_before, trained
from runs import UNET as TINY
from typed import ROOT, typed

FROZEN = ROOT / "tests" / "helpers" / "frozen_norms.py"
UNET = ["model=unet", "model.widths=[4,4,8,8,8]", "callbacks.progress=null"]
SMALL = {
    "unet": "widths: [4, 4, 8, 8, 8]",
    "swin_unet": "embed_dim: 24\ndepths: [1, 1, 1, 1]",
    "mamba_unet": "embed_dim: 16\ndepths: [1, 1, 1, 1]",
}


def sweep(place, *names):
    """Words of a sweep over networks, each made small by a config of our own."""
    (place / "conf" / "model").mkdir(parents=True)
    for name in names:
        config = place / "conf" / "model" / f"small_{name}.yaml"
        config.write_text(f"defaults: [{name}]\n{SMALL[name]}\n")
    chosen = ",".join(f"small_{name}" for name in names)
    return [f"--config-dir={place / 'conf'}", "-m", f"model={chosen}", *QUIET]


@pytest.fixture(scope="module")
def swept(shared_run, tmp_path_factory):
    """Name -> run folder of three networks that one process has trained with frozen norms."""
    place = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentationTask, "on_train_batch_start", freeze, raising=False)
        words = [*sweep(place, *SMALL), *shared_run, "trainer=cpu", f"outputs={place}"]
        assert entered("train.py", *words) == 0
    return dict(zip(sorted(SMALL), sorted((place / "default").glob("*-seed*")), strict=True))


def folders(tmp_path, experiment="default"):
    return sorted((tmp_path / "outputs" / experiment).glob("*-seed*"))


def test_a_sweep_trains_three_networks_under_equal_conditions(swept):
    assert [run.name.split("-")[0] for run in swept.values()] == [*swept]
    one, *others = [yaml.safe_load((run / "config.yaml").read_text()) for run in swept.values()]
    for part in ("data", "optim", "loss", "evaluation", "seed"):
        assert all(other[part] == one[part] for other in others)


def ended(run):
    """The last weights of a run that took four steps and scored each case once."""
    assert len((run / "cases.csv").read_text().splitlines()) == 1 + 4 * 4
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 4
    return last["state_dict"]


@pytest.mark.timeout(600)  # two trainings of two processes each
def test_two_processes_train_what_one_trains_also_in_a_sweep(swept, small_run, tmp_path):
    """The same global batches, dropped units and Dice sums: the same weights but for rounding."""
    done = typed(
        *sweep(tmp_path, "unet", "mamba_unet"), *small_run,
        "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", script=FROZEN,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not re.search("Warning|recommended|deprecated", done.stderr), done.stderr
    for name in ("unet", "mamba_unet"):
        alone = swept[name]
        (together,) = (tmp_path / "outputs" / "default").glob(f"{name}-*-seed*")
        # devices identify no run, unless each has batch norms of its own (which are frozen here)
        assert (together.name == alone.name) == (name != "unet")
        weights = ended(together)
        for key, value in ended(alone).items():
            torch.testing.assert_close(
                weights[key], value, rtol=1e-5, atol=1e-5, msg=f"{name} {key}"
            )


def test_synthetic_data_are_said_first_and_in_the_table(small_run):
    done = typed(*UNET, *small_run, "data.steps=2", "logger=csv")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert "synthetic phantom, not ACDC" in lines[0] and "ACDC_ROOT" in lines[0]
    assert done.stdout.count("ACDC_ROOT") == 1
    assert "unet · synthetic phantom, not ACDC" in done.stdout
    assert "mean foreground Dice" in done.stdout and "median_" in done.stdout
    assert "Warning" not in done.stderr


@pytest.mark.timeout(600)
def test_more_processes_than_validation_cases_show_and_score_what_one_does(small_run, tmp_path):
    """Two validation cases and four test cases for three processes; pictures are of all cases."""
    words = [*TINY, *QUIET, *small_run, "data.batch_size=6", "data.steps=2", "trainer=ddp",
             "trainer.accelerator=cpu"]  # fmt: skip
    alone = trained(*words, "trainer.devices=1", f"outputs={tmp_path / 'alone'}").folder.path
    done = typed(*words, "trainer.devices=3", script=FROZEN)
    assert done.returncode == 0, done.stderr
    (together,) = folders(tmp_path)
    seen = [
        (
            sorted(path.name for path in (run / "figures").iterdir()),
            [line.split(",")[:2] for line in (run / "cases.csv").read_text().splitlines()],
            json.loads((run / "run.json").read_text())["status"],
        )
        for run in (alone, together)
    ]
    assert seen[0] == seen[1] and seen[0][2] == "done"


def test_awkward_paths_work_as_documented(small_run, phantom_root, tmp_path):
    root = tmp_path / "my = datä, all"
    root.symlink_to(phantom_root)
    words = [*UNET, *small_run, f'data.root="{root}"', "data.steps=2", "test=false",
             f'outputs="{tmp_path / "aus gabe = ü"}"', "logger=csv"]  # fmt: skip
    assert entered("train.py", *words) == 0
    (run,) = (tmp_path / "aus gabe = ü" / "default").glob("*-seed*")
    assert not any("=" in path.name for path in run.rglob("*"))


def test_loader_processes_and_the_threads_of_the_scan_get_along(small_run, tmp_path):
    """No deadlock after a fork; and who asks for one thread gets one from every library."""
    script = tmp_path / "counted.py"
    script.write_text(
        "import runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "import numba, torch\n"
        "print('threads:', numba.get_num_threads(), torch.get_num_threads())\n"
    )
    words = ["model=mamba_unet", "model.embed_dim=16", "model.depths=[1,1,1,1]", "logger=csv",
             "model.scan_backend=numba", "data.num_workers=2", "test=false"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(script), str(ROOT / "src" / "train.py"), *words, *small_run],
        capture_output=True, text=True, timeout=280, stdin=subprocess.DEVNULL, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("threads: 1 1")


def test_the_phantom_is_not_trained_on_under_the_name_of_acdc(small_run, phantom_root):
    words = [*UNET, *small_run[1:], f"data.root={phantom_root}", "data.split=random"]
    words = [word for word in words if not word.startswith("data.prepare")]
    with pytest.raises(UserError, match=r"data=acdc: mambaseg computed what is in .*data=phantom"):
        trained("data=acdc", *words)


@pytest.mark.parametrize("words", [["logger=none"], ["~logger"], ["logger.wandb=null"]], ids=str)
def test_a_training_needs_no_logger(words, small_run, tmp_path):
    assert entered("train.py", *UNET, *small_run, "data.steps=2", *words) == 0
    (run,) = folders(tmp_path)
    assert (run / "metrics.json").is_file()
    assert (run / "metrics.csv").is_file() == (words == ["logger.wandb=null"])


def test_a_precision_may_be_a_number(small_run, tmp_path):
    words = [*UNET, *small_run, "data.steps=2", "logger=csv"]
    assert entered("train.py", *words, "trainer.precision=64") == 0
    (run,) = folders(tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["precision"] == "64-true"


def test_a_folder_of_the_user_is_never_a_place_for_synthetic_data(tmp_path):
    here, nowhere = "data.root=my_acdc", "data.root=nowhere"
    commands = {
        " ".join(words): ["train", "model=unet", *words]
        for words in ([here], ["data=phantom", here], [nowhere], ["data=acdc", nowhere],
                      ["data=folder", nowhere], ["experiment=dehazing", nowhere])
    }  # fmt: skip
    for name in commands:
        (tmp_path / name / "my_acdc").mkdir(parents=True)
        (tmp_path / name / "my_acdc" / "patient.nii.gz").write_bytes(b"precious")
    for name, done in typed_all(commands, tmp_path).items():
        assert done["code"] == 1 and "data.root" in done["error"], done
        assert "elete" not in done["error"] and "Traceback" not in done["error"]
        left = [path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*")]
        assert sorted(map(str, left)) == ["my_acdc", "my_acdc/patient.nii.gz"]


def test_a_damaged_summary_is_named_and_without_it_the_run_is_scored_again(small_run, monkeypatch):
    words = [*UNET, *small_run]
    folder = trained(*words).folder.path
    before = {name: (folder / name).read_bytes() for name in ("metrics.json", "cases.csv")}
    (folder / "metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"metrics\.json cannot be read .*Delete it, and start"):
        trained(*words)
    (folder / "metrics.json").unlink()
    stop_before(0, monkeypatch)  # nothing is trained
    trained(*words)
    assert {name: (folder / name).read_bytes() for name in before} == before
