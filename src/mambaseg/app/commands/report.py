"""Tables, statistics, figures and one page from many finished runs.

mambaseg report outputs/<experiment>           # writes outputs/<experiment>/report/index.html
mambaseg report status outputs/<experiment>    # what is done, running, failed, missing
mambaseg report wandb outputs/<experiment>     # the same report to Weights & Biases
mambaseg report --no-images outputs/<experiment>    # to publish: without patients' images
"""

import argparse
import importlib
import logging
from collections.abc import Sequence
from pathlib import Path


def main(words: Sequence[str]) -> None:
    """Does what the first word says; a folder alone means the report."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(
        prog="mambaseg report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="mambaseg report [status | wandb | --no-images] FOLDER",
    )
    parser.add_argument("folder", type=Path, help="outputs/<experiment>, the folder of its runs")
    about = "leave out all pictures of patients, for a page that is published"
    parser.add_argument("--no-images", dest="images", action="store_false", help=about)
    command = words[0] if words and words[0] in ("status", "wandb") else "report"
    given = parser.parse_args(words[command != "report" :])
    folder = given.folder
    if not given.images and command != "report":
        parser.error(f"{command} has no images to leave out")
    if command == "status":
        from rich import get_console

        from mambaseg.reporting.status import states, status_table

        get_console().print(status_table(states(folder), title=str(folder)))
    elif command == "wandb":
        importlib.import_module("mambaseg.reporting.wandb_report").publish(folder)
    else:
        from mambaseg.reporting.report import write_report

        logging.info("report: %s", write_report(folder, images=given.images))
