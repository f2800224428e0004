"""Pairs of a degraded and a clear image of the same scene: how to find and read them.

Images are 8-bit RGB PNG or JPEG of any size; docs/restoration.md has the layouts (LOL, RESIDE).
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mambaseg.data.fingerprint import THREADS
from mambaseg.data.splits import PARTS
from mambaseg.data.validation import DataError, check_file, decoding, unlisted
from mambaseg.storage.untrusted import readable

SMALLEST = 11  # pixels: the window of SSIM
_SUFFIXES = (".png", ".jpg", ".jpeg")
_LAYOUTS = (("low", "high"), ("hazy", "clear"), ("hazy", "gt"))
_EXPECTED = (
    "Expected is low/ and high/ with files of the same names, or hazy/ (<scene>_<n>_<beta>.png) "
    "and clear/ (<scene>.png), in the folder itself or in its train/ and test/. data.root names "
    "another folder; data=haze_phantom needs none."
)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """A degraded image and its clear one; holds paths, no pixels."""

    id: str  # unique: the degraded file's name without its suffix, after its part if it has one
    scene: str  # what both show; splits keep a scene together
    part: str  # `train`, `val`, `test`, or empty if no folder names it
    image_path: Path  # degraded
    clear_path: Path

    def sources(self) -> tuple[Path, ...]:
        """The two files."""
        return self.image_path, self.clear_path

    def read(self) -> tuple[NDArray[np.uint8], ...]:
        """The degraded and the clear image, (H, W, 3) each.

        Raises:
            UserError: a file cannot be decoded.
        """
        images = []
        for path in self.sources():
            with _opened(path) as image:
                images.append(np.asarray(image.convert("RGB")))
        return tuple(images)


def find_pairs(root: Path) -> list[Pair]:
    """List the pairs of a folder, sorted by id.

    Raises:
        UserError: no such folder or layout, an empty folder, an image without its clear one.
    """
    if not root.is_dir():
        raise DataError("no such folder", root, _EXPECTED)
    parts = [part for part in PARTS if (root / part).is_dir()]
    if missing := {"train", "test"}.difference(parts) if parts else ():
        remedy = "Add it, or put all pairs into one folder: they are split at random then."
        raise DataError(f"there is {'/, '.join(parts)}/ but no {min(missing)}/", root, remedy)
    found = [pair for part in parts or [""] for pair in _pairs_in(root / part, part)]
    return sorted(found, key=lambda pair: pair.id)


def _pairs_in(folder: Path, part: str) -> Iterator[Pair]:
    layouts = (two for two in _LAYOUTS if all((folder / name).is_dir() for name in two))
    degraded, clear = next(layouts, ("", ""))
    if not degraded:
        raise DataError("holds no pairs of images", folder, _EXPECTED)
    images, partners = _images(folder / degraded), _images(folder / clear)
    prefix, used = f"{part}-" if part else "", set()
    for name, path in images.items():
        scene = name if degraded == "low" else name.partition("_")[0]
        if scene not in partners:
            remedy = "Put it there, or move this one out."
            raise DataError(f"its clear image {clear}/{scene} is missing", path, remedy)
        used.add(scene)
        yield Pair(prefix + name, prefix + scene, part, path, partners[scene])
    if unused := partners.keys() - used:
        log.warning("%s: %d images have no partner in %s/ and are not used, %s first",
                    folder / clear, len(unused), degraded, min(unused))  # fmt: skip


def _images(folder: Path) -> dict[str, Path]:
    """Name without suffix -> file, of the images of a folder."""
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    except OSError as error:
        raise unlisted(folder, error) from error
    if not files:
        raise DataError("holds no PNG or JPEG image", folder, "Put the images there.")
    found: dict[str, Path] = {}
    for path in files:
        name = readable(path.stem)
        if name in found:
            raise DataError(f"there is {found[name].name} too", path, "Move one of the two out.")
        found[name] = path
    return found


def check_pair(pair: Pair, *, smallest: int) -> None:
    """Compare the heads of both files, without decoding them; `smallest` side in pixels.

    Raises:
        UserError: a file cannot be read, is not RGB or too small, or the two differ in size.
    """
    sizes = []
    for path in pair.sources():
        check_file(path)
        with _opened(path) as image:
            mode, size = image.mode, (image.height, image.width)
            wide = any("16" in str(tile[3]) for tile in image.tile)  # which Pillow calls RGB too
            transparent = "transparency" in image.info
        if wide or transparent:
            problem = "has 16 bits per colour" if wide else "is transparent"
            remedy = "Save it as an RGB image of 8 bits, without transparency."
            raise DataError(problem, path, remedy)
        if mode != "RGB":
            problem = f"is no RGB image (mode {mode}); red, green and blue are needed"
            remedy = "Convert it, such as with Pillow: Image.open(file).convert('RGB').save(file)"
            raise DataError(problem, path, remedy)
        sizes.append(size)
    (height, width), other = sizes
    problem = f"{height} × {width} pixels"
    if (height, width) != other:
        problem += f", but {pair.clear_path} has {other[0]} × {other[1]}"
        raise DataError(problem, pair.image_path, "Crop or resize one of them to show the same.")
    if min(height, width) < smallest:
        problem += f"; at least {smallest} × {smallest} are needed"
        remedy = f"Choose a smaller crop (data.size, not below {SMALLEST}), or move the pair out."
        raise DataError(problem, pair.image_path, remedy)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from PIL import Image

    with decoding(path, "PNG or JPEG"), Image.open(path) as image:
        yield image


def digests_of(pairs: Sequence[Pair]) -> tuple[dict[str, str], dict[Path, str]]:
    """Digests of pairs by id, and of their files, as `content_digest` makes them.

    Each file is read once, whatever the number of pairs that share it.

    Raises:
        UserError: a file cannot be read.
    """
    scenes: dict[Path, list[Pair]] = defaultdict(list)
    for pair in pairs:
        scenes[pair.clear_path].append(pair)
    of_pairs: dict[str, str] = {}
    of_files: dict[Path, str] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for mine, files in pool.map(_digests_of_scene, scenes.items()):
            of_pairs |= mine
            of_files |= files
    return of_pairs, of_files


def _digests_of_scene(scene: tuple[Path, list[Pair]]) -> tuple[dict[str, str], dict[Path, str]]:
    path, pairs = scene
    clear, of_pairs = _content(path), {}
    of_files = {path: hashlib.blake2b(clear, digest_size=16).hexdigest()}
    for pair in pairs:
        digest = hashlib.blake2b(_content(pair.image_path), digest_size=16)
        of_files[pair.image_path] = digest.hexdigest()
        digest.update(clear)
        of_pairs[pair.id] = digest.hexdigest()
    return of_pairs, of_files


def _content(path: Path) -> bytes:
    """The bytes of a file, with the mark that ends each in `content_digest`."""
    check_file(path)
    try:
        return path.read_bytes() + b"|"
    except OSError as error:
        raise unlisted(path, error) from error
