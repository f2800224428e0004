"""Are the results of finished runs still those of the present code?

Trains the first steps of each run again and compares all that they logged, and scores its
best.ckpt again and compares all of cases.csv. The folders of the runs stay as they are.

mambaseg replay outputs/<experiment>/<run folder>
mambaseg replay outputs/<experiment>                         # all finished runs
mambaseg replay docs/results/<experiment> data.root=...      # without checkpoints: the steps only
"""

import argparse
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from mambaseg.errors import UserError


def main(words: Sequence[str]) -> None:
    """Prints a table.

    Raises:
        UserError: there is no such run, or a number is not the same.
    """
    parser = argparse.ArgumentParser(
        prog="mambaseg replay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or an experiment")
    about = "training steps of each run (default: %(default)s)"
    parser.add_argument("--steps", type=int, default=20, help=about)
    about = "differences that count as none, relative to numbers above 1 (default: the same digits)"
    parser.add_argument("--tolerance", type=float, default=0.0, help=about)
    parser.add_argument("--config-dir", help="as when the runs were trained")
    given = parser.parse_intermixed_args(words)
    if not 0 <= given.tolerance < math.inf:
        raise UserError(f"--tolerance {given.tolerance}: a number, 0 or more")
    if given.steps < 1:
        raise UserError(f"--steps {given.steps}: a number of steps, 1 or more")
    runs = [word for word in given.runs if "=" not in word or Path(word).is_dir()]
    overrides = [word for word in given.runs if word not in runs]

    from rich import get_console
    from rich.progress import track

    from mambaseg.app.replay import Compared, replay
    from mambaseg.reporting.grid import UNDEFINED, Grid

    logging.basicConfig(level=logging.ERROR, format="%(message)s")

    def told(compared: Compared | str) -> list[str]:
        if isinstance(compared, str):
            return [UNDEFINED, compared]
        return [
            f"{compared.values:,}",
            f"{compared.difference:.1e}" if compared.difference else "same",
        ]

    rows, notes, differ = [], [], 0
    console, found = get_console(), _folders(runs)
    for path in track(found, "replaying", transient=True, disable=not console.is_terminal):
        try:
            one = replay(path, overrides, steps=given.steps, config_dir=given.config_dir)
        except UserError as error:  # the others may be sound
            differ += 1
            rows.append([path.name, UNDEFINED, "failed", UNDEFINED, UNDEFINED])
            notes.append(str(error))
            continue
        parts = [part for part in (one.steps, one.scores) if not isinstance(part, str)]
        differ += any(part.difference > given.tolerance for part in parts)
        rows.append([path.name, *told(one.steps), *told(one.scores)])
        if one.since:
            notes.append(f"{path.name}: changed since: {one.since}.")
    header = ["run", "numbers", f"{given.steps} steps", "numbers", "scores"]
    console.print(Grid("Replayed", header, rows, list(dict.fromkeys(notes))).terminal())
    if differ:
        raise UserError(f"{differ} of {len(rows)} runs differ or cannot be replayed: see the table")


def _folders(named: Sequence[str]) -> list[Path]:
    """Run folders as they are, and the finished runs of experiments."""
    from mambaseg.reporting.reading import run_folders
    from mambaseg.storage.run_folder import RunFolder

    found: list[Path] = []
    for path in map(Path, named):
        single = (path / "run.json").is_file()
        found += [path] if single else [one for one in run_folders(path) if RunFolder(one).trained]
    if not found:
        raise UserError(
            f"{' '.join(named) or 'nothing'}: there is no finished run; name a run folder"
        )
    return found
