"""What data-check proposes: a leaf of conf/data that fits a data set, ready to be used or changed.

| value         | rule |
|---------------|------|
| `class_names` | of the layout or dataset.json; otherwise background, class_1, ... |
| `label_map`   | where nobody named the classes and the values are not 0..K-1: in their order |
| `patient_pattern` | where names look like several cases of one patient |
| `size`        | multiple of 32 that covers the median of the longer in-plane sides, 64 to 512 |
| `batch_size`  | as many slices as the memory takes (`BYTES_PER_PIXEL`), at most 24 |
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import numpy as np

from mambaseg.data.check_report import Report
from mambaseg.data.examined import Examined
from mambaseg.storage.untrusted import readable

MULTIPLE, SMALLEST, LARGEST = 32, 64, 512  # of the side of the square
# A training step of mamba_unet in float32 takes 6.9 kB for each pixel of a batch more (peak of the
# process from 1 to 3 images of 224 x 224, torch 2.13 on a CPU); the rest is for what comes with it.
BYTES_PER_PIXEL = 10_000
SHARE_OF_GPU, SHARE_OF_RAM = 0.8, 0.5
MOST_SLICES = 24  # the published batch
MOST_CLASSES = 64  # more distinct values are no labels, but grey
GIB = 2**30


def propose(report: Report, name: str, *, memory: tuple[int, str] | None = None) -> str | None:
    """The content of conf/data/<name>.yaml; None without a case that can be used.

    Args:
        report: of `check_dataset`.
        name: of the leaf.
        memory: bytes that a training may use, and what they are; None asks the machine.
    """
    usable = [one for one in report.examined if one.digest is not None]
    if report.layout is None or not usable:
        return None
    layout, root = report.layout, report.root
    counts = np.array([one.label_counts for one in usable])  # (cases, 256)
    values = [int(value) for value in np.flatnonzero(counts.sum(axis=0))]
    names = report.class_names
    mapping = None if names or len(values) > MOST_CLASSES else _label_map(values)
    if names is None:
        classes = len(mapping) if mapping else max(values, default=0) + 1
        names = ("background", *(f"class_{index}" for index in range(1, max(classes, 2))))
    size = _size(usable)
    batch, why = _batch_size(size, memory or memory_at_hand())
    leaf: dict[str, Any] = {
        "name": name,
        "title": readable(root.absolute().name).replace("${", "-"),
        "root": str(root.absolute()).replace("${", "\\${"),
        "split": layout.split(root),
        "class_names": list(names),
        "num_classes": len(names),
        "label_map": mapping,
        "in_channels": Counter(one.shape[1] for one in usable).most_common(1)[0][0],
        "size": size,
        "batch_size": batch,
    }
    comments = {"size": "covers the median image", "batch_size": why}
    if layout.names_patients and report.patient_pattern:
        leaf["patient_pattern"] = report.patient_pattern
        comments["patient_pattern"] = "names begin or end alike: is this the patient?"
    lines = [
        f"# Proposed by data-check: {report.summary.partition(' in ')[0]}.",
        *_statistics(usable),
        *_frequencies(counts, names, mapping),
    ]
    if len(values) > MOST_CLASSES:
        lines.append(f"# The labels hold {len(values)} values: are they labels?")
    if not report.ok:
        lines.append("# Errors were found, which training may stop at.")
    lines += ["defaults:", f"  - {layout.name}", "  - _self_"]
    for key, value in leaf.items():
        comment = f"  # {comments[key]}" if key in comments else ""
        lines.append(f"{key}: {_yaml(value)}{comment}")
    return "\n".join(lines) + "\n"


def _label_map(values: Sequence[int]) -> dict[int, int] | None:
    """Values in their order as classes, 0 being background; None where they are classes."""
    ordered = sorted({0, *values})
    if ordered == list(range(len(ordered))):
        return None
    return {value: index for index, value in enumerate(ordered)}


def _size(usable: Sequence[Examined]) -> int:
    longer = median(max(one.shape[2:]) for one in usable)
    return int(min(max(-(-longer // MULTIPLE) * MULTIPLE, SMALLEST), LARGEST))


def _batch_size(size: int, memory: tuple[int, str]) -> tuple[int, str]:
    """Slices of a batch, and the rule in words."""
    available, what = memory
    batch = int(min(max(available // (BYTES_PER_PIXEL * size * size), 1), MOST_SLICES))
    return batch, (
        f"mamba_unet in float32 at {BYTES_PER_PIXEL // 1000} kB per pixel in {what}, "
        f"at most {MOST_SLICES}"
    )


def memory_at_hand() -> tuple[int, str]:
    """Bytes that a training may use here, and what they are in words."""
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        return int(SHARE_OF_GPU * total), f"{SHARE_OF_GPU:.0%} of {total / GIB:.0f} GiB on the GPU"
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not every system tells
        total = 8 * GIB
    return int(SHARE_OF_RAM * total), f"{SHARE_OF_RAM:.0%} of {total / GIB:.0f} GiB (no GPU)"


# ---- comments -----------------------------------------------------------------------------------


def _statistics(usable: Sequence[Examined]) -> Iterator[str]:
    """Voxel size and extent of the images: smallest, median, largest."""
    spacings = [one.spacing for one in usable if one.spacing is not None]
    if spacings:
        sides = [_spread([spacing[axis] for spacing in spacings]) for axis in range(3)]
        between, rows, columns = sides
        yield f"# Voxel size in mm, min/median/max: between slices {between}, rows {rows}, columns"
        yield f"#   {columns}; known of {len(spacings)} of {len(usable)} cases."
    else:
        yield "# Voxel size: unknown."
    depth, _, rows, columns = (_spread([one.shape[axis] for one in usable]) for axis in range(4))
    yield f"# Extent, min/median/max: {depth} slices, {rows} rows, {columns} columns."


def _spread(values: Sequence[float]) -> str:
    return "/".join(f"{value:.4g}" for value in (min(values), median(values), max(values)))


def _frequencies(
    counts: np.ndarray, names: Sequence[str], mapping: dict[int, int] | None
) -> Iterator[str]:
    """How much of the voxels each class is, and in how many cases it occurs."""
    yield "# Classes, share of voxels and of cases:"
    values = {index: value for value, index in mapping.items()} if mapping else {}
    total = int(counts.sum())
    for index, name in enumerate(names):
        of_class = counts[:, values.get(index, index)]
        voxels, cases = of_class.sum() / total, np.count_nonzero(of_class) / len(counts)
        yield f"#   {index} {' '.join(name.split())}: {voxels:.2%}, {cases:.0%}"


def _yaml(value: Any) -> str:
    """A value on one line; words that YAML would take for something else are quoted."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes `1e4` too: text for PyYAML, a number for OmegaConf and YAML 1.2."""

    exponent = re.compile(r"[-+]?[\d._]+[eE][-+]?\d+$")
    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+.0123456789"))
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n...\n").strip()
