"""Small runs in this process: composed, built and trained as the entry scripts do it."""

import runpy
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from PIL import Image

from mambaseg.app.build import build
from mambaseg.app.entry import CONF
from mambaseg.reporting import figures
from mambaseg.training.segmentation import SegmentationTask

SOURCE = Path(__file__).parents[2] / "src"
UNET = ("model=unet", "model.widths=[4,8]", "model.dropout=[0,0]")
"""A network that trains in seconds."""
QUIET = ("logger=csv", "callbacks.progress=null")
"""What `built` and `trained` begin with; later overrides win."""


def small_overrides(phantom_root: Path, outputs: Path) -> list[str]:
    """Overrides for a training of seconds: the phantom of eight, a few steps at 32 pixels."""
    return [
        "data=phantom",
        f"data.root={phantom_root}",
        "data.prepare.patients=8",
        f"data.cache_dir={phantom_root.parent / 'cache'}",
        f"outputs={outputs}",
        "data.size=32",
        "data.batch_size=4",
        "data.steps=4",
        "data.val_every=2",
    ]


def own_overrides(place: Path) -> list[str]:
    """Overrides for a training of two steps on any data; outputs and cache go below `place`."""
    return [
        *UNET,
        f"outputs={place / 'outputs'}",
        f"data.cache_dir={place / 'cache'}",
        "data.size=32",
        "data.batch_size=4",
        "data.steps=2",
        "data.val_every=1",
        "trainer=cpu",
    ]


def composed(
    *words: str, script: str = "config", configs: Path | None = None, hydra: bool = False
) -> DictConfig:
    """The configuration of conf/<script>.yaml under these overrides.

    What a command that ran in this process has left with Hydra is forgotten: its choices would
    be taken for those of this configuration.

    Args:
        words: the overrides.
        script: `config` (of train.py), `evaluate`, `predict`, ...
        configs: a folder of further config files, as `--config-dir` adds one.
        hydra: whether Hydra's own part belongs to it.
    """
    HydraConfig.instance().cfg = None
    more = [f"hydra.searchpath=[file://{configs}]"] if configs else []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(script, overrides=[*more, *words], return_hydra_config=hydra)


def built(*words: str, script: str = "config", configs: Path | None = None) -> Any:
    """The `Run` of these overrides, with nothing done yet: `with built(...) as run: run.fit()`."""
    return build(composed(*QUIET, *words, script=script, configs=configs))


def trained(*words: str, script: str = "config", configs: Path | None = None) -> Any:
    """The `Run` of these overrides after its end: trained, scored on the test set, reported.

    With `script="evaluate"` only scored. Its pictures are blank: a third of the time is theirs.
    """
    with ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(figures, "save_png", _blank)
        run = stack.enter_context(built(*words, script=script, configs=configs))
        if not run.finished:
            if script == "config":
                run.fit()
            run.evaluate()
        run.report()
    return run


def _blank(figure: Any, path: Path, **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (1, 1)).save(path)
    return path


def entered(script: str, *words: str, cwd: Path | None = None) -> int:
    """Runs an entry script, such as train.py, in this process; its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, words)])
        patch.setenv("ACDC_ROOT", "")  # the default data are the phantom
        if cwd:
            patch.chdir(cwd)
        try:
            runpy.run_path(str(SOURCE / script), run_name="__main__")
        except SystemExit as stop:
            if isinstance(stop.code, str):  # what the interpreter does with it
                sys.stderr.write(f"{stop.code}\n")
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def stop_before(
    step: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] = ZeroDivisionError
) -> None:
    """Let the training die when a step begins, as often as it gets there."""
    whole = SegmentationTask.training_step

    def training_step(self: SegmentationTask, batch: Any, index: int) -> Any:
        if batch["step"] == step:
            raise error("on purpose")
        return whole(self, batch, index)

    monkeypatch.setattr(SegmentationTask, "training_step", training_step)


def state_of(run: Any) -> dict[str, Any]:
    """What a run ended with: its checkpoints, its score, and every row of its tables."""
    kept = ("state_dict", "current_model_state", "averaging_state", "optimizer_states",
            "lr_schedulers", "global_step", "mambaseg")  # fmt: skip
    found: dict[str, Any] = {"score": run.score}
    for name in ("last", "best"):
        path = run.folder.path / "checkpoints" / f"{name}.ckpt"
        content = torch.load(path, weights_only=True)
        found[name] = {key: content[key] for key in kept if key in content}
    for path in run.folder.path.glob("*.csv"):
        found[path.name] = [row for row in path.read_text().splitlines() if row.strip(",")]
    return found


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Equal to the last bit, tensors and arrays in any nesting."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            assert_same(value, other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for place, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}/{place}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype and np.array_equal(one, other), where
    else:
        assert one == other or (one != one and other != other), where
