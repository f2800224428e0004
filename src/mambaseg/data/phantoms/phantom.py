"""A synthetic dataset: short-axis cine hearts, written in the official ACDC layout.

So that everything can be tried, tested and learnt without ACDC: the folder takes the same road as
real data (`patientXXX/patientXXX_4d.nii.gz`, `_frameFF.nii.gz`, `_frameFF_gt.nii.gz`,
`_frameFF_scribble.nii.gz`, `Info.cfg`). It proves nothing about real hearts, as `SYNTHETIC.md` in
it and each header's description warn.

`phantom_anatomy` shapes the hearts, `phantom_torso` surrounds them, `phantom_image` renders them,
`scribbles` draws in them, and this file writes the folder.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

from mambaseg.data.phantoms.phantom_anatomy import GROUPS, draw_heart, tune_ejection
from mambaseg.data.phantoms.phantom_image import Scan, draw_scan, render
from mambaseg.data.phantoms.scribbles import draw_scribble
from mambaseg.data.phantoms.synthetic import write_once
from mambaseg.errors import UserError

MANIFEST = "phantom.json"
VERSION = 1  # of the generator: raise it whenever the same parameters give other files

_NOTE = """# Synthetic data: this is not ACDC

These images were computed, not acquired. They show no patient and prove nothing about real hearts.
mambaseg wrote them (`phantom.json` has the parameters) in the folder layout of the
Automated Cardiac Diagnosis Challenge, so that software can be tried without the challenge's data.

Labels: 0 background, 1 right ventricle, 2 myocardium, 3 left ventricle; in scribbles 4: unlabelled.
Height and weight are made up.

For the real data see Bernard et al., "Deep Learning Techniques for Automatic MRI Cardiac
Multi-structures Segmentation and Diagnosis: Is the Problem Solved?", IEEE TMI 37(11), 2018.
"""


def write_phantom(root: Path, *, patients: int = 30, seed: int = 0, noise: float = 0.05) -> Path:
    """Write the phantom dataset, or return at once when it is there already (see `write_once`).

    Patient k depends on seed, noise and k only: a larger dataset begins with the smaller one. Each
    block of five patients holds every pathology group once, in an order that the seed shuffles.
    There are 1 to 999 patients; `noise` is the standard deviation of the noise per channel, as a
    share of blood's intensity.
    """
    if not 1 <= patients <= 999:
        raise UserError(
            f"The phantom has 1 to 999 patients, not {patients}: change data.prepare.patients."
        )
    if seed < 0 or noise < 0:
        raise UserError(f"The phantom's seed ({seed}) and noise ({noise}) must not be negative.")
    parameters = {"generator": __name__, "version": VERSION, "patients": patients}
    parameters |= {"seed": seed, "noise": noise}

    def write(work: Path) -> None:
        for number in range(1, patients + 1):
            _write_patient(work / f"patient{number:03d}", number, seed, noise)

    what = f"{patients} patients"
    return write_once(Path(root), parameters, write, note=_NOTE, manifest=MANIFEST, what=what)


def _write_patient(folder: Path, number: int, seed: int, noise: float) -> None:
    block, place = divmod(number - 1, len(GROUPS))  # each block holds every group once
    order = np.random.default_rng([seed, 0, block]).permutation(len(GROUPS))
    rng = np.random.default_rng([seed, 1, number])
    heart = draw_heart(GROUPS[order[place]], rng)
    frames = int(rng.integers(8, 13))
    # Nearly always the first frame is ED. In some patients it is not, as in ACDC: ES comes first.
    ed = 0 if rng.uniform() < 0.9 else int(rng.integers(frames // 2, frames))
    es = (ed + round(frames * rng.uniform(0.33, 0.42))) % frames
    scan = draw_scan(heart, ed=ed, es=es, frames=frames, noise=noise, rng=rng)
    heart = tune_ejection(heart, scan.depths)
    image, label = render(heart, scan, rng)
    folder.mkdir()
    affine = _affine(scan, rng)
    beat = float(rng.uniform(0.75, 1.05))
    _save(folder / f"{folder.name}_4d.nii.gz", image, affine, scan, step=beat / frames)
    for frame in (ed, es):
        stem = f"{folder.name}_frame{frame + 1:02d}"
        _save(folder / f"{stem}.nii.gz", image[frame], affine, scan)
        _save(folder / f"{stem}_gt.nii.gz", label[frame], affine, scan)
        scribble = draw_scribble(label[frame], np.random.default_rng([number, frame + 1]))
        _save(folder / f"{stem}_scribble.nii.gz", scribble, affine, scan)
    height, weight = rng.normal(171, 9), rng.normal(75, 12)
    (folder / "Info.cfg").write_text(
        f"ED: {ed + 1}\nES: {es + 1}\nGroup: {heart.group}\nHeight: {height:.1f}\n"
        f"NbFrame: {frames}\nWeight: {max(weight, 45):.1f}\n",
        encoding="utf-8",
    )


def _affine(scan: Scan, rng: np.random.Generator) -> np.ndarray:
    """Voxel (x, y, z) -> mm, an oblique plane around LPS (NIfTI counts towards right and front)."""
    tilt, turn = np.deg2rad(rng.uniform(-20, 20, 2))
    (cx, cz), (sx, sz) = np.cos([tilt, turn]), np.sin([tilt, turn])
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.diag([-1, -1, 1]) @ np.diag(scan.spacing[::-1])
    affine[:3, 3] = rng.uniform(-30, 30, 3).round(1) + np.array([80, 80, 0])
    return affine


def _save(
    path: Path, array: np.ndarray, affine: np.ndarray, scan: Scan, step: float | None = None
) -> None:
    """Write ([T,] Z, H, W) as NIfTI (x, y, z[, t]) in mm and s, with the same bytes each time."""
    import nibabel as nib

    image = nib.Nifti1Image(np.ascontiguousarray(array.T), affine)
    zooms = scan.spacing[::-1]
    image.header.set_zooms(zooms if step is None else (*zooms, step))
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"synthetic phantom, not ACDC"
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
