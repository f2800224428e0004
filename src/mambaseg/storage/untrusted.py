"""Files that somebody else may have written, read without executing anything and within bounds.

A file gives plain data: dicts, lists, text, numbers, booleans, None. No object is made of it, no
name in it is imported, nothing in it is interpolated, and its size and depth are bounded before
memory is spent. A `ForeignFileError` says what is wrong and never quotes the file, which may be a
link to somebody's password. An `OSError` means that a file is missing or may not be read.
"""

from __future__ import annotations

import csv
import io
import json
import math
import unicodedata
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

JSON_LIMIT = 8 << 20  # bytes; configurations and records have some kB
CSV_LIMIT = 128 << 20  # bytes; a hundred thousand rows of cases.csv have 34 MiB
ARRAY_LIMIT = 16 << 20  # bytes of one unpacked array
DEPTH = 64  # of nesting
NODES = 200_000  # of plain data
YAML_EVENTS = 20_000  # of a configuration's parser; ours have some hundred
# what reorders or hides the text around it; line feeds and tabs apart
_UNSEEN = ("Cc", "Cs", "Cf", "Zl", "Zp")
_TOO_DEEP = f"nested deeper than {DEPTH}, or too many values"


class ForeignFileError(ValueError):
    """A file is not what its place promises; the message does not quote it."""


def read_text(path: Path, *, limit: int = JSON_LIMIT) -> str:
    """Text in UTF-8 of at most `limit` bytes of a regular file, line ends as they are.

    A byte order mark, as Excel writes it, is left out.
    """
    _require_regular(path)
    with path.open("rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise ForeignFileError(f"larger than {limit >> 20} MiB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ForeignFileError(f"no text in UTF-8 (byte {error.start})") from None


def _require_regular(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise ForeignFileError("not a regular file")  # a pipe would never end


def read_json(path: Path) -> Any:
    """Plain data of a JSON file; NaN and infinities, which JSON does not have, become None."""
    text = read_text(path)
    try:
        return _plain(json.loads(text, parse_constant=lambda _: None))
    except json.JSONDecodeError as error:
        raise ForeignFileError(f"no JSON (line {error.lineno}, column {error.colno})") from None
    except ForeignFileError:
        raise
    except (RecursionError, ValueError):  # ValueError: a number with thousands of digits
        raise ForeignFileError(f"no JSON of ours ({_TOO_DEEP})") from None


def read_yaml(path: Path) -> Any:
    """Plain data of a YAML file without tags of Python and without aliases."""
    import yaml

    # libyaml's parser where it was built in: ten times faster
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = read_text(path)
    depth = 0
    try:
        # unlike `load`, this does not recurse
        for count, event in enumerate(yaml.parse(text, Loader=loader)):
            if isinstance(event, yaml.AliasEvent):  # of aliases: they would unfold to gigabytes
                raise ForeignFileError("not plain data: an alias in it")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEPTH or count > YAML_EVENTS:
                raise ForeignFileError(_TOO_DEEP)
        return _plain(yaml.load(text, Loader=loader))  # a safe loader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1})" if mark else ""
        raise ForeignFileError(f"not YAML with plain data alone{where}") from None
    except ForeignFileError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ForeignFileError(f"no YAML ({type(error).__name__})") from None


def _plain(value: Any) -> Any:
    """The value itself, when it is plain data within the bounds."""
    left: list[tuple[Any, int]] = [(value, 0)]
    count = 0
    while left:
        one, depth = left.pop()
        count += 1
        if depth > DEPTH or count > NODES:
            raise ForeignFileError(_TOO_DEEP)
        if isinstance(one, dict):
            kinds = {type(key) for key in one}
            if kinds and kinds != {str} and kinds != {int}:  # data.label_map has numbers
                raise ForeignFileError("its keys are neither all text nor all whole numbers")
            left += [(each, depth + 1) for pair in one.items() for each in pair]
        elif isinstance(one, list):
            left += [(each, depth + 1) for each in one]
        elif isinstance(one, str):
            if not one.isascii() and any(0xD800 <= ord(letter) < 0xE000 for letter in one):
                raise ForeignFileError("a text in it is no Unicode (half a surrogate pair)")
        elif isinstance(one, int) and abs(one) >= 1 << 63:
            raise ForeignFileError("a number in it is beyond 64 bits")
        elif not isinstance(one, (int, float, type(None))):
            raise ForeignFileError(f"a value in it is a {type(one).__name__}, not plain data")
    return value


def with_values(plain: Any, change: Callable[[Any], Any]) -> Any:
    """Plain data with each of its values changed: what is neither a mapping nor a list."""
    if isinstance(plain, Mapping):
        return {key: with_values(each, change) for key, each in plain.items()}
    if isinstance(plain, (list, tuple)):
        return [with_values(each, change) for each in plain]
    return change(plain)


def read_table(path: Path, *, growing: bool = False) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a CSV file; a row of another length than the heading is an error.

    With `growing` a process may be writing it: a last line without its end is left out.
    """
    text = read_text(path, limit=CSV_LIMIT)
    if growing:
        text = text[: text.rfind("\n") + 1]
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = next(reader, [])
        if len(set(columns)) != len(columns) or len(columns) > 1000:
            raise ForeignFileError("it has a column twice, or over a thousand columns")
        rows = []
        for row in filter(None, reader):
            if len(row) != len(columns):
                raise ForeignFileError(
                    f"line {reader.line_num} has {len(row)} cells, the heading {len(columns)}"
                )
            rows.append(dict(zip(columns, row, strict=True)))
    except csv.Error:
        raise ForeignFileError(f"no table (line {reader.line_num})") from None
    return columns, rows


def read_arrays(
    path: Path, wanted: Sequence[str], check: Callable[[str, npt.NDArray[Any]], bool]
) -> dict[str, npt.NDArray[Any]]:
    """The `wanted` arrays of an .npz file that it holds.

    `check`: (name, array) -> whether it has the shape and type that it must have. Sizes are
    compared with `ARRAY_LIMIT` before anything is unpacked, and the shape that an array's header
    claims with the bytes that follow it.
    """
    _require_regular(path)
    try:
        with zipfile.ZipFile(path) as file:
            members = {info.filename: info for info in file.infolist()}
            found = {name: members[f"{name}.npy"] for name in wanted if f"{name}.npy" in members}
            arrays = {name: _array(file, info) for name, info in found.items()}
    except (ForeignFileError, OSError):
        raise
    except Exception as error:  # foreign bytes make zipfile and NumPy raise nearly anything
        raise ForeignFileError(f"no .npz file of plain numbers ({type(error).__name__})") from None
    for name, array in arrays.items():
        if not check(name, array):
            raise ForeignFileError(f"an array in it is {array.dtype} {array.shape}")
    return arrays


def _array(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> npt.NDArray[Any]:
    if info.file_size > ARRAY_LIMIT:
        raise ForeignFileError(f"an array in it has more than {ARRAY_LIMIT >> 20} MiB")
    content = file.read(info)  # zipfile stops at info.file_size
    stream = io.BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ForeignFileError("an array in it has a header that numbers do not need")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject or not dtype.isnative or dtype.kind not in "biuf":
        raise ForeignFileError(f"an array in it holds {dtype}, not numbers")
    claimed = math.prod(map(int, shape)) * dtype.itemsize
    if any(side < 0 for side in shape) or claimed != len(content) - stream.tell():
        raise ForeignFileError("an array in it claims another shape than it has")
    flat = np.frombuffer(stream.read(), dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


def printable(text: str) -> str:
    """The text with what could command a terminal or hide other text replaced by `�`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        letter if letter in "\n\t" or unicodedata.category(letter) not in _UNSEEN else "�"
        for letter in text
    )


def readable(name: str) -> str:
    """The name of a file as text that can be written: bytes that are not UTF-8 become escapes."""
    return "".join(
        f"\\x{ord(letter) - 0xDC00:02x}" if "\udc80" <= letter <= "\udcff" else letter
        for letter in name
    )
