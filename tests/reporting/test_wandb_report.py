import json
import logging
from types import SimpleNamespace

import pytest
import yaml

from mambaseg.errors import UserError
from mambaseg.reporting import wandb_report
from mambaseg.storage.run_folder import RunFolder

HEADER = "step,lr-SGD,train/loss,val/dice,val/dice_A,test/dice,test/hd95_mm,test/dice_A,test/dice_B"


@pytest.fixture
def experiment(tmp_path):
    """Two runs with W&B's logger, the first one sent; one without it; one from before a rerun."""
    folder = tmp_path / "my sweep"
    for name in ("a", "b", "c", "a.previous"):
        run = RunFolder(folder / name)
        run.start(key=name)
        run.write_text("metrics.csv", HEADER + "\n")
        config = {"logger": {"wandb": {"project": "hearts", "group": "my sweep"}}}
        run.write_text("config.yaml", yaml.safe_dump(config))
        if name != "c":
            offline = run.path / "wandb" / f"offline-run-1-{name}"
            offline.mkdir(parents=True)
            (offline / f"run-{name}.wandb").touch()
    (folder / "a" / "wandb" / "offline-run-1-a" / "run-a.wandb.synced").touch()
    superseded = folder / "b" / "wandb" / "superseded" / "offline-run-0-b"
    superseded.mkdir(parents=True)
    (superseded / "run-b.wandb").touch()
    return folder


def metrics(description, section):
    (found,) = [s for s in description["sections"] if s["name"] == section]
    return [panel["metrics"] for panel in found["panels"]]


def test_without_a_key_the_workspace_is_written_and_the_way_to_send_it_said(
    experiment, monkeypatch, caplog
):
    monkeypatch.setattr(wandb_report, "has_key", lambda: False)
    caplog.set_level(logging.INFO)
    wandb_report.publish(experiment)
    text = (experiment / "report" / "wandb-workspace.json").read_text()
    said = json.loads(text)
    assert said["sync"] == ["b/wandb/offline-run-1-b"]  # sent, superseded and previous ones are not
    assert (said["project"], said["group"]) == ("hearts", "my sweep")
    assert metrics(said, "validation") == [["val/dice"], ["val/dice_A"]]
    assert metrics(said, "training") == [["train/loss"], ["lr-SGD"]]
    assert metrics(said, "test set") == [
        ["test/dice"], ["test/hd95_mm"], ["test/dice_A", "test/dice_B"]
    ]  # fmt: skip
    assert str(experiment) not in text  # the file may be passed on
    assert "wandb sync" in caplog.text and "report wandb" in caplog.text


def test_with_a_key_the_runs_go_first_and_the_workspace_after_them(experiment, monkeypatch):
    done = []

    def run(command, check):
        done.append(command[2:])
        return SimpleNamespace(returncode=0)

    workspace = SimpleNamespace(save=lambda: done.append("saved"), url="u")
    monkeypatch.setattr(wandb_report, "has_key", lambda: True)
    monkeypatch.setattr(wandb_report, "make_workspace", lambda description: workspace)
    monkeypatch.setattr(wandb_report.subprocess, "run", run)
    wandb_report.publish(experiment)
    assert done == [
        ["wandb", "sync", str(experiment / "b" / "wandb" / "offline-run-1-b")], "saved"
    ]  # fmt: skip


def test_a_failed_sync_saves_no_workspace(experiment, monkeypatch):
    workspace = SimpleNamespace(save=lambda: pytest.fail("saved"))
    monkeypatch.setattr(wandb_report, "has_key", lambda: True)
    monkeypatch.setattr(wandb_report, "make_workspace", lambda description: workspace)
    monkeypatch.setattr(
        wandb_report.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=3)
    )
    with pytest.raises(UserError, match="status 3"):
        wandb_report.publish(experiment)


def test_a_folder_without_wandb_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run folders"):
        wandb_report.publish(tmp_path)
    RunFolder(tmp_path / "a").start(key="a")
    with pytest.raises(UserError, match="no run in it was logged to W&B"):
        wandb_report.publish(tmp_path)


def test_the_key_is_looked_up_without_asking(monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not wandb_report.has_key()


def test_the_description_becomes_a_workspace(experiment):
    pytest.importorskip("wandb_workspaces", reason="needs the extra wandb")
    description = wandb_report.describe(experiment, wandb_report.find_runs(experiment))
    workspace = wandb_report.make_workspace(description, entity="me")
    assert [section.name for section in workspace.sections] == [
        "test set", "validation", "training", "overlays"
    ]  # fmt: skip
    first = workspace.sections[1].panels[0]
    assert first.x == "trainer/global_step" and first.y == ["val/dice"]
    assert "my sweep" in json.dumps(
        workspace._to_model().model_dump(by_alias=True), default=str
    )  # the filter on the group
