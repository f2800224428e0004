"""`hparams_search=optuna`: one repeatable study per network, blind to the test patients."""

import itertools
import json
import shlex
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
        path = tmp_path / "search" / "studies" / model / "optimization_results.yaml"
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
        results.append((folder / "studies" / "all" / "optimization_results.yaml").read_text())
    assert done.stdout.count("already finished") == 3
    assert records[0] == records[1] and results[0] == results[1]
