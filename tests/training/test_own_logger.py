"""A logger from outside the package: one file and one config."""

import json

from runs import UNET, trained

FILE = r'''
import json
from pathlib import Path

from lightning.pytorch.loggers.logger import Logger


class Lines(Logger):
    """Writes each logged value as a line of JSON."""

    name, version = "lines", 0

    def __init__(self, save_dir, unit="step"):
        self.path, self.unit = Path(save_dir) / "lines.json", unit

    def log_hyperparams(self, *arguments, **named):
        pass

    def log_metrics(self, metrics, step=None):
        with self.path.open("a") as file:
            file.write(json.dumps({self.unit: step, **metrics}) + "\n")
'''


def test_a_logger_of_a_foreign_file_logs_beside_ours(small_run, tmp_path, monkeypatch):
    (tmp_path / "lines_logger.py").write_text(FILE)
    (tmp_path / "logger").mkdir()
    config = "defaults: [csv]\nlines: {_target_: lines_logger.Lines, save_dir: '${run_dir}'}\n"
    (tmp_path / "logger" / "lines.yaml").write_text(config)
    monkeypatch.syspath_prepend(tmp_path)
    run = trained(*UNET, *small_run, "logger=lines", "+logger.lines.unit=at", configs=tmp_path)
    lines = [json.loads(line) for line in (run.folder.path / "lines.json").open()]
    assert {"at", "val/dice"} <= {key for line in lines for key in line}
    assert (run.folder.path / "metrics.csv").is_file()
