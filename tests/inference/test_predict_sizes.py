"""Images of any size: a pixel, a line, less than a window, much more than one."""

import gzip
import os
import tracemalloc

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from mambaseg.app.ensemble import restore_predictor
from mambaseg.data.formats.images import find_images
from mambaseg.data.formats.nifti import place_of, to_nifti
from mambaseg.data.geometry import Preprocessing
from mambaseg.inference.segment import Member, segment
from tiny_checkpoints import write_checkpoint

PRESETS = {
    name: Preprocessing(name, 32, **({"spacing": 1.1} if name == "spacing" else {}))
    for name in ("paper", "percentile", "zscore", "modern", "spacing", "native")
}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_smallest_images_and_those_of_one_line_are_predicted(preset, tmp_path):
    path = write_checkpoint(tmp_path / "tiny.ckpt", preprocessing=PRESETS[preset])
    random, place = np.random.default_rng(0), tmp_path / "in"
    place.mkdir()
    shapes = {"dot": (1, 1), "line": (5, 300), "few": (3, 3), "column": (300, 1)}
    if preset != "spacing":  # pictures have no voxel size
        for name, shape in shapes.items():
            Pillow.fromarray(random.integers(0, 255, shape, dtype=np.uint8)).save(
                place / f"{name}.png"
            )
    volumes = {"thin": (10, 64, 3), "flat": (64, 10, 1), "voxel": (1, 1, 1), "row": (1, 90, 2),
               "cine": (10, 10, 2, 3)}  # fmt: skip
    for name, shape in volumes.items():
        voxels = random.integers(0, 900, shape).astype(np.int16)
        image = nibabel.Nifti1Image(voxels, np.diag([1.3, 0.9, 8.0, 1.0]))
        image.header.set_xyzt_units("mm", "sec")
        nibabel.save(image, place / f"{name}.nii.gz")
    predictor = restore_predictor([path], device="cpu", tta="all", probabilities=True)
    outcome = predictor.predict(find_images(str(place), outside=tmp_path / "o"), tmp_path / "o")
    assert not outcome.failed
    for name, shape in volumes.items():
        assert nibabel.load(tmp_path / "o" / f"{name}.nii.gz").shape == shape
    if preset != "spacing":
        for name, (height, width) in shapes.items():
            with Pillow.open(tmp_path / "o" / f"{name}.png") as labels:
                assert labels.size == (width, height)


class Pixelwise(torch.nn.Module):
    """What a pixel is decides its class, so any window says the same of it."""

    def forward(self, image):
        return torch.cat([0.5 - image, image - 0.5], dim=1) * 50


@pytest.mark.parametrize("overlap", [0.5, 0.25, 0.37, 0.61, 0.0])
@pytest.mark.parametrize("shape", [(101, 103), (64, 65), (63, 200), (129, 1)], ids=str)
@pytest.mark.parametrize(("size", "views"), [(64, "none"), ((64, 24), "all")])
def test_windows_give_back_what_each_pixel_is(shape, overlap, size, views, monkeypatch):
    monkeypatch.setattr("mambaseg.inference.segment.OVERLAP", overlap)
    image = torch.rand(2, 1, *shape)
    member = Member(Pixelwise(), Preprocessing("native", size), views)
    found = segment([member], [image], probabilities=True, batch_size=3)
    assert torch.equal(found.labels, (image[:, 0] > 0.5).to(torch.uint8))
    expected = torch.sigmoid((image[:, 0] - 0.5) * 100)
    assert (found.probabilities[:, 1] / 255 - expected).abs().max() < 0.51 / 255


# ---- large results, and disks that forbid things -------------------------------------------------


def header(shape, affine):
    found = nibabel.Nifti1Header()
    found.set_data_shape(shape)
    found.set_sform(affine, code=2)
    found.set_xyzt_units("mm", "sec")
    return found


@pytest.mark.parametrize("shape", [(1, 5, 4, 3), (3, 5, 4, 3), (1, 2, 5, 4, 3), (3, 2, 5, 4, 3)])
def test_a_nifti_file_is_nibabels_byte_for_byte(shape):
    array = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    cine = shape[0] > 1
    geometry = place_of(header((3, 4, 5, 3) if cine else (3, 4, 5), np.diag([2, 3, 4, 1])))
    written = gzip.decompress(to_nifti(array, geometry, slope=1 / 255))
    voxels = np.moveaxis(array.T, 3, -1) if array.ndim == 5 else array.T
    voxels = voxels if cine else voxels[:, :, :, 0]
    image = nibabel.Nifti1Image.from_bytes(written)
    expected = nibabel.Nifti1Image(voxels, None, image.header)
    expected.header.set_slope_inter(1 / 255, 0)
    assert written == expected.to_bytes()
    assert np.array_equal(np.asarray(image.dataobj.get_unscaled()), voxels)
    assert np.array_equal(image.affine, np.diag([2, 3, 4, 1]))


def test_probabilities_of_a_large_volume_are_written_without_a_copy_of_all():
    array = np.zeros((1, 14, 40, 256, 256), np.uint8)
    geometry = place_of(header((256, 256, 40), np.eye(4)))
    tracemalloc.start()
    to_nifti(array, geometry, slope=1 / 255)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < array.nbytes / 5


def test_results_are_written_where_permissions_cannot_be_changed(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "tiny.ckpt")
    Pillow.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30)).save(tmp_path / "a.png")
    predictor = restore_predictor([path], device="cpu", overlay=True, probabilities=True)

    def forbidden(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    for name in ("chmod", "utime", "chown", "link", "symlink", "setxattr"):
        if hasattr(os, name):
            monkeypatch.setattr(os, name, forbidden)
    sources = find_images(str(tmp_path / "a.png"), outside=tmp_path / "out")
    assert predictor.predict(sources, tmp_path / "out").done == ["a"]
