"""Checks a data set: reads every file once, lists all problems, proposes a config."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from rich.console import Console
from rich.text import Text

from mambaseg.app.check import CONF
from mambaseg.app.own import find_code
from mambaseg.data.check.dataset import Report, check_dataset
from mambaseg.data.check.layouts import known_layouts
from mambaseg.data.check.proposal import propose
from mambaseg.data.check.sheet import require_new, write_sheet
from mambaseg.data.readers.reader import Level, Problem
from mambaseg.data.validation import DataError
from mambaseg.errors import UserError
from mambaseg.storage.files import print_any_name, write_whole

STYLES: dict[Level, str] = {"error": "bold red", "warning": "yellow", "info": "cyan"}


def main(words: Sequence[str]) -> int:
    """Prints the report and the proposed config; returns 1 when there are errors, else 0."""
    parser = argparse.ArgumentParser(prog="mambaseg check", description=__doc__)
    parser.add_argument("root", type=Path, help="folder of the data set (as data.root)")
    parser.add_argument("--layout", help="name of a config of conf/data (default: recognised)")
    parser.add_argument(
        "--num-classes", type=int, help="with background (default: what the layout tells)"
    )
    parser.add_argument(
        "--ignore-label", type=int, metavar="V", help="value of pixels without a label (default: "
        "what the layout tells)"
    )  # fmt: skip
    parser.add_argument(
        "--labels", choices=("dense", "scribble"), default="dense", help="which ones to check"
    )
    parser.add_argument(
        "--write", type=Path, metavar="conf/data/NAME.yaml", help="save the proposed config there"
    )
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE.png", help="draw a slice of each case with its labels"
    )
    parser.add_argument(
        "--config-dir", type=Path, action="append", default=[], help="a folder that has data/"
    )
    options = parser.parse_args(words)
    print_any_name()
    console = Console()
    try:
        word, _, folder = str(options.root).partition("=")
        if word in ("root", "data.root") and not options.root.exists():
            raise UserError(f"{options.root}: type the folder alone: mambaseg check {folder}")
        for place in options.config_dir:
            if not place.is_dir():
                raise UserError(f"--config-dir {place}: there is no such folder")
        if options.num_classes is not None and options.num_classes < 2:
            raise UserError(f"--num-classes {options.num_classes}: 2 or more, with background")
        layouts = known_layouts(options.config_dir, find_code)
        if options.layout and options.layout not in layouts:
            names = ", ".join(layouts)
            raise UserError(f"unknown layout {options.layout!r}: choose one of {names}")
        if options.sheet:
            require_new(options.sheet)  # before minutes of reading
        if options.write:
            _require_new_config(options.write)
        report = check_dataset(
            options.root,
            options.num_classes,
            layout=layouts.get(options.layout),
            ignore_label=options.ignore_label,
            labels=options.labels,
            config_dirs=options.config_dir,
        )
        for problem in report.problems:
            console.print(_entry(problem), soft_wrap=True)
        console.print(Text(report.summary, "green" if report.ok else "red"), soft_wrap=True)
        if report.supervision:
            console.print(Text(report.supervision), soft_wrap=True)
        console.print(Text(_proposed(report, options.write)), soft_wrap=True)
        if options.sheet:
            console.print(Text(write_sheet(report, options.sheet)), soft_wrap=True)
    except UserError as error:
        console.print(Text(str(error), "red"), soft_wrap=True)
        return 1
    return 0 if report.ok else 1


def _entry(one: Problem) -> Text:
    """A problem and its remedy, each on a line of its own, from which an override can be copied."""
    first = Text.assemble((f"{one.level:<9}", STYLES[one.level]), (one.where, "bold"))
    return Text("\n          ").join([first, Text(one.problem), Text(one.remedy)])


def _require_new_config(path: Path) -> None:
    """Raises DataError unless a config can be written there."""
    if not re.fullmatch(r"[A-Za-z]\w*\.yaml", path.name):
        raise DataError("name it like conf/data/hearts.yaml: letters, digits and _", path)
    if path.resolve().parent.name != "data":
        raise DataError("the folder of a data set's config is called data", path,
                        f"Write it to {path.parent / 'data' / path.name}")  # fmt: skip
    if path.exists() or (CONF / "data" / path.name).exists():
        own = "is there already" if path.exists() else "has the name of a config of mambaseg"
        raise DataError(own, path, "Choose another name, or move it away.")


def _proposed(report: Report, path: Path | None) -> str:
    """What to say about the proposed config, which is written where a path is given."""
    config = propose(report, path.stem if path else "mine")
    if config is None:
        return "No case can be used: no configuration is proposed."
    if path is None:
        return f"\nProposed as conf/data/mine.yaml (--write saves it):\n\n{config}"
    _require_new_config(path)
    write_whole(path, config, otherwise="choose another place with --write")
    configs = path.resolve().parents[1]
    elsewhere = "" if configs == CONF.resolve() else f" --config-dir={quote(str(configs))}"
    train = f"mambaseg train{elsewhere} data={path.stem}"
    return f"\n{config}\nWritten to {path}. To train with it: {train}"
