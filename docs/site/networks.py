"""A page per network, from what is known elsewhere: its config, docs/models.md and its class."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

import mambaseg
from mambaseg.app.schema import EXTRAS
from tables import read_header

_DATA = {"in_channels": 1, "num_classes": 4}  # of the sizes in docs/models.md
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")


def network_pages(root: Path) -> dict[str, str]:
    """Name -> page of every network in conf/model."""
    costs = table_rows((root / "docs" / "models.md").read_text("utf-8"))
    files = sorted((root / "conf" / "model").glob("*.yaml"))
    return {file.stem: _page(file, costs[file.stem]) for file in files}


def table_rows(models: str) -> dict[str, dict[str, str]]:
    """Network -> column -> cell of the last table of docs/models.md, the costs."""
    header, _, *rows = models[models.rindex("\n| network |") :].strip().splitlines()
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    cells = ([cell.strip() for cell in row.strip("|").split("|")] for row in rows if row[:1] == "|")
    return {row[0].strip("`"): dict(zip(columns, row, strict=True)) for row in cells}


def _page(file: Path, cost: dict[str, str]) -> str:
    text = file.read_text("utf-8")
    config = yaml.safe_load(text)
    about = read_header(file.stem, text)
    keys = text[text.index("\nname:") :].strip()  # without the comment, which the table tells
    source = _ARXIV.sub(r"[\g<0>](https://arxiv.org/abs/\1)", about["source"])
    facts = {
        "Source": source,
        "Differs from it": about["differs"],
        "Parameters": cost["parameters"],
        "Image sides": f"any; padded to multiples of {cost['multiple of']}",
        "Multiply-adds": f"{cost['GMAC']} G at 224 × 224",
    }
    if cost["scan, GFLOP"] != "–":
        facts["Selective scan"] = f"{cost['scan, GFLOP']} GFLOP at 224 × 224"
    rows = "\n".join(f"| {name} | {fact} |" for name, fact in facts.items())
    own = (file.parents[1] / "optim" / "own" / file.name).read_text("utf-8")
    return f"""\
# {file.stem}

{about["what"]}

| | for one channel and four classes |
|---|---|
{rows}

[Networks](../models.md) compares it with all others.

## Train it

```sh
mambaseg train model={file.stem}
```

## Use it in Python

```python
{example(config)}
```

## Config

`conf/model/{file.name}`; on the command line every value is `model.<key>=<value>`.

```yaml
{keys}
```

`optim=own/{file.stem}` is its authors' optimizer:

```yaml
{own.strip()}
```

## Class

{_class(public_name(config["_target_"]))}
"""


def _class(name: str) -> str:
    """What the class says of itself; of other packages, which have their own pages, its name."""
    if not name.startswith("mambaseg."):
        return f"`{name}`, which the documentation of {name.partition('.')[0].upper()} describes."
    return f"```{{eval-rst}}\n.. autoclass:: {name}\n   :no-index:\n```"


def public_name(target: str) -> str:
    """Where a user imports a class from: the package itself, if it is ours."""
    name = target.rpartition(".")[2]
    return f"mambaseg.{name}" if name in mambaseg.__all__ else target


def example(config: dict[str, Any]) -> str:
    """Code that makes the network of a config, for images of any size."""
    place, _, name = public_name(config["_target_"]).rpartition(".")
    dropped = {"_target_", "scan_backend", *EXTRAS["model"]}
    given = {key: _value(value) for key, value in config.items() if key not in dropped}
    multiple = config.get("size_multiple") or getattr(_build(config, given), "size_multiple", 1)
    imports = [f"from {place} import {name}"] if place != "mambaseg" else []
    ours = sorted({"AnySize", *([name] if place == "mambaseg" else [])})
    imports.append(f"from mambaseg import {', '.join(ours)}")
    arguments = "".join(f"    {key}={value!r},\n" for key, value in given.items())
    made = [f"network = {name}(\n{arguments})", f"network = AnySize(network, {multiple})"]
    return "\n".join([*imports, "", *made])


def _value(value: Any) -> Any:
    """An argument of a config; of the data's `in_channels` and `num_classes` an example."""
    if isinstance(value, str) and (match := re.fullmatch(r"\$\{data\.(\w+)\}", value)):
        return _DATA[match[1]]
    return value


def _build(config: dict[str, Any], given: dict[str, Any]) -> Any:
    """The network without memory."""
    import torch

    module, _, name = config["_target_"].rpartition(".")
    with torch.device("meta"):
        return getattr(import_module(module), name)(**given)
