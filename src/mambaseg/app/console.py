"""The console command: `mambaseg <command> ...`, and `mambaseg` alone lists the commands.

A command is one module with `main(words)`, imported when it is asked for.
"""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence

from mambaseg import __version__
from mambaseg.app.schema import did_you_mean
from mambaseg.errors import UserError

COMMANDS = {
    "train": ("commands.train", "train a network, test it; with -m many of them"),
    "evaluate": ("commands.evaluate", "score a trained network, or a folder of label maps"),
    "predict": ("commands.predict", "label maps of new images"),
    "report": ("commands.report", "tables, statistics and a page from many runs"),
    "replay": ("commands.replay", "do results of finished runs still hold under this code?"),
    "demo": ("commands.demo", "a page on this machine for trying a network out"),
    "export": ("commands.export", "a trained network as ONNX, for torch.export, or as a bundle"),
    "check": ("commands.check", "every problem of a data set, and a config for it"),
    "benchmark": ("commands.benchmark", "speed, memory and numbers of networks and scans"),
    "new": ("new", "a folder for a project of your own: network, config, test"),
    "doctor": ("doctor", "is this machine fit for training?"),
}
"""Name -> its module in `mambaseg.app`, and what it does."""
_USAGE = """usage: mambaseg COMMAND ...

{commands}

mambaseg COMMAND --help explains a command. Values are set as key=value:
  mambaseg train experiment=quickstart
  mambaseg predict run=outputs/default/<run folder> input=images output=labels
Without --config-dir, configs come from the installed conf/; data and outputs are folders of the
current folder. Documentation: README.md and docs/ of the repository.
"""


def main(words: Sequence[str] | None = None) -> None:
    """Runs the command that the first of the `words` names (default: those typed).

    Raises:
        SystemExit: with a message or a code, where the command did not do what was asked.
    """
    name, *rest = (sys.argv[1:] if words is None else words) or ["--help"]
    if name in ("--help", "-h", "help"):
        lines = (f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items())
        sys.stdout.write(_USAGE.format(commands="\n".join(lines)))
        return
    if name in ("--version", "-V"):
        sys.stdout.write(f"mambaseg {__version__}\n")
        return
    if name not in COMMANDS:
        near = did_you_mean(name, COMMANDS) or "; mambaseg --help lists them"
        if "=" in name or name.startswith("-"):
            near = f": say what to do with it, such as mambaseg train {name}"
        sys.exit(f"mambaseg: {name} is not a command{near}")
    try:
        code = importlib.import_module(f"mambaseg.app.{COMMANDS[name][0]}").main(rest)
    except UserError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:  # a run takes the signal itself, everything else has nothing to save
        sys.exit(128 + signal.SIGINT)
    if code:
        sys.exit(code)
