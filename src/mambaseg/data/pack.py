"""Packs ACDC into a small folder: python -m mambaseg.data.pack ROOT OUT.

For machines to which only little can be sent. Slices keep their native size; intensities become
uint8, labels are as they were, and both are compressed without loss. What reads a pack: `packed`.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import uuid
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mambaseg.data.case import Case
from mambaseg.data.fingerprint import THREADS, digest_of, fingerprint
from mambaseg.data.geometry import Preprocessing
from mambaseg.data.readers.acdc import find_cases
from mambaseg.data.readers.packed import FORMAT, INDEX, LEVELS
from mambaseg.data.splits import PUBLISHED, make_split
from mambaseg.errors import UserError
from mambaseg.storage.files import writing
from mambaseg.storage.run_folder import file_digest
from mambaseg.storage.untrusted import ARRAY_LIMIT

NUM_CLASSES = 4
log = logging.getLogger(__name__)


def pack(root: Path, out: Path) -> dict[str, Any]:
    """Pack the data set in `root` into the new folder `out`, whole or not at all.

    Args:
        root: ACDC in any layout that `find_cases` knows.
        out: folder to be made.

    Returns:
        The index: `cases`, `splits` (name -> who is in which part), `source` (fingerprint of what
        was packed), `error` (`max` and `mean` of the intensities' rounding, in [0, 1]), `digest`.

    Raises:
        UserError: a case cannot be read or is too large, `out` exists or cannot be written.
    """
    if out.exists():
        raise UserError(f"{out} exists: choose another folder, or move this one away")
    cases = find_cases(root)
    with writing(out, otherwise="choose another folder"):
        workshop = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
        workshop.mkdir(parents=True)
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                packed = list(pool.map(partial(_pack_case, folder=workshop), cases))
            index = _index(cases, packed)
            (workshop / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
            workshop.rename(out)
        finally:
            shutil.rmtree(workshop, ignore_errors=True)
    return index


def quantise(image: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Levels 0..255 of a volume (Z, H, W), min–max to [0, 1], and how far they are off."""
    scaled = Preprocessing("paper", 1).scale_intensity(image[:, None])[:, 0]
    levels = np.rint(scaled * LEVELS).astype(np.uint8)
    return levels, np.abs(levels / np.float32(LEVELS) - scaled)


def _pack_case(case: Case, *, folder: Path) -> tuple[dict[str, Any], float, float]:
    """Write one case; return its entry of the index, and the largest and the summed error."""
    volume = case.read(NUM_CLASSES)
    assert volume.label is not None  # read() with a number of classes demands it
    levels, off = quantise(volume.image[:, 0])
    if levels.size >= ARRAY_LIMIT:
        raise UserError(
            f"{case.image_path}: {levels.size} voxels are more than a pack takes ({ARRAY_LIMIT}). "
            "Train from the data set itself."
        )
    path = folder / f"{case.id}.npz"
    # bzip2: half a per cent off LZMA on these images, and it unpacks in bounded memory
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as file:
        for name, array in (("image", levels), ("label", volume.label)):
            member = zipfile.ZipInfo(f"{name}.npy")  # of no date: the same data, the same bytes
            member.compress_type = zipfile.ZIP_BZIP2
            with file.open(member, "w") as stream:
                np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
    entry = {
        "id": case.id, "group": case.group, "spacing": volume.spacing,
        "shape": list(levels.shape), "digest": file_digest(path),
    }  # fmt: skip
    return entry, float(off.max()), float(off.sum(dtype=np.float64))


def _index(cases: list[Case], packed: list[tuple[dict[str, Any], float, float]]) -> dict[str, Any]:
    entries = [entry for entry, _, _ in packed]
    voxels = sum(int(np.prod(entry["shape"])) for entry in entries)
    return {
        "format": FORMAT,
        "source": fingerprint(cases),
        "error": {
            "max": max(largest for _, largest, _ in packed),
            "mean": sum(summed for _, _, summed in packed) / voxels,
        },
        "splits": _splits({case.patient for case in cases}),
        "cases": entries,
        "digest": digest_of(json.loads(json.dumps(entries))),
    }


def _splits(patients: set[str]) -> dict[str, Any]:
    """Who is in which part of the published splits that these patients suffice for (fold 0)."""
    splits = {}
    for name in PUBLISHED:
        try:
            split = make_split(name, patients)
        except UserError:
            continue  # a patient of it is not there
        parts = {part: list(getattr(split, part)) for part in ("train", "val", "test")}
        splits[split.name] = {"hash": split.hash, **parts}
    return splits


def main(words: list[str]) -> None:
    """Pack, and say how large and how exact it came out."""
    parser = argparse.ArgumentParser(prog="mambaseg.data.pack", description=__doc__)
    parser.add_argument("root", type=Path, help="ACDC in any layout that training knows")
    parser.add_argument("out", type=Path, help="folder to be made")
    arguments = parser.parse_args(words)
    index = pack(arguments.root.expanduser(), arguments.out.expanduser())
    size = sum(path.stat().st_size for path in arguments.out.expanduser().iterdir())
    log.info("%d cases in %s: %.1f MB (%.1f MiB); intensities are off by at most %.5f, %.5f on "
             "average", len(index["cases"]), arguments.out, size / 1e6, size / 2**20,
             index["error"]["max"], index["error"]["mean"])  # fmt: skip
    log.info("splits: %s. Train from it with data=acdc data.root=%s",
             ", ".join(index["splits"]) or "random only", arguments.out)  # fmt: skip


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
