"""Sweeps side by side: the engines run for real, with jobs that cost nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from hydra import initialize_config_dir
from omegaconf import OmegaConf, open_dict

from mambaseg.app import sweeps
from mambaseg.app.entry import CONF
from mambaseg.errors import UserError
from runs import composed
from sweep_jobs import CHEAP, LIGHT, PLUGINS, ROOT, TRAIN, environment, needs, notes, typed

LAUNCHERS = [launcher for launcher in PLUGINS if launcher != "search"]


def sweep(*words):
    """The configuration of a sweep, as the callback sees it."""
    cfg = composed("data=phantom", *words, hydra=True)
    with open_dict(cfg):
        cfg.hydra.runtime.choices.setdefault("hparams_search", None)
    return cfg


def check(cfg):
    """What happens before a sweep, where nothing is refused."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        sweeps._check_launcher(cfg)
        sweeps._check_jobs(cfg)


@pytest.fixture
def plugins_there(monkeypatch):
    monkeypatch.setattr(sweeps.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(sweeps.shutil, "which", lambda name: f"/usr/bin/{name}")


def refusal(cfg, hook="on_multirun_start"):
    with pytest.raises(SystemExit) as ended:
        getattr(sweeps.Sweeps(), hook)(cfg)
    return str(ended.value)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_names_its_plugin_and_composes_without_it(launcher):
    assert launcher in {path.stem for path in (CONF / "hydra" / "launcher").glob("*.yaml")}
    target = sweep(f"hydra/launcher={launcher}").hydra.launcher._target_
    assert f"hydra_plugins.{PLUGINS[launcher]}." in target


def test_our_settings_lie_over_those_of_the_plugins():
    assert sweep("hydra/launcher=joblib").hydra.launcher.n_jobs == 2
    assert sweep("hydra/launcher=joblib").hydra.job.env_set.TERM == "dumb"
    ray = sweep("hydra/launcher=ray").hydra.launcher.ray
    assert ray.remote.max_calls == 1 and ray.init.object_store_memory is None
    for engine, cores in (("submitit_slurm", 8), ("submitit_local", 1)):
        hydra = sweep(f"hydra/launcher={engine}").hydra
        assert hydra.launcher.cpus_per_task == cores
        assert "cpus_per_task" in str(OmegaConf.to_container(hydra.job.env_set, resolve=False))


def test_slurm_without_a_cluster_is_refused(plugins_there, monkeypatch):
    monkeypatch.setattr(sweeps.shutil, "which", lambda name: None)
    assert "submitit_local" in refusal(sweep("hydra/launcher=submitit_slurm"))


@pytest.mark.parametrize("words", [[f"hydra/launcher={launcher}"] for launcher in LAUNCHERS]
                         + [["hparams_search=optuna"]], ids=str)  # fmt: skip
def test_an_absent_plugin_is_named_with_its_pip_command(words, monkeypatch):
    monkeypatch.setattr(sweeps.importlib.util, "find_spec", lambda name: None)
    message = refusal(sweep(*words))
    extra = {"ray": "ray", "optuna": "search"}.get(words[0].split("=")[1], "launchers")
    assert f"pip install 'mambaseg[{extra}]'" in message and "\n" not in message


def test_the_extras_that_errors_name_exist():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for module, extra in sweeps._EXTRAS.items():
        wanted = module.replace("_", "-")
        assert any(r.startswith(wanted) for r in project["optional-dependencies"][extra])


def test_gpus_that_are_not_there_are_refused_rather_than_waited_for(plugins_there, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    two = "hydra.launcher.ray.remote.num_gpus=2"
    check(sweep("hydra/launcher=ray", "hydra.launcher.ray.remote.num_cpus=1"))
    message = refusal(sweep("hydra/launcher=ray", two))
    assert "num_gpus=2: there are 1 here" in message and "num_gpus=0" in message
    many = "hydra.launcher.ray.remote.num_cpus=100000"
    assert "num_cpus=100000" in refusal(sweep("hydra/launcher=ray", many))
    check(sweep("hydra/launcher=ray", two, "hydra.launcher.ray.init.address=auto"))


def test_several_devices_per_job_are_refused_where_they_cannot_start(plugins_there):
    for launcher in ("joblib", "submitit_local", "ray"):
        words = [*CHEAP[launcher], "trainer=ddp"]
        assert "trainer.devices=2" in refusal(sweep(*words))
    assert "tasks_per_node=2" in refusal(sweep("hydra/launcher=submitit_slurm", "trainer=ddp"))
    check(sweep("hydra/launcher=submitit_slurm", "trainer=ddp", "hydra.launcher.tasks_per_node=2"))
    check(sweep("trainer=ddp"))


def test_a_launcher_or_a_search_without_m_is_refused(monkeypatch):
    for word in ("hydra/launcher=joblib", "hparams_search=optuna"):
        assert "-m" in refusal(sweep(word), "on_run_start")
    sweeps.Sweeps().on_run_start(sweep())
    monkeypatch.setenv("LOCAL_RANK", "1")  # DDP repeats the words of a job of a search
    sweeps.Sweeps().on_run_start(sweep("hparams_search=optuna"))


def test_a_sweep_of_experiments_lists_each_job_where_its_run_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "_BEGUN", [])
    words = ["name=a,b", "seed=1,2", f"outputs={tmp_path}"]
    cfg = sweep(words[-1])
    with open_dict(cfg):
        cfg.hydra.overrides.task = words
    with initialize_config_dir(str(CONF), version_base="1.3"):
        sweeps.Sweeps().on_multirun_start(cfg)
    assert [(place.name, len(own), before) for place, own, before in sweeps._BEGUN] == [
        ("a", 2, {}), ("b", 2, {})
    ]  # fmt: skip
    for name in "ab":
        listed = [json.loads(file.read_text()) for file in (tmp_path / name / ".jobs").iterdir()]
        assert sorted(job["overrides"] for job in listed) == [
            [f"name={name}", f"seed={seed}", words[-1]] for seed in (1, 2)
        ]
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_a_repeated_sweep_lists_all_its_jobs_once(tmp_path, monkeypatch, capsys):
    """Also those that it does not come to, and whatever it adds that leads to the same runs."""
    monkeypatch.setattr(sweeps, "_BEGUN", [])
    for more in ([], ["evaluation.batch_size=8", "logger=csv"]):
        words = ["seed=1,2,3", "name=a", f"outputs={tmp_path}", *more]
        cfg = sweep(words[2])
        with open_dict(cfg):
            cfg.hydra.overrides.task = words
        with initialize_config_dir(str(CONF), version_base="1.3"):
            sweeps.Sweeps().on_multirun_start(cfg)
        first = [word.replace("seed=1,2,3", "seed=1") for word in words]
        sweeps._note(tmp_path / "a", first, error="killed")  # in its first job
        sweeps.compare_jobs()
        shown = capsys.readouterr().out
        assert all(f"seed={seed}" in shown for seed in (1, 2, 3)) and "name=a" not in shown
        assert len([*(tmp_path / "a" / ".jobs").iterdir()]) == 3


@pytest.mark.parametrize("launcher", CHEAP)
def test_jobs_leak_nothing_and_a_failed_one_stops_no_other(launcher, tmp_path):
    needs(launcher)
    done = typed("-m", *CHEAP[launcher], "model=unet", "seed=1,13,3,4", f"outputs={tmp_path}")
    assert done.returncode == 1, done.stderr
    assert "seed 13 is refused" in done.stderr and "Traceback" not in done.stderr
    found = notes(tmp_path)
    assert [note["seed"] for note in found] == [1, 3, 4]
    assert [note["left"] for note in found] == [None] * 3
    assert not any("left" in note["words"] for note in found)
    assert len({note["handlers"] for note in found}) == 1
    assert len({note["filters"] for note in found}) == 1
    if launcher == "ray":  # one process per job
        assert len({note["pid"] for note in found}) == 3


@pytest.mark.parametrize("given", [None, "3"])
@pytest.mark.parametrize("engine", ["joblib", "submitit_local", "ray"])
def test_jobs_share_the_cores_unless_told_otherwise(engine, given, tmp_path):
    needs(engine)
    words = [*CHEAP[engine], "seed=1,2"]
    env = environment(OMP_NUM_THREADS=given) if given else environment()
    done = typed("-m", *words, f"outputs={tmp_path}", env=env)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    share = str(max(1, (os.cpu_count() or 1) // 2)) if engine == "joblib" else "1"
    assert {note["threads"] for note in notes(tmp_path)} == {given or share}


def test_what_sbatch_was_asked_for_and_lightning_cannot_do_is_said(monkeypatch):
    for name, value in (("JOB_ID", "5"), ("NTASKS", "2"), ("JOB_NAME", "x")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(UserError, match=r"^SLURM: .*--ntasks"):
        sweeps.cluster_plugins()


@pytest.fixture
def slurm(tmp_path):
    """A SLURM of this machine in PATH; ends what is left of its jobs."""
    needs("submitit_slurm")
    state, programs = tmp_path / "submitit_slurm", tmp_path / "bin"
    state.mkdir()
    programs.mkdir()
    for name in ("sbatch", "srun", "scontrol", "sacct", "scancel"):
        text = (ROOT / "tests" / "helpers" / "fake_slurm.py").read_text().split("\n", 1)[1]
        (programs / name).write_text(f"#!{sys.executable}\n{text}")
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    yield state, environment(PATH=path, FAKE_SLURM=str(state))
    for pid in state.glob("*.pid"):
        try:
            os.kill(int(pid.read_text()), signal.SIGKILL)
        except (ProcessLookupError, ValueError):
            continue


def interrupt(state, job, ready, seconds=200):
    """Signals a job as SLURM does ahead of its time limit, as soon as `ready` gives something."""
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until, (state / f"{job}.out").read_text()
        time.sleep(0.2)
    os.kill(int((state / f"{job}.pid").read_text()), signal.SIGUSR2)


def test_slurm_queues_a_job_again_that_runs_into_its_limit(slurm, tmp_path):
    state, env = slurm
    words = ["-m", "hydra/launcher=submitit_slurm", "seed=7,8", f"outputs={tmp_path}"]
    sweep = subprocess.Popen(
        [sys.executable, str(LIGHT), *words, "hydra.launcher.qos=low"],
        env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        interrupt(state, "100_0", (tmp_path / "interrupted").exists)
        said, _ = sweep.communicate(timeout=200)
    finally:
        sweep.kill()
    assert sweep.returncode == 0, said
    assert [note["seed"] for note in notes(tmp_path)] == [7, 8]
    assert {note["threads"] for note in notes(tmp_path)} == {"8"}
    commands = (state / "commands").read_text()
    assert commands.count("sbatch") == 1 and "scontrol requeue 100_0" in commands
    script = (state / "100.sh").read_text()
    for line in ("--requeue", "--signal=USR2@120", "--time=480", "--gpus-per-node=1",
                 "--cpus-per-task=8", "--qos=low"):  # fmt: skip
        assert f"#SBATCH {line}\n" in script
    assert "--partition" not in script


@pytest.mark.slow
def test_a_training_that_slurm_interrupts_ends_well_in_its_folder(slurm, small_run, tmp_path):
    """Neither Lightning nor submitit is in the other's way: one of them queues the job again."""
    state, env = slurm
    words = [
        "-m",
        "hydra/launcher=submitit_slurm",
        "model=unet",
        *small_run,
        "data.steps=60",
        "test=false",
    ]
    sweep = subprocess.Popen(
        [sys.executable, str(TRAIN), *words, "logger=csv", "trainer=cpu"],
        env={**env, "OMP_NUM_THREADS": "1"}, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    runs = tmp_path / "outputs" / "default"
    try:
        interrupt(state, "100", lambda: list(runs.glob("unet-*/checkpoints/last.ckpt")))
        said, _ = sweep.communicate(timeout=280)
    finally:
        sweep.kill()
    assert sweep.returncode == 0, said
    (run,) = runs.glob("unet-*")
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "done" and len(record["resumed"]) == 1
    assert (state / "commands").read_text().count("scontrol requeue 100") == 1
    assert not list(run.glob("hpc_ckpt*"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
def test_jobs_side_by_side_score_like_jobs_one_by_one(launcher, small_run, tmp_path):
    """Also with loader processes, and with W&B: one run per job."""
    needs(launcher)
    words = ["model=unet", "model.widths=[4,4,8,8,8]", "seed=1,2,3", *small_run, "trainer=cpu",
             "data.num_workers=2", "test=false"]  # fmt: skip
    env = environment(OMP_NUM_THREADS="1")
    scores = {}
    for name, how in (("one_by_one", CHEAP["basic"]), ("together", CHEAP[launcher])):
        done = typed("-m", *how, *words, f"name={name}", script=TRAIN, env=env)
        assert done.returncode == 0, done.stderr
        runs = sorted((tmp_path / "outputs" / name).glob("unet-*"))
        records = [json.loads((run / "run.json").read_text()) for run in runs]
        scores[name] = {
            run.name: record["val_dice"] for run, record in zip(runs, records, strict=True)
        }
        wandb = {next(run.glob("wandb/offline-run-*")).name.rsplit("-", 1)[-1] for run in runs}
        assert len(wandb) == 3
    assert len(scores["together"]) == 3 and scores["together"] == scores["one_by_one"]
