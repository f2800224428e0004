"""Writes docs/models.md and the table of docs/methods.md from configs, code and measurements.

    python docs/site/tables.py [RECORD.json of `mambaseg benchmark profile models=all`]

writes the table of learning methods, and with a record the page of networks.
"""

import sys
from pathlib import Path

import torch
from hydra.utils import get_class
from omegaconf import OmegaConf

from mambaseg.app.entry import CONF
from mambaseg.app.networks import made
from mambaseg.app.schema import EXTRAS
from mambaseg.benchmark.tables import Column, Table, number, text
from mambaseg.models import UNet
from mambaseg.storage.files import write_whole
from mambaseg.storage.untrusted import read_json
from mambaseg.training.losses import DiceCE
from mambaseg.training.methods.method import Step

DOCS = CONF.parent / "docs"

# ---- docs/models.md -----------------------------------------------------------------------------

INTRODUCTION = """\
# Networks

`make models` writes this page; do not edit it. The comment at the top of
`conf/model/<network>.yaml` describes a network; the docstrings of its module describe every
difference from the original. Tests compare everything here except the time with configs and code.

Every network accepts images of any size (a few from 32 or 64 pixels on), any number of classes,
and one or more channels. Images are padded at the bottom and right to the next multiple given here,
and the logits are cropped.
The numbers are for one channel, four classes and {size} × {size} pixels.

The optimizer of each network in `experiment=acdc_own_recipe` is in `conf/optim/own/<network>.yaml`
([protocol](protocol.md)).
"""
COSTS = """\
## Cost

GMAC: multiply-adds of all matrix products (convolutions, linear layers, attention, projections).
Scan: operations of the selective scans, 9 L D N + L D each. All: both, a multiply-add as two
operations ([performance](performance.md)).

Times: median of {repeats} calls, of one image in evaluation mode, and of a training step of two
images (forward, loss, backward, SGD). Measured by `{command}`:
{setting}.
Times are of that machine, with nothing else running. To compare two networks, measure them in turns
on yours: `mambaseg benchmark train 'models=[unet,mamba_unet]'`.
"""
HEADERS = [
    Column("network", lambda row: f"`{row['network']}`", is_number=False),
    text("what"), text("source"), text("differs from it", "differs"),
]  # fmt: skip
EXACT = [  # columns that follow from the code alone
    HEADERS[0],
    number("parameters", "parameters", ",.0f"),
    number("multiple of", "size_multiple", ".0f"),
    Column("GMAC", lambda row: f"{(row['layer_macs'] + row['other_macs']) / 1e9:.3f}"),
    Column("scan, GFLOP", lambda r: f"{r['scan_flops'] / 1e9:.3f}" if r["scan_flops"] else "–"),
    number("all, GFLOP", "flops", ".3f", 1e-9),
]
MEASURED_TIMES = [
    number("image, ms", "median_s", ".0f", 1e3),
    number("training step, ms", "step_s", ".0f", 1e3),
]


def read_header(network, config):
    """Reads the comment at the head of a network's config: what it is, `Source:`, `Differs:`.

    Raises:
        ValueError: a part is missing.
    """
    lines = config.splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    comment = " ".join(line.lstrip("# ") for line in lines[:end])
    what, _, rest = comment.partition(" Source: ")
    source, _, differs = rest.partition(" Differs: ")
    if not (what and source and differs):
        raise ValueError("a config of a network begins with a comment: summary, Source:, Differs:")
    return {"network": network, "what": what, "source": source, "differs": differs}


def networks_page(record, configs):
    """The page of all networks as Markdown, from the record of `mambaseg benchmark profile`.

    `configs` is the text of `conf/model/<network>.yaml`, by the rows' `network`.
    """
    rows, versions, hardware = record["rows"], record["versions"], record["hardware"]
    device = hardware["gpus"][0] if record["device"] == "cuda" else hardware["cpu"]
    used = ", ".join(f"{name} {said}" for name, said in record["instructions"].items())
    setting = (
        f"{device}, threads: {hardware['threads']}, {record['precision']},\n"
        f"instruction sets: {used};\n"
        f"torch {versions['torch']}, numba {versions['numba']}, {record['started'][:10]}"
    )
    names = [row["network"] for row in rows]
    headers = Table("", HEADERS, [read_header(name, configs[name]) for name in names])
    repeats = record["settings"]["repeats"]
    costs = COSTS.format(repeats=repeats, command=record["command"], setting=setting)
    parts = (INTRODUCTION.format(size=record["settings"]["size"]), headers.markdown(), costs)
    return "\n".join((*parts, Table("", [*EXACT, *MEASURED_TIMES], rows).markdown()))


# ---- docs/methods.md ----------------------------------------------------------------------------

BATCH, SIDE, CLASSES = 4, 32, 4  # of the step that is counted
COLUMNS = [
    Column("method", HEADERS[0].cell, is_number=False),
    *HEADERS[1:], text("needs"), text("passes"),
]  # fmt: skip


def write_methods(page):
    """Replaces the table of methods in a page."""
    before, rule, rest = page.read_text("utf-8").partition("\n| method | what |")
    if not rule:
        raise SystemExit(f"{page} has no table of methods (| method | what |)")
    _, _, after = rest.partition("\n\n")
    write_whole(page, f"{before}\n{methods_table()}\n{after}")


def methods_table():
    """The table as Markdown, from configs, classes and a counted step."""
    files = sorted((CONF / "method").glob("*.yaml"))
    return Table("", COLUMNS, [method_row(file) for file in files]).markdown()


def method_row(file):
    """The row of a method's config."""
    config = OmegaConf.load(file)
    kind = get_class(config._target_)
    needs = [f"{kind.count} networks" if kind.count else "2 networks or more"]
    needs = [] if kind.count == 1 else needs
    needs += ["unlabelled images"] * kind.unlabelled + [kind.needs] * bool(kind.needs)
    about = read_header(file.stem, file.read_text("utf-8"))
    with_gradient, without = passes(config)
    cost = f"{with_gradient:g}" + f" + {without:g}" * bool(without)
    return {**about, "needs": ", ".join(needs) or "–", "passes": cost}


def passes(config):
    """Images that a step sends through networks, per image of its batch: with gradient, without."""
    data = {"in_channels": 1, "num_classes": CLASSES}
    root = {"data": data, "model": {"name": "mamba_unet"}, "method": config}
    config = OmegaConf.create(root).method
    partner = config.partner
    partners = [partner] if isinstance(partner, str) else partner
    networks = [UNet(widths=(2, 2, 2, 2, 2)) for _ in range(1 + len(partners))]
    method = made(OmegaConf.to_container(config, resolve=True), *EXTRAS["method"])(networks)
    counts = {True: 0, False: 0}

    def run(function, image, *_):
        counts[torch.is_grad_enabled()] += len(image)
        return function(image)

    method.terms(
        Step(
            image=torch.rand(BATCH, 1, SIDE, SIDE),
            label=torch.randint(CLASSES, (BATCH, SIDE, SIDE)),
            labelled=BATCH // 2 if method.unlabelled else BATCH,
            number=1,
            steps=2,
            positions=range(BATCH),
            seed=0,
            run=run,
            supervised_loss=DiceCE(),
        )
    )
    method.after(1)  # of which a discriminator learns
    return counts[True] / BATCH, counts[False] / BATCH


if __name__ == "__main__":
    write_methods(DOCS / "methods.md")
    for record in map(Path, sys.argv[1:]):
        configs = {path.stem: path.read_text("utf-8") for path in (CONF / "model").glob("*.yaml")}
        measured = read_json(record)
        if sorted(row["network"] for row in measured["rows"]) != sorted(configs):
            raise SystemExit(f"{record} is not of `mambaseg benchmark profile models=all`")
        write_whole(DOCS / "models.md", networks_page(measured, configs))
