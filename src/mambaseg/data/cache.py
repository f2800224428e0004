"""The decoded cache: every case read, checked and intensity-scaled once, then memory-mapped.

A cache is a folder named after the content of the source files, how they are read, the intensity
scaling, the numbers of classes and channels and the format, so that another source or scaling is
another folder and a stale one is never opened. It holds

    images.npy   float32, all volumes one after the other
    labels.npy   uint8, likewise
    index.json   where each case lies, its checksums, and a digest of the index itself

It is built beside its final name and renamed when complete. Of two processes that build the same
one, the first to rename wins and the other uses that.
"""

import contextlib
import json
import logging
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mambaseg.data.case import Case
from mambaseg.data.fingerprint import THREADS, digest_of, fingerprint, source_digests
from mambaseg.data.geometry import Preprocessing
from mambaseg.data.seen import fingerprint_of
from mambaseg.data.validation import collected_warnings
from mambaseg.data.volume_cache import FILES, DamagedCacheError, Entry, VolumeCache
from mambaseg.errors import UserError
from mambaseg.storage.files import remove_abandoned, writing

FORMAT = 4
SECONDS_BETWEEN_REPORTS = 5
_TEMPORARY = ".building-"
_OTHERWISE = (
    "choose another folder with data.cache_dir=... (5 bytes per voxel, 4 more per further channel)"
)

log = logging.getLogger(__name__)

_Decoded = tuple[NDArray[np.float32], NDArray[np.uint8], tuple[float, float, float] | None, str]


def open_cache(
    cases: Sequence[Case],
    preprocessing: Preprocessing,
    *,
    cache_dir: Path,
    num_classes: int,
    channels: int = 1,
    digests: dict[str, str] | None = None,
) -> VolumeCache:
    """Open the decoded cache of these cases, building it if it is missing or damaged.

    Args:
        cases: The cases, each with a label.
        preprocessing: Its intensity scaling is applied; its geometry plays no part here.
        cache_dir: Folder that holds caches, made if needed.
        num_classes: Labels must lie in 0..num_classes-1.
        channels: C of every image.
        digests: `source_digests(cases)` where they are known already.

    Raises:
        UserError: A case cannot be read or used, or the cache cannot be written.
    """
    digests = digests or source_digests(cases)
    recipes = sorted({case.recipe for case in cases})
    files, scaling = fingerprint(cases, digests), preprocessing.intensity
    if preprocessing.window is not None:
        scaling = f"{scaling} {preprocessing.window}"
    identity = [files, recipes, scaling, num_classes, channels, FORMAT]
    folder = Path(cache_dir) / f"{preprocessing.intensity}-{digest_of(identity)}"
    damage: DamagedCacheError
    with writing(folder, otherwise=_OTHERWISE):
        for _ in range(2):  # a process that discards a damaged one may take away a new one
            if folder.exists():
                try:
                    return _open_verified(folder, digests)
                except DamagedCacheError as error:
                    log.warning("decoded cache %s is damaged (%s): building it again",
                                folder, error)  # fmt: skip
                    _discard(folder, digests)
            said: list[str] = []
            decode = partial(
                _decode, preprocessing=preprocessing, num_classes=num_classes, channels=channels,
                said=said,
            )  # fmt: skip
            _build(cases, decode, num_classes, digests, folder)
            if said:
                log.warning("%s%s", min(said),
                            f" ({len(said) - 1} more like this)" if said[1:] else "")  # fmt: skip
            try:
                return _open_verified(folder, digests)
            except DamagedCacheError as error:
                damage = error
    raise UserError(
        f"the decoded cache {folder} reads back differently than it was written ({damage}). "
        "Check the disk, or choose another folder with data.cache_dir=..."
    ) from damage


def _open_verified(folder: Path, digests: dict[str, str]) -> VolumeCache:
    cache = VolumeCache(folder)
    if {entry.case: entry.source for entry in cache.entries} != digests:
        raise DamagedCacheError("it holds other cases than its name says")
    cache.verify()
    return cache


def _discard(folder: Path, digests: dict[str, str]) -> None:
    """Remove a damaged cache; it leaves its name in one step, so nobody opens half of it.

    Where another process has built it again meanwhile, that one is put back.
    """
    grave = _workshop(folder)
    with contextlib.suppress(OSError):  # gone already, or there is a newer one
        folder.rename(grave)
        with contextlib.suppress(DamagedCacheError):
            _open_verified(grave, digests)
            grave.rename(folder)
    shutil.rmtree(grave, ignore_errors=True)


def _workshop(folder: Path) -> Path:
    """Return an unused name beside `folder`, on the same file system."""
    return folder.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")


def _build(
    cases: Sequence[Case],
    decode: Callable[[Case], _Decoded],
    num_classes: int,
    digests: dict[str, str],
    folder: Path,
) -> None:
    workshop = _workshop(folder)
    workshop.mkdir(parents=True)
    remove_abandoned(folder.parent, f"{_TEMPORARY}*")
    try:
        entries: list[Entry] = []
        with (
            _NpyWriter(workshop, "image") as images,
            _NpyWriter(workshop, "label") as labels,
        ):
            for case, (image, label, spacing, content) in zip(
                cases, _in_threads(decode, cases), strict=True
            ):
                _, image_crc = images.append(image)
                offset, label_crc = labels.append(label)
                depth, channels, height, width = image.shape
                entries.append(
                    Entry(
                        case=case.id,
                        shape=(depth, channels, height, width),
                        offset=offset,
                        spacing=spacing,
                        source=digests[case.id],
                        content=content,
                        image_crc=image_crc,
                        label_crc=label_crc,
                        class_voxels=tuple(
                            np.bincount(label.ravel(), minlength=num_classes).tolist()
                        ),
                    )
                )
        plain = [asdict(entry) for entry in entries]
        index = {"format": FORMAT, "digest": digest_of(plain), "cases": plain}
        (workshop / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
        try:
            workshop.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            log.info("decoded cache %s was built by another process meanwhile", folder)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _decode(
    case: Case,
    *,
    preprocessing: Preprocessing,
    num_classes: int,
    channels: int,
    said: list[str],
) -> _Decoded:
    with collected_warnings() as own:
        volume = case.read(num_classes, channels)
    said += own
    assert volume.label is not None  # read() with a number of classes demands it
    scaled, content = preprocessing.scale_intensity(volume.image), fingerprint_of(volume.image)
    return scaled, volume.label, volume.spacing, content


def _in_threads(decode: Any, cases: Sequence[Case]) -> Iterator[Any]:
    """Decode in parallel and in order, a few cases ahead of the writer, and log how far it is."""
    log.info("decoding %d cases once", len(cases))
    block, said = 2 * THREADS, time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(cases), block):
            yield from pool.map(decode, cases[start : start + block])
            done = min(start + block, len(cases))
            if time.monotonic() - said > SECONDS_BETWEEN_REPORTS:
                said = time.monotonic()
                log.info("decoded %d of %d cases", done, len(cases))


class _NpyWriter:
    """A one-dimensional .npy file of unknown length, written piece by piece."""

    def __init__(self, folder: Path, kind: str) -> None:
        name, self._dtype = FILES[kind]
        self._path, self._length = folder / name, 0

    def __enter__(self) -> "_NpyWriter":
        self._file: IO[bytes] = self._path.open("wb")
        self._header()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with contextlib.closing(self._file):
            if kind is None:
                self._file.seek(0)
                self._header()  # NumPy pads its headers so that the length can grow in place

    def append(self, array: NDArray[Any]) -> tuple[int, int]:
        """Write an array; return its offset in elements and the checksum of its bytes."""
        flat = np.ascontiguousarray(array, dtype=self._dtype).reshape(-1)
        offset, self._length = self._length, self._length + flat.size
        self._file.write(flat.data)
        return offset, zlib.crc32(flat.data)

    def _header(self) -> None:
        description = {
            "descr": self._dtype.str,
            "fortran_order": False,
            "shape": (self._length,),
        }
        np.lib.format.write_array_header_1_0(self._file, description)
