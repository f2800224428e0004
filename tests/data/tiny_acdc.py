"""Tiny data sets in the layouts that the readers know, for the tests of this folder."""

from pathlib import Path

import h5py
import nibabel as nib
import numpy as np

SHAPE = (6, 5, 3)  # (x, y, z), no two alike


def pixels(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image, and a label with a ring of myocardium around a left ventricle, both (x, y, z)."""
    rng = np.random.default_rng(seed)
    label = np.zeros(SHAPE, np.uint8)
    label[:2] = rng.integers(0, 2, (2, *SHAPE[1:]))
    label[0, 0, 0] = 1
    label[2:5, 1:4] = 2
    label[3, 2] = 3
    return rng.integers(0, 1000, SHAPE).astype(np.int16), label


def write_nifti(path: Path, array: np.ndarray, *, zooms=(1.5, 1.25, 10.0), unit="mm") -> None:
    """`array` is (x, y, z); x runs to the left and y to the back, as scanners write them."""
    image = nib.Nifti1Image(array, np.diag([-zooms[0], -zooms[1], zooms[2], 1.0]))
    image.header.set_xyzt_units(unit)
    nib.save(image, path)


def write_patient(folder: Path, *, ed=1, es=12, group="DCM", seed=0, **header) -> Path:
    """One patient in the official layout, with the files that readers must leave alone."""
    folder.mkdir(parents=True)
    name = folder.name
    for offset, frame in enumerate((ed, es)):
        image, label = pixels(100 * seed + offset)
        stem = f"{name}_frame{frame:02d}"
        write_nifti(folder / f"{stem}.nii.gz", image, **header)
        write_nifti(folder / f"{stem}_gt.nii.gz", label, **header)
        (folder / f"{stem}_scribble.nii.gz").write_bytes(b"not for us")
        (folder / f"._{stem}.nii.gz").write_bytes(b"Mac OS X")
    (folder / f"{name}_4d.nii.gz").write_bytes(b"not for us")
    (folder / "Info.cfg").write_text(f"ED: {ed}\nES: {es}\nGroup: {group}\nHeight: 184.0\n")
    return folder


def write_h5(path: Path, seed: int, *, label_of: int = 1) -> None:
    """One volume file, (z, y, x); `label_of` the voxel in the corner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image, label = pixels(seed)
    label[0, 0, 0] = label_of
    with h5py.File(path, "w") as file:
        file["image"] = (image.T / 1000).astype(np.float32)
        file["label"] = label.T
