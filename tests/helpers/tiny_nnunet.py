"""Tiny data sets in the layouts of nnU-Net v2, nnU-Net v1 and the MSD."""

import json
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image as Pillow

LABELS = ("background", "cavity", "wall")
SHAPE = (20, 18, 4)  # (x, y, z)


def arrays(seed: int, *, channels: int = 1, shape=SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Images (C, x, y, z) with a bright ring, and its label: 1 inside, 2 the ring."""
    rng = np.random.default_rng(seed)
    x, y, _ = np.meshgrid(*map(np.arange, shape), indexing="ij")
    radius = np.hypot(x - shape[0] / 2 - rng.normal(), y - shape[1] / 2 - rng.normal())
    label = np.where(radius < 3, 1, np.where(radius < 6, 2, 0)).astype(np.uint8)
    images = [
        rng.normal(200, 20, shape) + (100 + 50 * channel) * label for channel in range(channels)
    ]
    return np.stack(images).astype(np.int16), label


def write_nnunet(
    root: Path,
    *,
    cases: int = 5,
    tests: int = 0,
    channels: int = 1,
    ending: str = ".nii.gz",
    version: int = 2,
    whole: bool = False,
    splits: list | None = None,
    ids: list[str] | None = None,
    zooms=(1.5, 1.25, 8.0),
    **about,
) -> Path:
    """A data set of `cases` training cases.

    Args:
        root: its folder.
        tests: how many cases of imagesTs have a label in labelsTs; one more has none.
        channels: of each case.
        ending: of the files; a 2-D one makes 2-D cases.
        version: of dataset.json, 1 or 2.
        whole: one 4-D file per case, as MSD has it.
        splits: content of splits_final.json.
        ids: of the training cases.
        zooms: voxel size (x, y, z).
        about: replaces what dataset.json says.
    """
    ids = ids or [f"case_{number:03d}" for number in range(cases)]
    for seed, case in enumerate(ids):
        _write_case(root, "Tr", case, seed, channels, ending, whole, zooms)
    for number in range(tests):
        _write_case(root, "Ts", f"test_{number:03d}", 100 + number, channels, ending, whole, zooms)
    if tests:
        _write_case(root, "Ts", "test_alone", 200, channels, ending, whole, zooms, label=False)
    names = {str(number): f"T{number + 1}" for number in range(channels)}
    labels = {name: value for value, name in enumerate(LABELS)}
    content = {"channel_names": names, "labels": labels, "file_ending": ending}
    if version == 1:
        content = {"modality": names, "labels": {str(v): k for k, v in labels.items()}}
    content |= {"numTraining": len(ids)} | about
    (root / "dataset.json").write_text(json.dumps(content))
    if splits is not None:
        (root / "splits_final.json").write_text(json.dumps(splits))
    return root


def _write_case(root, part, case, seed, channels, ending, whole, zooms, *, label=True):
    flat = ending in (".png", ".tif")
    images, truth = arrays(seed, channels=channels, shape=(*SHAPE[:2], 1) if flat else SHAPE)
    folder = root / f"images{part}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"._{case}_0000{ending}").write_bytes(b"Mac OS X")
    if whole:
        content = np.moveaxis(images, 0, -1) if channels > 1 else images[0]
        write_volume(folder / f"{case}{ending}", content, zooms)
    else:
        for channel, image in enumerate(images):
            write_volume(folder / f"{case}_{channel:04d}{ending}", image, zooms)
    if label:
        (root / f"labels{part}").mkdir(exist_ok=True)
        write_volume(root / f"labels{part}" / f"{case}{ending}", truth, zooms)


def write_volume(path: Path, array: np.ndarray, zooms) -> None:
    """(x, y, z[, c]) as NIfTI, through SimpleITK, or as a picture of its one slice."""
    if path.name.endswith((".nii.gz", ".nii")):
        affine = np.diag([-zooms[0], -zooms[1], zooms[2], 1.0])
        image = nibabel.Nifti1Image(array, affine)
        image.header.set_xyzt_units("mm")
        nibabel.save(image, path)
    elif path.suffix in (".png", ".tif"):
        grey = array[:, :, 0].T if array.dtype == np.uint8 else array[:, :, 0].T / 4
        Pillow.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).save(path)
    else:
        import SimpleITK

        image = SimpleITK.GetImageFromArray(array.T)
        image.SetSpacing(tuple(map(float, zooms)))
        SimpleITK.WriteImage(image, str(path))
