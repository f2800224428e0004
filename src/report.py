"""Tables, statistics, figures and one page from many finished runs.

python src/report.py outputs/<experiment>           # writes outputs/<experiment>/report/index.html
python src/report.py status outputs/<experiment>    # what is done, running, failed, missing
python src/report.py wandb outputs/<experiment>     # the same report to Weights & Biases
"""

import argparse
import importlib
import logging
import sys
from pathlib import Path

from mambaseg.errors import UserError


def main(words: list[str]) -> None:
    """Does what the first word says; a folder alone means the report."""
    parser = argparse.ArgumentParser(
        prog="report.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="report.py [status | wandb] FOLDER",
    )
    parser.add_argument("folder", type=Path, help="outputs/<experiment>, the folder of its runs")
    command = words.pop(0) if words and words[0] in ("status", "wandb") else "report"
    folder = parser.parse_args(words).folder
    if command == "status":
        from rich.console import Console

        from mambaseg.reporting.status import states, status_table

        Console().print(status_table(states(folder), title=str(folder)))
    elif command == "wandb":
        importlib.import_module("mambaseg.reporting.wandb_report").publish(folder)
    else:
        from mambaseg.reporting.report import write_report

        logging.info("report: %s", write_report(folder))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"{error}")
