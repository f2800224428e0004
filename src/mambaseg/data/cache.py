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
import logging
import math
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mambaseg.data.case import Case
from mambaseg.data.fingerprint import THREADS, name_as_read, sealed, source_digests, unsealed
from mambaseg.data.geometry import Preprocessing
from mambaseg.data.seen import fingerprints_of
from mambaseg.data.validation import collected_warnings
from mambaseg.errors import UserError
from mambaseg.storage.files import remove_abandoned, writing

FORMAT = 5
SECONDS_BETWEEN_REPORTS = 5
_FILES: dict[str, tuple[str, np.dtype[Any]]] = {
    "image": ("images.npy", np.dtype("<f4")),
    "label": ("labels.npy", np.dtype("u1")),
}
_TEMPORARY = ".building-"
_ATTEMPTS = 3  # a process that discards a damaged cache may take away a new one

log = logging.getLogger(__name__)

T = TypeVar("T")


class DamagedCacheError(Exception):
    """A cache folder does not hold what its index promises."""


@dataclass(frozen=True)
class Entry:
    """Where one case lies in the two flat arrays, and what it must look like there."""

    case: str
    shape: tuple[int, int, int, int]  # (Z, C, H, W)
    offset: int  # in voxels of one channel
    spacing: tuple[float, float, float] | None  # mm (z, y, x)
    source: str  # content hash of the case's files
    content: str  # what its image shows, see `seen.fingerprints_of`
    image_crc: int
    label_crc: int
    class_voxels: tuple[int, ...]  # of each class 0..K-1
    frames: int  # of a cine, one after the other along Z

    @property
    def depth(self) -> int:
        """How many slices a frame has."""
        return self.shape[0] // self.frames

    @property
    def label_shape(self) -> tuple[int, int, int]:
        """(Z, H, W)."""
        depth, _, height, width = self.shape
        return depth, height, width

    @property
    def pixel(self) -> tuple[float, float] | None:
        """Height and width of a pixel in mm."""
        return None if self.spacing is None else self.spacing[1:]

    @property
    def unlabelled(self) -> int:
        """How many voxels have no label."""
        return self.stop - self.offset - sum(self.class_voxels)

    @property
    def stop(self) -> int:
        """Offset of what follows."""
        return self.offset + math.prod(self.label_shape)


_Decoded = tuple[NDArray[Any], NDArray[Any], Entry]  # image, label, where they are to lie


class VolumeCache:
    """A complete cache folder, opened read-only; `DamagedCacheError` where it is not one.

    Only the folder's path is pickled: a worker process maps the files itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.entries = _entries(unsealed(folder / "index.json"))
            self._positions = {entry.case: i for i, entry in enumerate(self.entries)}
            self._arrays = {kind: self._map(kind) for kind in _FILES}
        except Exception as error:  # foreign bytes make NumPy raise nearly anything
            raise DamagedCacheError(str(error) or type(error).__name__) from error

    def __reduce__(self) -> tuple[type["VolumeCache"], tuple[Path]]:
        return VolumeCache, (self.folder,)

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def position(self, case: str) -> int:
        """Return the number of a case, given its id."""
        return self._positions[case]

    def entry(self, case: str) -> Entry:
        """Return the entry of a case, given its id."""
        return self.entries[self._positions[case]]

    def image(self, number: int) -> NDArray[np.float32]:
        """Return the intensity-scaled image (Z, C, H, W) of a case as a read-only view."""
        entry = self.entries[number]
        return self._flat("image", entry).reshape(entry.shape)

    def label(self, number: int) -> NDArray[np.uint8]:
        """Return the label (Z, H, W) of a case as a read-only view."""
        entry = self.entries[number]
        return self._flat("label", entry).reshape(entry.label_shape)

    def verify(self) -> None:
        """Compare every stored voxel with its checksum; `DamagedCacheError` for a difference."""

        def intact(entry: Entry) -> bool:
            found = (zlib.crc32(self._flat(kind, entry).data) for kind in _FILES)
            return tuple(found) == (entry.image_crc, entry.label_crc)

        with ThreadPoolExecutor(THREADS) as pool:
            for entry, same in zip(self.entries, pool.map(intact, self.entries), strict=True):
                if not same:
                    raise DamagedCacheError(f"the data of {entry.case} have changed")

    def _map(self, kind: str) -> NDArray[Any]:
        name, dtype = _FILES[kind]
        array = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        length = self.entries[-1].stop * self._channels(kind)
        if array.dtype != dtype or array.shape != (length,):
            raise ValueError(f"{name} holds {array.dtype} {array.shape}, not {dtype} ({length},)")
        return np.asarray(array)  # a plain view of the map: memmap's own slicing is slow

    def _channels(self, kind: str) -> int:
        return self.entries[0].shape[1] if kind == "image" else 1

    def _flat(self, kind: str, entry: Entry) -> NDArray[Any]:
        channels = self._channels(kind)
        return self._arrays[kind][entry.offset * channels : entry.stop * channels]


def _entries(cases: list[dict[str, Any]]) -> tuple[Entry, ...]:
    """The volumes follow each other, so a case never shows a part of another one."""
    entries: list[Entry] = []
    for values in cases:
        spacing = None if values["spacing"] is None else tuple(map(float, values["spacing"]))
        shape, voxels = tuple(values["shape"]), tuple(values["class_voxels"])
        known: Any = {"shape": shape, "spacing": spacing, "class_voxels": voxels}
        entry = Entry(**{**values, **known})
        if entry.offset != (entries[-1].stop if entries else 0):
            raise ValueError(f"the entry of {entry.case} in index.json is impossible")
        entries.append(entry)
    return tuple(entries)


def open_cache(
    cases: Sequence[Case],
    preprocessing: Preprocessing,
    *,
    cache_dir: Path,
    num_classes: int,
    channels: int = 1,
) -> VolumeCache:
    """Open the decoded cache of these labelled cases, building it if it is missing or damaged.

    Of the preprocessing only the intensity scaling is applied; `channels` is C of every image.
    `UserError` where a case cannot be used or the cache cannot be written.
    """
    digests = source_digests(cases)
    scaling = preprocessing.intensity, preprocessing.window, preprocessing.ct
    name = name_as_read(cases, digests, *scaling, num_classes, channels, FORMAT)
    folder = Path(cache_dir) / f"{preprocessing.intensity}-{name}"
    remarks: list[str] = []

    def decode(case: Case) -> _Decoded:
        with collected_warnings() as own:
            volume = case.read(num_classes, channels)
        remarks.extend(own)
        assert volume.label is not None  # read() with a number of classes demands it
        frames = np.split(volume.image, volume.frames)
        scaled = np.concatenate([preprocessing.scale_intensity(one) for one in frames])
        image, label = (
            np.ascontiguousarray(array, dtype=dtype)
            for array, (_, dtype) in zip((scaled, volume.label), _FILES.values(), strict=True)
        )
        counts = np.bincount(label.ravel(), minlength=num_classes)[:num_classes]
        entry = Entry(
            case=case.id,
            shape=image.shape,
            offset=0,  # the writer's
            spacing=volume.spacing,
            source=digests[case.id],
            content=fingerprints_of(volume),
            image_crc=zlib.crc32(image.data),
            label_crc=zlib.crc32(label.data),
            class_voxels=tuple(counts.tolist()),
            frames=volume.frames,
        )
        return image, label, entry

    room = "5 bytes per voxel, 4 more per further channel"
    opened = partial(_open_verified, digests=digests)
    with writing(folder, otherwise=f"choose another folder with data.cache_dir=... ({room})"):
        for attempt in range(_ATTEMPTS):
            if not folder.exists():
                remarks.clear()
                _build(cases, decode, folder)
                if remarks:
                    more = f" ({len(remarks) - 1} more like this)" if remarks[1:] else ""
                    log.warning("%s%s", min(remarks), more)
            try:
                return opened(folder)
            except DamagedCacheError as error:
                if attempt == _ATTEMPTS - 1:
                    raise UserError(
                        f"the decoded cache {folder} reads back differently than it was written "
                        f"({error}). Check the disk, or choose another folder with "
                        "data.cache_dir=..."
                    ) from error
                log.warning("decoded cache %s is damaged (%s): building it again", folder, error)
                _discard(folder, opened)
    raise AssertionError  # the last attempt returns or raises


def _open_verified(folder: Path, digests: dict[str, str]) -> VolumeCache:
    cache = VolumeCache(folder)
    if {entry.case: entry.source for entry in cache.entries} != digests:
        raise DamagedCacheError("it holds other cases than its name stands for")
    cache.verify()
    return cache


def _discard(folder: Path, opened: Callable[[Path], VolumeCache]) -> None:
    """Remove a damaged cache in one step; put it back if another process has built it again."""
    grave = _beside(folder)
    with contextlib.suppress(OSError):  # gone already, or there is a newer one
        folder.rename(grave)
        with contextlib.suppress(DamagedCacheError):
            opened(grave)
            grave.rename(folder)
    shutil.rmtree(grave, ignore_errors=True)


def _beside(folder: Path) -> Path:
    """Return an unused name on the same file system."""
    return folder.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")


def _build(cases: Sequence[Case], decode: Callable[[Case], _Decoded], folder: Path) -> None:
    workshop = _beside(folder)
    workshop.mkdir(parents=True)
    remove_abandoned(folder.parent, f"{_TEMPORARY}*")
    try:
        entries: list[Entry] = []
        voxels = 0
        with contextlib.ExitStack() as stack:
            images, labels = files = [
                stack.enter_context((workshop / name).open("wb")) for name, _ in _FILES.values()
            ]
            _write_headers(files, (0, 0))  # how long they become shows at the end
            for image, label, entry in _in_threads(decode, cases):
                images.write(image.data)
                labels.write(label.data)
                entries.append(replace(entry, offset=voxels))
                voxels += label.size
            _write_headers(files, (voxels * entries[0].shape[1], voxels))
        index = sealed([asdict(entry) for entry in entries])
        (workshop / "index.json").write_text(index, encoding="utf-8")
        try:
            workshop.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            log.info("decoded cache %s was built by another process meanwhile", folder)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _write_headers(files: Sequence[IO[bytes]], lengths: Sequence[int]) -> None:
    """NumPy pads its headers so that the length can grow in place."""
    for file, length, (_, dtype) in zip(files, lengths, _FILES.values(), strict=True):
        file.seek(0)
        np.lib.format.write_array_header_1_0(
            file, {"descr": dtype.str, "fortran_order": False, "shape": (length,)}
        )


def _in_threads(decode: Callable[[Case], _Decoded], cases: Sequence[Case]) -> Iterator[_Decoded]:
    """Decode in parallel and in order, a few cases ahead of the writer; log the progress."""
    log.info("decoding %d cases once", len(cases))
    block, logged = 2 * THREADS, time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(cases), block):
            yield from pool.map(partial(once_more, decode), cases[start : start + block])
            if time.monotonic() - logged > SECONDS_BETWEEN_REPORTS:
                logged = time.monotonic()
                log.info("decoded %d of %d cases", min(start + block, len(cases)), len(cases))


def once_more(decode: Callable[[Case], T], case: Case) -> T:
    """Decode a case, again where another thread disturbed Python's parser.

    `np.load` parses headers with `ast`. In Python 3.11 a garbage collection in the middle of that
    lets another thread parse with the same depth counter: SystemError, "AST constructor recursion
    depth mismatch" (python/cpython 106905).
    """
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(SystemError):
            return decode(case)
    return decode(case)
