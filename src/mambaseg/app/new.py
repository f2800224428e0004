"""Starts a project of your own: a network, its config, an experiment, a test and a README.

mambaseg new my_project
"""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from mambaseg.errors import UserError
from mambaseg.storage.files import writing

SKELETON = Path(__file__).with_name("skeleton")
_OTHERWISE = "choose another folder"
log = logging.getLogger(__name__)


def main(words: Sequence[str]) -> None:
    """Makes the folder that the first word names."""
    parser = argparse.ArgumentParser(
        prog="mambaseg new",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="a folder that is not there, or is empty")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = new_project(parser.parse_args(words).folder.expanduser())
    place = quote(str(folder))
    log.info("%s is ready. Next:\n  cd %s\n  python -m pytest\n"
             "  mambaseg train --config-dir=conf experiment=first", folder, place)  # fmt: skip


def new_project(folder: Path) -> Path:
    """Makes the skeleton of a project in a folder.

    Raises:
        UserError: the folder holds something, or cannot be written.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: name a new folder, such as {folder}_2")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a new folder")
    with writing(folder, otherwise=_OTHERWISE):
        leave_out = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(SKELETON, folder, ignore=leave_out, dirs_exist_ok=True)
        (folder / "gitignore").rename(folder / ".gitignore")  # wheels leave out hidden files
        readme = folder / "README.md"
        readme.write_text(
            readme.read_text("utf-8").replace("PROJECT", folder.resolve().name), "utf-8"
        )
    return folder
