"""Ways to harm a tiny data set, each a function of its root: the vocabulary of `damages.py`."""

import gzip
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
from tiny_acdc import pixels, write_h5, write_nifti, write_patient

FOLDER = "patient002"
IMAGE, LABEL = "patient002_frame01.nii.gz", "patient002_frame01_gt.nii.gz"
H5 = "patient002_frame01.h5"


def write_official(root: Path) -> None:
    for number in (1, 2, 3, 4):
        write_patient(root / f"patient00{number}", seed=number)


def write_volumes(root: Path) -> None:
    for number in (1, 2, 3, 4):
        for frame in (1, 2):
            write_h5(root / "data" / f"patient00{number}_frame0{frame}.h5", 10 * number + frame)


WRITERS = {"official": write_official, "h5": write_volumes}


# ---- ways to harm


def at(name: str) -> Callable[[Path], Path]:
    """Where a file of the second patient is."""
    return lambda root: root / ("data" if name.endswith(".h5") else FOLDER) / name


def content(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Changes the bytes of a file."""

    def harm(root: Path) -> None:
        path = at(name)(root)
        path.write_bytes(change(path.read_bytes()))

    return harm


def unpacked(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Changes the bytes inside the gzip."""
    return content(name, lambda packed: gzip.compress(change(gzip.decompress(packed))))


def header(name: str, *changes: tuple[int, str, tuple]) -> Callable[[Path], object]:
    """Overwrites fields of a NIfTI-1 header: (offset, struct format, values)."""

    def change(data: bytes) -> bytes:
        altered = bytearray(data)
        for offset, form, values in changes:
            struct.pack_into(f"<{form}", altered, offset, *values)
        return bytes(altered)

    return unpacked(name, change)


def dimensions(*sizes: int) -> tuple[int, str, tuple]:
    return (40, f"{1 + len(sizes)}h", (len(sizes), *sizes))


def zooms(*sizes: float) -> tuple[int, str, tuple]:
    return (80, "3f", sizes)


def axes(*rows: float) -> tuple[int, str, tuple]:
    """The three rows of the sform."""
    return (280, "12f", rows)


def both(*changes: tuple[int, str, tuple]) -> Callable[[Path], object]:
    """The same header fields of an image and its label."""
    return lambda root: [header(name, *changes)(root) for name in (IMAGE, LABEL)]


def image(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], object]:
    return lambda root: write_nifti(at(IMAGE)(root), change(pixels(200)[0]))


def label(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], object]:
    return lambda root: write_nifti(at(LABEL)(root), change(pixels(200)[1]))


def with_value(array: np.ndarray, value: float, dtype: type) -> np.ndarray:
    array = array.astype(dtype)
    array[1, 1, 1] = value
    return array


def replaced(name: str, put: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else in place of a file."""

    def harm(root: Path) -> None:
        path = at(name)(root)
        path.unlink()
        put(path)

    return harm


def everywhere(pattern: str, harm: Callable[[Path], object]) -> Callable[[Path], object]:
    def harms(root: Path) -> None:
        for path in list(root.glob(pattern)):
            harm(path)

    return harms


def info(text: bytes | str) -> Callable[[Path], object]:
    data = text if isinstance(text, bytes) else text.encode()
    return lambda root: (root / FOLDER / "Info.cfg").write_bytes(data)


def in_h5(change: Callable[[h5py.File], object]) -> Callable[[Path], object]:
    def harm(root: Path) -> None:
        with h5py.File(at(H5)(root), "a") as file:
            change(file)

    return harm


def h5_image(**options) -> Callable[[Path], object]:
    def change(file: h5py.File) -> None:
        del file["image"]
        file.create_dataset("image", **options)

    return in_h5(change)


def gzip_bomb(path: Path, header_of: Path) -> None:
    """A sound header, then 64 GiB of zeros, in a few MB of gzip."""
    head = gzip.decompress(header_of.read_bytes())[:352]
    member = gzip.compress(bytes(2**24))
    path.write_bytes(gzip.compress(head) + 4096 * member)


def bomb(root: Path) -> None:
    gzip_bomb(at(IMAGE)(root), at(IMAGE)(root))


def sparse(path: Path, size: int) -> None:
    """A file that is long and takes no disk."""
    with path.open("ab") as file:
        file.truncate(size)


def long_nii(root: Path) -> None:
    """an unpacked whose header says 500 bytes."""
    packed = at(IMAGE)(root)
    path = packed.with_suffix("")
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    sparse(path, 2**26)


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(shape=(3, 5, 6), dtype="f4")
    layout[:] = h5py.VirtualSource("patient001_frame01.h5", "image", shape=(3, 5, 6))
    del file["image"]
    file.create_virtual_dataset("image", layout)


def external_link(file: h5py.File) -> None:
    del file["label"]
    file["label"] = h5py.ExternalLink("patient001_frame01.h5", "label")


def soft_link(file: h5py.File) -> None:
    file["label2"] = h5py.ExternalLink("/dev/stdin", "label")
    del file["label"]
    file["label"] = h5py.SoftLink("/label2")


def copy_of_a_patient(root: Path) -> None:
    for path in (root / "patient003").iterdir():
        path.unlink()
    for path in (root / FOLDER).iterdir():
        shutil.copy(path, root / "patient003" / path.name.replace(FOLDER, "patient003"))


def big_endian(root: Path) -> None:
    path = at(IMAGE)(root)
    stored = nib.load(path)
    swapped = nib.Nifti1Image(stored.get_fdata(), stored.affine, stored.header.as_byteswapped(">"))
    nib.save(swapped, path)


def bad_crc(data: bytes) -> bytes:
    return data[:-6] + bytes([data[-6] ^ 1]) + data[-5:]


def flipped_bit(data: bytes) -> bytes:
    """One bit of the voxels, under the old check sum."""
    inside = bytearray(gzip.decompress(data))
    inside[-20] ^= 8
    return gzip.compress(bytes(inside))[:-8] + data[-8:]
