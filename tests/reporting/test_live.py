"""Reports while runs go on, and on a full disk."""

import csv
import json
import multiprocessing

import pytest
from fake_runs import write_run

from mambaseg.errors import UserError
from mambaseg.reporting.collect import collect
from mambaseg.reporting.report import write_report
from mambaseg.reporting.status import states
from mambaseg.storage.run_folder import RunFolder
from mambaseg.training.loggers import MetricsCsv
from small_disk import content, fill, small_disk

processes = multiprocessing.get_context("fork")


def train(path, begun):
    """What a training does to its folder, without pause and without end."""
    folder = RunFolder(path)
    folder.start(key="live")
    metrics = MetricsCsv(path)
    rows = [{"case": f"case{i}", "dice": i / 100} for i in range(100)]
    step = 0
    while True:
        metrics.log_metrics({"train/loss": 0.5, f"column{step % 50}": 1.0}, step)
        folder.beat(steps=step)
        folder.write_rows("cases.csv", rows)
        folder.write_json("metrics.json", {"rows": rows, "step": step})
        begun.set()
        step += 1


@pytest.fixture
def live(tmp_path):
    """An experiment with a finished run and one that a process is writing."""
    experiment = tmp_path / "outputs" / "hearts"
    write_run(experiment, "unet", patients=(1, 2), size=16)
    begun = processes.Event()
    process = processes.Process(target=train, args=(experiment / "unet-live", begun))
    process.start()
    assert begun.wait(20)
    yield experiment, process
    process.kill()
    process.join()


def test_a_reader_sees_whole_files_while_a_run_writes_them(live):
    experiment, process = live
    path, steps = experiment / "unet-live", set()
    while len(steps) < 100:
        record = json.loads((path / "run.json").read_text())
        steps.add(record.get("steps"))
        assert record["status"] == "running" and record["key"] == "live"
        with (path / "cases.csv").open(newline="") as stream:
            assert len(list(csv.DictReader(stream))) == 100
        assert len(json.loads((path / "metrics.json").read_text())["rows"]) == 100
        assert process.is_alive()


def test_a_report_amid_a_training_says_what_still_runs(live, no_figures):
    experiment, process = live
    page = write_report(experiment).read_text()
    comparisons, _, problems = collect(experiment)
    assert [run.path.name for c in comparisons for e in c.entries for run in e.runs] == [
        "unet-sgd-seed1"
    ]
    assert not problems
    assert process.is_alive()
    assert "Not all runs are finished (1 done, 1 running)" in page
    assert "unet-live" in page and '<tr class="state-running">' in page
    assert [(run.name, run.state) for run in states(experiment)] == [
        ("unet-sgd-seed1", "done"),
        ("unet-live", "running"),
    ]


def test_two_reports_at_once_leave_a_whole_one(tmp_path):
    write_run(tmp_path, "unet", patients=(1, 2), size=16)
    writers = [processes.Process(target=write_report, args=(tmp_path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    report = tmp_path / "report"
    assert (report / "index.html").read_text().rstrip().endswith("</html>")
    assert not list(report.glob(".*"))


def test_a_full_disk_leaves_the_earlier_report(tmp_path):
    with small_disk(tmp_path / "disk", kibibytes=3072) as disk:
        write_run(disk / "fakes", "unet", patients=(1, 2), size=16)
        report = disk / "fakes" / "report"
        report.mkdir()
        for name, text in {"index.html": "<html>earlier", "table.md": "earlier"}.items():
            (report / name).write_text(text)
        before = content(disk)
        fill(disk, leave=80 * 1024)
        with pytest.raises(UserError, match=r"cannot write .*report.*No space left.*Free"):
            write_report(disk / "fakes")
        assert content(disk) == before
