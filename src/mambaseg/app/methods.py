"""The table of docs/methods.md: what each learning method is, needs and costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import Tensor

from mambaseg.app.entry import CONF
from mambaseg.app.networks import made
from mambaseg.app.schema import EXTRAS
from mambaseg.benchmark.pages import HEADERS, read_header
from mambaseg.benchmark.tables import Column, Row, Table, text
from mambaseg.errors import UserError
from mambaseg.models import UNet
from mambaseg.storage.run_folder import RunFolder
from mambaseg.training.losses import DiceCE
from mambaseg.training.methods.method import Step

_BATCH, _SIDE, _CLASSES = 4, 32, 4  # of the step that is counted
COLUMNS = [
    Column("method", HEADERS[0].cell, is_number=False),
    *HEADERS[1:], text("needs"), text("passes"),
]  # fmt: skip


def write_methods(page: Path) -> None:
    """Writes the table of all methods into the page that has it, and leaves the rest alone."""
    try:
        before, rule, rest = page.read_text("utf-8").partition("\n| method | what |")
    except FileNotFoundError:
        rule = ""
    if not rule:
        raise UserError(f"page={page}: has no table of methods (| method | what |)")
    _, _, after = rest.partition("\n\n")
    RunFolder(page.parent).write_text(page.name, f"{before}\n{methods_table()}\n{after}")


def methods_table() -> str:
    """The table as Markdown, from configs, classes and a counted step."""
    files = sorted((CONF / "method").glob("*.yaml"))
    return Table("", COLUMNS, [method_row(file) for file in files]).markdown()


def method_row(file: Path) -> Row:
    """The row of a method's config."""
    config = OmegaConf.load(file)
    kind: Any = get_class(config._target_)
    needs = [f"{kind.count} networks" if kind.count else "2 networks or more"]
    needs = [] if kind.count == 1 else needs
    needs += ["unlabelled images"] * kind.unlabelled + [kind.needs] * bool(kind.needs)
    about = read_header(file.stem, file.read_text("utf-8"))
    with_gradient, without = passes(config)
    cost = f"{with_gradient:g}" + f" + {without:g}" * bool(without)
    return {**about, "needs": ", ".join(needs) or "–", "passes": cost}


def passes(config: Any) -> tuple[float, float]:
    """Images that a step sends through networks, per image of its batch: with gradient, without."""
    data = {"in_channels": 1, "num_classes": _CLASSES}
    root = {"data": data, "model": {"name": "mamba_unet"}, "method": config}
    config = OmegaConf.create(root).method
    partner = config.partner
    partners: Sequence[Any] = [partner] if isinstance(partner, str) else partner
    networks = [UNet(widths=(2, 2, 2, 2, 2)) for _ in range(1 + len(partners))]
    method = made(OmegaConf.to_container(config, resolve=True), *EXTRAS["method"])(networks)
    counts = {True: 0, False: 0}

    def run(function: Callable[[Tensor], Any], image: Tensor, *_: Any) -> Any:
        counts[torch.is_grad_enabled()] += len(image)
        return function(image)

    method.terms(
        Step(
            image=torch.rand(_BATCH, 1, _SIDE, _SIDE),
            label=torch.randint(_CLASSES, (_BATCH, _SIDE, _SIDE)),
            labelled=_BATCH // 2 if method.unlabelled else _BATCH,
            number=1,
            steps=2,
            positions=range(_BATCH),
            seed=0,
            run=run,
            supervised_loss=DiceCE(),
        )
    )
    return counts[True] / _BATCH, counts[False] / _BATCH
