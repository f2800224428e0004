"""A complete decoded cache on disk, memory-mapped. How it is made: `cache.py`."""

import json
import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mambaseg.data.fingerprint import THREADS, digest_of
from mambaseg.storage.untrusted import read_text

FILES: dict[str, tuple[str, np.dtype[Any]]] = {
    "image": ("images.npy", np.dtype("<f4")),
    "label": ("labels.npy", np.dtype("u1")),
}
_INDEX_LIMIT = 256 << 20  # bytes: half a million cases


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
    content: str  # what its image shows, see `seen.fingerprint_of`
    image_crc: int
    label_crc: int
    class_voxels: tuple[int, ...]  # of each class 0..K-1

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
    def stop(self) -> int:
        """Offset of what follows."""
        return self.offset + math.prod(self.label_shape)


class VolumeCache:
    """A complete cache folder, opened read-only.

    Only the folder's path is pickled: a worker process maps the files itself.

    Raises:
        DamagedCacheError: A file is missing, has another size or type, or the index was changed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            index = json.loads(read_text(folder / "index.json", limit=_INDEX_LIMIT))
            if index["digest"] != digest_of(index["cases"]):
                raise ValueError("index.json was changed")
            self.entries = tuple(_entry(values) for values in index["cases"])
            _require_contiguous(self.entries)
            self._arrays = {kind: self._map(kind) for kind in FILES}
        except Exception as error:  # foreign bytes make NumPy raise nearly anything
            raise DamagedCacheError(str(error) or type(error).__name__) from error
        self._positions = {entry.case: i for i, entry in enumerate(self.entries)}

    def __reduce__(self) -> tuple[type["VolumeCache"], tuple[Path]]:
        return VolumeCache, (self.folder,)

    def __len__(self) -> int:
        return len(self.entries)

    def position(self, case: str) -> int:
        """Return the number of a case, given its id."""
        return self._positions[case]

    def image(self, number: int) -> NDArray[np.float32]:
        """Return the intensity-scaled image (Z, C, H, W) of a case as a read-only view."""
        entry = self.entries[number]
        return self._flat("image", entry).reshape(entry.shape)

    def label(self, number: int) -> NDArray[np.uint8]:
        """Return the label (Z, H, W) of a case as a read-only view."""
        entry = self.entries[number]
        return self._flat("label", entry).reshape(entry.label_shape)

    def verify(self) -> None:
        """Compare every stored voxel with its checksum.

        Raises:
            DamagedCacheError: Naming the first case that differs.
        """
        with ThreadPoolExecutor(THREADS) as pool:
            for entry, same in zip(
                self.entries, pool.map(self._is_intact, self.entries), strict=True
            ):
                if not same:
                    raise DamagedCacheError(f"the data of {entry.case} have changed")

    def _map(self, kind: str) -> NDArray[Any]:
        name, dtype = FILES[kind]
        array = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        length = self.entries[-1].stop * (self.channels if kind == "image" else 1)
        if array.dtype != dtype or array.shape != (length,):
            raise ValueError(f"{name} holds {array.dtype} {array.shape}, not {dtype} ({length},)")
        return np.asarray(array)  # a plain view of the map: memmap's own slicing is slow

    @property
    def channels(self) -> int:
        """Channels of every image."""
        return self.entries[0].shape[1]

    def _flat(self, kind: str, entry: Entry) -> NDArray[Any]:
        channels = self.channels if kind == "image" else 1
        return self._arrays[kind][entry.offset * channels : entry.stop * channels]

    def _is_intact(self, entry: Entry) -> bool:
        return all(
            zlib.crc32(self._flat(kind, entry).data) == crc
            for kind, crc in (("image", entry.image_crc), ("label", entry.label_crc))
        )


def _require_contiguous(entries: tuple[Entry, ...]) -> None:
    """The volumes must follow each other: a case never shows a part of another one.

    Raises:
        ValueError: they do not.
    """
    stop = 0
    for entry in entries:
        sides = (entry.offset, *entry.shape)
        if any(type(side) is not int for side in sides) or min(entry.shape) < 1:
            raise ValueError(f"the shape of {entry.case} is {entry.shape} at {entry.offset}")
        if entry.shape[1] != entries[0].shape[1]:
            raise ValueError(f"{entry.case} has other channels than the case before it")
        if entry.offset != stop:
            raise ValueError(f"{entry.case} does not begin where the case before it ends")
        stop = entry.stop


def _entry(values: dict[str, Any]) -> Entry:
    depth, channels, height, width = values["shape"]
    spacing = None if values["spacing"] is None else _spacing(values["spacing"])
    if not isinstance(values["case"], str):
        raise TypeError("a case's id is not text")
    known = {"spacing": spacing, "class_voxels": tuple(map(int, values["class_voxels"]))}
    return Entry(**{**values, "shape": (depth, channels, height, width), **known})


def _spacing(values: Any) -> tuple[float, float, float]:
    z, y, x = map(float, values)
    if not all(0 < side < float("inf") for side in (z, y, x)):
        raise ValueError(f"a case has the spacing {values}")
    return z, y, x
