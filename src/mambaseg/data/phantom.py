"""A synthetic dataset: short-axis cine hearts, written in the official ACDC layout.

So that everything can be tried, tested and learnt without ACDC: the folder takes the same road as
real data (`patientXXX/patientXXX_4d.nii.gz`, `_frameFF.nii.gz`, `_frameFF_gt.nii.gz`, `Info.cfg`).
It says nothing about real hearts; `SYNTHETIC.md` in it and each header's description say so.

`phantom_anatomy` shapes the hearts, `phantom_torso` surrounds them, `phantom_image` renders them,
and this file writes the folder.
"""

from __future__ import annotations

import gzip
import json
import logging
import shutil
import tempfile
from pathlib import Path

import numpy as np

from mambaseg.data.phantom_anatomy import GROUPS, draw_heart, tune_ejection
from mambaseg.data.phantom_image import Scan, draw_scan, render
from mambaseg.errors import UserError
from mambaseg.files import remove_abandoned, writing
from mambaseg.foreign import read_json

MANIFEST = "phantom.json"
VERSION = 1  # of the generator: raise it whenever the same parameters give other files

_log = logging.getLogger(__name__)
_NOTE = """# Synthetic data: this is not ACDC

These images were computed, not acquired. They show no patient and prove nothing about real hearts.
`mambaseg.data.phantom` wrote them (`phantom.json` has the parameters) in the folder layout of the
Automated Cardiac Diagnosis Challenge, so that software can be tried without the challenge's data.

Labels: 0 background, 1 right ventricle, 2 myocardium, 3 left ventricle.
Height and weight are made up.

For the real data see Bernard et al., "Deep Learning Techniques for Automatic MRI Cardiac
Multi-structures Segmentation and Diagnosis: Is the Problem Solved?", IEEE TMI 37(11), 2018.
"""


def write_phantom(root: Path, *, patients: int = 30, seed: int = 0, noise: float = 0.05) -> Path:
    """Write the phantom dataset, or return at once when it is there already.

    Patient k depends on seed, noise and k only: a larger dataset begins with the smaller one. Each
    block of five patients holds every pathology group once, in an order that the seed shuffles. The
    folder appears complete or not at all, also when several processes write it at a time.

    Args:
        root: folder to write; its parents are made.
        patients: how many, 1 to 999.
        seed: of everything drawn.
        noise: standard deviation of the noise per channel, as a share of blood's intensity.

    Returns:
        `root`.

    Raises:
        UserError: `root` holds something else (other parameters, another generator, missing files),
            or cannot be written.
    """
    if not 1 <= patients <= 999:
        raise UserError(
            f"The phantom has 1 to 999 patients, not {patients}: change data.prepare.patients."
        )
    if seed < 0 or noise < 0:
        raise UserError(f"The phantom's seed ({seed}) and noise ({noise}) must not be negative.")
    parameters = {
        "generator": __name__,
        "version": VERSION,
        "patients": patients,
        "seed": seed,
        "noise": noise,
    }
    root = Path(root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        return _checked(root, parameters)
    _log.info("Writing the synthetic phantom (%d patients) to %s", patients, root)
    with writing(root, otherwise="choose another folder with data.root=..."):
        root.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(root.parent, f".{root.name}.partial-*")
        work = Path(tempfile.mkdtemp(prefix=f".{root.name}.partial-", dir=root.parent))
        try:
            for number in range(1, patients + 1):
                _write_patient(work / f"patient{number:03d}", number, seed, noise)
            _seal(work, parameters)
            work.chmod(0o755)  # mkdtemp makes private folders
            _rename(work, root, parameters)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return root


def _rename(work: Path, root: Path, parameters: dict[str, object]) -> None:
    """Put the finished folder in its place, unless another process has just done the same."""
    try:
        work.rename(root)  # also over an empty folder, but over no other
    except OSError:
        if not root.is_dir():
            raise
        _checked(root, parameters)


def _checked(root: Path, parameters: dict[str, object]) -> Path:
    """The existing folder, when it is the phantom of these parameters and complete."""
    remedy = f"Delete the folder {root}, or choose another one with data.root."
    try:
        found = read_json(root / MANIFEST)
        files = dict(found.pop("files"))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise UserError(
            f"{root} exists and is not a phantom dataset of ours (no readable {MANIFEST}): "
            f"nothing was written. {remedy}"
        ) from None
    differing = [key for key in parameters if found.get(key) != parameters[key]]
    if differing:
        pairs = ", ".join(f"{key} {found.get(key)} ≠ {parameters[key]}" for key in differing)
        raise UserError(f"The phantom in {root} was made otherwise ({pairs}). {remedy}")
    damaged = [name for name, size in files.items() if _size(root / name) != size]
    if damaged:
        raise UserError(
            f"The phantom in {root} is damaged: {len(damaged)} of {len(files)} files are missing "
            f"or changed, {damaged[0]} first. {remedy}"
        )
    return root


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _seal(root: Path, parameters: dict[str, object]) -> None:
    """Add the note and the manifest to the patients' folders; the manifest last."""
    (root / "SYNTHETIC.md").write_text(_NOTE, encoding="utf-8")
    written = sorted(path for path in root.rglob("*") if path.is_file())
    files = {path.relative_to(root).as_posix(): path.stat().st_size for path in written}
    text = json.dumps({**parameters, "files": files}, indent=1)
    (root / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _group(number: int, seed: int) -> str:
    """Pathology group of a patient: each block of five holds every group once."""
    block, place = divmod(number - 1, len(GROUPS))
    order = np.random.default_rng([seed, 0, block]).permutation(len(GROUPS))
    return GROUPS[order[place]]


def _write_patient(folder: Path, number: int, seed: int, noise: float) -> None:
    rng = np.random.default_rng([seed, 1, number])
    heart = draw_heart(_group(number, seed), rng)
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
    height, weight = rng.normal(171, 9), rng.normal(75, 12)
    (folder / "Info.cfg").write_text(
        f"ED: {ed + 1}\nES: {es + 1}\nGroup: {heart.group}\nHeight: {height:.1f}\n"
        f"NbFrame: {frames}\nWeight: {max(weight, 45):.1f}\n",
        encoding="utf-8",
    )


def _affine(scan: Scan, rng: np.random.Generator) -> np.ndarray:
    """Voxel (x, y, z) -> mm, an oblique plane around LPS (NIfTI counts towards right and front)."""
    tilt, turn = np.deg2rad(rng.uniform(-20, 20, 2))
    about_x = np.array(
        [[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]]
    )
    about_z = np.array(
        [[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]]
    )
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
