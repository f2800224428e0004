"""Trainings of a given time: steps that are measured once, and stay."""

import errno
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from mambaseg.app import budget
from mambaseg.app.build import build
from mambaseg.app.devices import device_count
from mambaseg.errors import UserError
from runs import QUIET, UNET, built, composed, entered, trained
from tiny_nnunet import write_nnunet


@pytest.fixture
def words(small_run):
    kept = [one for one in small_run if not one.startswith(("data.steps", "data.val_every"))]
    return [*kept, *UNET, *QUIET, "trainer=cpu", "test=false"]


def told(monkeypatch, *, step=0.01, validation=0.5):
    asked = []
    monkeypatch.setattr(budget, "_measured", lambda *_: asked.append(1) or (step, validation))
    return asked


def test_steps_and_validations_fill_the_time_and_stay(words, monkeypatch):
    asked = told(monkeypatch)
    run = built(*words, "data.minutes=1")
    steps, every = (run.config["data"][key] for key in ("steps", "val_every"))
    count = steps / every
    assert count == 11  # 10 % of 57.6 s
    assert 0.9 * 57.6 < steps * 0.01 + count * 0.5 <= 57.6
    assert run.config["data"]["minutes"] is None
    assert run.config["optim"]["scheduler"]["total_iters"] == steps

    told(monkeypatch, step=0.02)
    same = [built(*words, "data.minutes=1", one) for one in ("seed=1337", "rerun=true", "seed=2")]
    assert [one.config["data"]["steps"] for one in same] == [steps] * 3
    assert same[0].key == same[1].key == run.key != same[2].key
    other = built(*words, "data.minutes=1", "data.batch_size=2")
    assert other.config["data"]["steps"] < 0.6 * steps
    assert len(asked) == 1


def test_what_costs_no_time_shares_a_plan(words, monkeypatch):
    """Trials of a search for the learning rate train as many steps."""

    def key(*more):
        return budget._key(composed(*words, "data.minutes=1", *more))

    same = ["optim.optimizer.lr=0.02", "optim.optimizer.weight_decay=0.1", "loss.ce_weight=0.3",
            "optim=sgd", "seed=2"]  # fmt: skip
    assert {key(word) for word in same} == {key()}
    for word in ("optim=adamw", "data.batch_size=2", "loss=top_k", "model.widths=[4,4]"):
        assert key(word) != key()


def test_a_plan_of_an_earlier_version_stays(words, monkeypatch, tmp_path):
    """Its name held the learning rate; the runs that began with it are found with its steps."""
    told(monkeypatch)
    place = tmp_path / "outputs" / "default" / ".budgets"
    cfg = composed(*words, "data.minutes=1")
    steps = built(*words, "data.minutes=1").config["data"]["steps"]
    (path,) = place.glob("*.json")
    old = place / f"{budget._key(cfg, tuned=True)}.json"
    assert old != path
    old.write_text(path.read_text().replace(f'"steps": {steps}', '"steps": 77'))
    assert built(*words, "data.minutes=1").config["data"]["steps"] == 77
    other = built(*words, "data.minutes=1", "optim.optimizer.lr=0.5")
    assert other.config["data"]["steps"] == steps


def test_a_plan_of_other_files_is_measured_again(tmp_path, monkeypatch, caplog):
    root = write_nnunet(tmp_path / "Dataset001_Tiny")
    (root / "again").symlink_to(root)  # in circles
    (root / "gone").symlink_to(root / "nowhere")
    words = [*UNET, *QUIET, "data=nnunet", f"data.root={root}", "data.minutes=1", "trainer=cpu"]
    cfg = composed(*words, f"outputs={root / 'outputs'}", f"data.cache_dir={root / 'cache'}")

    def steps():
        return budget.within_minutes(cfg, build).data.steps

    caplog.set_level("INFO")
    asked = told(monkeypatch)
    first = steps()
    (root / "cache").mkdir()
    for place in (root / "cache" / "new", root / ".hidden"):
        place.write_text("not of the data set")
    assert steps() == first and len(asked) == 1 and "measuring again" not in caplog.text
    asked = told(monkeypatch, step=0.02)
    (root / "imagesTr" / "case_000_0000.nii.gz").write_bytes(b"other")
    assert steps() < first and f"the files in {root} are not those of" in caplog.text
    assert steps() < first and len(asked) == 1

    (path,) = (root / "outputs").glob("*/.budgets/*.json")
    kept = json.loads(path.read_text())
    del kept["files"]  # as earlier versions wrote it
    path.write_text(json.dumps(kept))
    (root / "imagesTr" / "case_000_0000.nii.gz").unlink()
    assert steps() == kept["steps"] and len(asked) == 1


def test_folds_share_a_plan_and_data_sets_do_not():
    def key(root, *more):
        return budget._key(composed("data=nifti", f"data.root={root}", "data.minutes=1", *more))

    assert key("/here/heart", "data.fold=3", "seed=4") == key("/there/heart")
    assert key("/here/heart") != key("/here/lung")


def test_folds_of_nnunets_layout_share_a_plan(tmp_path):
    root = write_nnunet(tmp_path / "Dataset001_Tiny")
    words = ["data=nnunet", f"data.root={root}", "data.minutes=1"]
    keys = {budget._key(composed(*words, f"data.fold={fold}")) for fold in (0, 3)}
    assert len(keys) == 1


def test_a_debug_run_ignores_the_time_of_its_experiment(phantom_root, tmp_path, monkeypatch):
    asked = told(monkeypatch)
    words = ["data=phantom", f"data.root={phantom_root}", "data.prepare.patients=8", *QUIET,
             f"outputs={tmp_path / 'out'}", f"data.cache_dir={tmp_path / 'cache'}"]  # fmt: skip
    run = built("experiment=laptop", "debug=fast", "trainer=cpu", *words)
    assert run.config["data"]["steps"] == 4 and not asked


@pytest.mark.parametrize(
    ("devices", "count"), [("1", 1), ("[1]", 1), ("[0,1]", 2), ("3", 3), ("auto", 1)]
)
def test_one_device_may_be_any(devices, count):
    cfg = composed("data=phantom", "trainer.accelerator=cpu", f"trainer.devices={devices}")
    assert device_count(cfg.trainer) == count


def test_of_jobs_side_by_side_one_measures(words, monkeypatch):
    begun = []

    def slowly(*_):
        begun.append(1)
        time.sleep(0.3)
        return 0.01 * len(begun), 0.5

    monkeypatch.setattr(budget, "_measured", slowly)
    cfg = composed(*words, "data.minutes=1")
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: budget.within_minutes(cfg, build), range(3)))
    assert len({one.data.steps for one in found}) == len(begun) == 1


def test_slow_steps_of_the_trial_count_in_the_plan(words):
    recorder = SimpleNamespace(steps=[9.0] * 8 + [1.0] * 12 + [3.0] * 4, validating=2.0)
    trial = SimpleNamespace(recorder=recorder, fit=lambda: None)
    measured = budget._measured(composed(*words, "data.minutes=1"), lambda _: nullcontext(trial))
    assert measured == (1.5, 2.0)


def test_what_is_measured_leaves_nothing_and_the_run_is_as_long(words, tmp_path, monkeypatch):
    more = ("data.minutes=0.1", "trainer.accumulate_grad_batches=2")
    step, validation = budget._measured(composed(*words, *more), build)
    assert step > 0 and validation > 0 and not (tmp_path / "outputs").exists()
    told(monkeypatch, step=0.5)
    run = trained(*words, *more)
    (plan,) = (json.loads(p.read_text()) for p in (tmp_path / "outputs").glob("*/.budgets/*.json"))
    assert run.trainer.global_step == plan["steps"] == run.config["data"]["steps"] == 8
    assert built(*words, *more).finished


def test_a_damaged_plan_is_named_with_its_remedy(words, monkeypatch, tmp_path):
    told(monkeypatch)
    built(*words, "data.minutes=1")
    (path,) = (tmp_path / "outputs").glob("*/.budgets/*.json")
    for text in ("{", '{"steps": 0, "val_every": 3}', "[]"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"\.budgets/.*delete it"):
            built(*words, "data.minutes=1")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data.minutes=0.01"], r"2 validations of 0\.5 s and a step of 0\.01 s do not fit"),
        (["data.minutes=1", "trainer=ddp"], "is for one device"),
        (["data.minutes=1", "trainer.devices=2"], "is for one device"),
    ],
)
def test_what_cannot_be_planned_is_refused(words, monkeypatch, more, message):
    told(monkeypatch)
    with pytest.raises(UserError, match=message):
        built(*words, *more)


def test_outputs_that_cannot_be_written_are_named(words, monkeypatch, tmp_path):
    told(monkeypatch)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*/file/.*outputs="):
        built(*words, "data.minutes=1", f"outputs={tmp_path / 'file' / 'outputs'}")


def test_a_file_system_without_locks_is_said(words, monkeypatch, caplog):
    def acquire(self, *args, **options):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    told(monkeypatch)
    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    assert built(*words, "data.minutes=1").config["data"]["steps"] > 1
    assert "without locks" in caplog.text


def test_steps_beside_minutes_are_refused(words, capsys):
    assert entered("train.py", *words, "data.minutes=1", "data.steps=5") == 1
    assert "data.steps=5: data.minutes=1 plans the steps" in capsys.readouterr().err


def test_an_hour_on_a_laptop_is_one_command_for_any_data_set(phantom_root, tmp_path, monkeypatch):
    told(monkeypatch, step=14.0)
    monkeypatch.setattr("mambaseg.inference.segment.cpu_has_bf16", lambda: True)
    words = [
        "experiment=laptop", "data=phantom", f"data.root={phantom_root}", "trainer=cpu",
        "data.prepare.patients=8", f"outputs={tmp_path / 'out'}",
        f"data.cache_dir={tmp_path / 'cache'}", *QUIET,
    ]  # fmt: skip
    run = built(*words)
    data, model = run.config["data"], run.config["model"]
    assert (data["steps"], data["preprocessing"]) == (220, "spacing")
    assert run.config["trainer"]["precision"] == "bf16-mixed" and model["deep_supr_num"] == 3
    small = ["data.minutes=0.4", "model.filters=[2,2,2,2,2]", "data.batch_size=2", "data.size=64"]
    told(monkeypatch, step=10.0, validation=1.0)
    done = trained(*words, *small)
    assert done.folder.finished and done.trainer.global_step == 2
    assert "post_processing" in done.folder.record
