"""Pairs of a degraded and a clear image of the same scene: where they are, and how they are read.

| folders | which belong together |
|---|---|
| `low/` `high/` | files of one name (LOL) |
| `hazy/` `clear/` or `hazy/` `gt/` | `<scene>_<n>_<beta>` and `<scene>` (RESIDE) |

Either in the root, or in `train/`, `test/` and perhaps `val/` below it. Images are 8-bit RGB PNG or
JPEG of any size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mambaseg.data.case import DataError
from mambaseg.data.files import AGAIN, check_file, unlisted
from mambaseg.storage.untrusted import readable

SUFFIXES = (".png", ".jpg", ".jpeg")
SMALLEST = 11  # pixels: the window of SSIM
LAYOUTS = (("low", "high"), ("hazy", "clear"), ("hazy", "gt"))
_EXPECTED = (
    "Expected is low/ and high/ with files of the same names, or hazy/ (<scene>_<n>_<beta>.png) "
    "and clear/ (<scene>.png), in the folder itself or in its train/ and test/. data.root names "
    "another folder; data=haze_phantom needs none."
)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """A degraded image and its clear one; holds paths, no pixels.

    Attributes:
        id: unique, the degraded file's name without its ending, after its part where there is one.
        scene: what both show; splits go by it.
        part: `train`, `val`, `test`, or empty where the folder does not say.
        image_path: the degraded image.
        clear_path: the clear one.
    """

    id: str
    scene: str
    part: str
    image_path: Path
    clear_path: Path

    def sources(self) -> tuple[Path, ...]:
        """Its files."""
        return self.image_path, self.clear_path

    def read(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The degraded and the clear image, (H, W, 3) each.

        Raises:
            UserError: a file cannot be decoded.
        """
        return read_image(self.image_path), read_image(self.clear_path)


def find_pairs(root: Path) -> list[Pair]:
    """List the pairs of a folder, sorted by id.

    Raises:
        UserError: no such folder or layout, an empty folder, an image without its clear one.
    """
    if not root.is_dir():
        raise DataError("no such folder", root, _EXPECTED)
    parts = [part for part in ("train", "val", "test") if (root / part).is_dir()]
    if not parts:
        return sorted(_pairs_in(root, ""), key=lambda pair: pair.id)
    for needed in ("train", "test"):
        if needed not in parts:
            raise DataError(
                f"there is {', '.join(f'{part}/' for part in parts)} but no {needed}/",
                root, f"Add {needed}/, or put all pairs into one folder: they are then split here.",
            )  # fmt: skip
    found = [pair for part in parts for pair in _pairs_in(root / part, part)]
    return sorted(found, key=lambda pair: pair.id)


def _pairs_in(folder: Path, part: str) -> Iterator[Pair]:
    for degraded, clear in LAYOUTS:
        if (folder / degraded).is_dir() and (folder / clear).is_dir():
            break
    else:
        raise DataError("holds no pairs of images", folder, _EXPECTED)
    images, partners = _images(folder / degraded), _images(folder / clear)
    scene_of: Callable[[str], str] = str if degraded == "low" else _reside_scene
    unused = set(partners)
    for name, path in images.items():
        scene = scene_of(name)
        if scene not in partners:
            raise DataError(
                f"its clear image {clear}/{scene} is missing", path,
                "Put it there, or move this one out.",
            )  # fmt: skip
        unused.discard(scene)
        prefix = f"{part}-" if part else ""
        yield Pair(prefix + name, prefix + scene, part, path, partners[scene])
    if unused:
        log.warning("%s: %d images belong to nothing in %s/ and are not used, %s first",
                    folder / clear, len(unused), degraded, min(unused))  # fmt: skip


def _images(folder: Path) -> dict[str, Path]:
    """Name without ending -> file, of the images of a folder."""
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
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


def _reside_scene(name: str) -> str:
    return name.partition("_")[0]


def check_pair(pair: Pair, *, smallest: int = SMALLEST) -> None:
    """Look at the heads of both files, without decoding them.

    Args:
        pair: which.
        smallest: least height and width.

    Raises:
        UserError: a file cannot be read, is not RGB, is too small, or the two differ in size.
    """
    sizes = [image_size(path) for path in pair.sources()]
    if sizes[0] != sizes[1]:
        raise DataError(
            f"{sizes[0][0]} × {sizes[0][1]} pixels, but {pair.clear_path} has {sizes[1][0]} × "
            f"{sizes[1][1]}", pair.image_path, "Crop or resize one of them to show the same."
        )  # fmt: skip
    if min(sizes[0]) < smallest:
        raise DataError(
            f"{sizes[0][0]} × {sizes[0][1]} pixels; at least {smallest} × {smallest} are needed",
            pair.image_path, f"Choose a smaller crop (data.size, not below {SMALLEST}), or move "
            "the pair out.",
        )  # fmt: skip


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an RGB image, from its head.

    Raises:
        UserError: it cannot be read or is not RGB.
    """
    from PIL import Image

    check_file(path)
    try:
        with Image.open(path) as image:
            mode, size = image.mode, image.size
    except Exception as error:  # Pillow raises a zoo of types for damaged files
        raise _undecodable(path, error) from error
    if mode != "RGB":
        kind = "a grey image" if mode in ("1", "L", "LA", "F", "I", "I;16") else "no RGB image"
        raise DataError(
            f"is {kind} (mode {mode}); red, green and blue are needed", path,
            "Convert it: python -c \"from PIL import Image; Image.open('in').convert('RGB')"
            ".save('out.png')\"",
        )  # fmt: skip
    return size[1], size[0]


def read_image(path: Path) -> NDArray[np.uint8]:
    """Decode an RGB image: (H, W, 3).

    Raises:
        UserError: it cannot be decoded.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # as above
        raise _undecodable(path, error) from error


def _undecodable(path: Path, error: Exception) -> DataError:
    return DataError(f"cannot be read as an image ({type(error).__name__})", path, AGAIN)
