"""Without data=, a run is scored on its own data, as its run folder tells."""

import shutil

import pytest
import yaml

from mambaseg.data.phantoms.synthetic import NOTE
from mambaseg.reporting.reading import training_of
from mambaseg.storage.run_folder import RunFolder
from mambaseg.storage.untrusted import read_yaml
from runs import entered

HEARTS = """
defaults:
  - acdc
  - _self_
name: hearts
title: hearts of our hospital
split: random
class_names: [background, right, wall, left]
"""


@pytest.fixture(scope="module")
def own(phantom_root, tmp_path_factory):
    """A run of a config of one's own, whose file has another name than its data."""
    place = tmp_path_factory.mktemp("own")
    (place / "conf" / "data").mkdir(parents=True)
    (place / "conf" / "data" / "heart.yaml").write_text(HEARTS)
    shutil.copytree(phantom_root, place / "hearts")
    (place / "hearts" / NOTE).unlink()
    words = [
        f"--config-dir={place / 'conf'}", "data=heart", f"data.root={place / 'hearts'}",
        f"data.cache_dir={place / 'cache'}", f"outputs={place / 'outputs'}", "+data.split_seed=3",
        "data.size=32", "data.batch_size=4", "data.steps=2", "data.val_every=2", "logger=csv",
        "model=unet", "model.widths=[4,8,8,8,8]", "trainer=cpu", "seed=5",
    ]  # fmt: skip
    assert entered("train.py", *words, cwd=place) == 0
    (run,) = (place / "outputs" / "default").glob("*/run.json")
    return run.parent


def scored(run, tmp_path, *words):
    """Status of evaluate.py from an empty folder, and the run folder that it made, if any."""
    words = f"--config-dir={own_conf(run)}", f"outputs={tmp_path / 'out'}", "logger=csv", *words
    status = entered("evaluate.py", *words, "trainer=cpu", cwd=tmp_path)
    made = list((tmp_path / "out" / "evaluate").glob("*/run.json"))
    return status, RunFolder(made[0].parent) if made else None


def own_conf(run):
    return run.parents[2] / "conf"


@pytest.mark.parametrize("which", ["", "checkpoints/best.ckpt"])
def test_a_run_is_scored_on_its_own_data(own, which, tmp_path):
    status, again = scored(own, tmp_path, f"run={own / which}")
    assert status == 0
    assert again.summary["data"] == "hearts of our hospital"
    assert "-seed5-" in again.path.name and again.path.name.startswith("unet-heart")
    assert again.summary["split"] == RunFolder(own).summary["split"]
    assert again.summary["foreground"] == RunFolder(own).summary["foreground"]
    assert RunFolder(own).record["data"]["config"] == "heart"
    assert again.record["training"] == training_of(str(own / "checkpoints" / "best.ckpt")) != ""
    assert not (tmp_path / "data" / "phantom").exists()


def test_a_seed_of_its_own_would_make_two_evaluations_of_one_network(own, tmp_path, capfd):
    assert scored(own, tmp_path, f"run={own}", "seed=4") == (1, None)
    assert "seed=: an evaluation uses the seed of its run" in capfd.readouterr().err


def test_overrides_that_only_a_training_reads_are_named(own, tmp_path, capfd):
    status, again = scored(own, tmp_path, f"run={own}", "loss=focal", "data.batch_size=2")
    assert status == 0 and again.summary["foreground"] == RunFolder(own).summary["foreground"]
    said = capfd.readouterr().out
    assert "loss=focal data.batch_size=2: not read, because nothing is trained" in said
    assert "evaluation.batch_size is what" in said


def test_the_config_of_its_data_may_be_in_a_folder(own, tmp_path):
    run = shutil.copytree(own, tmp_path / "outputs" / "default" / own.name)
    (tmp_path / "conf" / "data" / "mine").mkdir(parents=True)
    config = HEARTS.replace("- acdc", "- /data/acdc@_here_")
    (tmp_path / "conf" / "data" / "mine" / "heart.yaml").write_text(config)
    record = (run / "run.json").read_text().replace('"config": "heart"', '"config": "mine/heart"')
    (run / "run.json").write_text(record)
    status, again = scored(run, tmp_path, f"run={run}")
    assert status == 0
    assert again.summary["foreground"] == RunFolder(own).summary["foreground"]


def test_what_the_command_says_of_the_data_is_kept(own, tmp_path, capfd):
    status, again = scored(own, tmp_path, f"run={own}", "data.root=elsewhere")
    assert status == 1 and again is None
    assert "elsewhere" in capfd.readouterr().err
    words = "+data.split_seed=0", "evaluation.allow_seen=true", "trainer.precision=bf16"
    status, again = scored(own, tmp_path, f"run={own}", *words)
    assert status == 0 and again.summary["split"]["name"] == "random-seed0"
    config = read_yaml(again.path / "config.yaml")
    assert config["trainer"]["precision"] == "bf16-mixed"
    assert config["data"]["cache_dir"] == "data/cache"  # of this machine, not of that which trained


def test_a_checkpoint_alone_does_not_say_what_to_score_it_on(own, tmp_path, capfd):
    alone = shutil.copy(own / "checkpoints" / "best.ckpt", tmp_path / "alone.ckpt")
    status, again = scored(own, tmp_path, f"run={alone}")
    assert status == 1 and again is None
    assert "data=" in capfd.readouterr().err


def changed(own, place, change):
    """A copy of a run folder with another config.yaml."""
    copy = shutil.copytree(own, place / "copied")
    config = yaml.safe_load((copy / "config.yaml").read_text())
    change(config["data"])
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    return copy


ATTACKS = {
    "another class": lambda data: data.update(_target_="os.system"),
    "another function": lambda data: data["find_cases"].update(_target_="os.system"),
    "a new object": lambda data: data.update(prepare={"_target_": "os.system", "command": "x"}),
    "an object among values": lambda data: data.update(window=[{"_target_": "os.getcwd"}]),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_run_folder_makes_no_object(own, attack, monkeypatch, tmp_path, capfd):
    run = changed(own, tmp_path, ATTACKS[attack])
    monkeypatch.setattr("os.system", lambda *_: pytest.fail("was called"))
    status, again = scored(own, tmp_path, f"run={run}")
    assert status == 1 and again is None
    assert "object" in capfd.readouterr().err.lower()


def test_what_a_run_folder_says_is_not_interpolated(own, tmp_path):
    title = "${oc.env:HOME}"
    run = changed(own, tmp_path, lambda data: data.update(title=title))
    status, again = scored(own, tmp_path, f"run={run}")
    assert status == 0 and again.summary["data"] == title


def test_data_that_have_gone_and_configs_that_have_gone_are_named(own, tmp_path, capfd):
    run = changed(own, tmp_path, lambda data: data.update(root="/nonexistent/hearts"))
    assert scored(own, tmp_path, f"run={run}") == (1, None)
    assert "/nonexistent/hearts" in capfd.readouterr().err
    record = run / "run.json"
    record.write_text(record.read_text().replace('"config": "heart"', '"config": "../heart"'))
    assert scored(own, tmp_path, f"run={run}") == (1, None)
    assert "conf/data/../heart.yaml" in capfd.readouterr().err
