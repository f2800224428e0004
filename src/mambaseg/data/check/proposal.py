"""The config that data-check proposes, ready to be used or changed (rules: docs/own-data.md)."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import numpy as np

from mambaseg.data.check.dataset import Examined, Report
from mambaseg.data.classes import IGNORED
from mambaseg.data.plan import plan_2d
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
    """Return the content of conf/data/<name>.yaml; None without a case that can be used.

    `memory` is bytes that a training may use, and what they are; None asks the machine.
    """
    usable = [one for one in report.examined if one.digest is not None]
    if report.layout is None or not usable:
        return None
    layout, root, asked = report.layout, report.root, report.layout.reader.split
    counts = np.array([one.label_counts for one in usable])  # (cases, 256)
    ignore, regions = layout.config.get("ignore_label"), layout.regions(root)
    if any(one.case.ignore is not None for one in usable):
        counts[:, IGNORED] = 0
    values = [int(value) for value in np.flatnonzero(counts.sum(axis=0))]
    names, classes, mapping = _classes(report, values)
    longer = median(max(one.shape[2:]) for one in usable)
    size = int(min(max(-(-longer // MULTIPLE) * MULTIPLE, SMALLEST), LARGEST))
    available, what = memory or memory_at_hand()
    read_with = getattr(usable[0].case.reader, "keywords", {})  # of pictures
    config: dict[str, Any] = {
        "name": name,
        "title": readable(root.absolute().name).replace("${", "-"),
        "root": str(root.absolute()).replace("${", "\\${"),
        "split": asked(root) if asked else layout.config.get("split", "random"),
        "class_names": list(names),
        "num_classes": len(names),
        "label_map": mapping,
        **({"masks": "instances"} if read_with.get("masks") == "instances" else {}),
        **({"regions": regions} if regions else {}),
        **({"ignore_label": ignore} if type(ignore) is int else {}),
        **({"labels": report.labels} if report.labels != "dense" else {}),
        "in_channels": _channels(usable),
        **({"window": None} if sum(one.narrow for one in usable) * 2 > len(usable) else {}),
        "size": size,
        "batch_size": int(min(max(available // (BYTES_PER_PIXEL * size**2), 1), MOST_SLICES)),
    }
    comments = {
        "size": "  # covers the median image",
        "batch_size": f"  # mamba_unet in float32 at {BYTES_PER_PIXEL // 1000} kB per pixel in "
        f"{what}, at most {MOST_SLICES}",
        "patient_pattern": "  # names begin or end alike: is this the patient?",
    }
    if report.alike and "patient_pattern" in layout.config:
        config["patient_pattern"] = report.alike.pattern
    lines = [
        f"# Proposed by mambaseg check: {report.summary.partition(' in ')[0]}.",
        *_statistics(usable),
        *_shares(counts, names, classes),
        *_regions(counts, regions),
        *_plan(usable, len(names)),
    ]
    if len(values) > MOST_CLASSES:
        lines.append(f"# The labels hold {len(values)} values: are they labels?")
    if len(values) > 2 and values == [*range(len(values) - 1), IGNORED]:
        lines.append("# Does 255 mark pixels without a label? Then check with --ignore-label 255.")
    if not report.ok:
        lines.append("# Errors were found, which training may stop at.")
    lines += ["defaults:", f"  - {layout.name}", "  - _self_"]
    lines += [f"{key}: {_yaml(value)}{comments.get(key, '')}" for key, value in config.items()]
    return "\n".join(lines) + "\n"


def _channels(usable: Sequence[Examined]) -> int:
    """How many channels most images have; one, where all are pictures without colours."""
    if all(one.grey for one in usable):
        return 1
    return Counter(one.shape[1] for one in usable).most_common(1)[0][0]


def _classes(
    report: Report, values: Sequence[int]
) -> tuple[Sequence[str], dict[int, int], dict[int, int] | None]:
    """Names of the classes, class -> value as it was counted, and `data.label_map`."""
    assert report.layout is not None
    if report.class_names is not None:
        same = {index: index for index in range(len(report.class_names))}
        return report.class_names, same, report.layout.config.get("label_map")
    ordered = sorted({0, *values})
    mapped = ordered != list(range(len(ordered))) and len(values) <= MOST_CLASSES
    classes = dict(enumerate(ordered if mapped else range(max(2, ordered[-1] + 1))))
    given = report.layout.config.get("class_names")
    if isinstance(given, list) and len(given) == len(classes):
        names = tuple(map(str, given))
    else:
        names = ("background", *(f"class_{index}" for index in range(1, len(classes))))
    proposed = {value: k for k, value in classes.items()}
    return names, classes, proposed if mapped else report.layout.config.get("label_map")


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


def _statistics(usable: Sequence[Examined]) -> Iterator[str]:
    """Voxel size and extent of the images: smallest, median, largest."""
    known = [one.spacing for one in usable if one.spacing is not None]
    between, rows, columns = map(_spread, zip(*known, strict=True)) if known else 3 * ["unknown"]
    yield f"# Voxel size in mm, min/median/max: between slices {between}, rows {rows}, columns"
    yield f"#   {columns}; known of {len(known)} of {len(usable)} cases."
    depth, _, rows, columns = map(_spread, zip(*(one.shape for one in usable), strict=True))
    yield f"# Extent, min/median/max: {depth} slices, {rows} rows, {columns} columns."


def _plan(usable: Sequence[Examined], num_classes: int) -> Iterator[str]:
    """What nnU-Net would plan, where all voxel sizes are known."""
    known = [(one.shape, one.spacing) for one in usable if one.spacing is not None]
    if len(known) < len(usable):
        return
    shapes = [(shape[0], *shape[2:]) for shape, _ in known]
    plan = plan_2d(shapes, [spacing for _, spacing in known], num_classes=num_classes)
    sides = " × ".join(map(str, plan.patch))
    pixel = " × ".join(f"{side:.3g}" for side in plan.spacing)
    yield f"# nnU-Net's own plan in 2-D: patches of {sides} pixels of {pixel} mm, batches of"
    yield f"#   {plan.batch}, {len(plan.strides)} stages. experiment=nnunet_2d plans like this."


def _spread(values: Sequence[float]) -> str:
    return "/".join(f"{value:.4g}" for value in (min(values), median(values), max(values)))


def _shares(counts: np.ndarray, names: Sequence[str], classes: dict[int, int]) -> Iterator[str]:
    """How much of the voxels each class is, and in how many cases it occurs."""
    yield "# Classes, share of voxels and of cases:"
    for index, name in enumerate(names):
        of_class = counts[:, classes[index]]
        share, cases = of_class.sum() / counts.sum(), np.count_nonzero(of_class) / len(counts)
        yield f"#   {index} {' '.join(name.split())}: {share:.2%}, {cases:.0%}"


def _regions(counts: np.ndarray, regions: Any) -> Iterator[str]:
    """Likewise of regions, which overlap."""
    if regions:
        yield "# Regions, which are scored in place of the classes:"
    for name, labels in (regions or {}).items():
        of_region = counts[:, labels].sum(axis=1)
        share, cases = of_region.sum() / counts.sum(), np.count_nonzero(of_region) / len(counts)
        yield f"#   {' '.join(name.split())}: {share:.2%}, {cases:.0%}"


def _yaml(value: Any) -> str:
    """A value on one line; words that YAML would take for something else are quoted."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes `1e4` too: text for PyYAML, a number for OmegaConf and YAML 1.2."""

    exponent = re.compile(r"[-+]?[\d._]+[eE][-+]?\d+$")
    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+.0123456789"))
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n...\n").strip()
