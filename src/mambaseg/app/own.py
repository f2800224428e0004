"""Networks, losses and configs of a user's own project: where they are found, and what to say.

Code is looked for where Python looks, and for a `_target_` that is nowhere there also in the
current folder, which then stays at the end of `sys.path`: it can hide no installed module. Every
`_target_` is in a config that is installed, in a folder that the user names with `--config-dir`, or
on the command line. Checkpoints and run folders name none, so none of them imports a module.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra

from mambaseg.errors import UserError
from mambaseg.storage.files import conf_folder
from mambaseg.storage.run_folder import RunFolder


def config_dirs() -> list[Path]:
    """The folders of `--config-dir`; none outside of a command."""
    if not GlobalHydra.instance().is_initialized():
        return []
    places = GlobalHydra.instance().config_loader().get_search_path().get_path()
    named = [str(one.path) for one in places if one.provider == "command-line"]
    return [Path(path.removeprefix("file://")) for path in named]


def search_path(folders: Iterable[Path]) -> ConfigSearchPath:
    """Where Hydra looks for configs: in the installed conf/, then in these folders."""
    places = create_config_search_path(str(conf_folder()))
    for folder in folders:  # the schema is the last
        places.prepend("command-line", f"file://{folder}", anchor="schema")
    return places


def require_own_names(choices: Mapping[str, str | None]) -> None:
    """Raise `UserError` where an installed config is chosen (group -> name) in place of a user's.

    Of two configs of one name Hydra takes the installed one and says nothing.
    """
    for group, name in choices.items():
        installed = conf_folder() / group / f"{name}.yaml"
        for mine in (place / group / installed.name for place in config_dirs()):
            if not (mine.is_file() and installed.is_file()):
                continue
            if mine.read_bytes() != installed.read_bytes():
                raise UserError(
                    f"{mine}: mambaseg has a config of this name too, and {group}={name} chooses "
                    "that one. Give yours another name"
                )


def find_code(target: str) -> bool:
    """Makes the current folder importable if only that holds the module of a target."""
    here, first = Path.cwd(), target.partition(".")[0]
    if str(here) in sys.path or not _is_missing(first) or not _holds(here, first):
        return False
    sys.path.append(str(here))
    importlib.invalidate_caches()
    return True


def code_remedy(target: str) -> str:
    """What to do about a target whose module is nowhere; empty if there is one."""
    first = target.partition(".")[0]
    if not _is_missing(first):
        return ""
    beside = [folder.parent for folder in config_dirs() if _holds(folder.parent, first)]
    where = f", {beside[0]}" if beside else ""
    return (
        f". Run the command in the folder that holds {first}.py{where}; or name that folder in "
        f"the variable PYTHONPATH"
    )


def is_config_name(name: str) -> bool:
    """Whether a text, which may be of a foreign file, can name a config: `unet`, `mine/deep`."""
    return len(name) <= 200 and bool(re.fullmatch(r"\w[\w.+-]*(/\w[\w.+-]*)*", name, re.ASCII))


def config_remedy(group: str, name: str, run: RunFolder | None = None) -> str:
    """Which option gives a config that is not there, and where the `run` that had it found it."""
    place = found_config(group, name)
    if place is not None:
        return f"It is in {place}: add --config-dir={place}"
    used = run.record.get("config_dirs") if run else None
    before = f", which was {used[0]} in the training" if used and isinstance(used, list) else ""
    return f"Pass the folder that has {group}/{name}.yaml{before}: --config-dir=<folder>"


def found_config(group: str, name: str) -> Path | None:
    """The folder in the current one that has a config, as `mambaseg new` makes it."""
    if not is_config_name(name):
        return None
    here = Path.cwd()
    near = (path for path in sorted(here.glob("*")) if (path / f"{group}/{name}.yaml").is_file())
    return next((path.relative_to(here) for path in near), None)


def _is_missing(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except (ImportError, ValueError):  # it is there without a spec, as __main__ is
        return False


def _holds(folder: Path, module: str) -> bool:
    return module.isidentifier() and (
        (folder / f"{module}.py").is_file() or any((folder / module).glob("*.py"))
    )
