"""Which commands make the paper's table and the speed limit, the weightiest first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mambaseg.benchmark.plan import Part

NETWORKS = ("mamba_unet", "unet", "swin_unet")
PAPER, CURVES, MODERN = "acdc_paper", "curves", "acdc_modern"
PRECISIONS = {"bf16": "bf16-mixed", "fp32": "32-true"}
# nothing of a run waits for the device or the disk more often than it must
_QUIET = (
    "logger=csv", "callbacks.progress=null", "trainer.log_every_n_steps=50",
    "callbacks.checkpoint.every=1000",
)  # fmt: skip


def gpu_parts(
    data: Path,
    out: Path,
    *,
    networks: Sequence[str] = NETWORKS,
    seeds: Sequence[int] = (1337,),
    train: Sequence[str] = (),
    bench: Sequence[str] = (),
    only: Sequence[str] | None = None,
) -> list[Part]:
    """The parts of the plan.

    Args:
        data: the data set's folder.
        out: where runs and measurements go.
        networks: leaves of `conf/model`.
        seeds: of the table; those after the first come after everything else that it needs.
        train: further words for every `train.py`; they win.
        bench: likewise for every `benchmark.py`.
        only: beginnings of names; the other parts are left out.
    """

    def training(name: str, model: str, *words: str, experiment: str = PAPER) -> Part:
        fixed = (
            "experiment=acdc_paper", f"name={experiment}", f"model={model}", f"data.root={data}",
            f"data.cache_dir={out.parent / 'cache'}", f"outputs={out / 'runs'}", *_QUIET,
        )  # fmt: skip
        return Part(name, ("src/train.py", *fixed, *words, *train))

    def benchmark(what: str, *words: str, name: str = "", **environment: str) -> Part:
        folder = out / "bench" / (name or what)
        fixed = (what, f"outputs={folder}", *words, *bench)
        return Part(name or what, ("src/benchmark.py", *fixed), environment=environment)

    def report(experiment: str, name: str) -> Part:
        return Part(name, ("src/report.py", str(out / "runs" / experiment)), least_s=20)

    leaves = f"models=[{','.join(networks)}]"
    first, *others = seeds
    parts = [
        benchmark("truth", leaves, CUBLAS_WORKSPACE_CONFIG=":4096:8"),
        benchmark("train", leaves, "batch=24", "warmup=5", "repeats=9", name="steps"),
        *(training(f"train-{model}-{first}", model, f"seed={first}") for model in networks),
        report(PAPER, "report"),
        *(
            benchmark("scan", f"precision={precision}", f"batch={batch}", "loop_limit=0",
                      "shapes=[stage1,stage2,stage3,stage4]", name=f"scan-{short}-{batch}")
            for short, precision in PRECISIONS.items() for batch in (24, 1)
        ),
        *(benchmark("tune", f"batch={batch}", "shapes=[stage1,stage2,stage3,stage4]",
                    name=f"tune-{batch}") for batch in (24, 1)),
        *(
            training(f"curve-{short}", "mamba_unet", f"trainer.precision={precision}",
                     "data.steps=500", "data.val_every=500", "test=false",
                     "trainer.log_every_n_steps=1", experiment=CURVES)
            for short, precision in PRECISIONS.items()
        ),
        *(training(f"train-{model}-{seed}", model, f"seed={seed}")
          for seed in others for model in networks),
        *([report(PAPER, "report-seeds")] if others else []),
        *(training(f"modern-{model}", model, f"seed={first}", "optim=adamw",
                   "data.augmentation=modern", experiment=MODERN) for model in networks),
        report(MODERN, "modern-report"),
    ]  # fmt: skip
    chosen = tuple(only) if only else ("",)
    return [part for part in parts if part.name.startswith(chosen)]
