"""Measures scans, blocks, networks and training steps: speed and memory, as ratios within one run.

python src/benchmark.py scan backends=[numba,torch] shapes=[stage1]
python src/benchmark.py inference models=[swin_unet,mamba_unet]
python src/benchmark.py train size=128 batch=4
python src/benchmark.py blocks
python src/benchmark.py profile models=all page=docs/models.md
python src/benchmark.py truth
python src/benchmark.py kernels device=cuda
python src/benchmark.py gpu minutes=9 root=$ACDC_ROOT out=outputs/gpu
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
