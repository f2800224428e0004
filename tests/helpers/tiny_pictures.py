"""Tiny data sets of pictures with masks, in the layouts that people have."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 40, 56  # height and width


def blob(seed: int, size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """A noisy picture (H, W, 3) uint8 of a reddish disc, and where the disc is, (H, W) bool."""
    random = np.random.default_rng(seed)
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    centre = random.uniform(0.35, 0.65, 2) * size
    radius = random.uniform(0.15, 0.28) * min(size)
    disc = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2
    colour = np.where(disc[..., None], (190, 80, 70), (90, 120, 110))
    noisy = colour + random.normal(0, 12, (height, width, 3))
    return noisy.clip(0, 255).astype(np.uint8), disc


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    """A PNG of (H, W, 3) with 16 bits, which Pillow cannot write."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
             (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


def mask(disc: np.ndarray) -> np.ndarray:
    return np.where(disc, 255, 0).astype(np.uint8)


def write_two_folders(root: Path, count: int = 4, *, first: int = 0, ending: str = ".png") -> Path:
    """`images/` and `masks/`."""
    for number in range(first, first + count):
        pixels, disc = blob(number)
        save(root / "images" / f"a{number}.jpg", pixels, quality=95)
        save(root / "masks" / f"a{number}{ending}", mask(disc))
    return root


def write_parts(root: Path) -> Path:
    """`train/`, `val/` and `test/`, each with `images/` and `masks/`; the same names in all."""
    for part, count in (("train", 3), ("val", 1), ("test", 2)):
        write_two_folders(root / part, count)
    return root


def write_parts_inside(root: Path) -> Path:
    """`images/train/` and `masks/train/`."""
    for part, count in (("train", 3), ("test", 2)):
        for number in range(count):
            pixels, disc = blob(number)
            save(root / "images" / part / f"a{number}.png", pixels)
            save(root / "masks" / part / f"a{number}.png", mask(disc))
    return root


def write_busi(root: Path) -> Path:
    """Grey pictures stored as colours beside their masks, in class folders; one has two masks."""
    for group, number in (("benign", 1), ("benign", 2), ("malignant", 1), ("normal", 1)):
        pixels, disc = blob(number)
        grey = np.repeat(pixels[..., :1], 3, axis=2)
        disc = disc & (group != "normal")
        place = root / group
        save(place / f"{group} ({number}).png", grey)
        left = disc.copy()
        if (group, number) == ("benign", 2):
            left[:, SIZE[1] // 2 :] = False
            save(place / f"{group} ({number})_mask_1.png", mask(disc & ~left))
        save(place / f"{group} ({number})_mask.png", mask(left))
    return root


def write_glas(root: Path) -> Path:
    """BMP files beside their annotations, which number the glands; parts by name."""
    for name in ("train_1", "train_2", "train_3", "testA_1", "testB_1"):
        pixels, disc = blob(len(name) + int(name[-1]))
        objects = disc.astype(np.uint8) * 3
        objects[: SIZE[0] // 2] *= 2
        save(root / f"{name}.bmp", pixels)
        save(root / f"{name}_anno.bmp", objects)
    (root / "Grade.csv").write_text("name\n")
    return root


def write_nuclei(root: Path) -> Path:
    """A folder per image, with a mask per nucleus; RGBA images."""
    for number in range(4):
        pixels, disc = blob(number)
        name = f"f{number}c{number}"
        alpha = np.full((*SIZE, 1), 255, np.uint8)
        save(root / name / "images" / f"{name}.png", np.concatenate([pixels, alpha], axis=2))
        for part in range(3):
            rows = np.zeros(SIZE, bool)
            rows[part::3] = True
            save(root / name / "masks" / f"{part}e{number}.png", mask(disc & rows))
    return root


LAYOUTS = {
    "two folders": write_two_folders,
    "parts": write_parts,
    "parts inside": write_parts_inside,
    "busi": write_busi,
    "glas": write_glas,
    "nuclei": write_nuclei,
}
