"""Measures scans, blocks, networks and training steps: speed and memory, as ratios within one run.

python src/benchmark.py scan backends=[numba,torch] shapes=[stage1]
python src/benchmark.py train models=[swin_unet,mamba_unet] batch=4
python src/benchmark.py --help
"""

import shlex
import sys

from omegaconf import DictConfig

from mambaseg.app.benchmarks import KINDS, run_benchmark
from mambaseg.app.entry import entry


@entry("benchmark")
def main(cfg: DictConfig) -> None:
    """Measures, prints tables, writes a JSON file."""
    run_benchmark(cfg, command=shlex.join(["python", "src/benchmark.py", *_typed]))


if __name__ == "__main__":
    _typed = sys.argv[1:]
    if _typed and _typed[0] in KINDS:
        sys.argv[1] = f"what={_typed[0]}"
    elif not {"--help", "-h"} & set(_typed):
        said = f"{_typed[0]!r} is not a benchmark" if _typed else "which benchmark?"
        sys.exit(f"{said}: python src/benchmark.py {'|'.join(KINDS)} [key=value ...]")
    main()
