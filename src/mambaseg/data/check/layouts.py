"""The layouts of data sets that are known: every config in conf/data that names a reader."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mambaseg.data.readers.reader import Reader, require_folder
from mambaseg.data.splits import listed
from mambaseg.data.validation import DataError, unlisted
from mambaseg.storage.files import conf_folder
from mambaseg.storage.untrusted import ForeignFileError, read_yaml


@dataclass(frozen=True)
class Layout:
    """A config, without what it inherits, and the reader that its `find_cases._target_` names."""

    name: str
    reader: Reader
    config: Mapping[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """What the config hands to the reader, without what depends on other keys."""
        node = self.config.get("find_cases", {})
        return {k: v for k, v in node.items() if k[0] != "_" and "${" not in str(v)}

    def class_names(self, root: Path) -> tuple[str, ...] | None:
        """Names of the classes, None where nobody names them."""
        asked = self.reader.class_names
        names = asked(root) if asked else self.config.get("class_names")
        return tuple(map(str, names)) if isinstance(names, (list, tuple)) else None

    def ignore_label(self, root: Path) -> int | None:
        """The value of pixels without a label, where the config or the folder names one."""
        value, asked = self.config.get("ignore_label"), self.reader.ignore_label
        return value if type(value) is int else asked(root) if asked else None

    def regions(self, root: Path) -> Any:
        """What is scored in place of the classes, where the config or the folder names regions."""
        asked = self.reader.regions
        return asked(root) if asked else self.config.get("regions")

    def ignoring(self, value: int) -> Layout:
        """The layout whose label files have `value` where pixels have no label."""
        node = dict(self.config["find_cases"])
        if "ignore_label" in node:
            node["ignore_label"] = value
        return replace(self, config={**self.config, "ignore_label": value, "find_cases": node})


def known_layouts(
    config_dirs: Iterable[Path] = (), find_code: Callable[[str], object] | None = None
) -> dict[str, Layout]:
    """Name -> layout by the configs that name a reader, in the order in which they are asked.

    `config_dirs` are folders beside ours that hold a `data/`, as Hydra's `--config-dir`.
    `find_code` makes the module of a target importable, if only the current folder has it.
    """
    found = {}
    for path in (
        path for place in (conf_folder(), *config_dirs) for path in place.glob("data/*.yaml")
    ):
        try:
            config = read_yaml(path)
            target = config["find_cases"]["_target_"]
            if find_code:
                find_code(target)
            function = pkgutil.resolve_name(target)
        except (KeyError, TypeError):
            continue  # it inherits its reader, or its data are no cases
        except (ForeignFileError, OSError, ImportError, AttributeError, ValueError) as error:
            problem = f"its reader (find_cases._target_) cannot be found: {error}"
            raise DataError(
                problem,
                path,
                "Run the command in the folder of the module, or name that in PYTHONPATH.",
            ) from error
        reader = function if isinstance(function, Reader) else Reader(function)
        found[path.stem] = Layout(path.stem, reader, config)
    return dict(sorted(found.items(), key=lambda pair: (pair[1].reader.any_names, pair[0])))


def find_layout(root: Path, config_dirs: Iterable[Path] = ()) -> Layout:
    """Recognise the layout of a folder; `UserError` where it is none."""
    layouts = known_layouts(config_dirs).values()

    def recognised(folder: Path) -> Layout | None:
        return next((layout for layout in layouts if layout.reader.recognises(folder)), None)

    try:
        require_folder(root)
        if found := recognised(root):
            return found
        folders = (child for child in sorted(root.iterdir()) if child.is_dir())
        below = [folder for folder in folders if recognised(folder)]
    except OSError as error:
        raise unlisted(Path(error.filename or root), error) from error
    if len(below) > 1:
        names = listed(child.name for child in below)
        problem = f"{len(below)} data sets lie below this folder: {names}"
        raise DataError(problem, root, f"Give the folder of one, such as {below[0]}.")
    hint = f"Did you mean {below[0]}? " if below else ""
    known = "; ".join(layout.reader.example for layout in layouts if layout.reader.example)
    raise DataError("no layout of a data set is recognised here", root, f"{hint}Known: {known}.")
