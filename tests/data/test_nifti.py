"""NIfTI headers of all kinds: where nibabel says the voxels lie, or refused with the remedy."""

import gzip
import struct

import nibabel as nib
import numpy as np
import pytest

from mambaseg.data.formats.images import find_images
from mambaseg.data.formats.nifti import to_nifti
from mambaseg.errors import UserError

VOXELS = np.random.default_rng(0).integers(0, 900, (6, 5, 4)).astype(np.int16)
AFFINE = np.array([[-1.2, 0, 0, 10], [0, 1.3, 0, -20], [0, 0, 8, 5], [0, 0, 0, 1.0]])


def made(path, voxels=VOXELS, affine=AFFINE, *, qform=1, sform=1, unit="mm", order="<", **dtype):
    header = nib.Nifti1Header(endianness=order)
    image = nib.Nifti1Image(voxels, affine, header=header, **dtype)
    if not dtype:
        image.set_data_dtype(voxels.dtype)
    image.set_qform(affine if qform else None, code=qform)
    image.set_sform(affine if sform else None, code=sform)
    image.header.set_xyzt_units(unit)
    nib.save(image, path)
    return path


def read(path, tmp_path):
    (source,) = find_images(str(path), outside=tmp_path / "results")
    return source.read()


def assert_same(path, tmp_path):
    """Voxels and both forms as nibabel has them, in the label map too."""
    image, theirs = read(path, tmp_path), nib.load(path)
    voxels = np.asarray(theirs.dataobj)
    assert np.array_equal(image.image[0, :, 0].T, voxels)
    labels = np.zeros(image.image.shape[:2] + image.image.shape[3:], np.uint8)
    (tmp_path / "labels.nii.gz").write_bytes(to_nifti(labels, image.header, label=True))
    ours = nib.load(tmp_path / "labels.nii.gz")
    assert np.array_equal(ours.affine, theirs.affine)
    for form in ("get_qform", "get_sform"):
        one, other = getattr(ours, form)(coded=True), getattr(theirs, form)(coded=True)
        assert one[1] == other[1] and (one[0] is None or np.array_equal(one[0], other[0]))
    assert ours.header.get_xyzt_units() == theirs.header.get_xyzt_units()
    return image


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("qform", "sform"), [(1, 0), (0, 2), (1, 1), (1, 4), (0, 0)])
def test_each_form_of_orientation(tmp_path, qform, sform, order):
    path = made(tmp_path / "a.nii.gz", qform=qform, sform=sform, order=order)
    assert assert_same(path, tmp_path).spacing == pytest.approx((8.0, 1.3, 1.2))


@pytest.mark.parametrize("depth", [1.0, 0.0])
@pytest.mark.parametrize("sform", [0, 1])
def test_a_file_of_two_dimensions_is_one_slice_and_its_label_map_is_too(tmp_path, sform, depth):
    affine = np.diag([-1.2, 1.3, 1, 1])
    path = made(tmp_path / "a.nii", VOXELS[:, :, 0], affine, sform=sform)
    content = bytearray(path.read_bytes())
    content[88:92] = struct.pack("<f", depth)  # pixdim[3], which some programs leave empty
    path.write_bytes(content)
    image = read(path, tmp_path)
    assert image.spacing is None and np.array_equal(image.image[0, 0, 0].T, VOXELS[:, :, 0])
    labels = np.zeros((1, 1, 5, 6), np.uint8)
    (tmp_path / "labels.nii.gz").write_bytes(to_nifti(labels, image.header, label=True))
    ours = nib.load(tmp_path / "labels.nii.gz")
    assert ours.shape == (6, 5) and np.allclose(ours.affine, affine)
    several = np.zeros((1, 3, 1, 5, 6), np.uint8)
    (tmp_path / "classes.nii.gz").write_bytes(to_nifti(several, image.header))
    assert nib.load(tmp_path / "classes.nii.gz").shape == (6, 5, 1, 3)


def test_nifti_2_is_refused_by_its_name(tmp_path):
    nib.Nifti2Image(VOXELS, AFFINE).to_filename(tmp_path / "a.nii.gz")
    with pytest.raises(UserError, match=r"a\.nii\.gz: it is a NIfTI-2 file.*Save it as NIfTI-1"):
        read(tmp_path / "a.nii.gz", tmp_path)


@pytest.mark.parametrize("axes", [(1, 2, 0), (2, 0, 1), (0, 2, 1)])
def test_axes_in_any_order(tmp_path, axes):
    path = made(tmp_path / "a.nii", VOXELS.transpose(axes), AFFINE[:, [*axes, 3]])
    assert_same(path, tmp_path)


@pytest.mark.parametrize(("unit", "factor"), [("meter", 0.001), ("micron", 1000.0), ("mm", 1.0)])
def test_units_of_length(tmp_path, unit, factor):
    affine = AFFINE * factor
    affine[3, 3] = 1
    path = made(tmp_path / "a.nii.gz", affine=affine, unit=unit)
    assert assert_same(path, tmp_path).spacing == pytest.approx((8.0, 1.3, 1.2), rel=1e-6)


def test_a_size_that_nobody_filled_in_is_unknown(tmp_path):
    path = made(tmp_path / "a.nii.gz", affine=np.eye(4), unit="unknown")
    assert assert_same(path, tmp_path).spacing is None


@pytest.mark.parametrize("dtype", ["i1", "u1", "u2", "i4", "u4", "i8", "u8", "f4", "f8", ">f4"])
def test_data_types(tmp_path, dtype):
    voxels = np.clip(VOXELS, 0, 120).astype(dtype)
    order = ">" if dtype[0] == ">" else "<"
    assert_same(made(tmp_path / "a.nii", voxels, order=order, dtype=voxels.dtype), tmp_path)


def test_data_types_that_are_no_grey_values_are_refused(tmp_path):
    made(tmp_path / "complex.nii", VOXELS.astype(np.complex64))
    colours = np.zeros(VOXELS.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    made(tmp_path / "rgb.nii", colours)
    for name in ("complex.nii", "rgb.nii"):
        with pytest.raises(UserError, match=rf"{name}: the volume has data type"):
            read(tmp_path / name, tmp_path)


@pytest.mark.parametrize(
    ("slope", "intercept", "factor"),
    [(np.nan, np.nan, 1), (0, 7, 1), (np.inf, 0, 1), (-2, 10, -2), (2, np.nan, None)],
)
def test_slopes(tmp_path, slope, intercept, factor):
    content = bytearray(gzip.decompress(made(tmp_path / "a.nii.gz").read_bytes()))
    content[112:120] = struct.pack("<ff", slope, intercept)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content))
    if factor is None:
        with pytest.raises(UserError, match=r"a\.nii\.gz"):
            read(tmp_path / "a.nii.gz", tmp_path)
    else:
        expected = VOXELS * factor + (intercept if factor != 1 else 0)
        assert np.array_equal(assert_same(tmp_path / "a.nii.gz", tmp_path).image[0, :, 0].T,
                              expected)  # fmt: skip


def test_axes_that_are_sheared_or_contradict_the_voxel_size_are_refused(tmp_path):
    sheared = AFFINE.copy()
    sheared[0, 1] = 0.4
    made(tmp_path / "a.nii", affine=sheared, qform=0)
    with pytest.raises(UserError, match=r"a\.nii: the header's axes are 17 degrees off"):
        read(tmp_path / "a.nii", tmp_path)
    nearly = AFFINE.copy()
    nearly[0, 1] = 1e-3
    assert_same(made(tmp_path / "b.nii", affine=nearly, qform=0), tmp_path)
    image = nib.Nifti1Image(VOXELS, np.diag([2.0, 2, 2, 1]))
    image.set_qform(None, code=0)
    image.header["pixdim"][1:4] = 1.2, 1.3, 8
    nib.save(image, tmp_path / "c.nii")
    with pytest.raises(UserError, match=r"\(1.2, 1.3, 8\) \(x, y, z\), and \(2, 2, 2\)"):
        read(tmp_path / "c.nii", tmp_path)


@pytest.mark.parametrize("scale", [1e200, 1e-60])
def test_grey_values_beyond_float32_are_refused(tmp_path, scale):
    made(tmp_path / "a.nii", VOXELS * scale, dtype=np.float64)
    with pytest.raises(UserError, match=r"a\.nii: the grey values .* 32-bit floats"):
        read(tmp_path / "a.nii", tmp_path)
    made(tmp_path / "b.nii", VOXELS.astype(np.uint64) + 2**60, dtype=np.uint64)
    with pytest.raises(UserError, match=r"b\.nii: the grey values .* 32-bit floats"):
        read(tmp_path / "b.nii", tmp_path)
