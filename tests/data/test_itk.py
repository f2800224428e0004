"""MetaImage and DICOM: the same voxels at the same place as SimpleITK's own NIfTI files."""

import sys

import nibabel
import numpy as np
import pytest

from mambaseg.app.commands.check import main
from mambaseg.data.formats.images import find_images
from mambaseg.data.formats.nifti import to_nifti
from mambaseg.errors import UserError

sitk = pytest.importorskip("SimpleITK")

SERIES, STUDY = "1.2.826.0.1.3680043.2.1125.1.1", "1.2.826.0.1.3680043.2.1125.1"


def oblique(size=(9, 12, 4), pixel=sitk.sitkInt16):
    """An image whose axes, origin and voxel sizes are all unlike any default; size is x, y, z."""
    values = np.random.default_rng(0).integers(0, 4000, size[::-1])
    image = sitk.Cast(sitk.GetImageFromArray(values.astype(np.int16)), pixel)
    axes = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]
    axes *= np.sign(np.linalg.det(axes))
    if len(size) == 3:
        image.SetDirection(axes.ravel().tolist())
        image.SetOrigin((-31.5, 17.25, 80.0))
        image.SetSpacing((1.25, 1.5, 8.0))
    return image


def write_series(
    folder, image, *, series=SERIES, prefix="slice", keep=lambda z: True, ending=".dcm"
):
    """One file per slice, in an order that is not the slices'."""
    folder.mkdir(exist_ok=True)
    axes = image.GetDirection()
    for z in filter(keep, range(image.GetSize()[2])):
        plane = image[:, :, z]
        position = image.TransformIndexToPhysicalPoint((0, 0, z))
        tags = {
            "0008|0060": "MR", "0020|000e": series, "0020|000d": STUDY, "0020|0013": str(z + 1),
            "0020|0032": "\\".join(map(str, position)),
            "0020|0037": "\\".join(str(axes[i]) for i in (0, 3, 6, 1, 4, 7)),
            "0008|0018": f"{series}.{z + 1}",
        }  # fmt: skip
        for key, value in tags.items():
            plane.SetMetaData(key, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{prefix}{(7 * z) % 5}{z}.dcm"))
        writer.Execute(plane)
    if ending != ".dcm":
        for path in folder.glob("*.dcm"):
            path.rename(path.with_suffix(ending))
    return folder


def found(place, tmp_path):
    return find_images(str(place), outside=tmp_path / "out")


def same_as_simpleitk(read, image, tmp_path, *, tolerance=0.0):
    """Compares voxels and place with the NIfTI file that SimpleITK makes of the same image."""
    sitk.WriteImage(image, str(tmp_path / "theirs.nii.gz"))
    (tmp_path / "ours.nii.gz").write_bytes(
        to_nifti((read.image[:, :, 0] % 251).astype(np.uint8), read.header)
    )
    theirs, ours = (nibabel.load(tmp_path / f"{who}.nii.gz") for who in ("theirs", "ours"))
    voxels = np.asarray(theirs.dataobj) % 251
    assert ours.shape == voxels.shape and np.array_equal(np.asarray(ours.dataobj), voxels)
    for one, other in ((ours.affine, theirs.affine), (ours.get_qform(), theirs.get_qform())):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance + 1e-5)
    np.testing.assert_allclose(ours.header.get_zooms(), theirs.header.get_zooms(), rtol=1e-6)
    assert ours.header.get_xyzt_units()[0] == "mm"
    assert read.spacing == pytest.approx(image.GetSpacing()[2::-1])


@pytest.mark.parametrize("name", ["scan.mha", "scan.mhd"])
def test_a_meta_image_keeps_its_place(tmp_path, name):
    image = oblique()
    sitk.WriteImage(image, str(tmp_path / name))
    (source,) = found(tmp_path / name, tmp_path)
    assert source.name == "scan"
    same_as_simpleitk(source.read(), image, tmp_path)


def test_a_meta_image_of_a_cine_keeps_its_frames(tmp_path):
    image = sitk.JoinSeries([oblique(), oblique() + 1, oblique() + 2], 0.0, 31.0)
    sitk.WriteImage(image, str(tmp_path / "cine.mha"))
    read = found(tmp_path / "cine.mha", tmp_path)[0].read()
    assert read.image.shape == (3, 4, 1, 12, 9)
    same_as_simpleitk(read, image, tmp_path)


@pytest.mark.parametrize("ending", [".dcm", ".IMA", ""])
def test_a_dicom_series_is_a_volume_sorted_by_position(tmp_path, ending):
    image = oblique()
    folder = write_series(tmp_path / "series", image, ending=ending)
    (source,) = found(folder, tmp_path)
    assert source.name == "series"
    read = source.read()
    # positions are text in DICOM
    same_as_simpleitk(read, image, tmp_path, tolerance=1e-3)


def test_series_in_one_folder_are_told_apart(tmp_path):
    write_series(tmp_path / "both", oblique())
    write_series(tmp_path / "both", oblique() + 1, series=SERIES + ".9", prefix="other")
    one, other = found(tmp_path, tmp_path)
    assert (one.name, other.name) == ("both_1", "both_2")
    assert np.array_equal(one.read().image + 1, other.read().image)


def test_a_single_dicom_file_is_an_image(tmp_path):
    folder = write_series(tmp_path / "series", oblique())
    path = sorted(folder.glob("*.dcm"))[0]
    (source,) = found(path, tmp_path)
    assert source.read().image.shape == (1, 1, 1, 12, 9)


def test_a_series_with_a_hole_is_refused(tmp_path):
    write_series(tmp_path / "series", oblique((9, 12, 5)), keep=lambda z: z != 2)
    with pytest.raises(UserError, match="4 slices of the series are no regular grid"):
        found(tmp_path / "series", tmp_path)[0].read()


def test_damaged_coloured_and_huge_images_are_refused(tmp_path):
    sitk.WriteImage(oblique(), str(tmp_path / "a.mha"))
    (tmp_path / "a.mha").write_bytes((tmp_path / "a.mha").read_bytes()[:400])
    sitk.WriteImage(sitk.Compose([oblique()] * 3), str(tmp_path / "b.mha"))
    header = "ObjectType = Image\nNDims = 3\nDimSize = 90000 90000 9000\nElementType = MET_SHORT\n"
    (tmp_path / "c.mhd").write_text(header + "ElementDataFile = c.raw\n")
    (tmp_path / "d.mha").write_bytes(b"nothing")
    messages = ["not a readable .MHA", "3 channels", "claims shape", "not a readable"]
    for source, message in zip(found(tmp_path, tmp_path), messages, strict=True):
        with pytest.raises(UserError, match=message):
            source.read()


def test_without_the_package_the_message_names_the_extra(tmp_path, monkeypatch):
    sitk.WriteImage(oblique(), str(tmp_path / "a.mha"))
    write_series(tmp_path / "series", oblique())
    for package in ("SimpleITK", "pydicom"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"pip install 'mambaseg\[images\]'"):
        found(tmp_path / "a.mha", tmp_path)[0].read()
    with pytest.raises(UserError, match=r"pip install 'mambaseg\[images\]'"):
        found(tmp_path / "series", tmp_path)


def test_data_check_says_once_that_the_package_is_missing(tmp_path, monkeypatch, capsys):
    for name in ("a", "a_seg", "b", "b_seg"):
        sitk.WriteImage(oblique(), str(tmp_path / f"{name}.nrrd"))
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    assert main([str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert said.count("pip install 'mambaseg[images]'") == 1 and "bug" not in said


def header_of(path):
    return path.read_bytes().decode("latin-1")


def read_one(path, tmp_path):
    return found(path, tmp_path)[0].read()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", ["a.mhd", "a.mha", "a.nrrd"])
@pytest.mark.parametrize("size", [3, 5])
def test_as_many_voxels_as_the_header_promises(tmp_path, name, compressed, size):
    image = oblique((9, 12, 4))
    sitk.WriteImage(image, str(tmp_path / name), compressed)
    path = tmp_path / name
    same_as_simpleitk(read_one(path, tmp_path), image, tmp_path)
    content = path.read_bytes()
    for line in (b"DimSize = 9 12 ", b"sizes: 9 12 "):
        content = content.replace(line + b"4", line + str(size).encode())
    path.write_bytes(content)
    with pytest.raises(UserError, match=name):
        read_one(path, tmp_path)


@pytest.mark.parametrize("name", ["a.mhd", "a.nrrd"])
def test_a_header_that_gives_no_voxel_size_has_none(tmp_path, name):
    path = tmp_path / name
    if name == "a.mhd":
        sitk.WriteImage(oblique(), str(path))
        lines = header_of(path).splitlines(keepends=True)
        gone = ("ElementSpacing", "TransformMatrix", "Offset", "CenterOf", "Anatom")
        path.write_text("".join(line for line in lines if not line.startswith(gone)))
    else:
        voxels = np.arange(24, dtype="<i2").tobytes()
        head = "NRRD0004\ntype: int16\ndimension: 3\nsizes: 2 3 4\nendian: little\nencoding: raw\n"
        path.write_bytes(head.encode() + b"\n" + voxels)
    image = read_one(path, tmp_path)
    assert image.spacing is None and image.header["xyzt_units"] == 0


def test_a_flat_image_has_no_thickness(tmp_path):
    sitk.WriteImage(oblique((9, 12)), str(tmp_path / "a.mha"))
    image = read_one(tmp_path / "a.mha", tmp_path)
    assert image.spacing is None and image.image.shape == (1, 1, 1, 12, 9)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("../a.raw", "outside its folder"),
        ("/etc/passwd", "outside its folder"),
        ("LIST\n../a.raw\n", "outside its folder"),
        ("LIST", "outside its folder or none"),
        ("LIST\nb.raw\n", r"b\.(raw: the file is missing|nrrd: not a readable)"),
        ("a%d.raw 1 4 1", "outside its folder or none"),
    ],
)
def test_voxels_of_other_files(tmp_path, names, message):
    sitk.WriteImage(oblique(), str(tmp_path / "a.mhd"))
    path = tmp_path / "a.mhd"
    path.write_text(header_of(path).replace("= a.raw", f"= {names}"))
    with pytest.raises(UserError, match=message):
        read_one(path, tmp_path)
    voxels = (tmp_path / "a.raw").read_bytes()
    nrrd = "NRRD0004\ntype: int16\ndimension: 3\nsizes: 9 12 4\nendian: little\nencoding: raw\n"
    (tmp_path / "b.nrrd").write_text(f"{nrrd}data file: {names}\n")
    with pytest.raises(UserError, match=message):
        read_one(tmp_path / "b.nrrd", tmp_path)
    (tmp_path / "b.nrrd").write_text(f"{nrrd}data file: a.raw\n")
    assert read_one(tmp_path / "b.nrrd", tmp_path).image.tobytes() == voxels


def test_a_list_of_slices_is_read(tmp_path):
    image = oblique()
    sitk.WriteImage(image, str(tmp_path / "a.mhd"))
    voxels = (tmp_path / "a.raw").read_bytes()
    size = len(voxels) // 4
    for z in range(4):
        (tmp_path / f"{z}.raw").write_bytes(voxels[z * size : (z + 1) * size])
    path = tmp_path / "a.mhd"
    path.write_text(header_of(path).replace("= a.raw", "= LIST\n0.raw\n1.raw\n2.raw\n3.raw\n"))
    same_as_simpleitk(read_one(path, tmp_path), image, tmp_path)
    (tmp_path / "2.raw").write_bytes(voxels[:-2])
    with pytest.raises(UserError, match="promises"):
        read_one(path, tmp_path)


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize(
    ("space", "to_ras"),
    [
        ("right-anterior-superior", (1, 1, 1)),
        ("left-anterior-superior", (-1, 1, 1)),
        ("left-posterior-superior", (-1, -1, 1)),
    ],
)
def test_a_nrrd_lies_where_its_space_says(tmp_path, space, to_ras, big):
    voxels = np.random.default_rng(0).integers(0, 900, (4, 3, 2)).astype(">i2" if big else "<i2")
    axes = np.array([[0, 1.5, 0], [1.25, 0, 0], [0, 0, -8.0]])  # of x, y, z
    text = (
        f"NRRD0004\ntype: int16\ndimension: 3\nspace: {space}\nsizes: 2 3 4\n"
        "space directions: (0,1.5,0) (1.25,0,0) (0,0,-8)\nkinds: domain domain domain\n"
        f"endian: {'big' if big else 'little'}\nencoding: raw\nspace origin: (10,-20,30)\n\n"
    )
    (tmp_path / "a.nrrd").write_bytes(text.encode() + voxels.tobytes())
    image = read_one(tmp_path / "a.nrrd", tmp_path)
    assert np.array_equal(image.image[0, :, 0], voxels) and image.spacing == (8.0, 1.25, 1.5)
    rows = np.array([image.header[name] for name in ("srow_x", "srow_y", "srow_z")])
    np.testing.assert_allclose(rows[:, :3], (axes * to_ras).T, atol=1e-6)
    np.testing.assert_allclose(rows[:, 3], np.array([10, -20, 30]) * to_ras, atol=1e-6)
    for old, new, message in [
        ("space directions: (0,1.5,0)", "space directions: (0.4,1.5,0)", "sheared"),
        ("space origin", 'space units: "m" "m" "m"\nspace origin', '"m"'),
    ]:
        (tmp_path / "a.nrrd").write_bytes(text.replace(old, new).encode() + voxels.tobytes())
        with pytest.raises(UserError, match=message):
            read_one(tmp_path / "a.nrrd", tmp_path)


def test_a_meta_image_of_big_endian_and_of_another_unit(tmp_path):
    image = oblique()
    sitk.WriteImage(image, str(tmp_path / "a.mhd"))
    path = tmp_path / "a.mhd"
    voxels = np.frombuffer((tmp_path / "a.raw").read_bytes(), "<i2")
    (tmp_path / "a.raw").write_bytes(voxels.astype(">i2").tobytes())
    path.write_text(header_of(path).replace("MSB = False", "MSB = True"))
    same_as_simpleitk(read_one(path, tmp_path), image, tmp_path)
    path.write_text(header_of(path).replace("NDims", "DistanceUnits = um\nNDims", 1))
    with pytest.raises(UserError, match="voxel size is in um"):
        read_one(path, tmp_path)


def test_a_training_set_is_another_one_when_voxels_beside_a_header_change(tmp_path):
    """`Case` names the header alone; the fingerprint and the cache must see its voxels too."""
    from mambaseg.data.case import Case
    from mambaseg.data.fingerprint import fingerprint, source_digests
    from mambaseg.data.formats.files import read_volume

    sitk.WriteImage(oblique(), str(tmp_path / "a.mhd"))
    case = Case("a", "a", None, None, tmp_path / "a.mhd", None, lambda case: read_volume(case.path))
    before = fingerprint(source_digests([case]))
    voxels = bytearray((tmp_path / "a.raw").read_bytes())
    voxels[3] ^= 1
    (tmp_path / "a.raw").write_bytes(voxels)
    assert fingerprint(source_digests([case])) != before
