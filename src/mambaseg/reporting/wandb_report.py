"""The comparison of an experiment on Weights & Biases: its offline runs, and a workspace of panels.

The workspace is described as plain data, which is what is written where there is no key; the
objects of wandb-workspaces are made from that description alone.
"""

from __future__ import annotations

import logging
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mambaseg.errors import UserError
from mambaseg.reporting.reading import run_folders
from mambaseg.storage.run_folder import RunFolder
from mambaseg.storage.untrusted import read_table, read_yaml

AXIS = "trainer/global_step"  # of every curve, see `mambaseg.training.wandb_logger.StepRows`
OVERLAYS = ("test/worst", "test/median", "test/best")
log = logging.getLogger(__name__)


def publish(folder: Path) -> None:
    """Sends an experiment to W&B: `wandb sync` of its offline runs, then the workspace.

    Without a key nothing is sent: `<folder>/report/wandb-workspace.json` describes what would be,
    and the log says how to send it.

    Raises:
        UserError: there is no run with W&B's logger, wandb-workspaces is missing, a sync failed.
    """
    runs = find_runs(folder)
    if not runs:
        raise UserError(
            f"{folder}: no run in it was logged to W&B (logger=default or logger=wandb): "
            "give the folder of an experiment, <outputs>/<name>"
        )
    found = [path for run in runs for path in sorted(run.path.glob("wandb/offline-run-*"))]
    offline = [path for path in found if not list(path.glob("*.synced"))]
    sync = ["sync", *map(str, offline)]
    description = describe(folder, runs)
    if not has_key():
        written = RunFolder(folder / "report").write_json(
            "wandb-workspace.json",
            {"sync": [path.relative_to(folder).as_posix() for path in offline], **description},
        )
        log.info("no W&B key: nothing was sent, the workspace is described in %s", written)
        if offline:
            log.info("the runs: wandb login && %s", shlex.join(["wandb", *sync]))
        log.info("both: wandb login && mambaseg report wandb %s", shlex.quote(str(folder)))
        return
    workspace = make_workspace(description)  # before the sync, which may take long
    if offline:
        done = subprocess.run([sys.executable, "-m", "wandb", *sync], check=False)
        if done.returncode:
            raise UserError(f"{folder}: wandb sync ended with status {done.returncode}, see above")
    workspace.save()
    log.info("workspace: %s", workspace.url)


def find_runs(folder: Path) -> list[RunFolder]:
    """The run folders of an experiment that have a W&B run; earlier ones of a rerun have not."""
    return [RunFolder(path) for path in run_folders(folder) if (path / "wandb").is_dir()]


def describe(folder: Path, runs: Iterable[RunFolder]) -> dict[str, Any]:
    """The workspace as plain data: which runs, and which panels in which sections.

    Curves are what the metrics.csv of the runs (at least one) have, so a data set with other
    classes gets its own.
    """
    runs = list(runs)
    names = list(dict.fromkeys(name for run in runs for name in _columns(run)))
    settings = next((s for s in map(_settings, runs) if s), {})

    def lines(start: str) -> list[dict[str, Any]]:
        return [{"kind": "line", "metrics": [n]} for n in names if n.startswith(start)]

    test = [name for name in names if name.startswith("test/")]
    structures = [name for name in test if name.startswith("test/dice_")]
    bars = [{"kind": "bar", "metrics": [name]} for name in test if name not in structures]
    if structures:
        bars.append({"kind": "bar", "metrics": structures, "title": "test/dice of the structures"})
    return {
        "name": f"comparison {settings.get('group') or folder.name}",
        "project": settings.get("project", "mambaseg"),
        "group": settings.get("group") or folder.name,
        "columns": [
            "config:model.name", "config:optim.optimizer.lr", "config:seed", "summary:test/dice"
        ],
        "axis": AXIS,
        "sections": [
            {"name": "test set", "panels": bars},
            {"name": "validation", "panels": lines("val/")},
            {"name": "training", "panels": lines("train/") + lines("lr-")},
            {"name": "overlays", "panels": [{"kind": "media", "metrics": list(OVERLAYS)}]},
        ],
    }  # fmt: skip


def make_workspace(description: dict[str, Any], *, entity: str | None = None) -> Any:
    """What `describe` gives as a `wandb_workspaces` workspace, not saved.

    `entity` is a W&B user or team; None asks W&B's server for the key's default.

    Raises:
        UserError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise UserError(
            "wandb-workspaces is not installed: pip install 'mambaseg[wandb]'"
        ) from error

    def panel(about: dict[str, Any]) -> Any:
        metrics = about["metrics"]
        title = about.get("title", ", ".join(metrics))
        if about["kind"] == "line":
            return panels.LinePlot(title=title, x=description["axis"], y=metrics)
        if about["kind"] == "bar":
            return panels.BarPlot(title=title, metrics=metrics)
        return panels.MediaBrowser(title=title, media_keys=metrics)

    if entity is None:
        import wandb

        entity = wandb.Api().default_entity
    sections = [
        workspaces.Section(name=s["name"], panels=[panel(p) for p in s["panels"]], is_open=True)
        for s in description["sections"]
        if s["panels"]
    ]
    group = workspaces.Metric("Group")
    return workspaces.Workspace(
        entity=entity,
        project=description["project"],
        name=description["name"],
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis=description["axis"], max_runs=50),
        runset_settings=workspaces.RunsetSettings(
            filters=workspaces.And(group == description["group"]),
            pinned_columns=description["columns"],
        ),
    )


def has_key() -> bool:
    """Whether W&B finds a key (in its own places); asks nobody."""
    import wandb

    return bool(wandb.login(prompt=False))


def _columns(run: RunFolder) -> list[str]:
    try:
        return read_table(run.path / "metrics.csv", growing=True)[0]
    except (OSError, ValueError):
        return []


def _settings(run: RunFolder) -> dict[str, Any]:
    """How the run's W&B logger was configured: project, group, ..."""
    try:
        settings = read_yaml(run.path / "config.yaml")["logger"]["wandb"]
        named = {key: settings[key] for key in ("project", "group") if settings.get(key)}
        return {key: name for key, name in named.items() if re.fullmatch(r"[\w .+-]{1,128}", name)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
