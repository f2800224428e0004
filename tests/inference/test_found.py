"""Which run is meant: a folder, `newest`, a pattern, an experiment."""

import logging

import pytest
import yaml

from mambaseg.errors import UserError
from mambaseg.inference.found import distinct, find_run, find_runs, weights_file
from mambaseg.storage.run_folder import RunFolder

CHECKPOINT = {"_target_": "mambaseg.training.checkpoints.Checkpoints", "monitor": "val/dice"}
CLASSES = {"class_names": ["background", "heart"]}


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for day, (name, score) in enumerate(
        {
            "hearts/unet-a-seed1-00000000": 0.8,
            "hearts/mamba_unet-a-seed1-11111111": 0.9,
            "hearts/mamba_unet-a-seed2-22222222": 0.7,
            "hearts/mamba_unet-a-seed1-11111111.previous": 0.99,
            "lungs/unet-b-seed1-33333333": 0.6,
        }.items()
    ):
        write_run(tmp_path / "outputs" / name, score, ended=f"2026-01-0{day + 1}")
    return tmp_path / "outputs"


def write_run(path, score, *, data="a", ended="2026-01-01", status="done", **checkpoint):
    folder = RunFolder(path)
    folder.start(data={"fingerprint": data}, split={"hash": "s"}, val_dice=score)
    (path / "checkpoints/best.ckpt").touch()
    config = {"seed": 1, "model": {"name": "unet"}, "data": CLASSES}
    config["callbacks"] = {"checkpoint": {**CHECKPOINT, **checkpoint}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    folder.update(status=status, ended=ended)


def test_a_folder_and_a_file_are_themselves(outputs):
    run = outputs / "hearts/unet-a-seed1-00000000"
    file = run / "checkpoints/best.ckpt"
    assert find_run(run) == run and find_run(str(file)) == file
    assert str(find_run("absent/run")) == "absent/run"  # whoever reads it says what is missing


def test_a_run_without_a_best_state_gives_its_last_one(outputs, caplog):
    run = outputs / "hearts/unet-a-seed1-00000000"
    best, last = (run / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    last.touch()
    assert weights_file(run) == best
    best.unlink()
    assert weights_file(run) == last and "no best state" in caplog.text
    RunFolder(run).update(ended="2026-02-01")
    assert find_run("newest").name == run.name  # not another network than expected
    RunFolder(run).update(status="interrupted")
    with pytest.raises(UserError, match=r"no file .*best\.ckpt.* its last state is .*last\.ckpt"):
        weights_file(run)


def test_newest_is_the_one_that_ended_last(outputs, caplog):
    caplog.set_level(logging.INFO)
    assert find_run("newest").name == "unet-b-seed1-33333333"
    assert "run=newest: outputs/lungs/unet-b-seed1-33333333" in caplog.text
    write_run(outputs / "lungs/unet-b-seed2-44444444", 0.1, ended="2026-02-01", status="running")
    write_run(outputs / "debug/unet-b-seed3-55555555", 0.1, ended="2026-02-02")
    assert find_run("newest").name == "unet-b-seed1-33333333"


def test_a_pattern_that_fits_one_run_is_that_run(outputs):
    assert find_run("outputs/hearts/*mamba*seed2*").name == "mamba_unet-a-seed2-22222222"
    assert find_run("outputs/**/*-b-*").name == "unet-b-seed1-33333333"
    assert find_run("outputs/l*/*/checkpoints/*.ckpt").name == "best.ckpt"


def test_a_pattern_that_fits_several_lists_them_and_an_ensemble_takes_them(outputs):
    with pytest.raises(UserError, match="fits 2 runs; name one of them") as error:
        find_run("outputs/hearts/*mamba*")
    listed = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert [line[-8:] for line in listed] == ["22222222", "11111111"]  # the newer one first
    assert [str(run) for run in find_runs("outputs/hearts/*mamba*")] == listed
    with pytest.raises(UserError, match="no run folder and no"):
        find_run("outputs/*/swin*")


def test_a_pattern_leaves_out_what_is_still_training(outputs, caplog):
    path = outputs / "hearts/mamba_unet-a-seed3-66666666"
    write_run(path, 0.1, ended="2026-02-01", status="running")
    assert len(find_runs("outputs/hearts/*mamba*")) == 2
    assert "has not ended: outputs/hearts/mamba_unet-a-seed3-66666666" in caplog.text
    assert find_runs("outputs/hearts/*seed3-6*") == [path.relative_to(outputs.parent)]


def test_an_unfinished_run_that_is_named_is_used_with_a_warning(outputs, caplog):
    path = outputs / "hearts/mamba_unet-a-seed3-66666666"
    write_run(path, 0.1, status="interrupted")
    for named in (path, str(path), "outputs/hearts/*seed3-6*"):
        caplog.clear()
        find_run(named)
        assert "66666666 has not ended (interrupted): its best state so far" in caplog.text
    caplog.clear()
    find_run(path / "checkpoints/best.ckpt")
    find_run(outputs / "hearts/unet-a-seed1-00000000")
    find_run("absent/run")
    assert not caplog.text


def test_a_network_counts_once_whatever_it_is_called(outputs, caplog):
    one, other = sorted((outputs / "hearts").glob("*unet-a-seed1-????????"))
    link = outputs / "link"
    link.symlink_to(one)
    best = other / "checkpoints/best.ckpt"
    assert distinct([one, other, link, one.relative_to(outputs.parent), best]) == [one, other]
    assert caplog.text.count("is left out") == 3 and f"{best} is left out: {other}" in caplog.text
    last = other / "checkpoints/last.ckpt"
    last.touch()
    assert distinct([other, last]) == [other, last]


def test_an_experiment_is_its_best_run_by_validation(outputs, caplog):
    caplog.set_level(logging.INFO)
    assert find_run("outputs/hearts").name == "mamba_unet-a-seed1-11111111"
    assert "of 3 finished runs in outputs/hearts the best by val/dice (0.9000)" in caplog.text
    for run in (outputs / "hearts").glob("*-????????"):
        write_run(run, RunFolder(run).record["val_dice"], monitor="val/dice", mode="min")
    assert find_run("outputs/hearts").name == "mamba_unet-a-seed2-22222222"


def test_the_score_of_a_class_whose_name_has_blanks_chooses_too(outputs):
    for run in (outputs / "hearts").glob("*-????????"):
        score = RunFolder(run).record["val_dice"]
        write_run(run, score, monitor="val/dice_whole tumor")
        RunFolder(run).update(**{"val_dice_whole tumor": score})
    assert find_run("outputs/hearts").name == "mamba_unet-a-seed1-11111111"


@pytest.mark.parametrize(
    ("other", "words"),
    [({"data": "b"}, "different data"), ({"monitor": "val/iou"}, "chosen by different scores")],
)
def test_an_experiment_whose_scores_do_not_compare_is_refused(outputs, other, words):
    write_run(outputs / "hearts/unet-b-seed1-55555555", 0.99, **other)
    if "monitor" in other:
        RunFolder(outputs / "hearts/unet-b-seed1-55555555").update(val_iou=0.5)
    with pytest.raises(UserError, match=words):
        find_run("outputs/hearts")


def test_an_experiment_without_a_finished_run_says_so(outputs):
    write_run(outputs / "new/unet-a-seed1-66666666", 0.5, status="running")
    with pytest.raises(UserError, match="holds no finished run with a validation score"):
        find_run("outputs/new")
