"""Measures scans, blocks, networks and training steps: speed and memory, as ratios within one run.

mambaseg benchmark scan backends=[numba,torch] shapes=[stage1]
mambaseg benchmark train models=[swin_unet,mamba_unet] batch=4
mambaseg benchmark --help
"""

import shlex
from collections.abc import Sequence

from omegaconf import DictConfig

from mambaseg.app.entry import entry
from mambaseg.app.schema import BENCHMARKS
from mambaseg.errors import UserError


def main(words: Sequence[str]) -> None:
    """Measures what the first word names, prints tables, writes a JSON file."""
    first, *rest = words or ("",)
    if first in BENCHMARKS:
        words = [f"what={first}", *rest]
    elif not {"--help", "-h"} & set(words):
        said = f"{first!r} is not a benchmark" if first else "which benchmark?"
        raise UserError(f"{said}: mambaseg benchmark {'|'.join(BENCHMARKS)} [key=value ...]")

    @entry("benchmark")
    def measure(cfg: DictConfig) -> None:
        from mambaseg.app.benchmarks import run_benchmark

        run_benchmark(cfg, command=shlex.join(["mambaseg", "benchmark", first, *rest]))

    measure(words)
