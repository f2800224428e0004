"""The page of all networks, docs/models.md: what they are, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mambaseg.benchmark.networks import PROCESSOR_CALLS

Row = Mapping[str, Any]
INTRODUCTION = """\
# Networks

Made by `make models`; do not edit. What a network is stands in the comment at the head of its leaf,
`conf/model/<network>.yaml`; the long form, with every difference from the original, in the
docstrings of its module. Tests compare everything here but the time with leaves and code.

Every network takes images of any size: those that do not fit are padded at the bottom and right to
the next multiple given here, and the logits are cropped. Any number of classes, one or more
channels; the numbers are for one channel, four classes and {size} × {size} pixels.

What optimizer each has in `experiment=acdc_own_recipe` stands in `conf/optim/own/<network>.yaml`
([protocol](protocol.md)).
"""
COSTS = """\
## Cost

GMAC: multiply-adds of all matrix products (convolutions, linear layers, attention, projections).
Scan: operations of the selective scans, 9 L D N + L D each. All: both, a multiply-add as two
([performance](performance.md)).

CPU: processor time of one image in evaluation mode, the least of {calls} calls; on one thread, what
an idle machine takes. Measured by `{command}`:
{setting}. Other programs still disturb it through caches and clock: take it as an order of
magnitude. Ratios to rely on come from `python src/benchmark.py inference` on an idle machine.
"""


@dataclass(frozen=True)
class Header:
    """What the comment at the head of a leaf says.

    Attributes:
        summary: what the network is.
        source: the paper.
        differs: from the original.
    """

    summary: str
    source: str
    differs: str


def read_header(text: str) -> Header:
    """Reads the comment at the head of a leaf: a summary, `Source: ...`, `Differs: ...`.

    Raises:
        ValueError: a part is missing.
    """
    lines = text.splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    comment = " ".join(line.lstrip("# ") for line in lines[:end])
    summary, found, rest = comment.partition(" Source: ")
    source, also, differs = rest.partition(" Differs: ")
    if not (summary and found and source and also and differs):
        raise ValueError("a leaf of conf/model begins with a comment: summary, Source:, Differs:")
    return Header(summary, source, differs)


def networks_page(
    rows: Sequence[Row],
    headers: Mapping[str, Header],
    *,
    size: int,
    command: str,
    setting: str,
) -> str:
    """The page as Markdown.

    Args:
        rows: of `profile_networks`.
        headers: of the leaves, by the rows' `network`.
        size: side of the image that was measured, pixels.
        command: that measured.
        setting: machine, versions and date of the time.
    """
    table = [
        "| network | parameters | multiple of | GMAC | scan, GFLOP | all, GFLOP | CPU, ms |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(f"{exact_cells(row)} {1e3 * row['cpu_s']:.0f} |" for row in rows),
    ]
    return "\n".join(
        [
            INTRODUCTION.format(size=size),
            "| network | what | source | differs from it |",
            "|---|---|---|---|",
            *(header_cells(row["network"], headers[row["network"]]) for row in rows),
            "",
            COSTS.format(calls=PROCESSOR_CALLS, command=command, setting=setting),
            *table,
            "",
        ]
    )


def header_cells(network: str, header: Header) -> str:
    """The row that says what a network is."""
    return f"| `{network}` | {header.summary} | {header.source} | {header.differs} |"


def exact_cells(row: Row) -> str:
    """The cells of a row that follow from the code alone, without the time."""
    macs = row["layer_macs"] + row["other_macs"]
    scan = f"{row['scan_flops'] / 1e9:.3f}" if row["scan_flops"] else "–"
    return (
        f"| `{row['network']}` | {row['parameters']:,} | {row['size_multiple']} "
        f"| {macs / 1e9:.3f} | {scan} | {row['flops'] / 1e9:.3f} |"
    )
