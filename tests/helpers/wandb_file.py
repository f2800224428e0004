"""Reads what W&B wrote offline: the records of a run's .wandb file, without wandb's own tools."""

import json
import struct
import time
from pathlib import Path
from typing import Any

BLOCK = 32768  # LevelDB's log: chunks of (CRC u32, length u16, type u8), none across a block's end
LAST_CHUNK = (1, 4)  # of a record: FULL or LAST, as opposed to FIRST and MIDDLE


def records(path: Path):
    """Every record of the file, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts = path.read_bytes(), 7, b""  # W&B's own header has seven bytes
    while at + 7 <= len(content):
        if BLOCK - at % BLOCK < 7:  # the rest of a block is too short for a chunk
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in LAST_CHUNK:
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def read_run(folder: Path, *, patience: float = 20.0) -> dict[str, Any]:
    """What one offline run says: run, config, history (its rows), summary, exit_code.

    Args:
        folder: the run folder; it must hold exactly one offline run that `wandb sync` would take.
        patience: s; W&B's own process writes the end of a run a moment after it has finished.
    """
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + patience
    while (said := _said(path))["exit_code"] is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return said


def _said(path: Path) -> dict[str, Any]:
    said: dict[str, Any] = {"config": {}, "history": [], "summary": {}, "exit_code": None}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            said["run"] = record.run
            said["config"] |= _items(record.run.config.update)
        elif kind == "config":
            said["config"] |= _items(record.config.update)
        elif kind == "summary":
            said["summary"] |= _items(record.summary.update)
        elif kind == "history":
            said["history"].append(_items(record.history.item))
        elif kind == "exit":
            said["exit_code"] = record.exit.exit_code
    return said


def _items(items) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in items:
        *outer, last = item.nested_key or [item.key]  # an image is spread over keys of its own
        inner = values
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = json.loads(item.value_json)
    return values


def curves(said: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """The history as (W&B's own step, what was logged), without W&B's clock."""
    return [
        (row["_step"], {k: v for k, v in row.items() if not k.startswith("_")})
        for row in said["history"]
    ]
