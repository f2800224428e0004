"""A finished run, trained for its first steps again and scored again, against what it says."""

import json
import shutil

import pytest

from mambaseg import train
from mambaseg.app.commands.replay import main
from mambaseg.app.replay import replay
from mambaseg.errors import UserError
from mambaseg.reporting.pack import FILES
from mambaseg.training.run import Run
from runs import UNET


@pytest.fixture(scope="module")
def finished(shared_run):
    """The folder of a run of four steps, which logs its loss at the second and the fourth."""
    words = [*shared_run, *UNET, "trainer=cpu", "trainer.log_every_n_steps=2", "logger=default"]
    return train(*words, "callbacks.progress=null", "logger.wandb=null").path


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it to be changed."""
    return shutil.copytree(finished, tmp_path / "hearts" / finished.name)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_code_gives_the_same_numbers_and_leaves_the_run_alone(run):
    before = contents(run)
    found = replay(run, steps=4)
    assert (found.steps.difference, found.scores.difference, found.since) == (0.0, 0.0, "")
    lines = (run / "cases.csv").read_text().splitlines()
    assert found.scores.values == (len(lines) - 1) * (len(lines[0].split(",")) - 3)
    assert found.steps.values > 8 and contents(run) == before


def test_a_test_set_that_a_run_left_unseen_stays_so(run, monkeypatch, capsys):
    (run / "cases.csv").unlink()
    with pytest.raises(UserError, match=r"cases\.csv cannot be read \(No such file"):
        replay(run, steps=4)
    (run / "metrics.json").unlink()
    monkeypatch.setattr(Run, "evaluate", None)
    main(["--steps", "4", str(run)])
    assert "not tested" in capsys.readouterr().out


def test_a_run_of_a_given_time_is_replayed_by_its_steps(run):
    record = json.loads((run / "run.json").read_text())
    kept = [
        one for one in record["overrides"] if not one.startswith(("data.val_every", "data.steps"))
    ]
    configs = run.parent / "conf"
    (configs / "experiment").mkdir(parents=True)
    (configs / "experiment" / "timed.yaml").write_text(
        "# @package _global_\ndata: {minutes: 1e-6}\n"  # too short to be planned again
    )
    for word, place in (("data.minutes=1e-6", None), ("experiment=timed", configs)):
        (run / "run.json").write_text(json.dumps({**record, "overrides": [*kept, word]}))
        assert replay(run, steps=4, config_dir=place).steps.difference == 0.0


def test_a_number_that_is_not_there_any_more_is_a_difference(run):
    path = run / "metrics.csv"
    lines = path.read_text().splitlines()
    place = lines[0].split(",").index("val/dice")
    cells = [line.split(",") for line in lines]
    row = next(row for row in cells[1:] if row[place])
    row[place] = "nan"
    path.write_text("\n".join(map(",".join, cells)) + "\n")
    assert replay(run, steps=4).steps.difference == float("inf")


def test_of_packed_runs_the_steps_are_replayed_and_one_that_differs_is_named(
    finished, tmp_path, capsys
):
    kept = tmp_path / "kept" / finished.name
    kept.mkdir(parents=True)
    for name in FILES:
        shutil.copy(finished / name, kept)
    table = kept / "metrics.csv"
    lines = table.read_text().splitlines()
    place = lines[0].split(",").index("train/loss")
    row = next(n for n, line in enumerate(lines) if n and line.split(",")[place])
    cells = lines[row].split(",")
    loss = float(cells[place])
    cells[place] = repr(loss + 1e-4)
    lines[row] = ",".join(cells)
    table.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="1 of 1 runs differ"):
        main(["--steps", "2", str(kept.parent)])
    printed = capsys.readouterr().out
    assert f"{1e-4 / (loss + 1e-4):.1e}" in printed and "no best.ckpt" in printed
    assert finished.name[:12] in printed and max(map(len, printed.splitlines())) <= 80
    main(["--steps", "2", "--tolerance", "1e-3", str(kept)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"overrides": None}, "not the folder of a finished training"),
        ({"status": "failed"}, "not the folder of a finished training"),
        ({"overrides": ["+callbacks.x={_target_: os.system}"]}, "asks for an object"),
        ({"overrides": ["data=phantom", "seed=${oc.env:HOME}"]}, "asks for an object"),
        ({"data": {"fingerprint": "0"}}, "another run now: the fingerprint"),
    ],
)
def test_what_cannot_be_replayed_is_said(run, change, said):
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, **change}))
    with pytest.raises(UserError, match=said):
        replay(run, steps=2)


def test_a_run_that_cannot_be_replayed_does_not_stop_the_others(run, capsys):
    (run / "run.json").write_text('{"status": "done"}')
    with pytest.raises(UserError, match="1 of 1 runs differ or cannot be replayed"):
        main([str(run.parent)])
    assert "failed" in (printed := capsys.readouterr().out) and "overrides" in printed
    with pytest.raises(UserError, match="--tolerance nan: a number, 0 or more"):
        main([str(run.parent), "--tolerance", "nan"])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("cases.csv", "case,class,dice\na,1\n", "cases.csv cannot be read .line 2 has 2 cells"),
        ("cases.csv", "patient,dice\na,1\n", "cases.csv cannot be read .it has no 'case'"),
        ("cases.csv", "case,dice\n", "cases.csv cannot be read .it holds no scores"),
        ("metrics.csv", "train/loss\n1\n", "metrics.csv cannot be read .it has no 'step'"),
        ("metrics.csv", "step,train/loss\nx,1\n", "metrics.csv cannot be read"),
        ("config.yaml", None, "not the folder of a finished training"),
    ],
)
def test_a_damaged_file_is_named(run, name, text, said):
    if text is None:
        text = (run / name).read_text().replace("  val_every: 2\n", "")
    (run / name).write_text(text)
    with pytest.raises(UserError, match=said):
        replay(run, steps=2)


def test_words_that_lead_to_another_run_are_refused(run):
    with pytest.raises(UserError, match=r"another run now: optim\.optimizer\.lr was"):
        replay(run, ["optim.optimizer.lr=0.5"], steps=2)
    with pytest.raises(UserError, match=r"no loss of its first steps, .*more than --steps 1$"):
        replay(run, steps=1)
    with pytest.raises(UserError, match="no finished run"):
        main(["data.root=elsewhere"])
    (empty := run.parents[1] / "a=b").mkdir()  # a folder, and no override
    with pytest.raises(UserError, match="a=b holds no run folders"):
        main([str(empty)])


def test_a_replay_of_no_steps_is_refused(tmp_path):
    with pytest.raises(UserError, match="--steps 0: a number of steps, 1 or more"):
        main([str(tmp_path), "--steps", "0"])


def test_options_and_overrides_may_come_in_any_order(tmp_path):
    with pytest.raises(UserError, match="holds no run folders"):
        main([str(tmp_path), "--steps", "2", "data.root=elsewhere"])
