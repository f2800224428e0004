"""`dataset.json` of nnU-Net v2, nnU-Net v1 and the Medical Segmentation Decathlon (MSD).

|          | v2                                | v1, MSD                               |
|----------|-----------------------------------|---------------------------------------|
| channels | `channel_names`: {"0": "T1", ...} | `modality`: {"0": "T1", ...}          |
| labels   | `labels`: {"background": 0, ...}  | `labels`: {"0": "background", ...}    |
| ending   | `file_ending`                     | `.nii.gz`                             |

Of v2 a label may be a region: {"whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing": 3}.
`regions_class_order` then says which value each region in turn writes over those before it; it
names the classes, which here exclude each other: `rest of whole tumor`, ..., `enhancing`.

Somebody else wrote the file: it is read within bounds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambaseg.data.formats.files import ENDINGS
from mambaseg.data.splits import listed
from mambaseg.data.validation import DataError
from mambaseg.storage.untrusted import ForeignFileError, printable, read_json

NAME = "dataset.json"
IGNORE = "ignore"  # nnU-Net's name for the value of pixels without a label
NAME_LENGTH = 100  # letters of a class; as many as a checkpoint may say
MAX_CHANNELS = 64


@dataclass(frozen=True)
class DatasetJson:
    """What a `dataset.json` says."""

    path: Path
    channels: tuple[str, ...]  # what each channel is, in the order of their numbers
    value_names: dict[int, str]  # value in the label files -> name; empty where there are none
    ignore: int | None  # the value of pixels without a label, which the file calls `ignore`
    ending: str  # of the images and labels
    count: int | None  # how many training cases there are said to be
    labels: str  # as the file has them, for messages
    regions: dict[str, list[int]] | None = None  # name -> values, where labels are regions

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels 0, 1, ...; `UserError` where each has no plain name of its own."""
        names = [self.value_names.get(value, "") for value in range(len(self.value_names))]
        plain = all(name and "${" not in name for name in names)  # which a config would replace
        if not (plain and 1 < len(set(names)) == len(names) <= 256):
            raise DataError(
                f"labels is {self.labels}, which does not give each of the values 0, 1, 2, ... a "
                "name of its own",
                self.path,
                'Regions are lists of these values, such as "whole tumor": [1, 2, 3]. Correct the '
                "file, or name the classes yourself: data.num_classes=K "
                "data.class_names=[background,...] and data.label_map={value: class, ...} for "
                "every value of the files.",
            )
        return tuple(names)


def read_dataset_json(root: Path | str) -> DatasetJson:
    """Read the file in the folder of a data set (`Dataset027_ACDC`, `Task01_BrainTumour`)."""
    path = Path(root).expanduser() / NAME
    below = listed(child.parent.name for child in path.parent.glob(f"*/{NAME}"))
    remedy = (
        "data.root names the folder of a data set in nnU-Net's layout: it holds this file, which "
        "says what channels and labels are (docs/own-data.md), beside imagesTr and labelsTr."
        f"{' Data sets are below this folder: ' if below else ''}{below}"
    )
    content = read_plain(path, dict, remedy)
    if "dataset" in content:
        remedy = "Put the files (or links) into imagesTr and labelsTr, and take the list out."
        raise DataError("lists its files under 'dataset'", path, remedy)
    channels = content.get("channel_names", content.get("modality"))
    count = len(channels) if isinstance(channels, dict) else 0
    numbers = [str(number) for number in range(count)]
    if not 1 <= count <= MAX_CHANNELS or set(channels) != set(numbers):
        raise DataError(
            "channel_names (in older files modality) does not number the channels 0, 1, ...: it "
            f"is {_short(json.dumps(channels))}",
            path,
            f'It must be like {{"0": "T1", "1": "T2"}}, at most {MAX_CHANNELS} channels.',
        )
    ending = content.get("file_ending", ".nii.gz")
    if ending not in ENDINGS:
        problem = f"file_ending is {_short(repr(ending))}, which is not read"
        raise DataError(problem, path, f"Known endings: {', '.join(ENDINGS)}.")
    labels, said = content.get("labels"), content.get("numTraining")
    ignore = _ignored_value(labels, path)
    regions = _regions(labels)
    return DatasetJson(
        path,
        channels=tuple(_short(channels[number]) for number in numbers),
        value_names=_of_regions(regions, content) if regions else _value_names(labels),
        ignore=ignore,
        ending=str(ending),
        count=said if isinstance(said, int) else None,
        labels=_short(json.dumps(labels)),
        regions=regions,
    )


def read_plain(path: Path, kind: type, remedy: str) -> Any:
    """Read a JSON file that holds a `kind`; `UserError` where it does not."""
    try:
        content = read_json(path)
    except (ForeignFileError, OSError) as error:
        missing = isinstance(error, FileNotFoundError)
        problem = "the file is missing" if missing else f"is not usable: {error}"
        raise DataError(problem, path, remedy) from error
    if not isinstance(content, kind):
        raise DataError(f"holds no {kind.__name__}", path, remedy)
    return content


def _ignored_value(labels: Any, path: Path) -> int | None:
    """The value of pixels without a label, of either version; `UserError`: not the highest one."""
    if not isinstance(labels, dict):
        return None
    numbers: list[Any] = []
    if IGNORE in labels:  # v2, whose regions are lists
        ignore = labels[IGNORE]
        for value in (value for name, value in labels.items() if name != IGNORE):
            numbers += value if isinstance(value, list) else [value]
    else:
        named = {int(key): name for key, name in labels.items() if key.isdecimal()}
        ignore = next((value for value, name in named.items() if name == IGNORE), None)
        numbers += [value for value in named if value != ignore]
    others = [number for number in numbers if type(number) is int]
    if ignore is None or (type(ignore) is int and max(others, default=0) < ignore < 256):
        return ignore
    problem = f"labels is {_short(json.dumps(labels))}, where '{IGNORE}' is not the last value"
    raise DataError(problem, path, "As in nnU-Net, give it the highest number of all, below 256.")


def _value_names(labels: Any) -> dict[int, str]:
    """Value -> name, of either version; empty where the labels are neither."""
    if not isinstance(labels, dict):
        return {}
    labels = {key: value for key, value in labels.items() if IGNORE not in (key, value)}
    if all(type(value) is int for value in labels.values()):  # v2; True is no number
        pairs = [(value, name) for name, value in labels.items()]
    elif all(isinstance(name, str) and key.isdecimal() for key, name in labels.items()):
        pairs = [(int(key), name) for key, name in labels.items()]
    else:
        return {}
    names = {value: _short(name) for value, name in pairs}
    return names if len(names) == len(pairs) else {}


def _regions(labels: Any) -> dict[str, list[int]] | None:
    """Name -> values where one of the labels is a list; None: they are classes, or neither."""
    if not isinstance(labels, dict) or not any(type(one) is list for one in labels.values()):
        return None
    lists = {_short(k): v if type(v) is list else [v] for k, v in labels.items() if k != IGNORE}
    if not all(own and all(type(v) is int and 0 <= v < 256 for v in own) for own in lists.values()):
        return None
    values = sorted({0, *(value for own in lists.values() for value in own)})
    regions = {name: own for name, own in lists.items() if own != [0]}
    return regions if values == list(range(len(values))) else None


def _of_regions(regions: dict[str, list[int]], content: dict[str, Any]) -> dict[int, str]:
    """Names of the classes that regions are made of, by the region that writes each of them."""
    order = content.get("regions_class_order")
    order = order if isinstance(order, list) and len(order) == len(regions) else []
    written = {v: name for v, name in zip(order, regions, strict=False) if type(v) is int}
    names = {0: "background"}
    for value in sorted({value for own in regions.values() for value in own if value}):
        name = written.get(value)
        alone = name and regions[name] == [value]
        names[value] = str(name) if alone else f"rest of {name}" if name else f"label {value}"
    return names


def _short(value: Any) -> str:
    """A name as it may stand in a table: one line of bounded length."""
    return printable(" ".join(str(value).split()))[:NAME_LENGTH]
