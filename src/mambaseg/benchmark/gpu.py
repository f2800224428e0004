"""What a fresh GPU machine is worth, in minutes: its numbers, its speed, and the paper's table.

Parts are commands that one could type. Each has its own time limit and log, and what they found is
written after each of them; a part that fails costs the others nothing.
"""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mambaseg.benchmark.gpu_page import newest_record, write_page
from mambaseg.storage.run_folder import RunFolder

NETWORKS = ("mamba_unet", "unet", "swin_unet")
EXPERIMENT = "acdc_paper"
MOST_STEPS = 10_000  # of the paper's protocol
LOOP_STEPS = 100  # of the short trainings that tell what the loop costs beside the network's step
START_S, END_S = 30.0, 30.0  # what a training needs around its steps: imports, data; test, figures
POLL_S = 0.05  # between looks at what runs
GRACE_S = 20.0  # for a part to save its state after it was asked to stop
# what the trainings leave to the report: they may take the grace, and it is stopped that much early
REPORT_S = END_S + 2 * GRACE_S
SLOWER = 1.15  # a training's step over the network's own, as a guess for the plan
# nothing of a training waits for the device or the disk more often than it must
QUIET = (
    "logger=csv", "callbacks.progress=null", "trainer.log_every_n_steps=50",
    "callbacks.checkpoint.every=1000",
)  # fmt: skip
_OURS = ("-m", "mambaseg")
log = logging.getLogger(__name__)


class Part(NamedTuple):
    """One command."""

    name: str  # of its log and results
    words: tuple[str, ...]  # behind `python`
    limit_s: float = 60.0  # it is asked to stop after this long


def measure_gpu(
    root: Path,
    out: Path,
    *,
    minutes: float,
    cwd: Path,
    networks: Sequence[str] = NETWORKS,
    only: Sequence[str] = (),
    graph: bool = True,
    train: Sequence[str] = (),
    bench: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Measures a machine and trains the paper's networks on it, all within some minutes.

    Args:
        root: the data set, as `data.root` of `experiment=acdc_paper`.
        out: gets `logs/`, `bench/`, `runs/`, `parts.json` and `table.md`.
        minutes: in all.
        cwd: the folder in which they run.
        networks: configs of `conf/model`; the trainings run side by side.
        only: beginnings of the names of parts; empty: all.
        graph: record the networks' passes as CUDA graphs (`trainer.graph`).
        train: further overrides of each training; they win.
        bench: likewise of each benchmark.

    Returns:
        One record per part: `name`, `command`, `status` (done, stopped, failed), `seconds`.
    """
    machine = Machine(out, cwd, time.monotonic() + 60 * minutes, tuple(only))
    models = f"models=[{','.join(networks)}]"
    graphs = f"graph={str(graph).lower()}"

    def benchmark(name: str, what: str, *words: str, limit_s: float = 60.0) -> Part:
        folder = f"outputs={out / 'bench' / name}"
        return Part(name, (*_OURS, "benchmark", what, folder, *words, *bench), limit_s)

    def training(name: str, network: str, *words: str, limit_s: float) -> Part:
        fixed = (
            f"experiment={EXPERIMENT}", f"model={network}", f"data.root={root}",
            f"data.cache_dir={out / 'cache'}", f"outputs={out / 'runs'}", f"trainer.{graphs}",
        )  # fmt: skip
        return Part(name, (*_OURS, "train", *fixed, *QUIET, *words, *train), limit_s)

    # nothing of these is timed
    machine.run(
        Part("environment", (*_OURS, "doctor"), 90.0),
        benchmark("smoke", "truth", "scans=[small]", models, limit_s=150.0),
        benchmark("truth", "truth", "scans=[stage1,stage4]", "models=[]", limit_s=150.0),
    )
    machine.run(benchmark("steps", "train", models, "batch=24", "warmup=3", graphs, limit_s=90.0))
    machine.run(benchmark("scan", "scan", "batch=24", "forms=[2d]", "loop_limit=0",
                          "shapes=[stage1,stage2,stage3,stage4]"))  # fmt: skip
    machine.run(benchmark("kernels", "kernels", models, graphs))
    for network in networks:
        short = (f"data.steps={LOOP_STEPS}", f"data.val_every={LOOP_STEPS}", "test=false")
        machine.run(training(f"loop-{network}", network, "name=loop", *short, limit_s=60.0))
    trained = [network for network in networks if machine.runs(f"train-{network}")]
    steps = affordable(machine.seconds_left, newest_record(out, "steps")) if trained else 0
    if steps:
        log.info("%d steps fit for each of %s", steps, ", ".join(trained))
        words = (f"data.steps={steps}", f"data.val_every={max(100, steps // 8)}")
        limit = machine.seconds_left - REPORT_S
        machine.run(*(training(f"train-{name}", name, *words, limit_s=limit) for name in trained))
    elif trained:
        log.warning("no time is left to train the networks")
    machine.run(Part("report", (*_OURS, "report", str(out / "runs" / EXPERIMENT)), END_S))
    return machine.parts


def affordable(seconds: float, steps: dict[str, Any] | None) -> int:
    """Equal number of steps for networks that train side by side; 0: not enough to be worth it.

    `steps` is the record of `mambaseg benchmark train`; without one, or where no network fitted
    into it, a guess is made.
    """
    each = sum(row["median_s"] for row in steps["rows"]) if steps and steps["rows"] else 0.2
    count = int((seconds - START_S - END_S - REPORT_S) / (SLOWER * each))
    return 0 if count < LOOP_STEPS else min(count // LOOP_STEPS * LOOP_STEPS, MOST_STEPS)


class Machine:
    """Runs parts until `end` (by `time.monotonic()`), and keeps what they left in `out`."""

    def __init__(self, out: Path, cwd: Path, end: float, only: tuple[str, ...] = ()) -> None:
        self.out, self.cwd, self.end, self.only = out, cwd, end, only or ("",)
        self.parts: list[dict[str, Any]] = []
        (out / "logs").mkdir(parents=True, exist_ok=True)

    @property
    def seconds_left(self) -> float:
        """Seconds until the end."""
        return self.end - time.monotonic()

    def runs(self, name: str) -> bool:
        """Whether the part of this name is asked for."""
        return name.startswith(self.only)

    def run(self, *parts: Part) -> None:
        """Runs parts side by side, each until its limit or the end."""
        parts = tuple(part for part in parts if self.runs(part.name))
        if not parts:
            return
        start = time.monotonic()
        log.info("%.0f s left: %s", self.seconds_left, ", ".join(part.name for part in parts))
        running: dict[Part, subprocess.Popen[bytes]] = {}
        try:
            for part in parts:
                with self._log(part).open("wb") as stream:
                    running[part] = subprocess.Popen(
                        [sys.executable, *part.words], cwd=self.cwd, stdout=stream,
                        stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                        env={"CUBLAS_WORKSPACE_CONFIG": ":4096:8", **os.environ},
                    )  # fmt: skip
            self._wait(running, start)
        finally:  # also where this process is asked to stop
            for process in running.values():
                if process.poll() is None:
                    process.terminate()
        write_page(self.out, self.parts)

    def _wait(self, running: dict[Part, subprocess.Popen[bytes]], start: float) -> None:
        """Notes each part when it ends, and stops it at its limit."""
        limits = {part: min(start + part.limit_s, self.end - GRACE_S) for part in running}
        stopped: dict[Part, float] = {}  # when
        while running:
            for part, process in list(running.items()):
                now, code = time.monotonic(), process.poll()
                if code is not None:
                    del running[part]
                    status = "done" if code == 0 else "stopped" if part in stopped else "failed"
                    self._note(part, status, now - start)
                elif part not in stopped and now >= limits[part]:
                    process.terminate()  # a training saves its state, and keeps its best checkpoint
                    stopped[part] = now
                elif now >= stopped.get(part, now) + GRACE_S:
                    process.kill()
            time.sleep(POLL_S)

    def _log(self, part: Part) -> Path:
        return self.out / "logs" / f"{part.name}.log"

    def _note(self, part: Part, status: str, seconds: float) -> None:
        command = shlex.join(["python", *part.words])
        self.parts.append(
            {"name": part.name, "command": command, "status": status, "seconds": round(seconds, 1)}
        )
        log.info("%s: %s after %.0f s", part.name, status, seconds)
        if status == "failed":
            lines = self._log(part).read_text("utf-8", errors="replace").splitlines()
            log.warning("the end of %s:\n%s", self._log(part), "\n".join(lines[-12:]))
        RunFolder(self.out).write_json("parts.json", self.parts)
