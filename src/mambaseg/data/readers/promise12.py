"""PROMISE12 (Litjens et al., Medical Image Analysis 18(2), 2014): which cases a folder holds.

T2-weighted prostate MR, 50 labelled cases, two classes. Layouts, recognised by their names:

    [folders/]Case00.mhd + .raw     [folders/]Case00_segmentation.mhd + .raw    the challenge's own
    [data/]Case00.h5                `image` and `label`, both (Z, H, W)         SSL4MIS's

The split is that of the lists which the Mamba-UNet repository has for it: 35 / 5 / 10 cases.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from mambaseg.data.case import Case
from mambaseg.data.readers.acdc_h5 import read_h5
from mambaseg.data.readers.nnunet import read
from mambaseg.data.readers.reader import Found, named, reader
from mambaseg.data.validation import DataError

VAL = (2, 7, 22, 31, 46)
TEST = (5, 9, 16, 30, 34, 36, 38, 43, 45, 49)
NAME = re.compile(r"(Case(\d\d))(_segmentation)?\.(mhd|h5)")


def _named(root: Path) -> Iterator[tuple[re.Match[str], Path]]:
    """Files of the data set in `root` and two levels below: the old site had three parts."""
    for folder in (root, *sorted(root.glob("[!.]*/")), *sorted(root.glob("[!.]*/[!.]*/"))):
        yield from named(folder, NAME)


@reader(
    example="PROMISE12 (Case00.mhd, Case00.raw and Case00_segmentation.mhd, or data/Case00.h5)",
    remedy="The challenge's files may be in folders. https://promise12.grand-challenge.org",
    recognises=lambda root: any(_named(root)),
)
def find_cases(root: Path) -> Iterator[Found]:
    """All labelled cases, with the part that the published lists give them."""
    images: dict[str, list[Path]] = defaultdict(list)
    labels: dict[str, list[Path]] = defaultdict(list)
    for match, path in _named(root):
        (labels if match[3] else images)[match[1]].append(path)
    for name in sorted({*images, *labels}):
        twice = [paths for paths in (images[name], labels[name]) if len(paths) > 1]
        if twice:
            problem = f"{name} is there twice, also as {twice[0][0]}"
            yield DataError(problem, twice[0][1], "Keep one of the two.")
        elif not images[name]:
            yield DataError(f"there is no {name}.mhd beside it", labels[name][0], "Add the image.")
        elif images[name][0].suffix == ".mhd" and not labels[name]:
            problem = f"the label {name}_segmentation.mhd is missing"
            remedy = "Only the training part of the challenge has labels: leave the others out."
            yield DataError(problem, images[name][0], remedy)
        else:
            number, image = int(name.removeprefix("Case")), images[name][0]
            part = "test" if number in TEST else "val" if number in VAL else "train"
            label, reading = (labels[name][0], read) if labels[name] else (image, read_h5)
            yield Case(name, name, None, None, image, label, reading, part=part)
