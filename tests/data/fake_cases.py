"""Tiny cases without a medical file format: one .npz per case."""

from pathlib import Path

import numpy as np

from mambaseg.data.case import Case
from mambaseg.data.volume import Volume

GROUPS = ("DCM", "HCM", "MINF", "NOR", "RV")


def read_npz(case: Case) -> Volume:
    with np.load(case.image_path, allow_pickle=False) as arrays:
        return Volume(arrays["image"][:, None], arrays["label"], spacing=(10.0, 1.5, 1.5))


def never_read(case: Case) -> Volume:
    raise AssertionError(f"{case.id} was read again")


never_read.__qualname__ = read_npz.__qualname__  # reads like it as far as a cache can tell


def write_cases(root: Path, patients: int = 10, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    for number in range(1, patients + 1):
        for phase in ("ED", "ES"):
            shape = rng.integers((3, 20, 24), (6, 40, 40))
            label = np.zeros(shape, np.uint8)
            label[:, 5:15, 6:16] = rng.integers(1, 4)
            image = (rng.random(shape) * 100 + 50 * label).astype(np.float32)
            np.savez(root / f"patient{number:03d}_{phase}.npz", image=image, label=label)


def find_fakes(root: Path, reader=read_npz) -> list[Case]:
    return [
        Case(
            id=path.stem,
            patient=path.stem[:10],
            phase=path.stem[11:],
            group=GROUPS[int(path.stem[7:10]) % 5],
            image_path=path,
            label_path=path,
            reader=reader,
        )
        for path in sorted(root.glob("patient*.npz"))
    ]


def find_unreadable(root: Path) -> list[Case]:
    return find_fakes(root, reader=never_read)
