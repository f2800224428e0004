"""Words with `${...}` stay as they were typed, and what cannot be composed is said in one line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf, open_dict

import mambaseg
from mambaseg.app import sweeps
from mambaseg.app.api import composition, our_hydra
from mambaseg.app.check import checked
from mambaseg.app.console import main
from mambaseg.app.entry import CONF
from mambaseg.app.overrides import typed
from mambaseg.errors import UserError
from runs import composed

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@pytest.fixture
def said(monkeypatch, capfd):
    """What a command says on its way to exit status 1."""
    monkeypatch.setattr("sys.argv", ["mambaseg"])
    monkeypatch.setenv("ACDC_ROOT", "")

    def of(*words):
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        assert ended.value.code not in (0, None)
        out = str(ended.value.code) + capfd.readouterr().err
        assert "Traceback" not in out
        return out

    return of


# ---- interpolations -----------------------------------------------------------------------------


def test_no_interpolation_of_a_word_is_looked_up():
    words = ["outputs=${oc.env:NOWHERE}/x", "callbacks.mc.dirpath='${run_dir}/more'"]
    assert typed(OmegaConf.create(words)) == words
    assert typed([r"evaluation.batch_size=$\{data.batch_size\}", r"name=$\{a.$\{b\}\}"]) == [
        "evaluation.batch_size=${data.batch_size}", "name=${a.${b}}"
    ]  # fmt: skip


@pytest.mark.parametrize("command", [
    "train data=phantom", "train data=phantom -m seed=1,2", "evaluate run=x", "export run=x",
    "predict run=x input=y output=z",
])  # fmt: skip
def test_a_variable_that_is_not_set_is_named_with_its_key(command, said):
    out = said(*command.split(), "outputs=${oc.env:NOWHERE}/runs")
    assert "\noutputs=${oc.env:NOWHERE}/runs: " in f"\n{out}" and "'NOWHERE' not found" in out


def test_a_job_of_a_sweep_is_listed_and_noted_under_the_same_words(tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "_BEGUN", [])
    word = "evaluation.batch_size=${data.batch_size}"
    words = ["data=phantom", "seed=1,2", word, f"outputs={tmp_path}"]
    cfg = composed("data=phantom", words[-1], hydra=True)
    with open_dict(cfg):
        cfg.hydra.runtime.choices.setdefault("hparams_search", None)
        cfg.hydra.overrides.task = words
    with initialize_config_dir(str(CONF), version_base="1.3"):
        sweeps.Sweeps().on_multirun_start(cfg)
    (tmp_path / "default").mkdir(exist_ok=True)
    listed = [json.loads(file.read_text()) for file in tmp_path.glob("default/.jobs/*")]
    assert len(listed) == 2 and all(word in job["overrides"] for job in listed)
    job = ["data=phantom", "seed=1", r"evaluation.batch_size=$\{data.batch_size\}", words[-1]]
    sweeps._note_failure(composed(*job, hydra=True), "failed")  # as Hydra's sweeper writes it
    assert len(list(tmp_path.glob("default/.jobs/*"))) == 2


# ---- what cannot be composed --------------------------------------------------------------------


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_can_be_evaluated_or_asks_for_its_network(experiment, monkeypatch):
    monkeypatch.setenv("ACDC_ROOT", "/nowhere")
    with our_hydra(None):
        assert composition("evaluate", [f"experiment={experiment}", "model=unet"])
        try:
            composition("evaluate", [f"experiment={experiment}"])
        except UserError as error:
            assert str(error).startswith(f"experiment={experiment}: it depends on the network")


def test_a_config_that_is_no_yaml_is_named_with_the_line(tmp_path, said):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name: mine\nwidths: [4, 8\ndropout: 0\n")
    with pytest.raises(UserError, match=r"model/mine.yaml, line 3: not valid YAML: "):
        mambaseg.train("data=phantom", "model=mine", config_dir=tmp_path)
    words = ["train", f"--config-dir={tmp_path}", "data=phantom"]
    assert "model/mine.yaml, line 3: " in said(*words, "model=mine")
    assert "model/mine.yaml, line 3: " in said(*words, "-m", "model=unet,mine")


def refusal(*words, configs, script="config"):
    with pytest.raises(UserError) as refused:
        checked(composed(*words, configs=configs, script=script), script, words)
    return str(refused.value)


@pytest.mark.parametrize("key", ["model.name", "data.name", "data.title"])
def test_a_config_without_its_name_is_asked_for_it(key, tmp_path):
    group, name = key.split(".")
    ours = {"model": "unet", "data": "acdc"}[group]
    config = yaml.safe_load((CONF / group / f"{ours}.yaml").read_text())
    del config[name]
    (tmp_path / group).mkdir()
    (tmp_path / group / "mine.yaml").write_text(yaml.safe_dump(config))
    said = refusal("data=phantom", f"{group}=mine", configs=tmp_path)
    assert said.startswith(f"{key} is missing") and f"in a line {name}: <text>" in said


@pytest.mark.parametrize("group", ["experiment", "debug", "hparams_search", "local"])
def test_a_config_of_differences_without_its_first_line_is_told_so(group, tmp_path):
    name = "default" if group == "local" else "mine"
    (tmp_path / group).mkdir()
    (tmp_path / group / f"{name}.yaml").write_text("data: {steps: 3}\n")
    words = ["data=phantom"] + [f"{group}={name}"] * (group != "local")
    said = refusal(*words, configs=tmp_path)
    assert said.startswith(words[1] if words[1:] else "local: ")
    assert said.endswith("# @package _global_")


def test_a_choice_that_a_command_does_not_have_is_refused(said):
    for word in ("data=acdc", "+data=acdc"):
        out = said("predict", "run=x", "input=y", "output=z", word)
        assert f"{word}: mambaseg predict has no data to choose" in out
    assert "loss=focal: mambaseg export has no loss to choose" in said("export", "loss=focal")


def test_the_configs_of_the_folder_that_was_named_are_listed(said):
    out = said("train", "optim=own/foo")
    assert "vm_unet" in out and "adamw" not in out


def test_options_of_hydra_end_well_or_say_that_they_are_not_read(said, monkeypatch, capfd):
    assert "--experimental-rerun is not read" in said("train", "--experimental-rerun", "foo")
    with pytest.raises(SystemExit) as ended:
        main(["train", "data=phantom", "--hydra-help"])
    assert ended.value.code == 0 and "Hydra" in capfd.readouterr().out


@pytest.mark.parametrize("words", [["--model", "unet"], ["--model=unet"]])
def test_a_value_given_as_an_option_is_told_how_it_is_set(said, words):
    out = said("train", *words)
    assert "--model is no option" in out and "without dashes and with =, such as model=" in out


@pytest.mark.skipif(os.name == "nt", reason="no pipe breaks there")
def test_a_reader_of_the_help_may_stop_early():
    read = subprocess.Popen(
        [sys.executable, "-m", "mambaseg", "train", "--help"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    read.stdout.close()
    assert read.stderr.read() == b"" and read.wait() == -signal.SIGPIPE


def test_a_folder_that_is_not_there_is_said_before_minutes_of_work(said):
    assert "root=nowhere: there is no such folder" in said("benchmark", "gpu", "root=nowhere")


def test_an_original_file_is_described_by_the_same_keys_on_the_page():
    words = ["data.window=[0,255]", "data.intensity=window", "data.spacing=1.5"]
    one, other = (composed("model=unet", *words, script=name) for name in ("predict", "demo"))
    assert one.data == other.data and list(one.data.window) == [0, 255]


# ---- evaluate -----------------------------------------------------------------------------------


def test_scores_of_a_few_cases_are_not_kept_among_those_of_all(said):
    assert "debug=fast: scores of a few cases" in said("evaluate", "run=x", "debug=fast")
    out = said("evaluate", "run=x", "+trainer.limit_test_batches=1")
    assert "scores of a few cases" in out and "debug=" not in out
    out = said("train", "data=phantom", "+trainer={limit_test_batches: 1}")
    assert "scores of a few cases" in out and "choose debug=fast" in out


@pytest.mark.parametrize("word", ["ignore_label=255", "class_names=[background,heart]"])
def test_what_is_read_of_label_maps_alone_is_refused_beside_a_run(word, said, tmp_path):
    (file := tmp_path / "some.ckpt").touch()
    key, out = word.partition("=")[0], said("evaluate", f"run={file}", word)
    assert f"{key}= applies to label maps only" in out


def test_label_maps_are_not_scored_in_the_name_of_a_run(tmp_path):
    with pytest.raises(UserError, match="predictions= applies to label maps only"):
        mambaseg.evaluate(tmp_path, "predictions=p", "references=q")


@pytest.mark.parametrize(
    "word",
    [
        "data=acdc",
        "data.size=3",
        "evaluation.tta=true",
        "test=false",
        "model=unet",
        "loss=focal",
        "init_from=nope",
        "seed=3",
    ],
)
def test_what_is_read_of_a_run_alone_is_refused_beside_label_maps(word, said):
    assert f"{word}: not read with predictions=" in said(
        "evaluate", "predictions=p", "references=q", word
    )


def test_a_sweep_over_folders_of_label_maps_notes_what_it_has_scored(tmp_path, monkeypatch):
    import numpy as np
    from PIL import Image

    for name in ("one", "two", "truth"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / name / "a.png")
    monkeypatch.setattr("sys.argv", ["mambaseg"])
    main(["evaluate", "-m", f"predictions={tmp_path}/one,{tmp_path}/two",
          f"references={tmp_path}/truth", "class_names=[background,line]",
          f"outputs={tmp_path}/outputs"])  # fmt: skip
    jobs = [json.loads(file.read_text()) for file in tmp_path.glob("outputs/*/.jobs/*")]
    assert sorted(str(job["run"])[:3] for job in jobs) == ["one", "two"]
    assert all(Path(tmp_path / "outputs" / "evaluate" / job["run"]).is_dir() for job in jobs)
