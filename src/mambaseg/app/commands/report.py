"""Tables, statistics, figures and one page from many finished runs.

mambaseg report outputs/<experiment>           # writes outputs/<experiment>/report/index.html
mambaseg report status outputs/<experiment>    # what is done, running, failed, missing
mambaseg report power outputs/<experiment>     # seeds and patients that a difference would need
mambaseg report pack outputs/<experiment> --to docs/results/<experiment>    # small files only
mambaseg report wandb outputs/<experiment>     # the same report to Weights & Biases
mambaseg report --no-images outputs/<experiment>    # to publish: without patients' images
"""

import argparse
import importlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from mambaseg.app.schema import did_you_mean
from mambaseg.errors import UserError


def main(words: Sequence[str]) -> None:
    """Does what the first word says; a folder alone means the report."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    command = words[0] if words and words[0] in _COMMANDS else "report"
    typo = did_you_mean(words[0], _COMMANDS) if words and command == "report" else ""
    if typo and not Path(words[0]).exists():
        raise UserError(f"{words[0]}: no such folder{typo}")
    name = "" if command == "report" else f" {command}"
    parser = argparse.ArgumentParser(
        prog=f"mambaseg report{name}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="outputs/<experiment>, the folder of its runs")
    if command == "report":
        about = "leave out all pictures of patients, for a page that is published"
        parser.add_argument("--no-images", dest="images", action="store_false", help=about)
    elif command == "power":
        about = "networks to compare, with commas between them (default: all)"
        parser.add_argument("--networks", type=_names, default=(), metavar="NAMES", help=about)
        about = "the true difference of mean Dice to be found (default: %(default)s, that of "
        about += "Mamba-UNet's paper)"
        parser.add_argument("--difference", type=float, default=0.0033, help=about)
        about = "how often it is to be found (default: %(default)s)"
        parser.add_argument("--power", type=float, default=0.8, help=about)
    elif command == "pack":
        about = "where its config, record and scores are copied to; no images, no weights"
        parser.add_argument("--to", type=Path, required=True, help=about)
    _COMMANDS[command](parser.parse_args(words[command != "report" :]))


def _names(text: str) -> list[str]:
    return text.split(",")


def _report(given: argparse.Namespace) -> None:
    from mambaseg.reporting.report import write_report

    logging.info("report: %s", write_report(given.folder, images=given.images))


def _status(given: argparse.Namespace) -> None:
    from rich import get_console

    from mambaseg.reporting.status import states, status_table

    get_console().print(status_table(states(given.folder), title=str(given.folder)))


def _power(given: argparse.Namespace) -> None:
    from rich import get_console

    from mambaseg.reporting.power import power_grids

    for grid in power_grids(
        given.folder, networks=given.networks, difference=given.difference, wanted=given.power
    ):
        get_console().print(grid.terminal())


def _pack(given: argparse.Namespace) -> None:
    from mambaseg.reporting.pack import pack

    for run in pack(given.folder, given.to):
        logging.info("packed: %s", run)


def _wandb(given: argparse.Namespace) -> None:
    importlib.import_module("mambaseg.reporting.wandb_report").publish(given.folder)


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "report": _report, "status": _status, "power": _power, "pack": _pack, "wandb": _wandb,
}  # fmt: skip
