"""Foreign files are plain data within bounds, or an error that does not quote them."""

import json
import os
import tracemalloc

import numpy as np
import pytest
import yaml

from mambaseg.storage.untrusted import (
    ARRAY_LIMIT,
    CSV_LIMIT,
    JSON_LIMIT,
    ForeignFileError,
    printable,
    read_arrays,
    read_json,
    read_table,
    read_text,
    read_yaml,
)
from payload import armed, claiming_npy, npz, object_npy


@pytest.fixture
def written(tmp_path):
    def write(content):
        path = tmp_path / "file"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# ---- text ----------------------------------------------------------------------------------------


def test_a_pipe_is_refused_rather_than_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (read_text, read_json, read_yaml, read_table):
        with pytest.raises(ForeignFileError, match="regular"):
            read(tmp_path / "pipe")
    with pytest.raises(ForeignFileError, match="regular"):
        read_arrays(tmp_path / "pipe", ["x"], lambda *_: True)


def test_a_device_without_an_end_is_refused(tmp_path):
    (tmp_path / "run.json").symlink_to("/dev/zero")
    with pytest.raises(ForeignFileError, match="regular"):
        read_json(tmp_path / "run.json")


@pytest.mark.parametrize(("read", "limit"), [(read_json, JSON_LIMIT), (read_table, CSV_LIMIT)])
def test_a_huge_file_is_refused_before_it_is_read(tmp_path, read, limit):
    path = tmp_path / "huge"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)  # a terabyte of zeros that takes no place on the disk
    tracemalloc.start()
    with pytest.raises(ForeignFileError, match="larger than"):
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * limit


# ---- JSON and YAML -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, "[" * 500 + "]" * 500, '{"a":' * 80 + "1" + "}" * 80, "9" * 5000, '"\\ud800"',
     "1" + "0" * 30, json.dumps([0] * 300_000), "{", "", b"\xff\xfe", "{'a': 1}"],
)  # fmt: skip
def test_json_beyond_the_bounds_is_an_error(written, content):
    with pytest.raises(ForeignFileError):
        read_json(written(content))


def test_json_within_the_bounds_is_itself(written):
    value = {"a": [1, 2.5, None, True, "é"], "b": {"c": [[]]}}
    assert read_json(written(json.dumps(value))) == value
    assert read_json(written('{"x": NaN, "y": -Infinity}')) == {"x": None, "y": None}


LAUGHS = "\n".join(
    ["l0: &l0 [ha, ha]", *(f"l{i}: &l{i} [*l{i - 1}, *l{i - 1}, *l{i - 1}]" for i in range(1, 40))]
)
MERGES = "\n".join(
    ["l0: &l0 {k: v}", *(f"l{i}: &l{i} {{<<: [*l{i - 1}, *l{i - 1}]}}" for i in range(1, 40))]
)


@pytest.mark.parametrize(
    "content",
    ["- x\n" * 30_000, LAUGHS, MERGES, "a: &a [*a]", "[" * 20_000, "- " * 5000 + "x",
     "? [a]\n: b", "1: 2\na: b", "!!binary aGFsbG8=", "2001-12-14", "!!set {a, b}", "a: b: c",
     "\t- x", "*nobody", "[1, 2", "a: " + "9" * 5000],
)  # fmt: skip
@pytest.mark.timeout(20)
def test_yaml_beyond_the_bounds_is_an_error(written, content):
    with pytest.raises(ForeignFileError):
        read_yaml(written(content))


@pytest.mark.parametrize("loader", ["CSafeLoader", None])
@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:os.system [touch {}]", "!!python/object/new:os.system [touch {}]",
     "!!python/name:os.system", "!!python/module:os", "!!python/object/apply:eval ['1']"],
)  # fmt: skip
def test_yaml_makes_no_objects(written, tmp_path, tag, loader, monkeypatch):
    if loader is None:
        monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    marker = tmp_path / "ran"
    with pytest.raises(ForeignFileError, match="plain data"):
        read_yaml(written("a: " + tag.format(marker)))
    assert not marker.exists()


def test_yaml_is_not_interpolated(written, monkeypatch):
    monkeypatch.setenv("SOME_SECRET", "hush")
    text = "_target_: os.system\na: ${oc.env:SOME_SECRET}\nb: &b [1, 2]\n"
    expected = {"_target_": "os.system", "a": "${oc.env:SOME_SECRET}", "b": [1, 2]}
    assert read_yaml(written(text)) == expected
    with pytest.raises(ForeignFileError, match="alias"):
        read_yaml(written(text + "c: *b\n"))


@pytest.mark.parametrize("read", [read_json, read_yaml, read_table])
def test_messages_do_not_quote_the_file(written, read):
    secret = "machine: [api.example\n\tpassword hush, : }\n'\"x"
    with pytest.raises(ForeignFileError) as caught:
        read(written(secret))
    assert "hush" not in str(caught.value) and "example" not in str(caught.value)


# ---- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", ["a,a\n1,2\n", "a,b\n1\n", "a,b\n1,2,3\n", 'a\n"x', "a\n" + "x" * 200_000 + "\n"]
)
def test_what_is_no_table_is_an_error(written, content):
    with pytest.raises(ForeignFileError):
        read_table(written(content))


def test_a_growing_table_lacks_its_last_half_line(written):
    path = written("step,x\n1,2\n3,")
    assert read_table(path, growing=True) == (["step", "x"], [{"step": "1", "x": "2"}])


# ---- arrays --------------------------------------------------------------------------------------


def saved(array):
    import io

    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_arrays_are_what_was_written(tmp_path):
    arrays = {"a/x": np.arange(12, dtype=np.uint8).reshape(3, 2, 2), "b": np.ones(2, np.int16)}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    found = read_arrays(tmp_path / "a.npz", ["a/x", "b", "absent"], lambda *_: True)
    assert found.keys() == arrays.keys()
    assert all((found[name] == arrays[name]).all() for name in arrays)
    with pytest.raises(ForeignFileError, match="int16"):
        read_arrays(tmp_path / "a.npz", ["b"], lambda name, array: array.dtype == np.uint8)


def hostile_arrays(payload):
    yield "objects", npz({"x": object_npy(payload)})
    yield "a pickle", __import__("pickle").dumps(payload)
    yield "a .npy alone", object_npy(payload)
    yield "a terabyte", npz({"x": claiming_npy((1 << 20, 1 << 20))})
    yield "a product beyond 64 bits", npz({"x": claiming_npy((1 << 32, 1 << 32))})
    yield "negative sides", npz({"x": claiming_npy((-4, -4))})
    yield "less than it claims", npz({"x": claiming_npy((4, 8))})
    yield "more than it claims", npz({"x": claiming_npy((4,))})
    yield "text", npz({"x": claiming_npy((4,), descr="<U1")})
    yield "no array", npz({"x": b"import os"})
    yield "a deep header", npz({"x": b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000})
    yield "an unknown version", npz({"x": b"\x93NUMPY\x09\x00" + saved(np.ones(2))[8:]})
    yield "cut off", npz({"x": saved(np.ones(2))})[:-30]
    yield "nothing", b""


def test_hostile_arrays_are_refused_and_run_nothing(tmp_path):
    payload = armed(tmp_path / "ran")
    for kind, content in hostile_arrays(payload):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(ForeignFileError):
            read_arrays(tmp_path / "a.npz", ["x"], lambda *_: True)
        assert not payload.marker.exists(), kind


def test_a_bomb_is_not_unpacked(tmp_path):
    (tmp_path / "a.npz").write_bytes(npz({"x": claiming_npy((1 << 28,), bytes(1 << 28))}))
    assert (tmp_path / "a.npz").stat().st_size < 1 << 20
    tracemalloc.start()
    with pytest.raises(ForeignFileError, match="MiB"):
        read_arrays(tmp_path / "a.npz", ["x"], lambda *_: True)
    assert tracemalloc.get_traced_memory()[1] < ARRAY_LIMIT
    tracemalloc.stop()


# ---- for a terminal ------------------------------------------------------------------------------


def test_printable_text_commands_no_terminal():
    assert printable("a\x1b]52;c;aGk=\x07b\r\u202ec\ud800\u2028") == "a�]52;c;aGk=�b��c��"
    assert printable("naïve – ±\n\tDice") == "naïve – ±\n\tDice"


def test_keys_are_text_or_numbers_as_a_label_map_has_them(written):
    assert read_yaml(written("label_map: {0: 0, 85: 1}")) == {"label_map": {0: 0, 85: 1}}
    for keys in ("{1: a, b: c}", "{true: 1}", "{1.5: 1}", "{null: 1}", f"{{{1 << 70}: 1}}"):
        with pytest.raises(ForeignFileError):
            read_yaml(written(keys))
