"""Files that somebody else may have written, read without executing anything and within bounds.

Whatever is read back from a run folder, a sweep's list or a cache goes through here. A file gives
plain data: dicts with text as keys, lists, text, numbers, booleans, None. No object is made of it,
no name in it is imported, nothing in it is interpolated; its size, its depth and what its aliases
unfold to are bounded before memory is spent. Messages name the problem and never quote the file,
which may be a link to somebody's password.
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

JSON_LIMIT = 8 << 20  # bytes; configurations and records have some kB
CSV_LIMIT = 32 << 20  # bytes; a hundred thousand rows have 10 MiB
ARRAY_LIMIT = 16 << 20  # bytes of one unpacked array
DEPTH = 64  # of nesting
NODES = 200_000  # of plain data
YAML_NODES = 10_000  # the same of a configuration, its aliases unfolded; ours have some hundred
# what reorders or hides the text around it; line feeds and tabs apart
_UNSEEN = ("Cc", "Cs", "Cf", "Zl", "Zp")


class ForeignFileError(ValueError):
    """A file is not what its place promises; the message does not quote it."""


def read_text(path: Path, *, limit: int = JSON_LIMIT) -> str:
    """Text in UTF-8 of at most `limit` bytes, line ends as they are.

    Raises:
        ForeignFileError: too large, not a regular file (a pipe would never end), not UTF-8.
        OSError: it is missing or may not be read.
    """
    if path.exists() and not path.is_file():
        raise ForeignFileError("not a regular file")
    with path.open("rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise ForeignFileError(f"larger than {limit >> 20} MiB")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ForeignFileError(f"no text in UTF-8 (byte {error.start})") from None


def read_json(path: Path) -> Any:
    """Plain data of a JSON file; NaN and infinities, which JSON does not have, become None.

    Raises:
        ForeignFileError: not JSON, or beyond the bounds.
        OSError: it is missing or may not be read.
    """
    text = read_text(path)
    try:
        value = json.loads(text, parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        raise ForeignFileError(f"no JSON (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise ForeignFileError(f"nested deeper than {DEPTH}") from None
    except ValueError:
        raise ForeignFileError("a number in it has thousands of digits") from None
    return _plain(value)


def read_yaml(path: Path) -> Any:
    """Plain data of a YAML file: no tags of Python, aliases only as far as they unfold to little.

    Raises:
        ForeignFileError: not YAML, something else than plain data in it, or beyond the bounds.
        OSError: it is missing or may not be read.
    """
    import yaml

    # libyaml's parser where it was built in: ten times faster
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = read_text(path)
    try:
        _bound_yaml(yaml.parse(text, Loader=loader))
        value = yaml.load(text, Loader=loader)  # a safe loader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1})" if mark else ""
        tag = "constructor" in str(error.problem)
        problem = "it asks for an object, plain data is taken only" if tag else "no YAML"
        raise ForeignFileError(problem + where) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ForeignFileError):
            raise
        raise ForeignFileError(f"no YAML ({type(error).__name__})") from None
    return _plain(value)


def _bound_yaml(events: Iterable[Any]) -> None:
    """Counts what a document unfolds to, without unfolding it.

    Aliases of aliases grow exponentially with the length of the text (the billion laughs), and so
    does what merge keys copy.
    """
    import yaml

    sizes: dict[str, int] = {}  # anchor -> nodes
    opened: list[tuple[str | None, int]] = []  # (anchor, nodes before it)
    nodes = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ForeignFileError("an alias in it refers to itself or to nothing")
            nodes += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            sizes.pop(event.anchor, None)
            opened.append((event.anchor, nodes))
            nodes += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor:
                sizes[anchor] = nodes - before
        if nodes > YAML_NODES:
            raise ForeignFileError(f"more than {YAML_NODES} values, its aliases unfolded")
        if len(opened) > DEPTH:
            raise ForeignFileError(f"nested deeper than {DEPTH}")


def _plain(value: Any) -> Any:
    """The value itself, when it is plain data within the bounds.

    Raises:
        ForeignFileError: it is not.
    """
    left: list[tuple[Any, int]] = [(value, 0)]
    count = 0
    while left:
        one, depth = left.pop()
        count += 1
        if depth > DEPTH or count > NODES:
            raise ForeignFileError(f"nested deeper than {DEPTH}, or more than {NODES} values")
        if isinstance(one, dict):
            if {type(key) for key in one} not in (
                {str},
                {int},
                set(),
            ):  # data.label_map has numbers
                raise ForeignFileError("its keys are neither all text nor all whole numbers")
            left += [(each, depth + 1) for pair in one.items() for each in pair]
        elif isinstance(one, list):
            left += [(each, depth + 1) for each in one]
        elif isinstance(one, str):
            _check_text(one)
        elif isinstance(one, int) and abs(one) >= 1 << 63:
            raise ForeignFileError("a number in it is beyond 64 bits")
        elif not isinstance(one, (int, float, type(None))):
            raise ForeignFileError(f"a value in it is a {type(one).__name__}, not plain data")
    return value


def _check_text(text: str) -> None:
    if not text.isascii() and any(0xD800 <= ord(letter) < 0xE000 for letter in text):
        raise ForeignFileError("a text in it is no Unicode (half a surrogate pair)")


def read_table(path: Path, *, growing: bool = False) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a CSV file; a row of another length than the heading is an error.

    Args:
        path: of the file.
        growing: a process may be writing it: a last line without its end is left out.

    Raises:
        ForeignFileError: beyond the bounds, or not a table.
        OSError: it is missing or may not be read.
    """
    text = read_text(path, limit=CSV_LIMIT)
    if growing:
        text = text[: text.rfind("\n") + 1]
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = next(reader, [])
        if len(set(columns)) != len(columns) or len(columns) > 1000:
            raise ForeignFileError("a column stands in it twice, or there are over a thousand")
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
    """Some arrays of an .npz file; those that it does not hold are left out.

    Sizes are compared with `ARRAY_LIMIT` before anything is unpacked, and the shape that an
    array's header claims with the bytes that follow it.

    Args:
        path: of the file.
        wanted: names of arrays.
        check: (name, array) -> whether it has the shape and type that it must have.

    Raises:
        ForeignFileError: not an .npz file of plain numbers, or beyond the bounds.
        OSError: it is missing or may not be read.
    """
    if path.exists() and not path.is_file():
        raise ForeignFileError("not a regular file")
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
    with file.open(info) as packed:
        stream = io.BytesIO(packed.read(ARRAY_LIMIT + 1))  # zipfile stops at info.file_size
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[np.lib.format.read_magic(stream)]
    shape, fortran, dtype = read_header(stream)
    left = stream.getbuffer().nbytes - stream.tell()
    if dtype.hasobject or not dtype.isnative or dtype.kind not in "biuf":
        raise ForeignFileError(f"an array in it holds {dtype}, not numbers")
    if any(side < 0 for side in shape) or _product(shape) * dtype.itemsize != left:
        raise ForeignFileError("an array in it claims another shape than it has")
    flat = np.frombuffer(stream.read(), dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


def _product(shape: Iterable[int]) -> int:
    product = 1
    for side in shape:
        product *= int(side)  # Python's integers: NumPy's would wrap around
    return product


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
    if name.isascii():
        return name
    return "".join(
        f"\\x{ord(letter) - 0xDC00:02x}" if "\udc80" <= letter <= "\udcff" else letter
        for letter in name
    )
