"""Slices along the axis with the largest voxel size; what says where they lie goes with them."""

from dataclasses import replace

import nibabel
import numpy as np
import pytest
from fake_cases import find_fakes, write_cases

from mambaseg.data.case import Case
from mambaseg.data.datamodule import SegmentationDataModule
from mambaseg.data.formats.images import find_images
from mambaseg.data.readers import nifti_pairs
from mambaseg.data.readers.unlabelled import find_unlabelled
from mambaseg.data.seen import fingerprint_of, fingerprints_of
from mambaseg.data.volume import Volume, slice_axis, unsliced
from mambaseg.errors import UserError
from mambaseg.inference.predictor import Options, Predictor


@pytest.mark.parametrize(
    ("spacing", "axis"),
    [
        ((10.0, 1.5, 1.5), 0),
        ((1.5, 10.0, 1.5), 1),
        ((1.2, 1.5, 10.0), 2),
        ((1.0, 1.0, 1.0), 0),
        ((0.5, 0.8, 0.8), 0),  # two are the largest: neither is how it was made
        ((1.0, 1.0, 1.49), 0),
        ((1.0, 1.0, 1.5), 2),
        ((0.6, 0.9, 0.6), 1),
        (tuple(map(float, np.float32([0.6, 0.9, 0.6]))), 1),  # as a header holds them
        (tuple(map(float, np.float32([0.8, 0.8, 1.2]))), 2),
        (None, 0),
    ],
)
def test_the_axis_with_the_clearly_largest_voxel_size(spacing, axis):
    assert slice_axis(spacing, "spacing") == axis
    assert slice_axis(spacing, "stored") == 0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slicing_along_an_axis_is_undone(axis):
    array = np.arange(2 * 3 * 4 * 5).reshape(3, 2, 4, 5)
    cut = Volume(array).sliced(axis).image
    assert cut.shape[1] == 2 and cut.shape[0] == (3, 4, 5)[axis]
    assert np.array_equal(unsliced(cut[:, 1], axis, 0), array[:, 1])


def read_sagittal(case: Case) -> Volume:
    """Thick along x: each voxel says where it is, in mm."""
    z, y, x = np.meshgrid(*map(np.arange, (4, 5, 3)), indexing="ij")
    affine = np.array([[0, -1.2, 0, 7], [0, 0, 1.1, -3], [-6.0, 0, 0, 2], [0, 0, 0, 1]])
    voxels = np.stack([x, y, z, np.ones_like(x)], axis=-1) @ affine.T
    image = np.moveaxis(voxels[..., :3], -1, 1).astype(np.float32)
    return Volume(image, (x + 3 * y).astype(np.uint8), (1.1, 1.2, 6.0), affine, "IPR")


def test_what_says_where_a_voxel_lies_goes_with_it():
    stored = Case("a", "a", None, None, "a", None, read_sagittal)
    case = replace(stored, slicing="spacing")
    volume = case.load()
    assert volume.image.shape == (3, 3, 4, 5) and volume.label.shape == (3, 4, 5)
    assert volume.spacing == (6.0, 1.1, 1.2) and volume.orientation == "PRI"
    for z, y, x in ((0, 0, 0), (2, 3, 4), (1, 2, 0)):
        there = volume.affine @ (x, y, z, 1)
        assert there[:3] == pytest.approx(volume.image[z, :, y, x])
        assert volume.label[z, y, x] == z + 3 * x
    assert stored.load().image.shape == (4, 3, 5, 3)
    assert stored.recipe != case.recipe  # another decoded cache


def test_the_frames_of_an_unlabelled_cine_are_cut_one_by_one(tmp_path):
    cine = np.random.default_rng(0).random((3, 5, 4, 2), np.float32)  # (x, y, z, t), thick along x
    nibabel.save(nibabel.Nifti1Image(cine, np.diag([10, 1.5, 1.5, 1])), tmp_path / "a.nii")
    (stored,) = find_unlabelled(tmp_path, channels=1, longest_side=None)
    volume = replace(stored, slicing="spacing").load()
    frames = cine.transpose(3, 0, 2, 1).reshape(2 * 3, 1, 4, 5)
    assert np.array_equal(volume.image, frames) and volume.label.shape == (6, 4, 5)
    assert volume.spacing == (10, 1.5, 1.5) and stored.load().image.shape == (8, 1, 5, 3)
    prints = {fingerprint_of(cine[..., frame][:, None]) for frame in (0, 1)}
    assert {*fingerprints_of(volume).split()} == prints


def test_the_data_module_slices_as_it_is_told(tmp_path):
    write_cases(tmp_path / "data", patients=4)
    data = {
        "name": "tiny", "find_cases": find_fakes, "root": tmp_path / "data", "size": 8,
        "class_names": list("abcd"), "num_classes": 4, "split": "random", "batch_size": 2,
        "steps": 1, "cache_dir": tmp_path / "cache",
    }  # fmt: skip
    module = SegmentationDataModule(**data, slicing="spacing")
    module.load()
    assert {case.slicing for part in module.cases.values() for case in part} == {"spacing"}
    with pytest.raises(UserError, match="stored, spacing"):
        SegmentationDataModule(**data, slicing="thick")


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("spacing", [(1.0, 2.0, 1.0), (2.0, 1.0, 1.0), (1.0, 1.0, 2.0), None])
def test_a_flat_image_is_one_slice_whatever_its_voxel_size(spacing, axis):
    shape = [7, 6, 5]
    shape[axis] = 1
    assert slice_axis(spacing, "spacing", shape) == axis
    assert slice_axis(spacing, "stored", shape) == 0


def write_flat(root, spacing=(1.0, 1.0, 2.0), count=4):
    """Slices with a z of 1 mm that nobody measured, and pixels of 2 x 1 mm (x, y, z)."""
    for number in range(count):
        voxels = np.random.default_rng(number).random((5, 6, 1), np.float32)
        for name, array in ((f"p{number}", voxels), (f"p{number}_seg", (voxels > 0.5) * 1)):
            file = nibabel.Nifti1Image(array.astype(np.float32), np.diag([2.0, 1.0, 1.0, 1.0]))
            file.header.set_xyzt_units("mm")
            root.mkdir(exist_ok=True)
            nibabel.save(file, root / f"{name}.nii.gz")
    return root


def test_a_flat_image_is_learnt_from_and_predicted_whole(tmp_path):
    root = write_flat(tmp_path / "data")
    (case, *_) = nifti_pairs.find_cases(root)
    assert replace(case, slicing="spacing").load().image.shape == (1, 1, 6, 5)
    (unlabelled,) = find_unlabelled(root / "p0.nii.gz", channels=1, longest_side=None)
    assert replace(unlabelled, slicing="spacing").load().image.shape == (1, 1, 6, 5)
    predictor = Predictor([], channels=1, class_names=list("ab"), made_by=[], options=Options(),
                          slicing="spacing")  # fmt: skip
    (source,) = find_images(str(root / "p0.nii.gz"), outside=tmp_path / "out")
    assert predictor._axis(source.read(1)) == 0
