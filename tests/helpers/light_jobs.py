"""An entry with train.py's configuration whose jobs cost nothing: they note what they found."""

import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path

from omegaconf import DictConfig

import mambaseg.app.build  # noqa: F401  (the configuration's resolvers)
from mambaseg.app.entry import entry
from mambaseg.errors import UserError


@entry("config")
def main(cfg: DictConfig) -> float:
    optimizer = cfg.optim.optimizer
    found = {
        "pid": os.getpid(),
        "words": sys.argv[1:],
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "handlers": len(logging.getLogger().handlers),
        "filters": len(warnings.filters),
        "left": os.environ.get("LEFT_BY_A_JOB"),
        "model": cfg.model.name,
        "seed": cfg.seed,
        "test": cfg.test,
        "lr": optimizer.lr,
        "weight_decay": optimizer.weight_decay,
    }
    # what a careless job leaves behind
    os.environ["LEFT_BY_A_JOB"] = str(cfg.seed)
    sys.argv.append("left")
    logging.getLogger().addHandler(logging.NullHandler())
    warnings.simplefilter("ignore")
    interrupted = Path(cfg.outputs) / "interrupted"
    if cfg.seed == 7 and not interrupted.exists():  # its first attempt takes too long
        interrupted.touch()
        time.sleep(600)
    if cfg.seed == 13:
        raise UserError("seed 13 is refused")
    note = f"{cfg.model.name}-{cfg.seed}-{optimizer.lr!r}.json"
    folder = Path(cfg.outputs) / "notes"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / note).write_text(json.dumps(found), encoding="utf-8")
    return 1 / (1 + abs(optimizer.lr - 0.01) + abs(optimizer.weight_decay - 0.001))


if __name__ == "__main__":
    main()
