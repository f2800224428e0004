"""`hparams_search=optuna`: one repeatable study per network, blind to the test patients."""

import itertools
import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from mambaseg.app.check import CONF
from runs import composed
from sweep_jobs import TRAIN, environment, needs, notes, typed


def proposals(outputs, model):
    found = [note for note in notes(outputs) if note["model"] == model]
    return {(note["lr"], note["weight_decay"]) for note in found}


def test_every_network_gets_a_study_of_its_own_with_the_same_budget(tmp_path):
    needs("search")
    words = ["-m", "hparams_search=optuna", "model=unet,mamba_unet", "hydra.sweeper.n_trials=5",
             "hydra.sweeper.n_jobs=2", "hydra.sweeper.sampler.n_startup_trials=2"]  # fmt: skip
    done = typed(*words, f"outputs={tmp_path}")
    assert done.returncode == 0, done.stderr
    unet, mamba = proposals(tmp_path, "unet"), proposals(tmp_path, "mamba_unet")
    assert len(unet) == 5 and unet == mamba  # equal scores here, so equal proposals
    assert all(1e-4 <= lr <= 1e-1 and 1e-6 <= decay <= 1e-1 for lr, decay in unet)
    assert not any(note["test"] for note in notes(tmp_path))
    best = max(unet, key=lambda p: 1 / (1 + abs(p[0] - 0.01) + abs(p[1] - 0.001)))
    for model in ("unet", "mamba_unet"):
        studies = (tmp_path / "search" / "studies").glob(f"{model}-*/optimization_results.yaml")
        (path,) = studies
        result = yaml.safe_load(path.read_text())
        found = result["best_params"]
        assert (found["optim.optimizer.lr"], found["optim.optimizer.weight_decay"]) == best
    assert "alembic" not in done.stdout and "\x1b[" not in done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "name=search_best model=unet" in line)
    final = shlex.split(line.split("mambaseg train", 1)[1])
    assert not any(word.startswith(("test=", "hparams_search=")) for word in final)
    assert typed(*final, f"outputs={tmp_path / 'final'}").returncode == 0
    (note,) = notes(tmp_path / "final")
    assert note["test"] and (note["lr"], note["weight_decay"]) == best


def test_ranges_and_globs_make_studies_too():
    needs("search")
    from hydra_plugins.mambaseg_studies import Studies

    with initialize_config_dir(str(CONF), version_base="1.3"):
        studies = Studies({}, {"optim.optimizer.lr": "interval(1, 2)"})
        loader = GlobalHydra.instance().config_loader()
        studies.hydra_context = SimpleNamespace(config_loader=loader)
        words = ["seed=range(1,3)", "model=glob(swin_unet*)", "optim.optimizer.lr=1,2", "name=x"]
        found = list(studies._studies(words))
    expected = itertools.product(("seed=1", "seed=2"), ("model=swin_unet", "model=swin_unetr"))
    assert [tuple(own) for own, _ in found] == list(expected)
    assert all(rest[2:] == words[2:] for _, rest in found)


def labels(*words, hydra=()):
    """The labels of the studies of a search."""
    from hydra_plugins.mambaseg_studies import Studies

    studies = Studies({}, {"optim.optimizer.lr": "interval(1, 2)"})
    studies.config = composed("hparams_search=optuna", *hydra, hydra=True)
    studies.config.hydra.overrides.hydra = [*hydra]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        studies.hydra_context = SimpleNamespace(config_loader=loader)
        found = studies._studies(["hparams_search=optuna", *words])
        return [studies._label(chosen, every) for chosen, every in found]


def test_the_command_of_the_best_point_finds_the_configs_of_the_search(
    tmp_path, monkeypatch, caplog
):
    from hydra_plugins.mambaseg_studies import Studies

    studies = Studies({}, {})
    studies.config = composed("hparams_search=optuna", "name=x", hydra=True)
    monkeypatch.setattr("mambaseg.app.own.config_dirs", lambda: [Path("/my configs")])
    monkeypatch.setattr(Studies, "_job", lambda *_: composed("data=phantom"))
    result = {"best_params": {"optim.optimizer.lr": 0.1}, "best_value": 0.5}
    (tmp_path / "optimization_results.yaml").write_text(yaml.safe_dump(result))
    with caplog.at_level("INFO"):
        studies._say_best("unet", ["model=unet", "name=x"], tmp_path)
    (line,) = (one for one in caplog.messages if one.startswith("train and test it:"))
    expected = ["--config-dir=/my configs", "name=x_best", "model=unet", "optim.optimizer.lr=0.1"]
    assert shlex.split(line.partition(": mambaseg train ")[2]) == expected


def test_a_study_has_a_name_of_its_own():
    assert labels("model=unet,mamba_unet", "name=x", "outputs=y") == ["unet", "mamba_unet"]
    assert labels("model=unet") == ["unet"] and labels() == ["mamba_unet"]
    assert labels("experiment=acdc_cpu_semi")[0].startswith("unet-")
    searches = [
        ["model=unet"], ["model=unet", "seed=1"], ["model=unet", "seed=1,2"],
        ["model=unet", "data=phantom", "data.fold=1,2"], ["model=mamba_unet"],
        ["model=unet", "optim.optimizer.lr=interval(0.1,0.2)"],
    ]  # fmt: skip
    found = [label for words in searches for label in labels(*words)]
    found += labels("model=unet", hydra=["hydra.sweeper.sampler.seed=1"])
    assert len({*found}) == len(found) == 9
    assert labels("seed=1", "model=unet") == labels("model=unet", "seed=1")
    assert labels("model=unet", hydra=["hydra.sweeper.n_trials=40"]) == ["unet"]


def test_two_searches_leave_two_results(tmp_path):
    needs("search")
    for model in ("unet", "mamba_unet"):
        done = typed("-m", "hparams_search=optuna", f"model={model}", "hydra.sweeper.n_trials=1",
                     f"outputs={tmp_path}")  # fmt: skip
        assert done.returncode == 0, done.stderr
    for model in ("unet", "mamba_unet"):
        path = tmp_path / "search" / "studies" / model / "optimization_results.yaml"
        result = yaml.safe_load(path.read_text())
        assert f"model={model}" in result["overrides"] and result["best_params"]


def written(path, body):
    """A script with train.py's configuration and another body."""
    lines = ["import mambaseg.app.build", "from mambaseg.app import budget",
             "from mambaseg.app.entry import entry", "", "", '@entry("config")', "def main(cfg):",
             *(f"    {line}" for line in body), "", "", "main()"]  # fmt: skip
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    ("least", "tolerated", "said"),
    [
        (0.006, 0.0, "val/dice: no validation gave a number"),
        (0.006, 0.9, ""),
        (1.0, 0.0, "val/dice: no validation gave a number"),
        (1.0, 1.0, "study unet: no trial has a score"),
    ],
)
def test_a_trial_without_a_score_fails(least, tolerated, said, tmp_path):
    needs("search")
    body = [f"return None if cfg.optim.optimizer.lr < {least} else 0.5"]
    done = typed("-m", "hparams_search=optuna", "model=unet", "hydra.sweeper.n_trials=4",
                 f"outputs={tmp_path}", f"hydra.sweeper.max_failure_rate={tolerated}",
                 script=written(tmp_path / "scoreless.py", body))  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == bool(said) and said in done.stderr
    assert ("best score 0.5000" in done.stdout) == (not said)


def test_the_best_point_is_tested_with_the_steps_of_its_trial(tmp_path):
    """Another experiment would measure `data.minutes` anew."""
    needs("search")
    body = [
        "budget._measured = lambda *_: (0.01, 0.5)",
        "return budget.within_minutes(cfg, None).data.steps * cfg.optim.optimizer.lr",
    ]
    done = typed("-m", "hparams_search=optuna", "model=unet", "data=phantom", "data.minutes=1",
                 "hydra.sweeper.n_trials=2", f"outputs={tmp_path}",
                 script=written(tmp_path / "budgeted.py", body))  # fmt: skip
    assert done.returncode == 0, done.stderr
    (plan,) = (json.loads(path.read_text()) for path in tmp_path.glob("search/.budgets/*.json"))
    (line,) = (line for line in done.stdout.splitlines() if "name=search_best" in line)
    words = shlex.split(line.split("mambaseg train", 1)[1])
    steps = [f"data.steps={plan['steps']}", f"data.val_every={plan['val_every']}"]
    assert {"data.minutes=null", *steps} < {*words} and "data.minutes=1" not in words


METRIC = """
from mambaseg.evaluation.metrics import Metric


class Misses(Metric):
    def __init__(self):
        super().__init__("misses", "misses", higher_is_better=False)
"""


@pytest.mark.parametrize(
    ("monitor", "direction"),
    [("misses", "minimize"), ("dice", "maximize"), ("hd95_mm", "minimize")],
)
def test_a_study_looks_for_what_its_metric_calls_better(monitor, direction, tmp_path, monkeypatch):
    from hydra_plugins.mambaseg_studies import Studies

    (tmp_path / "metric").mkdir()
    (tmp_path / "metric" / "misses.yaml").write_text("misses: {_target_: metric_of_search.Misses}")
    (tmp_path / "metric_of_search.py").write_text(METRIC)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["metric=misses", f"callbacks.checkpoint.monitor=val/{monitor}",
             "optim.optimizer.lr=interval(1,2)"]  # fmt: skip
    studies = Studies({}, {}, direction=None)
    studies.config = composed("hparams_search=optuna", configs=tmp_path, hydra=True)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        studies.hydra_context = SimpleNamespace(config_loader=loader)
        assert studies._direction(words) == direction


def test_a_failed_study_does_not_stop_the_others(tmp_path):
    needs("search")
    done = typed("-m", "hparams_search=optuna", "model=unet", "seed=13,5", f"outputs={tmp_path}",
                 "hydra.sweeper.n_trials=2")  # fmt: skip
    assert done.returncode == 1
    assert "seed 13 is refused" in done.stderr and "Traceback" not in done.stderr
    assert [note["seed"] for note in notes(tmp_path)] == [5, 5]


@pytest.mark.slow
def test_the_same_search_again_takes_its_trials_from_their_folders(small_run, tmp_path):
    needs("search")
    words = ["-m", "hparams_search=optuna", "model=unet", "model.widths=[4,4,8,8,8]", *small_run,
             "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1", "logger=csv", "trainer=cpu",
             "hydra.sweeper.sampler.n_startup_trials=1"]  # fmt: skip
    results, records = [], []
    for _ in range(2):
        done = typed(*words, script=TRAIN, env=environment(OMP_NUM_THREADS="1"))
        assert done.returncode == 0, done.stderr
        folder = tmp_path / "outputs" / "search"
        runs = sorted(folder.glob("unet-*"))
        assert len(runs) == 3
        records.append([json.loads((run / "run.json").read_text()) for run in runs])
        assert not any((run / "cases.csv").exists() for run in runs)  # the test part is untouched
        (result,) = folder.glob("studies/unet-*/optimization_results.yaml")
        results.append(result.read_text())
    assert done.stdout.count("already finished") == 3
    assert records[0] == records[1] and results[0] == results[1]
