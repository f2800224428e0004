"""`dataset.json` of nnU-Net v2, nnU-Net v1 and the Medical Segmentation Decathlon (MSD).

|          | v2                                | v1, MSD                               |
|----------|-----------------------------------|---------------------------------------|
| channels | `channel_names`: {"0": "T1", ...} | `modality`: {"0": "T1", ...}          |
| labels   | `labels`: {"background": 0, ...}  | `labels`: {"0": "background", ...}    |
| ending   | `file_ending`                     | `.nii.gz`                             |

The file is somebody else's: it is read within bounds, and what it says is checked when it is asked
for, so that a label that is no class does not keep anybody from naming the classes himself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambaseg.data.formats.files import ENDINGS
from mambaseg.data.problems import counted
from mambaseg.data.splits import listed
from mambaseg.data.validation import DataError
from mambaseg.storage.untrusted import ForeignFileError, printable, read_json

NAME = "dataset.json"
NAME_LENGTH = 100  # letters of a class; as many as a checkpoint may say
MAX_CHANNELS = 64
THEMSELVES = (
    "Or name the classes yourself: data.num_classes=K data.class_names=[background,...] and "
    "data.label_map={value: class, ...} for every value of the files."
)


@dataclass(frozen=True)
class DatasetJson:
    """What a `dataset.json` says.

    Attributes:
        path: of the file.
        content: its plain data.
    """

    path: Path
    content: dict[str, Any]

    @property
    def channels(self) -> tuple[str, ...]:
        """What each channel is, in the order of their numbers.

        Raises:
            UserError: there are none, or they are not numbered 0, 1, ...
        """
        key = next((key for key in ("channel_names", "modality") if key in self.content), None)
        if key is None:
            raise self._wrong(
                "has no channel_names (in older files modality)",
                'Name the channels by their numbers, like "channel_names": {"0": "T1", "1": "T2"}.',
            )
        found = self.content[key]
        numbers = [str(number) for number in range(len(found) if isinstance(found, dict) else 0)]
        if not numbers or sorted(found) != sorted(numbers):
            raise self._wrong(
                f"{key} does not number the channels 0, 1, ...: it is {_short(json.dumps(found))}",
                'It must be like {"0": "T1", "1": "T2"}, numbers first.',
            )
        if len(found) > MAX_CHANNELS:
            raise self._wrong(f"names {len(found)} channels", f"At most {MAX_CHANNELS} are read.")
        return tuple(_short(found[number]) for number in numbers)

    @property
    def class_names(self) -> tuple[str, ...]:
        """What each label 0, 1, ... is called.

        Raises:
            UserError: labels that are regions (lists of values), an ignored label, values that are
                not 0, 1, ..., or no names.
        """
        found = self.content.get("labels")
        if not isinstance(found, dict) or len(found) < 2:
            raise self._wrong("labels does not name background and a class", THEMSELVES)
        regions = [name for name, value in found.items() if isinstance(value, list)]
        if regions:
            raise self._wrong(
                f"the label {_short(regions[0])!r} is a region made of several values",
                "Regions that overlap are not trained here, each voxel has one class: give each "
                f"value of the files its own name. {THEMSELVES}",
            )
        if "ignore" in found:
            raise self._wrong(
                "the label 'ignore' marks voxels without annotation",
                "They would be trained and scored as a class: annotate them, or leave such cases "
                f"and the name out. {THEMSELVES}",
            )
        by_value = _by_value(found)
        if by_value is None or sorted(by_value) != list(range(len(found))) or len(found) > 256:
            raise self._wrong(
                "the values of the labels are not 0, 1, 2, ... without gaps, once each",
                f"Correct it where it differs from the files. {THEMSELVES}",
            )
        names = tuple(_short(by_value[value]) for value in range(len(found)))
        if any("${" in name for name in names):  # a configuration would put something in its place
            raise self._wrong("the name of a label holds '${'", "Give it a plain name.")
        if len(set(names)) < len(names) or not all(names):
            raise self._wrong("two labels have the same name or none", "Name each its own way.")
        return names

    @property
    def value_names(self) -> tuple[tuple[int, str], ...]:
        """Pairs (value in the files, name); none where a name is of a region or of no class."""
        found = self.content.get("labels")
        if not isinstance(found, dict) or "ignore" in found:
            return ()
        named = _by_value(found) or {}
        return tuple((value, _short(name)) for value, name in named.items())

    @property
    def ending(self) -> str:
        """Ending of the images and labels.

        Raises:
            UserError: files with it are not read.
        """
        ending = self.content.get("file_ending", ".nii.gz")
        if ending not in ENDINGS:
            raise self._wrong(
                f"file_ending is {_short(ending)!r}, which is not read",
                f"Known endings: {', '.join(ENDINGS)}.",
            )
        return str(ending)

    @property
    def count(self) -> int | None:
        """How many training cases there are said to be."""
        found = self.content.get("numTraining")
        return found if isinstance(found, int) else None

    def _wrong(self, problem: str, remedy: str) -> DataError:
        return DataError(printable(problem), self.path, remedy)


def read_dataset_json(root: Path | str) -> DatasetJson:
    """Read the file of a data set.

    Args:
        root: its folder (`Dataset027_ACDC`, `Task01_BrainTumour`).

    Raises:
        UserError: it is missing, or is not what it should be.
    """
    path = Path(root).expanduser() / NAME
    remedy = "It says what channels and labels are (nnU-Net v1 or v2, MSD): docs/own-data.md."
    try:
        content = read_json(path)
    except FileNotFoundError as error:
        below = sorted(child.parent for child in path.parent.glob(f"*/{NAME}"))
        if below:
            names = listed(child.name for child in below)
            problem = f"{counted(len(below), 'data set')} below this folder: {names}"
            remedy = f"Point data.root at one of them, such as {below[0]}."
            raise DataError(problem, path.parent, remedy) from error
        raise DataError(
            "the file is missing",
            path,
            "Point data.root at the folder of a data set in nnU-Net's layout: it holds the file "
            "beside imagesTr and labelsTr.",
        ) from error
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
        raise DataError(problem, path, "Check its permissions, links and the disk.") from error
    except ForeignFileError as error:
        raise DataError(f"is not usable: {error}", path, remedy) from error
    if not isinstance(content, dict):
        raise DataError("holds no names and values", path, remedy)
    if "dataset" in content:
        raise DataError(
            "lists its files under 'dataset'",
            path,
            "Only files in imagesTr and labelsTr are read: put them (or links) there, and take the "
            "list out.",
        )
    return DatasetJson(path, content)


def _by_value(labels: dict[str, Any]) -> dict[int, Any] | None:
    """Value -> name, of either version; None where it is neither."""
    if all(type(value) is int for value in labels.values()):  # v2; True is no number
        names = {value: name for name, value in labels.items()}
        return names if len(names) == len(labels) else None
    if all(isinstance(value, str) and key.isdecimal() for key, value in labels.items()):
        names = {int(key): name for key, name in labels.items()}
        return names if len(names) == len(labels) else None
    return None


def _short(value: Any) -> str:
    """A name as it may stand in a table: one line of bounded length."""
    return printable(" ".join(str(value).split()))[:NAME_LENGTH]
